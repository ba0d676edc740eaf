"""What the balloon driver needs of whatever lies between it and the device (vhost-user, virtio-mmio, virtio-pci)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from vring.split import QueueLayout

__all__ = ["CanResetQueues", "CanWait", "Interrupts", "Transport"]


@dataclass(slots=True)
class Interrupts:
    """What the device has signalled since the last look."""

    config: bool = False
    """The config space may have changed."""
    queues: set[int] = field(default_factory=set)
    """Queues with used buffers."""


class Transport(Protocol):
    """One virtio device as its driver sees it. All calls return at once or raise `DeviceError` or `PeerVanished`."""

    def device_features(self) -> int:
        """Return the offered feature bits."""

    def set_driver_features(self, features: int) -> None:
        """Accept `features`; raises `DeviceError` if the device does not confirm them."""

    def read_config(self, offset: int, length: int) -> bytes:
        """Return bytes of the device's config space."""

    def write_config(self, offset: int, data: bytes) -> None:
        """Write bytes of the device's config space."""

    def queue_size_max(self, index: int) -> int:
        """Return the largest size of a queue, 0 if the device has no such queue."""

    def setup_queue(self, index: int, layout: QueueLayout, *, base: int = 0) -> None:
        """Tell the device where a queue is. `base`: avail index to go on from, not 0 for a guest that was migrated."""

    def driver_ok(self) -> None:
        """Let the device go to work."""

    def kick(self, index: int) -> None:
        """Send an available buffer notification."""

    def interrupts(self) -> Interrupts:
        """Return and forget what was signalled."""

    def filenos(self) -> list[int]:
        """Return descriptors that become readable with an interrupt, for a caller that wants to wait."""

    def reset(self) -> None:
        """Reset the device: it uses no queue any more."""

    def close(self) -> None:
        """Give everything back."""


@runtime_checkable
class CanWait(Protocol):
    """A transport that can also wait, for the one place where a driver has to: memory has run out."""

    def wait(self, index: int) -> bool:
        """Wait for an interrupt of a queue, for a time the transport thinks right.

        Returns
        -------
        bool
            Whether one came, so that it is worth looking; False means give up.
        """


@runtime_checkable
class CanResetQueues(Protocol):
    """A transport with RING_RESET."""

    def reset_queue(self, index: int) -> None:
        """Reset one queue, so that its memory is the driver's again; `Transport.setup_queue` enables it anew."""
