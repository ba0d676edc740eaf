"""What virtio-mmio's registers take along in a migration, as checked values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from vring.decode import U16, U32, Fields, Refusal
from vring.errors import UsageError

__all__ = ["SavedQueue", "SavedRegisters"]

MAX_QUEUES = U16
MAX_FEATURES = (1 << 128) - 1
"""DriverFeatures of words 0 to 3."""
MAX_STATUS = 255


@dataclass(frozen=True, slots=True)
class SavedQueue:
    """Registers of one queue, see `vring.mmio_queues.QueueRegisters`."""

    size: int
    desc: int
    avail: int
    used: int
    base: int
    ready: bool
    broken: bool

    @classmethod
    def take(cls, said: Fields) -> Self:
        """Return the value of a JSON object."""
        size, base = said.integer("size", 0, U32), said.integer("base", 0, U16)
        desc, avail, used = (said.integer(name) for name in ("desc", "avail", "used"))
        return cls(size, desc, avail, used, base, said.boolean("ready"), said.boolean("broken"))

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class SavedRegisters:
    """Registers of one device, see `vring.mmio.MmioDevice`."""

    status: int
    features: int
    """What the driver wrote to DriverFeatures."""
    selected: dict[str, int]
    """DeviceFeaturesSel, DriverFeaturesSel and QueueSel as ``device``, ``driver`` and ``queue``."""
    queues: tuple[SavedQueue, ...]

    @classmethod
    def from_json(cls, value: Any, refusal: Refusal = UsageError) -> Self:
        """Check what `to_json` returned.

        Raises
        ------
        VirtioError
            What `refusal` makes, if it is malformed.
        """
        said = Fields(value, "saved registers", refusal)
        selected = said.members("selected")
        return cls(
            said.integer("status", 0, MAX_STATUS),
            said.integer("features", 0, MAX_FEATURES),
            {name: selected.integer(name, 0, U32) for name in ("device", "driver", "queue")},
            tuple(SavedQueue.take(queue) for queue in said.objects("queues", MAX_QUEUES)),
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        queues = [queue.to_json() for queue in self.queues]
        return {"status": self.status, "features": self.features, "selected": dict(self.selected), "queues": queues}
