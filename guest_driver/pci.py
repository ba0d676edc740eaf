"""The driver's side of virtio-pci (VIRTIO 4.1), modern devices, interrupts by INTx; over any bus.

The bus reaches the function's config space and memory space; giving BARs their addresses is the platform's business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from guest_driver.registers import POLLS, RegisterTransport
from vring.errors import DeviceError, UsageError
from vring.split import QueueLayout

__all__ = ["PciBus", "PciTransport"]

VENDOR = 0x1AF4
FIRST_MODERN = 0x1040
VENDOR_CAPABILITY = 0x09
NO_VECTOR = 0xFFFF
ISR_QUEUE, ISR_CONFIG = 1, 2
COMMAND, STATUS, BAR0, CAPABILITIES = 0x04, 0x06, 0x10, 0x34
HAS_CAPABILITIES = 1 << 4
MEMORY_SPACE, BUS_MASTER, NO_INTX = 1 << 1, 1 << 2, 1 << 10


class Cfg(IntEnum):
    """cfg_type of a virtio capability, section 4.1.4."""

    COMMON = 1
    NOTIFY = 2
    ISR = 3
    DEVICE = 4
    PCI = 5


class Common(IntEnum):
    """Offsets in the common configuration structure, section 4.1.4.3."""

    device_feature_select = 0
    device_feature = 4
    driver_feature_select = 8
    driver_feature = 12
    config_msix_vector = 16
    num_queues = 18
    device_status = 20
    config_generation = 21
    queue_select = 22
    queue_size = 24
    queue_msix_vector = 26
    queue_enable = 28
    queue_notify_off = 30
    queue_desc = 32
    queue_driver = 40
    queue_device = 48
    queue_reset = 58


_WIDTH = {
    Common.device_feature_select: 4,
    Common.device_feature: 4,
    Common.driver_feature_select: 4,
    Common.driver_feature: 4,
    Common.device_status: 1,
    Common.config_generation: 1,
}
"""Bytes of the fields that are not 16 bits wide; queue addresses are written as two halves."""


class PciBus(Protocol):
    """One PCI function as its driver reaches it: values as unsigned integers, little-endian on the wire."""

    def config_read(self, offset: int, size: int) -> int:
        """Read config space, 1, 2 or 4 bytes."""

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Write config space."""

    def read(self, address: int, size: int) -> int:
        """Read memory space."""

    def write(self, address: int, size: int, value: int) -> None:
        """Write memory space."""


@dataclass(frozen=True, slots=True)
class Window:
    """A structure of the device in memory space."""

    address: int
    """Where it begins."""
    length: int
    """Bytes."""


class PciTransport(RegisterTransport):
    """One device behind virtio-pci; a `guest_driver.transport.Transport`.

    Parameters
    ----------
    bus
        The function. Its BARs have addresses already.
    running
        The guest was migrated and the device has taken over its state: nothing is initialised again, only checked.
    polls
        How often to read a register that has to change.
    pause
        Called between two such reads.

    Raises
    ------
    DeviceError
        If it is no modern virtio device, or one without the structures that a driver needs.
    """

    def __init__(
        self, bus: PciBus, *, running: bool = False, polls: int = POLLS, pause: Callable[[], None] | None = None
    ) -> None:
        super().__init__(running, polls, pause)
        self.bus = bus
        self._notify: dict[int, int] = {}
        vendor, device = bus.config_read(0, 2), bus.config_read(2, 2)
        if vendor != VENDOR or device < FIRST_MODERN:
            raise DeviceError(f"PCI function {vendor:04x}:{device:04x} is no modern virtio device")
        self.device_id = device - FIRST_MODERN
        """Virtio device type."""
        self._multiplier = 0
        self._windows: dict[int, Window] = {}
        self._walk()
        missing = [kind.name for kind in (Cfg.COMMON, Cfg.NOTIFY, Cfg.ISR) if kind not in self._windows]
        if missing:
            raise DeviceError(f"the virtio PCI device has no capability {', '.join(missing)}")
        command = bus.config_read(COMMAND, 2)
        bus.config_write(COMMAND, 2, (command | MEMORY_SPACE | BUS_MASTER) & ~NO_INTX)

    # -- capabilities ---------------------------------------------------------------------------------------------

    def _walk(self) -> None:
        """Find the structures: of each kind the first one in a BAR that we know (4.1.4.1)."""
        bus = self.bus
        if not bus.config_read(STATUS, 2) & HAS_CAPABILITIES:
            raise DeviceError("the PCI function has no capabilities")
        at, seen = bus.config_read(CAPABILITIES, 1) & ~3, set[int]()
        while at and at not in seen:
            seen.add(at)
            if bus.config_read(at, 1) == VENDOR_CAPABILITY:
                self._capability(at)
            at = bus.config_read(at + 1, 1) & ~3

    def _capability(self, at: int) -> None:
        bus = self.bus
        kind, bar = bus.config_read(at + 3, 1), bus.config_read(at + 4, 1)
        if kind not in (Cfg.COMMON, Cfg.NOTIFY, Cfg.ISR, Cfg.DEVICE) or bar > 5 or kind in self._windows:
            return
        base = self._bar(bar)
        if base is None:
            return
        self._windows[kind] = Window(base + bus.config_read(at + 8, 4), bus.config_read(at + 12, 4))
        if kind == Cfg.NOTIFY:
            self._multiplier = bus.config_read(at + 16, 4)

    def _bar(self, number: int) -> int | None:
        """Return the address of a memory BAR, None for an I/O BAR or one without an address."""
        low = self.bus.config_read(BAR0 + 4 * number, 4)
        if low & 1:
            return None
        address = low & ~0xF
        if low & 6 == 4:
            address |= self.bus.config_read(BAR0 + 4 * number + 4, 4) << 32
        return address or None

    # -- registers ------------------------------------------------------------------------------------------------

    def _get(self, field: Common) -> int:
        return self.bus.read(self._windows[Cfg.COMMON].address + field, _WIDTH.get(field, 2))

    def _set(self, field: Common, value: int) -> None:
        self.bus.write(self._windows[Cfg.COMMON].address + field, _WIDTH.get(field, 2), int(value))

    def _get_status(self) -> int:
        return self._get(Common.device_status)

    def _set_status(self, value: int) -> None:
        self._set(Common.device_status, value)

    def _offered_word(self, word: int) -> int:
        self._set(Common.device_feature_select, word)
        return self._get(Common.device_feature)

    def _accept_word(self, word: int, bits: int) -> None:
        self._set(Common.driver_feature_select, word)
        self._set(Common.driver_feature, bits)

    def _generation(self) -> int:
        return self._get(Common.config_generation)

    def _config(self, offset: int, width: int) -> int:
        return self.bus.read(self._device_config() + offset, width)

    def _set_config(self, offset: int, width: int, value: int) -> None:
        self.bus.write(self._device_config() + offset, width, value)

    def _device_config(self) -> int:
        window = self._windows.get(Cfg.DEVICE)
        if window is None:
            raise DeviceError("the virtio PCI device has no device configuration")
        return window.address

    # -- queues ---------------------------------------------------------------------------------------------------

    def queue_size_max(self, index: int) -> int:
        """Return the largest size of a queue, 0 if the device has no such queue."""
        if index >= self._get(Common.num_queues):
            return 0
        self._set(Common.queue_select, index)
        return self._get(Common.queue_size)

    def setup_queue(self, index: int, layout: QueueLayout, *, base: int = 0) -> None:
        """Tell the device where a queue is, and enable it.

        Raises
        ------
        UsageError
            If it is larger than the device allows, or has a base.
        DeviceError
            If the queue is enabled already, or (with `running`) not yet.
        """
        largest = self.queue_size_max(index)
        self._set(Common.queue_select, index)
        enabled = self._get(Common.queue_enable)
        notify = self._windows[Cfg.NOTIFY].address + self._get(Common.queue_notify_off) * self._multiplier
        if bool(enabled) is not self._running:
            raise DeviceError(
                f"queue_enable reads {enabled} {'of a migrated device' if self._running else 'before set-up'}",
                queue=index,
            )
        self._notify[index] = notify
        if self._running:
            return
        if base or layout.size > largest:
            raise UsageError(f"a queue of {layout.size} entries (at most {largest}) from index {base}", queue=index)
        self._set(Common.queue_size, layout.size)
        places = ((Common.queue_desc, layout.desc), (Common.queue_driver, layout.avail))
        for field, value in (*places, (Common.queue_device, layout.used)):
            for half in (0, 1):  # 64-bit fields may be written as two halves (4.1.3.1)
                address = self._windows[Cfg.COMMON].address + field + 4 * half
                self.bus.write(address, 4, value >> 32 * half & 0xFFFFFFFF)
        self._set(Common.queue_enable, 1)

    def reset_queue(self, index: int) -> None:
        """Reset one queue, so that its memory is the driver's again; `setup_queue` enables it anew.

        Raises
        ------
        UsageError
            If RING_RESET was not negotiated.
        DeviceError
            If queue_reset does not come down to 0, or the queue stays enabled.
        """
        self._check_ring_reset(index)
        self._set(Common.queue_select, index)
        self._set(Common.queue_reset, 1)
        if self._until_zero(lambda: self._get(Common.queue_reset)):
            raise DeviceError(f"queue_reset reads 1 after {self.polls} reads", queue=index)
        if self._get(Common.queue_enable):
            raise DeviceError("queue_enable reads 1 after a queue reset", queue=index)

    def kick(self, index: int) -> None:
        """Send an available buffer notification: the queue's number at its place in the notify structure."""
        self._check_live(index)
        self.bus.write(self._notify[index], 2, index)

    # -- interrupts and the end -----------------------------------------------------------------------------------

    def _look(self) -> bool:
        """Read the ISR status, which acknowledges it and lowers INTx; a used buffer may mean every queue."""
        causes = self.bus.read(self._windows[Cfg.ISR].address, 1)
        if causes & ISR_QUEUE:
            self._pending.queues |= set(self._notify)
        if causes & ISR_CONFIG:
            self._pending.config = True
        return bool(causes & ISR_QUEUE)

    def reset(self) -> None:
        """Reset the device, and wait until its status reads 0.

        Raises
        ------
        DeviceError
            If it does not.
        """
        self._notify.clear()
        super().reset()
