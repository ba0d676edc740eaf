"""The rings that a vhost-user front end has set up: when they run, their doorbells, and what breaks them.

Nothing here knows messages; `host_qemu_side.vhost_user.messages` says what the front end said. Whatever it said,
`Rings.missing` alone decides whether a ring may run; `rest` and `wake` act upon it after each message.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from typing import Any

from host_qemu_side.loop import TURN, Loop
from host_qemu_side.vhost_user.ring import Piece, Ring, Whose
from host_qemu_side.vhost_user.table import MemoryTable
from vring import vhost_user as vu
from vring.device import Device, TakesTurns, most_queues
from vring.errors import VirtioError, reason
from vring.features import CommonFeature
from vring.peer import Signals, take_signals
from vring.split import MAX_SIZE, DeviceQueue, QueueLayout
from vring.vhost_user import VhostUserError

__all__ = ["Ring", "Rings"]

log = logging.getLogger(__name__)
BREAKS_TOLD = 20
"""Of one front end's rings, as errors: one that is broken and set up again for ever fills no disk."""
NOT_THE_DEVICES = vu.F_PROTOCOL_FEATURES | vu.F_LOG_ALL
"""Feature bits of vhost and vhost-user: they may change while one driver goes on."""


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
        self.table = MemoryTable()
        """Guest memory, and where the front end has it, to understand its addresses of rings."""
        self.features: int | None = None
        """As negotiated; None: not yet."""
        self.held = False
        self._breaks = 0
        self.last_error: str | None = None
        self._signals = Signals()
        self._turn_ends = math.inf
        if isinstance(device, TakesTurns):
            device.enough = self._turn_is_over

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

    @property
    def running(self) -> bool:
        """Whether any ring runs."""
        return any(ring.queue is not None for ring in self._rings)

    # -- what the front end says ----------------------------------------------------------------------------------

    def set_features(self, features: int) -> bool:
        """Take the driver's choice; False if the device refuses it. The same once more changes nothing.

        Where it differs another driver begins, and rings that were set up before are not its own: they lie in memory
        that is somebody else's by now. Without bit 30 nothing enables a ring, and none may come to life by that.
        """
        first, before = self.features is None, self.features or 0
        changed = bool((before ^ features) & ~NOT_THE_DEVICES)
        if not first and (changed or before & ~features & vu.F_PROTOCOL_FEATURES):
            self.retire()
        if (first or changed) and not self._device.set_features(features & ~NOT_THE_DEVICES):
            return False
        for ring in self._rings:
            ring.another = ring.another or (changed and not first)
        self.features = features
        return True

    def set_table(self, table: MemoryTable) -> None:
        """Take another memory table. A ring goes on where it was, once its address is in a region."""
        for index in range(len(self._rings)):
            self.stop(index)
        self.table = table
        self._device.set_memory(table.memory)

    def set_size(self, index: int, size: int) -> None:
        """Take the number of entries of a ring. Any that is legal is taken: a front end cannot ask what we like.

        Raises
        ------
        VhostUserError
            If it is no power of two, or more than 32768.
        """
        ring = self[index]
        if not 0 < size <= MAX_SIZE or size & (size - 1):
            raise VhostUserError(
                f"vhost-user: ring of {size} entries, which is no power of two from 1 to {MAX_SIZE}",
                queue=index,
                clause="ring.size-1",
            )
        if size != ring.size:
            self._begins_anew(index)
        ring.size = size

    def set_base(self, index: int, base: int) -> None:
        """Take the index that a ring starts from. Another than it stands at is another driver's."""
        ring = self[index]
        if base > 0xFFFF:
            raise VhostUserError(f"vhost-user: base index {base}", queue=index)
        if base != self.position(index):
            self._begins_anew(index)
        if ring.queue is None:
            ring.base, ring.base_said = base, True
            ring.new |= Piece.BASE

    def set_addr(self, addr: vu.VringAddr) -> None:
        """Take the place of a ring. One that runs goes on there."""
        ring = self[addr.index]
        if ring.queue is not None and addr == ring.addr:
            return
        self.stop(addr.index)
        ring.addr = addr
        ring.new |= Piece.ADDR

    def set_kick(self, index: int, fd: int) -> None:
        """Take over the descriptor of a ring's kicks. One that runs goes on with it."""
        ring = self[index]
        self.stop(index)
        self._loop.unwatch(ring.kick)
        ring.own("kick", fd)
        ring.new |= Piece.KICK
        self._watch(index)

    def set_call(self, index: int, fd: int) -> None:
        """Take over the descriptor of a ring's interrupts, -1 for none; one that is due is sent."""
        ring = self[index]
        ring.own("call", fd)
        if ring.call_due:
            self._interrupt(index)

    def end(self, index: int) -> int:
        """Stop a ring until it is set up anew; return where it stopped, or would have started."""
        self.stop(index)
        self._forget(index, Piece.ALL)
        return self[index].base

    def end_all(self) -> None:
        """Stop all rings until they are set up anew."""
        for index in range(len(self._rings)):
            self.end(index)

    def retire(self) -> None:
        """Stop all rings, and forget what was said before they ran: it is not meant for who comes next."""
        for index in range(len(self._rings)):
            self._begins_anew(index)

    def resume(self, bases: dict[int, int]) -> None:
        """Expect the driver of a state that was loaded: a ring that starts at its base goes on."""
        for index, base in bases.items():
            self[index].stopped_at = base

    def close(self) -> None:
        """Give back what signals them."""
        self._signals.close()

    def clear(self, *, table: bool = True) -> None:
        """Forget everything that was said, with `table` the memory table as well: the front end is gone."""
        for index, ring in enumerate(self._rings):
            self.stop(index)
            self._loop.unwatch(ring.kick)
            ring.close()
        self._rings = [Ring() for _ in self._rings]
        self._breaks = 0
        self.features = None
        if table:
            self.table = MemoryTable()

    def _begins_anew(self, index: int) -> None:
        self.stop(index)
        self._forget(index, Piece.ALL & ~self._rings[index].new)

    def _forget(self, index: int, pieces: Piece) -> None:
        ring = self._rings[index]
        if pieces & Piece.KICK:
            self._loop.unwatch(ring.kick)
        ring.forget(pieces)

    # -- running and at rest --------------------------------------------------------------------------------------

    def missing(self, index: int) -> list[str]:
        """Return what a ring still needs to run, as the names of messages; nothing: it may run.

        A ring waits also while its address is in no region: another table or another address may be on its way.
        """
        ring = self[index]
        without_bit_30 = self.features is not None and not self.features & vu.F_PROTOCOL_FEATURES
        found = {
            "SET_FEATURES": self.features is not None,
            "SET_MEM_TABLE": self.table.memory is not None,
            "SET_VRING_NUM": ring.size > 0,
            "SET_VRING_BASE": ring.base_said,
            "SET_VRING_ADDR": ring.addr is not None,
            "a region with the ring's address": ring.addr is None or self._layout(ring) is not None,
            "SET_VRING_KICK": ring.kick >= 0,
            "SET_VRING_ENABLE": ring.enabled or without_bit_30,
        }
        return [name for name, there in found.items() if not there]

    def _layout(self, ring: Ring) -> QueueLayout | None:
        """Return where a ring lies in guest memory, None if that is not known or not all in a region."""
        if ring.addr is None:
            return None
        bare = QueueLayout(ring.size, 0, 0, 0)
        found = [
            self.table.guest_address(user, length)
            for user, length in (
                (ring.addr.desc, bare.desc_bytes),
                (ring.addr.avail, bare.avail_bytes),
                (ring.addr.used, bare.used_bytes),
            )
        ]
        places = [place for place in found if place is not None]
        return QueueLayout(ring.size, *places) if len(places) == len(found) else None

    def rest(self) -> None:
        """Stop what may not run any more. Before the front end has its reply: then the memory is its own again."""
        for index, ring in enumerate(self._rings):
            if ring.queue is not None and self.missing(index):
                self.stop(index)

    def wake(self) -> None:
        """Start what may run now."""
        for index, ring in enumerate(self._rings):
            if ring.queue is None and not self.missing(index):
                self._start(index)

    def _start(self, index: int) -> None:
        ring = self._rings[index]
        layout = self._layout(ring)
        features, memory = self.features or 0, self.table.memory
        assert layout is not None
        assert memory is not None
        try:
            queue = DeviceQueue(
                memory,
                layout,
                base=ring.base,
                event_idx=bool(features & CommonFeature.EVENT_IDX),
                indirect=bool(features & CommonFeature.INDIRECT_DESC),
                index=index,
            )
        except VirtioError as error:
            self._broken(index, error)
            return
        whose = ring.whose()
        if whose is not Whose.SAME:
            log.info("vhost-user: queue %d starts at %d: it is %s", index, ring.base, whose.value)
            self._device.new_driver(index, sure=whose is Whose.ANOTHER)
            ring.moved = False
        ring.queue, ring.new, ring.another = queue, Piece.NONE, False
        self._device.attach_queue(index, queue)
        self.process(index)

    def stop(self, index: int) -> None:
        """Let a ring rest, if it runs; it may go on from its base."""
        ring = self._rings[index]
        if ring.queue is not None:
            self.call()  # what was used is told before the device forgets whom to tell
            position = self.position(index)
            ring.moved = ring.moved or position != ring.base
            ring.base = ring.stopped_at = position
            ring.queue = None
            self._device.detach_queue(index)

    def position(self, index: int) -> int:
        """Avail index to go on from; buffers that the device holds are popped again there."""
        ring = self[index]
        if ring.queue is None:
            return ring.base
        return ring.queue.next_avail - self._device.held_buffers(index) & 0xFFFF

    # -- serving --------------------------------------------------------------------------------------------------

    def _watch(self, index: int) -> None:
        """Listen for kicks, also of a ring that does not run."""
        if self._rings[index].kick < 0 or self.held:
            return
        try:
            self._loop.watch(self._rings[index].kick, lambda: self._kicked(index))
        except OSError as error:  # what can be sent but not waited for: a plain file, a directory
            why = VhostUserError(f"vhost-user: cannot wait for kicks: {error.strerror}", queue=index)
            self._broken(index, why, Piece.KICK)

    def _kicked(self, index: int) -> None:
        try:
            with contextlib.suppress(BlockingIOError):
                if not take_signals(self._rings[index].kick):
                    raise VhostUserError("vhost-user: the front end closed its end of the kick", queue=index)
        except (VhostUserError, OSError) as error:  # else it would be readable for ever
            self._broken(index, error, Piece.KICK)
        else:
            ring = self._rings[index]
            if ring.stopped_at is None:
                ring.base_said = True  # it begins at 0 if nobody said otherwise
            self.wake()
            self.process(index)
        self._deliver()

    def process(self, index: int) -> None:
        """Serve a queue until it is empty, or for two calls of the device and one turn; the rest is left to the loop.

        A guest can add buffers as fast as they are returned: whoever waited for the end of it would wait for ever.
        """
        ring = self._rings[index]
        if ring.queue is None or self.held:
            return
        self._turn_ends = time.monotonic() + TURN
        try:
            served = self._device.process(index)
            ring.moved = ring.moved or served > 0
            if served and (self._turn_is_over() or self._device.process(index)) and not ring.again:
                ring.again = True
                self._loop.soon(lambda: self._again(index))
        except Exception as error:
            # The driver broke the ring, or this host could not do what it asked (a discard that failed: the buffer was
            # not returned; no memory). Either way this queue rests, and the others live on.
            self._broken(index, error)
        finally:
            self._turn_ends = math.inf

    def _turn_is_over(self) -> bool:
        return time.monotonic() > self._turn_ends

    def _again(self, index: int) -> None:
        self._rings[index].again = False
        self.process(index)
        self._deliver()

    def _broken(self, index: int, error: Exception, pieces: Piece = Piece.ALL) -> None:
        """A ring that cannot be trusted: stop it until these pieces are said anew, signal its err descriptor, log."""
        self._breaks += 1
        level = logging.ERROR if self._breaks <= BREAKS_TOLD else logging.DEBUG
        log.log(level, "vhost-user: queue %d is stopped until it is set up again: %s", index, reason(error))
        self.last_error = reason(error)
        self.stop(index)
        self._forget(index, pieces)
        if self._rings[index].err >= 0:
            self._signal(self._rings[index].err)

    def no_doorbell(self, index: int, error: VirtioError) -> None:
        """What came as a doorbell of this ring is none, and who sent it has no other answer: it rests until a kick."""
        self._broken(index, error, Piece.KICK)

    def call(self) -> None:
        """Notify the driver of used buffers."""
        for index in self._device.take_calls():
            self._interrupt(index)

    def _interrupt(self, index: int) -> None:
        """Send an interrupt; without a descriptor that takes it, it is due until there is one, however often the ring
        stops.
        """
        ring = self._rings[index]
        ring.call_due = ring.call < 0 or not self._signal(ring.call)

    def _signal(self, fd: int) -> bool:
        """Return whether it could be: who has closed his end hears nothing."""
        try:
            self._signals.signal(fd)
        except OSError:
            return False
        return True

    # -- pausing, saving ------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Serve no queue until `release`."""
        self.held = True
        for ring in self._rings:
            self._loop.unwatch(ring.kick)

    def release(self) -> None:
        """Go on serving."""
        self.held = False
        for index in range(len(self._rings)):
            self._watch(index)
            self.process(index)

    def save(self) -> list[dict[str, Any]]:
        """Return sizes and base indices of the rings that run."""
        return [
            {"index": index, "size": ring.size, "base": self.position(index)}
            for index, ring in enumerate(self._rings)
            if ring.queue is not None
        ]
