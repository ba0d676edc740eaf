"""What virtio-mmio's queue registers hold, and how a ring comes of it. Who may write them when is in `vring.mmio`."""

from __future__ import annotations

from dataclasses import dataclass

from vring.device import Device
from vring.errors import DriverError
from vring.features import CommonFeature
from vring.memory import GuestMemory
from vring.mmio_saved import SavedQueue
from vring.split import DeviceQueue, QueueLayout

__all__ = ["QueueRegisters"]


@dataclass(slots=True)
class QueueRegisters:
    """The registers of one queue."""

    index: int
    """Number of the queue."""
    largest: int
    """QueueSizeMax."""
    size: int = 0
    """QueueSize as written, checked when the ring is made; `largest` after a reset."""
    desc: int = 0
    """Guest address of the descriptor table, from QueueDescLow and -High."""
    avail: int = 0
    """Guest address of the avail ring, from QueueDriverLow and -High."""
    used: int = 0
    """Guest address of the used ring, from QueueDeviceLow and -High."""
    base: int = 0
    """Avail index to go on from: 0 unless the queue was only stopped, or loaded."""
    ready: bool = False
    """QueueReady."""
    resetting: bool = False
    """QueueReset: a reset was asked for while the queue was being served."""
    broken: bool = False
    """The ring cannot be trusted; only a reset makes it usable again."""
    kicked: bool = False
    """A notification came and was not served yet."""
    ring: DeviceQueue | None = None
    """Set while the device uses the ring."""

    def __post_init__(self) -> None:
        self.size = self.size or self.largest

    def set_part(self, name: str, shift: int, value: int) -> None:
        """Store one 32-bit register of the settings. A queue that is set up anew starts at index 0."""
        if name == "size":
            self.size = value
        else:
            setattr(self, name, getattr(self, name) & ~(0xFFFFFFFF << shift) | value << shift)
        self.base = 0

    def clear(self) -> None:
        """Go back to the defaults, both ring indexes included (basic.vqreset.device-3)."""
        self.size, self.desc, self.avail, self.used, self.base = self.largest, 0, 0, 0, 0
        self.ready = self.resetting = self.broken = self.kicked = False
        self.ring = None

    def make_ring(self, memory: GuestMemory, features: int) -> DeviceQueue:
        """Return the device's half of the ring.

        Raises
        ------
        DriverError
            If the settings are impossible, or the ring is not in RAM.
        """
        if not 0 < self.size <= self.largest:
            raise DriverError(
                f"QueueSize was set to {self.size}, QueueSizeMax reads {self.largest}",
                queue=self.index,
                clause="mmio.regs.driver-14",
            )
        self.ring = DeviceQueue(
            memory,
            QueueLayout(self.size, self.desc, self.avail, self.used),
            base=self.base,
            event_idx=bool(features & CommonFeature.EVENT_IDX),
            indirect=bool(features & CommonFeature.INDIRECT_DESC),
            index=self.index,
        )
        return self.ring

    def next_base(self, device: Device) -> int:
        """Avail index to go on from; buffers that the device holds are popped again there."""
        if self.ring is None:
            return self.base
        return self.ring.next_avail - device.held_buffers(self.index) & 0xFFFF

    def save(self, device: Device) -> SavedQueue:
        """Return the registers for a migration."""
        base = self.next_base(device)
        return SavedQueue(self.size, self.desc, self.avail, self.used, base, self.ready, self.broken)

    def load(self, saved: SavedQueue) -> None:
        """Take over what `save` returned."""
        self.clear()
        self.size, self.desc, self.avail, self.used, self.base = (
            saved.size,
            saved.desc,
            saved.avail,
            saved.used,
            saved.base,
        )
        self.ready, self.broken = saved.ready, saved.broken
