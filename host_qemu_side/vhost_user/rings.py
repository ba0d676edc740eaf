"""The rings that a vhost-user front end has set up: when they run, their doorbells, and what breaks them.

Nothing here knows messages; `host_qemu_side.vhost_user.backend` says what the front end said.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from host_qemu_side.loop import Loop
from vring import vhost_user as vu
from vring.device import Device, most_queues
from vring.errors import VirtioError
from vring.features import CommonFeature
from vring.memory import GuestMemory
from vring.split import DeviceQueue, QueueLayout
from vring.vhost_user import VhostUserError

__all__ = ["Ring", "Rings", "close_fd"]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Ring:
    """What the front end said about one queue. The descriptors are the ring's own."""

    size: int = 0
    base: int = 0
    addr: vu.VringAddr | None = None
    kick: int = -1
    call: int = -1
    err: int = -1
    enabled: bool = False
    queue: DeviceQueue | None = None
    """Set while the ring is live."""
    again: bool = False
    """The loop comes back to it: there may be more than was served."""

    def own(self, which: str, fd: int) -> None:
        """Take over a descriptor as ``kick``, ``call`` or ``err`` in place of the last; -1 for none.

        Nobody waits for a front end that does not read what it is told. A ring must not be live for another kick.
        """
        if fd >= 0:
            try:
                os.set_blocking(fd, False)
            except OSError:
                os.close(fd)
                raise
        close_fd(getattr(self, which))
        setattr(self, which, fd)

    def close(self) -> None:
        """Close all three."""
        for which in ("kick", "call", "err"):
            self.own(which, -1)


class Rings:
    """All rings of one device.

    Parameters
    ----------
    device
        Whose queues they are.
    loop
        Who watches the kicks.
    deliver
        Called when a queue was served: the device may have something to say.
    """

    def __init__(self, device: Device, loop: Loop, deliver: Callable[[], None]) -> None:
        self._device, self._loop, self._deliver = device, loop, deliver
        self._rings = [Ring() for _ in range(most_queues(device))]
        self.memory: GuestMemory | None = None
        self.regions: list[vu.MemoryRegion] = []
        """Where the front end has that memory, to understand its addresses of rings."""
        self.features = 0
        self.held = False
        self.last_error: str | None = None

    def __len__(self) -> int:
        return len(self._rings)

    def __getitem__(self, index: int) -> Ring:
        """Return a ring by number.

        Raises
        ------
        VhostUserError
            If the device has no such queue.
        """
        if index >= len(self._rings):
            raise VhostUserError(f"vhost-user: queue {index}, the device has {len(self._rings)}", queue=index)
        return self._rings[index]

    def largest(self, index: int) -> int:
        """Return how many entries a ring may have.

        A queue the device could have but has not may be set up, too: a front end goes by GET_QUEUE_NUM, not by
        features. Nothing is expected on it.
        """
        sizes = self._device.queue_sizes
        return sizes[index] if index < len(sizes) else max(sizes, default=0)

    # -- running and at rest --------------------------------------------------------------------------------------

    def start(self, index: int) -> None:
        """Start a ring once everything about it is known and it is enabled (without bit 30: by its kick alone)."""
        ring = self._rings[index]
        enabled = ring.enabled or not self.features & vu.F_PROTOCOL_FEATURES
        if (
            ring.queue is not None
            or ring.addr is None
            or ring.kick < 0
            or not ring.size
            or self.memory is None
            or not enabled
        ):
            return
        try:
            layout = QueueLayout(
                ring.size, *(self._guest_address(a, index) for a in (ring.addr.desc, ring.addr.avail, ring.addr.used))
            )
            queue = DeviceQueue(
                self.memory,
                layout,
                base=ring.base,
                event_idx=bool(self.features & CommonFeature.EVENT_IDX),
                indirect=bool(self.features & CommonFeature.INDIRECT_DESC),
                index=index,
            )
        except VirtioError as error:
            self._broken(index, error)
            return
        ring.queue = queue
        self._device.attach_queue(index, queue)
        if not self.held:
            self._go(index)

    def _guest_address(self, user: int, index: int) -> int:
        for region in self.regions:
            if region.user_address <= user < region.user_address + region.size:
                return user - region.user_address + region.gpa
        raise VhostUserError(f"vhost-user: ring address {user:#x} is in no region of guest memory", queue=index)

    def stop(self, index: int) -> None:
        """Let a ring rest; its base is where to go on."""
        ring = self._rings[index]
        if ring.queue is not None:
            ring.base = self._base(index, ring.queue)
            ring.queue = None
            self._loop.unwatch(ring.kick)
            self._device.detach_queue(index)

    def stop_all(self) -> None:
        """Let all rings rest."""
        for index in range(len(self._rings)):
            self.stop(index)

    def _base(self, index: int, queue: DeviceQueue) -> int:
        """Avail index to go on from; buffers that the device holds are popped again there."""
        return queue.next_avail - self._device.held_buffers(index) & 0xFFFF

    def driver_gone(self) -> bool:
        """Forget where the rings lie: that memory is somebody else's now. Return whether any was set up."""
        if all(ring.addr is None for ring in self._rings):
            return False
        self.stop_all()
        for ring in self._rings:
            ring.own("kick", -1)
            ring.addr, ring.base, ring.enabled = None, 0, False
        return True

    def clear(self) -> None:
        """Forget everything that was said: the front end is gone."""
        self.stop_all()
        for ring in self._rings:
            ring.close()
        self._rings = [Ring() for _ in self._rings]
        self.regions, self.memory, self.features = [], None, 0

    # -- serving --------------------------------------------------------------------------------------------------

    def _go(self, index: int) -> None:
        """Begin to listen for kicks, and look at what is there already."""
        try:
            self._loop.watch(self._rings[index].kick, lambda: self._kicked(index))
        except OSError as error:  # what can be sent but not waited for: a plain file, a directory
            self._broken(index, VhostUserError(f"vhost-user: cannot wait for kicks: {error.strerror}", queue=index))
            return
        self.process(index)

    def _kicked(self, index: int) -> None:
        try:
            with contextlib.suppress(BlockingIOError):
                if not os.read(self._rings[index].kick, 8):
                    raise VhostUserError("vhost-user: the front end closed its end of the kick", queue=index)
        except (VhostUserError, OSError) as error:  # else it would be readable for ever
            self._broken(index, error)
        else:
            self.process(index)
        self._deliver()

    def process(self, index: int) -> None:
        """Serve a queue until it is empty, or for two calls of the device; the rest is left to the loop.

        A guest can add buffers as fast as they are returned: whoever waited for the end of it would wait for ever.
        """
        ring = self._rings[index]
        if ring.queue is None or self.held:
            return
        try:
            if self._device.process(index) and self._device.process(index) and not ring.again:
                ring.again = True
                self._loop.soon(lambda: self._again(index))
        except (VirtioError, OSError) as error:
            # The driver broke the ring, or this host could not do what it asked (a discard that failed: the buffer was
            # not returned). Either way this queue rests, and the others live on.
            self._broken(index, error)

    def _again(self, index: int) -> None:
        self._rings[index].again = False
        self.process(index)
        self._deliver()

    def _broken(self, index: int, error: Exception) -> None:
        """A ring that cannot be trusted: stop it, signal its err descriptor, log."""
        log.error("vhost-user: queue %d is stopped until it is set up again: %s", index, error)
        self.last_error = str(error)
        self.stop(index)
        if self._rings[index].err >= 0:
            _signal(self._rings[index].err)

    def call(self) -> None:
        """Notify the driver of used buffers."""
        for index in self._device.take_calls():
            if self._rings[index].call >= 0:
                _signal(self._rings[index].call)

    # -- pausing, saving ------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Serve no queue until `release`."""
        self.held = True
        for ring in self._rings:
            if ring.queue is not None:
                self._loop.unwatch(ring.kick)

    def release(self) -> None:
        """Go on serving."""
        self.held = False
        for index, ring in enumerate(self._rings):
            if ring.queue is not None:
                self._go(index)

    def save(self) -> list[dict[str, Any]]:
        """Return sizes and base indices of the rings that run."""
        return [
            {"index": index, "size": ring.size, "base": self._base(index, ring.queue)}
            for index, ring in enumerate(self._rings)
            if ring.queue is not None
        ]


def close_fd(fd: int) -> None:
    """Close a descriptor, -1 for none."""
    if fd >= 0:
        with contextlib.suppress(OSError):
            os.close(fd)


def _signal(fd: int) -> None:
    """Eight bytes: an eventfd counts them, User-Mode Linux has a socket there."""
    with contextlib.suppress(OSError):
        os.write(fd, (1).to_bytes(8, "little"))
