"""The driver's side of virtio-pci (VIRTIO 4.1), modern devices, interrupts by INTx; over any bus.

The bus reaches the function's config space and memory space; giving BARs their addresses is the platform's business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from guest_driver.transport import Interrupts
from vring.errors import DeviceError, UsageError
from vring.features import CommonFeature, Status
from vring.split import QueueLayout

__all__ = ["PciBus", "PciTransport"]

VENDOR = 0x1AF4
FIRST_MODERN = 0x1040
VENDOR_CAPABILITY = 0x09
NO_VECTOR = 0xFFFF
NO_NOTIFICATION_DATA = CommonFeature.NOTIFICATION_DATA
ISR_QUEUE, ISR_CONFIG = 1, 2
POLLS = 1000
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


class PciTransport:
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
        self.bus, self.polls, self._pause = bus, polls, pause
        self._running, self._live, self._begun = running, False, running
        self._offered = 0
        self._features = 0
        self._notify: dict[int, int] = {}
        self._pending = Interrupts()
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

    @property
    def status(self) -> Status:
        """The device status."""
        return Status(self._get(Common.device_status))

    def _add_status(self, bits: Status) -> None:
        self._set(Common.device_status, self.status | bits)

    # -- Transport ------------------------------------------------------------------------------------------------

    def device_features(self) -> int:
        """Return the offered feature bits; starts the initialisation if it has not begun."""
        if not self._begun:
            self.reset()
            self._begun = True
            self._add_status(Status.ACKNOWLEDGE)
            self._add_status(Status.DRIVER)
        offered = 0
        for word in (0, 1):
            self._set(Common.device_feature_select, word)
            offered |= self._get(Common.device_feature) << 32 * word
        self._offered = offered & ~NO_NOTIFICATION_DATA
        return self._offered

    def set_driver_features(self, features: int) -> None:
        """Accept `features`, and read back that the device agreed.

        Raises
        ------
        UsageError
            If there are bits that were not offered.
        DeviceError
            If FEATURES_OK does not stay set.
        """
        if features & ~self._offered:
            raise UsageError(
                f"features {features & ~self._offered:#x} were not offered", clause="basic.features.driver-1"
            )
        if not self._running:
            for word in (0, 1):
                self._set(Common.driver_feature_select, word)
                self._set(Common.driver_feature, features >> 32 * word & 0xFFFFFFFF)
            self._add_status(Status.FEATURES_OK)
        self._features = features
        status = self.status
        if not status & Status.FEATURES_OK:
            if not self._running:
                self._add_status(Status.FAILED)
            raise DeviceError(f"the device refuses features {features:#x}: its status reads {status!r}")

    def read_config(self, offset: int, length: int) -> bytes:
        """Return bytes of the config space, all of one generation.

        Raises
        ------
        DeviceError
            If there is no such structure, or the generation never stays the same.
        """
        base = self._device_config()
        for _ in range(self.polls):
            before = self._get(Common.config_generation)
            data = b"".join(
                self.bus.read(base + at, width).to_bytes(width, "little") for at, width in _pieces(offset, length)
            )
            if self._get(Common.config_generation) == before:
                return data
        raise DeviceError(f"config_generation changed during each of {self.polls} reads")

    def write_config(self, offset: int, data: bytes) -> None:
        """Write bytes of the config space."""
        base = self._device_config()
        for at, width in _pieces(offset, len(data)):
            piece = data[at - offset : at - offset + width]
            self.bus.write(base + at, width, int.from_bytes(piece, "little"))

    def _device_config(self) -> int:
        window = self._windows.get(Cfg.DEVICE)
        if window is None:
            raise DeviceError("the virtio PCI device has no device configuration")
        return window.address

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
        if not self._features & CommonFeature.RING_RESET:
            raise UsageError("RING_RESET was not negotiated: only the whole device can be reset", queue=index)
        self._set(Common.queue_select, index)
        self._set(Common.queue_reset, 1)
        if all(self._get(Common.queue_reset) for _ in range(self.polls)):
            raise DeviceError(f"queue_reset reads 1 after {self.polls} reads", queue=index)
        if self._get(Common.queue_enable):
            raise DeviceError("queue_enable reads 1 after a queue reset", queue=index)

    def driver_ok(self) -> None:
        """Let the device go to work."""
        if not self._running:
            self._add_status(Status.DRIVER_OK)
        elif not self.status & Status.DRIVER_OK:
            raise DeviceError(f"the device has not taken over the guest's state: its status reads {self.status!r}")
        self._live, self._running = True, False  # what is set up from now on is new

    def kick(self, index: int) -> None:
        """Send an available buffer notification: the queue's number at its place in the notify structure."""
        if not self._live:
            raise UsageError("a notification before DRIVER_OK", queue=index, clause="basic.init.driver-7")
        self.bus.write(self._notify[index], 2, index)

    def interrupts(self) -> Interrupts:
        """Return and forget what was signalled: reading the ISR status acknowledges it and lowers INTx.

        Raises
        ------
        DeviceError
            If the device says DEVICE_NEEDS_RESET.
        """
        self._look()
        pending, self._pending = self._pending, Interrupts()
        if pending.config and self._live and self.status & Status.DEVICE_NEEDS_RESET:
            raise DeviceError("the device status says DEVICE_NEEDS_RESET")
        return pending

    def _look(self) -> bool:
        causes = self.bus.read(self._windows[Cfg.ISR].address, 1)
        if causes & ISR_QUEUE:
            self._pending.queues |= set(self._notify)
        if causes & ISR_CONFIG:
            self._pending.config = True
        return bool(causes & ISR_QUEUE)

    def wait(self, index: int) -> bool:
        """Look for an interrupt of the queues, `polls` times at most; the ISR does not say of which queue."""
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

    def reset(self) -> None:
        """Reset the device, and wait until its status reads 0.

        Raises
        ------
        DeviceError
            If it does not.
        """
        self._running = self._live = self._begun = False
        self._notify.clear()
        self._pending = Interrupts()
        self._set(Common.device_status, Status.RESET)
        for _ in range(self.polls):
            if not self.status:
                return
            if self._pause is not None:
                self._pause()
        raise DeviceError(f"reset: the device status still reads {self.status!r}", clause="basic.reset.device-1")

    def close(self) -> None:
        """Nothing is held."""


def _pieces(offset: int, length: int) -> list[tuple[int, int]]:
    """Split a range into aligned accesses of 4, 2 and 1 bytes."""
    pieces, end = [], offset + length
    while offset < end:
        width = next(w for w in (4, 2, 1) if offset % w == 0 and offset + w <= end)
        pieces.append((offset, width))
        offset += width
    return pieces
