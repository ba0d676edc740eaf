"""One ring of a vhost-user front end: what was said about it, what of that still holds, and whose it is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntFlag

from host_qemu_side.vhost_user.descriptors import close_fd
from vring import vhost_user as vu
from vring.split import DeviceQueue

__all__ = ["Piece", "Ring", "Whose"]


class Piece(IntFlag):
    """What a front end says anew when it starts a ring again."""

    NONE = 0
    BASE = 1
    ADDR = 2
    KICK = 4
    ALL = 7


class Whose(Enum):
    """Whose ring it is that starts: no message says whether a driver goes on or another one begins."""

    SAME = "the driver's that had it before"
    UNKNOWN = "perhaps another driver's"
    ANOTHER = "another driver's"


@dataclass(slots=True)
class Ring:
    """What the front end said about one queue. The descriptors are the ring's own.

    What was said before the ring started last is old. Old pieces are enough to go on after a pause (ENABLE 0, another
    memory table); a ring that was stopped, or that another driver sets up, needs new ones.
    """

    size: int = 0
    base: int = 0
    """Avail index to start from."""
    base_said: bool = False
    """Whether that was said, and is still meant."""
    addr: vu.VringAddr | None = None
    kick: int = -1
    call: int = -1
    err: int = -1
    enabled: bool = False
    queue: DeviceQueue | None = None
    """Set while the ring runs."""
    new: Piece = Piece.NONE
    """What was said since the ring started last."""
    stopped_at: int | None = None
    """Avail index where it stopped; None: it has not run on this connection."""
    moved: bool = False
    """Whether this driver's buffers have been taken from it."""
    another: bool = False
    """Features were negotiated anew: whoever starts it is another driver."""
    call_due: bool = False
    """An interrupt found no descriptor that it could be sent by."""
    again: bool = False
    """The loop comes back to it: there may be more than was served."""

    def own(self, which: str, fd: int) -> None:
        """Take over a descriptor as ``kick``, ``call`` or ``err`` in place of the last; -1 for none.

        A kick must not be watched.
        """
        close_fd(getattr(self, which))
        setattr(self, which, fd)

    def close(self) -> None:
        """Close all three descriptors."""
        for which in ("kick", "call", "err"):
            self.own(which, -1)

    def forget(self, pieces: Piece) -> None:
        """Let pieces count as never said. A kick must not be watched."""
        if pieces & Piece.BASE:
            self.base_said = False
        if pieces & Piece.ADDR:
            self.addr = None
        if pieces & Piece.KICK:
            self.own("kick", -1)
        self.new &= ~pieces

    def whose(self) -> Whose:
        """Judge by the base whose ring starts: a driver that goes on does so where its ring stopped."""
        if self.another:
            return Whose.ANOTHER
        if not self.new & Piece.BASE:
            return Whose.SAME
        if self.stopped_at is None:  # the device was reset; a guest that is in the midst of it had another one before
            return Whose.UNKNOWN if self.base else Whose.SAME
        if self.base != self.stopped_at:
            return Whose.ANOTHER
        # An index that wrapped to 0 is also where another driver begins.
        return Whose.UNKNOWN if self.base == 0 and self.moved else Whose.SAME
