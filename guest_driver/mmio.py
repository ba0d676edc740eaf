"""The driver's side of virtio-mmio, over any bus that reads and writes registers: no clock, thread or descriptor.

The bus may be a device in the same process (`vring.mmio.MmioDevice`), or a real one of QEMU seen through qtest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from guest_driver.registers import POLLS, RegisterTransport
from vring.errors import DeviceError, UsageError
from vring.mmio_registers import (
    CONFIG_OFFSET,
    MAGIC,
    QUEUE_SETTINGS,
    REGISTER_BYTES,
    VERSIONS,
    Interrupt,
    Register,
)
from vring.split import QueueLayout

__all__ = ["Bus", "MmioTransport", "NoDeviceError"]


class Bus(Protocol):
    """The window of one device: offsets from its start, values as unsigned integers, little-endian on the wire."""

    def read(self, offset: int, size: int) -> int:
        """Return `size` bytes at `offset`."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Store `size` bytes at `offset`."""


class NoDeviceError(DeviceError):
    """There is no virtio device of this transport in the window: a placeholder, or something else altogether."""


class MmioTransport(RegisterTransport):
    """One device as its driver sees it through virtio-mmio registers; a `guest_driver.transport.Transport`.

    Making one reads MagicValue, Version and DeviceID and nothing else (mmio.init.driver-1 and -2).

    Parameters
    ----------
    bus
        The register window.
    running
        The guest was migrated and the device has taken over its state: nothing is initialised again, only checked.
    polls
        How often to read a register that has to change (reset, queue reset, generation, waiting for a buffer).
    pause
        Called between two such reads: lets time pass, or the other side work.

    Raises
    ------
    NoDeviceError
        If the window holds no device (mmio.regs.driver-6, -8 and -10). `find` is the same without an error.
    """

    def __init__(
        self, bus: Bus, *, running: bool = False, polls: int = POLLS, pause: Callable[[], None] | None = None
    ) -> None:
        super().__init__(running, polls, pause)
        self.bus = bus
        self._queues: set[int] = set()
        magic = self._get(Register.MagicValue)
        if magic != MAGIC:
            raise NoDeviceError(f"MagicValue reads {magic:#x}, not {MAGIC:#x}", clause="mmio.regs.driver-6")
        version = self._get(Register.Version)
        if version not in VERSIONS:  # no difference between these: every reset is waited for
            known = " or ".join(map(str, VERSIONS))
            legacy = ": a legacy device (for QEMU: -global virtio-mmio.force-legacy=false)" if version == 1 else ""
            raise NoDeviceError(f"Version reads {version}, not {known}{legacy}", clause="mmio.regs.driver-8")
        self.device_id = self._get(Register.DeviceID)
        """Virtio device type."""
        if not self.device_id:
            raise NoDeviceError("DeviceID reads 0: a placeholder without a device", clause="mmio.regs.driver-10")

    @classmethod
    def find(cls, bus: Bus, *, polls: int = POLLS, pause: Callable[[], None] | None = None) -> MmioTransport | None:
        """Return a transport, or None where the window holds no device, without a word (mmio.regs.driver-11).

        For going through all windows of a machine: look at `device_id`.
        """
        try:
            return cls(bus, polls=polls, pause=pause)
        except NoDeviceError:
            return None

    # -- registers ------------------------------------------------------------------------------------------------

    def _get(self, register: Register) -> int:
        return self.bus.read(int(register), REGISTER_BYTES) & 0xFFFFFFFF

    def _set(self, register: Register, value: int) -> None:
        self.bus.write(int(register), REGISTER_BYTES, int(value))

    def _until_zero_in(self, register: Register, what: str, clause: str) -> None:
        value = self._until_zero(lambda: self._get(register))
        if value:
            raise DeviceError(f"{what}: {register.name} still reads {value:#x}", clause=clause)

    def _get_status(self) -> int:
        return self._get(Register.Status)

    def _set_status(self, value: int) -> None:
        self._set(Register.Status, value)

    def _offered_word(self, word: int) -> int:
        self._set(Register.DeviceFeaturesSel, word)  # mmio.regs.driver-12
        return self._get(Register.DeviceFeatures)

    def _accept_word(self, word: int, bits: int) -> None:
        self._set(Register.DriverFeaturesSel, word)  # mmio.regs.driver-13
        self._set(Register.DriverFeatures, bits)

    def _generation(self) -> int:
        return self._get(Register.ConfigGeneration)

    def _config(self, offset: int, width: int) -> int:
        return self.bus.read(CONFIG_OFFSET + offset, width)

    def _set_config(self, offset: int, width: int, value: int) -> None:
        self.bus.write(CONFIG_OFFSET + offset, width, value)

    @property
    def vendor_id(self) -> int:
        """The VendorID register."""
        return self._get(Register.VendorID)

    # -- queues ---------------------------------------------------------------------------------------------------

    def queue_size_max(self, index: int) -> int:
        """Return the largest size of a queue, 0 if the device has no such queue."""
        self._set(Register.QueueSel, index)
        return self._get(Register.QueueSizeMax)

    def setup_queue(self, index: int, layout: QueueLayout, *, base: int = 0) -> None:
        """Tell the device where a queue is, and make it ready.

        Raises
        ------
        UsageError
            If it is larger than QueueSizeMax (mmio.regs.driver-14), or has a base: only the device itself can take
            over a queue that was in use, from its saved state.
        DeviceError
            If the queue is ready already, or (with `running`) not yet.
        """
        largest = self.queue_size_max(index)
        ready = self._get(Register.QueueReady)
        if self._running:
            if not ready:
                raise DeviceError(
                    "QueueReady reads 0: the device has not taken over the guest's queues",
                    queue=index,
                    clause="mmio.regs.device-7",
                )
            self._queues.add(index)
            return
        if base:
            raise UsageError(f"base index {base}: virtio-mmio has no register for that", queue=index)
        if layout.size > largest:
            raise UsageError(
                f"queue of {layout.size} entries, QueueSizeMax reads {largest}",
                queue=index,
                clause="mmio.regs.driver-14",
            )
        if ready:
            raise DeviceError(
                "QueueReady reads 1 before the queue was set up", queue=index, clause="mmio.regs.device-5"
            )
        for register, (name, shift) in QUEUE_SETTINGS.items():
            self._set(register, getattr(layout, name) >> shift & 0xFFFFFFFF)
        self._set(Register.QueueReady, 1)
        self._queues.add(index)

    def stop_queue(self, index: int) -> None:
        """Make a queue not ready, and read that back (mmio.regs.driver-16 and -17).

        Raises
        ------
        DeviceError
            If QueueReady does not read 0.
        """
        self._set(Register.QueueSel, index)
        self._set(Register.QueueReady, 0)
        self._until_zero_in(Register.QueueReady, f"stopping queue {index}", "mmio.regs.driver-17")
        self._queues.discard(index)

    def reset_queue(self, index: int) -> None:
        """Reset one queue, so that its memory is the driver's again; `setup_queue` enables it anew.

        Raises
        ------
        UsageError
            If RING_RESET was not negotiated.
        DeviceError
            If QueueReset does not come down to 0 (mmio.regs.driver-21), or QueueReady stays up.
        """
        self._check_ring_reset(index)
        self._set(Register.QueueSel, index)
        self._set(Register.QueueReset, 1)
        self._until_zero_in(Register.QueueReset, f"reset of queue {index}", "mmio.regs.device-12")
        if self._get(Register.QueueReady):
            raise DeviceError("QueueReady reads 1 after a queue reset", queue=index, clause="mmio.regs.device-12")
        self._queues.discard(index)

    def kick(self, index: int) -> None:
        """Send an available buffer notification.

        Raises
        ------
        UsageError
            Before `driver_ok` (basic.init.driver-7).
        """
        self._check_live(index)
        self._set(Register.QueueNotify, index)

    # -- interrupts and the end -----------------------------------------------------------------------------------

    def _look(self) -> bool:
        """Read InterruptStatus and acknowledge what is known; a used buffer means every queue (mmio.irq.driver-2)."""
        causes = self._get(Register.InterruptStatus) & (Interrupt.USED_BUFFER | Interrupt.CONFIG_CHANGE)
        if not causes:
            return False
        self._set(Register.InterruptACK, causes)
        if causes & Interrupt.USED_BUFFER:
            self._pending.queues |= self._queues
        if causes & Interrupt.CONFIG_CHANGE:
            self._pending.config = True
        return bool(causes & Interrupt.USED_BUFFER)

    def reset(self) -> None:
        """Reset the device, and wait until it says so (basic.reset.driver-1).

        Raises
        ------
        DeviceError
            If its status does not come down to 0.
        """
        self._queues.clear()
        super().reset()
