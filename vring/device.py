"""What a device type implements to sit behind any transport of this project (vhost-user, virtio-mmio).

A device is a core without I/O: the transport calls it and looks at what came of it. It knows no sockets, descriptors,
threads or clocks, so a test can choose the order of every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from vring.features import Status
from vring.memory import GuestMemory
from vring.split import DeviceQueue

__all__ = ["Device", "HasMostQueues", "HearsStatus", "most_queues"]


class Device(Protocol):
    """A virtio device type.

    The transport calls `set_memory` and `set_features` before `attach_queue`, and `process` whenever a queue was
    kicked. After any call it asks `take_config_change` and `take_calls` and notifies the driver accordingly. A
    transport that cannot tell a reset from a pause tells of `new_driver` where it sees one.
    """

    device_id: int
    """Virtio device type, e.g. 5 for the traditional memory balloon."""

    @property
    def offered_features(self) -> int:
        """Device-type and ring feature bits the device offers."""

    @property
    def queue_sizes(self) -> Sequence[int]:
        """Largest size of each queue, by queue number; the number of queues is its length."""

    @property
    def config_generation(self) -> int:
        """Changes whenever the config space changed by the device's own doing."""

    def set_memory(self, memory: GuestMemory | None) -> None:
        """Take the guest's memory; any queue attached before is invalid from now on."""

    def set_features(self, features: int) -> bool:
        """Take the driver's choice; False leaves FEATURES_OK clear and changes nothing."""

    def read_config(self, offset: int, length: int) -> bytes:
        """Return `length` bytes of the config space; bytes past its end read as 0."""

    def write_config(self, offset: int, data: bytes) -> None:
        """Store what the driver may write; the rest is ignored."""

    def new_driver(self, index: int, *, sure: bool) -> None:
        """Learn that the queue attached next is another driver's than before, without a reset in between.

        What belongs to the queue is to be forgotten, and no more: each queue of that driver is told of by itself. If it
        is not `sure`, only what would let the device change guest memory in the belief that it is free.
        """

    def attach_queue(self, index: int, queue: DeviceQueue) -> None:
        """Make a queue live."""

    def detach_queue(self, index: int) -> None:
        """Stop using a queue."""

    def held_buffers(self, index: int) -> int:
        """How many buffers popped from a queue the device keeps for later, always the last ones popped.

        A base index saved for the queue is less by so many: whoever goes on from there finds them again.
        """

    def process(self, index: int) -> int:
        """Serve what is available on a queue, at most one batch; return how many buffers that was.

        Raises
        ------
        DriverError
            If the ring cannot be trusted any more: the queue is broken until reset.
        """

    def take_config_change(self) -> bool:
        """Whether a config change notification is due; asking clears it."""

    def take_calls(self) -> Sequence[int]:
        """Numbers of the queues whose driver is to be notified of used buffers; asking clears them."""

    def reset(self) -> None:
        """Go back to the state before initialisation."""


@runtime_checkable
class HasMostQueues(Protocol):
    """A device whose number of queues depends on features."""

    @property
    def most_queues(self) -> int:
        """Queues it has at most, whatever is offered and however they are numbered."""


@runtime_checkable
class HearsStatus(Protocol):
    """A device that wants to know how far its driver is; a transport that sees the driver's own status tells it."""

    def set_status(self, status: Status) -> None:
        """Learn of a change; `Device.reset` sets the status to 0 without this call."""


@runtime_checkable
class TakesTurns(Protocol):
    """A device that can be told not to keep a transport that has others to serve, however much its driver asks for."""

    enough: Callable[[], bool]
    """Asked after each buffer that `Device.process` serves: whether the others are left to the next call."""


def most_queues(device: Device) -> int:
    """Return how many queues a device could have at most: what it says itself, else as many as it has."""
    return max(len(device.queue_sizes), device.most_queues if isinstance(device, HasMostQueues) else 0)
