"""The driver's side of virtio-mmio, over any bus that reads and writes registers: no clock, thread or descriptor.

The bus may be a device in the same process (`vring.mmio.MmioDevice`), or a real one of QEMU seen through qtest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from guest_driver.transport import Interrupts
from vring.errors import DeviceError, UsageError
from vring.features import CommonFeature, Status
from vring.mmio_registers import (
    CONFIG_OFFSET,
    MAGIC,
    QUEUE_SETTINGS,
    REGISTER_BYTES,
    VERSION,
    Interrupt,
    Register,
)
from vring.split import QueueLayout

__all__ = ["Bus", "MmioTransport", "NoDeviceError"]

POLLS = 1000
"""How often a register is read again before the driver gives up."""
TRANSPORT_FEATURES = CommonFeature.NOTIFICATION_DATA
"""Features that would change what this transport does, and that it does not have."""


class Bus(Protocol):
    """The window of one device: offsets from its start, values as unsigned integers, little-endian on the wire."""

    def read(self, offset: int, size: int) -> int:
        """Return `size` bytes at `offset`."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Store `size` bytes at `offset`."""


class NoDeviceError(DeviceError):
    """There is no virtio device of this transport in the window: a placeholder, or something else altogether."""


class MmioTransport:
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
        self.bus = bus
        self.polls = polls
        self._pause = pause
        self._begun = self._running = running
        self._settled = running
        self._live = False
        self._offered = self._features = 0
        self._queues: set[int] = set()
        self._pending = Interrupts()
        magic = self._get(Register.MagicValue)
        if magic != MAGIC:
            raise NoDeviceError(f"MagicValue reads {magic:#x}, not {MAGIC:#x}", clause="mmio.regs.driver-6")
        version = self._get(Register.Version)
        if version != VERSION:
            legacy = ": a legacy device (for QEMU: -global virtio-mmio.force-legacy=false)" if version == 1 else ""
            raise NoDeviceError(f"Version reads {version}, not {VERSION}{legacy}", clause="mmio.regs.driver-8")
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

    def _until(self, register: Register, done: Callable[[int], bool], what: str, clause: str) -> None:
        """Read a register until it is as it should be."""
        value = self._get(register)
        for _ in range(self.polls):
            if done(value):
                return
            if self._pause is not None:
                self._pause()
            value = self._get(register)
        if not done(value):
            raise DeviceError(f"{what}: {register.name} still reads {value:#x}", clause=clause)

    @property
    def status(self) -> Status:
        """The Status register."""
        return Status(self._get(Register.Status))

    def _add_status(self, bits: Status) -> None:
        """Set bits, with all that are set already (basic.status.driver-2)."""
        self._set(Register.Status, self.status | bits)

    @property
    def vendor_id(self) -> int:
        """The VendorID register."""
        return self._get(Register.VendorID)

    # -- features -------------------------------------------------------------------------------------------------

    def device_features(self) -> int:
        """Return the offered feature bits; starts the initialisation if it has not begun (basic.init.driver-1).

        Bits that would change the transport in a way that it does not know are left out (basic.features.driver-4).
        """
        if not self._begun:
            self.reset()
            self._begun = True
            self._add_status(Status.ACKNOWLEDGE)
            self._add_status(Status.DRIVER)
        self._offered = self._read_features() & ~TRANSPORT_FEATURES
        return self._offered

    def _read_features(self) -> int:
        features = 0
        for word in (0, 1):
            self._set(Register.DeviceFeaturesSel, word)  # mmio.regs.driver-12
            features |= self._get(Register.DeviceFeatures) << 32 * word
        return features

    def set_driver_features(self, features: int) -> None:
        """Accept `features`, and read back that the device agreed.

        Raises
        ------
        UsageError
            If there are bits that were not offered (basic.features.driver-1).
        DeviceError
            If FEATURES_OK does not stay set; the device has been told FAILED (basic.init.driver-5).
        """
        if features & ~self._offered:
            raise UsageError(
                f"features {features & ~self._offered:#x} were not offered (or not read yet)",
                clause="basic.features.driver-1",
            )
        self._features = features
        if self._running:
            if not self.status & Status.FEATURES_OK:
                raise DeviceError(f"the device has not taken over the guest's state: Status reads {self.status!r}")
            return
        for word in (0, 1):
            self._set(Register.DriverFeaturesSel, word)  # mmio.regs.driver-13
            self._set(Register.DriverFeatures, features >> 32 * word & 0xFFFFFFFF)
        self._add_status(Status.FEATURES_OK)
        status = self.status
        if not status & Status.FEATURES_OK:
            self._add_status(Status.FAILED)
            raise DeviceError(
                f"the device refuses features {features:#x}: Status reads {status!r}, without FEATURES_OK",
                clause="basic.features.device-2",
            )
        self._settled = True

    # -- config ---------------------------------------------------------------------------------------------------

    def read_config(self, offset: int, length: int) -> bytes:
        """Return bytes of the config space, all of one generation (basic.config.driver-2).

        They are read in the largest aligned pieces of 1, 2 or 4 bytes, which for a field or a row of 32-bit ones is
        the width the standard wants (mmio.regs.driver-5).

        Raises
        ------
        DeviceError
            If the generation never stays the same.
        """
        before = self._get(Register.ConfigGeneration)
        for _ in range(self.polls):
            data = b"".join(
                (self.bus.read(CONFIG_OFFSET + at, width) & (1 << 8 * width) - 1).to_bytes(width, "little")
                for at, width in _pieces(offset, length)
            )
            after = self._get(Register.ConfigGeneration)
            if after == before:
                return data
            before = after
        raise DeviceError(
            f"ConfigGeneration changed during each of {self.polls} reads of {length} bytes of config at {offset}",
            clause="mmio.regs.device-6",
        )

    def write_config(self, offset: int, data: bytes) -> None:
        """Write bytes of the config space, in pieces as `read_config`.

        Raises
        ------
        UsageError
            Before the features are settled (basic.init.driver-3).
        """
        if not self._settled:
            raise UsageError("config written during feature negotiation", clause="basic.init.driver-3")
        for at, width in _pieces(offset, len(data)):
            piece = data[at - offset : at - offset + width]
            self.bus.write(CONFIG_OFFSET + at, width, int.from_bytes(piece, "little"))

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
        self._until(Register.QueueReady, lambda value: value == 0, f"stopping queue {index}", "mmio.regs.driver-17")
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
        if not self._features & CommonFeature.RING_RESET:
            raise UsageError("RING_RESET was not negotiated: only the whole device can be reset", queue=index)
        self._set(Register.QueueSel, index)
        self._set(Register.QueueReset, 1)
        self._until(Register.QueueReset, lambda value: value == 0, f"reset of queue {index}", "mmio.regs.device-12")
        if self._get(Register.QueueReady):
            raise DeviceError("QueueReady reads 1 after a queue reset", queue=index, clause="mmio.regs.device-12")
        self._queues.discard(index)

    def driver_ok(self) -> None:
        """Let the device go to work."""
        if not self._running:
            self._add_status(Status.DRIVER_OK)
        elif not self.status & Status.DRIVER_OK:
            raise DeviceError(f"the device has not taken over the guest's state: Status reads {self.status!r}")
        self._live, self._running = True, False  # what is set up from now on is new

    def kick(self, index: int) -> None:
        """Send an available buffer notification.

        Raises
        ------
        UsageError
            Before `driver_ok` (basic.init.driver-7).
        """
        if not self._live:
            raise UsageError("a notification before DRIVER_OK", queue=index, clause="basic.init.driver-7")
        self._set(Register.QueueNotify, index)

    # -- interrupts -----------------------------------------------------------------------------------------------

    def interrupts(self) -> Interrupts:
        """Return and forget what was signalled: reads InterruptStatus and acknowledges what it knows.

        Noting the events is all the handling there is, so they are acknowledged here, before queues and config are
        looked at: an event that comes while they are sets its bit again. A used buffer means every queue
        (mmio.irq.driver-2).

        Raises
        ------
        DeviceError
            If the device says DEVICE_NEEDS_RESET.
        """
        self._look()
        pending, self._pending = self._pending, Interrupts()
        if pending.config and self._live and self.status & Status.DEVICE_NEEDS_RESET:
            raise DeviceError("Status says DEVICE_NEEDS_RESET", clause="basic.status.device-3")
        return pending

    def _look(self) -> bool:
        causes = self._get(Register.InterruptStatus) & (Interrupt.USED_BUFFER | Interrupt.CONFIG_CHANGE)
        if not causes:
            return False
        self._set(Register.InterruptACK, causes)
        if causes & Interrupt.USED_BUFFER:
            self._pending.queues |= self._queues
        if causes & Interrupt.CONFIG_CHANGE:
            self._pending.config = True
        return bool(causes & Interrupt.USED_BUFFER)

    def wait(self, index: int) -> bool:
        """Look for an interrupt of the queues, `polls` times at most; `interrupts` reports it all the same.

        Returns
        -------
        bool
            Whether one came; virtio-mmio does not say of which queue.
        """
        for _ in range(self.polls):
            if self._look():
                return True
            if self._pause is not None:
                self._pause()
            elif self._live and self.status & Status.DEVICE_NEEDS_RESET:
                return False
        return False

    def filenos(self) -> list[int]:
        """No descriptor tells of interrupts: the embedder's interrupt line does, or looking."""
        return []

    # -- end ------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Reset the device, and wait until it says so (basic.reset.driver-1).

        Raises
        ------
        DeviceError
            If Status does not come down to 0.
        """
        self._begun = self._running = self._settled = self._live = False
        self._features = 0
        self._queues.clear()
        self._pending = Interrupts()
        self._set(Register.Status, Status.RESET)
        self._until(Register.Status, lambda value: value == 0, "reset", "basic.reset.device-1")

    def fail(self) -> None:
        """Tell the device that this driver has given up on it (basic.init.driver-5)."""
        self._add_status(Status.FAILED)

    def close(self) -> None:
        """Nothing to give back: the bus is its owner's."""


def _pieces(offset: int, length: int) -> list[tuple[int, int]]:
    """Split a range of config into aligned accesses: (offset, width)."""
    pieces = []
    end = offset + length
    while offset < end:
        width = next(w for w in (4, 2, 1) if offset % w == 0 and offset + w <= end)
        pieces.append((offset, width))
        offset += width
    return pieces
