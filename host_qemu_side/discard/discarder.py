"""The discarder: decides what of a request may be dropped, drops it, and tells the embedder.

What it calls is in `calls`, what a request is cut into in `pieces`. Has no threads: calls must not overlap.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
import mmap
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from host_qemu_side.discard.calls import MADV_POPULATE_WRITE, advise, punch_hole
from host_qemu_side.discard.partial import PartialPages, whole_pages
from host_qemu_side.discard.pieces import (
    DiscardFailed,
    DiscardRefused,
    DiscardStats,
    Piece,
    Refusal,
    cut_out,
    grown,
    pieces_of,
)
from host_qemu_side.discard.residency import piece_reads_zero, piece_residency
from vring.backing import no_huge_pages
from vring.errors import GuestAddressError, UsageError
from vring.memory import Backing, GuestMemory

__all__ = ["Discarder", "OnDeflate"]

log = logging.getLogger(__name__)

U64 = npt.NDArray[np.uint64]
Hook = Callable[[Piece], None]

WHY_NOT = {
    Refusal.PRIVATE_FILE: (
        "dropping the private copies would bring back what is in the file, and a hole in the file would be seen by "
        "everybody who shares it. Map the file shared, or copy it into a memfd or into anonymous memory"
    ),
    Refusal.BUFFER: (
        "nothing is known about this memory, so nothing is done to it. Give the discarder a `discard_buffer` hook, or "
        "say what the region is by `Region.backing`"
    ),
}


class OnDeflate(enum.Enum):
    """What is done for pages that the guest takes back."""

    NOTHING = "nothing"
    """They come back when they are touched."""
    WILLNEED = "willneed"
    """The kernel is told (MADV_WILLNEED), as QEMU does. It brings back what was swapped out, not what was dropped."""
    POPULATE = "populate"
    """Memory is there before the guest has its answer (MADV_POPULATE_WRITE, Linux 5.14). With huge pages this is what
    keeps the guest from dying of SIGBUS when the machine has none left: the deflate fails instead."""


class Discarder:
    """Discards ranges of guest memory that the guest gave to the balloon. Callable, as a device's `discard`.

    Parameters
    ----------
    memory
        Guest memory.
    before
        Called with each `Piece` right before it is dropped: its content is still there. An exception keeps it.
    after
        Called with each piece when it is gone (and verified, with `verify`), before the request is acknowledged.
    discard_buffer
        Drops a piece of memory of the kind `Backing.BUFFER`, so that it reads as zero. None: such memory is refused.
    partial
        Remembers over requests what is in the balloon, for host pages larger than 4096 bytes; see there for what it
        takes. None: a host page is dropped only if one request has all of it.
    on_refusal
        What to do about kinds of memory that cannot be dropped: ``"raise"`` `DiscardRefused`, or ``"count"`` and go on,
        with the memory kept.
    verify
        Look after each discard whether the memory is really gone and reads as zero. For tests and diagnosis: it costs
        as much as reading the memory.
    on_deflate
        What `deflate` does for pages the guest takes back.
    remove
        Use MADV_REMOVE in place of a hole punched through the descriptor. It frees the same, and a userfaultfd of this
        process on this mapping is sent UFFD_EVENT_REMOVE; another thread must read that event, or the call hangs.

    Raises
    ------
    UsageError
        If `partial` is of another memory.
    """

    def __init__(
        self,
        memory: GuestMemory,
        *,
        before: Hook | None = None,
        after: Hook | None = None,
        discard_buffer: Hook | None = None,
        partial: PartialPages | None = None,
        on_refusal: str = "raise",
        verify: bool = False,
        on_deflate: OnDeflate = OnDeflate.NOTHING,
        remove: bool = False,
    ) -> None:
        if partial is not None and partial.memory is not memory:
            raise UsageError("these PartialPages are of another guest memory")
        if on_refusal not in ("raise", "count"):
            raise UsageError(f'on_refusal is {on_refusal!r}: it must be "raise" or "count"')
        self.memory = memory
        self.before = before
        self.after = after
        self.discard_buffer = discard_buffer
        self.partial = partial
        self.on_refusal = on_refusal
        self.verify = verify
        self.on_deflate = on_deflate
        self.remove = remove
        self.stats = DiscardStats()
        self._inhibited: Counter[str] = Counter()
        self._frozen: Counter[str] = Counter()
        self._stopped: str | None = None
        self._pins: dict[tuple[int, int], list[str]] = {}

    @property
    def bytes_discarded(self) -> int:
        """Bytes dropped since the start."""
        return self.stats.bytes_discarded

    def __call__(self, addr: U64, length: U64) -> None:
        """Drop ``addr[i], length[i]`` (bytes, whole pages of 4096), as far as that is allowed.

        The request may be acknowledged when this returns, whatever was refused: memory that was kept is no harm.

        Raises
        ------
        DiscardRefused
            If part of it is memory that cannot be dropped; nothing of the request was (`on_refusal`).
        DiscardFailed
            If a hook raised or a call failed: the request must not be acknowledged. What was dropped before stays
            dropped, so the same request may be tried again; hooks are then called again for it.
        UsageError, GuestAddressError
            If a range is not whole pages of RAM.
        """
        pieces = pieces_of(self.memory, addr, length)
        allowed = [piece for piece in pieces if self._kind_allows(piece)]
        if self.partial is not None:  # the guest gave the pages up, whether or not they may be dropped now
            whole = self.partial.inflate_pieces(allowed)
        else:
            whole = [w for piece in allowed for w in whole_pages(piece)]
        hold = self._hold()
        if hold is not None:
            for piece in allowed:
                self._refuse(piece, *hold)
            return
        for piece in whole:
            kept, cut = cut_out(piece, self._pins_in(piece))
            for pinned in cut:
                self._refuse(pinned, Refusal.PINNED, self._pin_reasons(pinned))
            for part in kept:
                self._drop(part)

    def unsupported(self) -> list[str]:
        """Return a message for each region of guest memory that cannot be dropped: ask before the guest does."""
        found = []
        for region in self.memory.regions:
            piece = Piece(region.gpa, region.size, region, self.memory.host_address(region.gpa))
            refusal = self._kind_refusal(piece)
            if refusal is not None:
                found.append(f"{region.describe()} cannot be discarded: {WHY_NOT[refusal]}")
        return found

    # -- when not ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def inhibit(self, reason: str) -> Iterator[None]:
        """While inside, nothing is dropped; it is counted. May be nested. What was not dropped is not made up for."""
        self._inhibited[reason] += 1
        try:
            yield
        finally:
            _leave(self._inhibited, reason)

    @property
    def inhibitors(self) -> list[str]:
        """Reasons for which discards are inhibited now."""
        return [*self._inhibited.elements()]

    @contextlib.contextmanager
    def frozen(self, reason: str = "paused") -> Iterator[None]:
        """As `inhibit`, for a guest that is frozen or whose memory is being read: RAM does not change while inside."""
        self._frozen[reason] += 1
        try:
            yield
        finally:
            _leave(self._frozen, reason)

    def stop(self, reason: str = "the guest was handed over") -> None:
        """Never drop anything again."""
        self._stopped = reason

    def pin(self, gpa: int, length: int, reason: str = "pinned") -> None:
        """Keep guest memory that something else has an address of (a device assigned to the guest, RDMA).

        Without this a discard would leave guest and device on different pages. Pins are counted.

        Parameters
        ----------
        gpa, length
            Bytes, at any alignment; every host page touched is kept.

        Raises
        ------
        GuestAddressError
            If the range is not all RAM.
        """
        if not self.memory.covers(gpa, length):
            raise GuestAddressError(f"cannot pin {gpa:#x}+{length:#x}: not all RAM ({self.memory.describe()})")
        self._pins.setdefault((gpa, length), []).append(reason)

    def unpin(self, gpa: int, length: int) -> None:
        """Undo one `pin` of exactly this range.

        Raises
        ------
        UsageError
            If there is none.
        """
        reasons = self._pins.get((gpa, length))
        if not reasons:
            raise UsageError(f"guest range {gpa:#x}+{length:#x} is not pinned (unpin takes exactly what was pinned)")
        reasons.pop()
        if not reasons:
            del self._pins[gpa, length]

    # -- the way back --------------------------------------------------------------------------------------------

    def deflate(self, addr: U64, length: U64) -> None:
        """Take note of pages the guest takes back. To be called before the request is returned to it.

        Raises
        ------
        DiscardFailed
            With `OnDeflate.POPULATE`, if there is no memory: the request must not be acknowledged.
        UsageError, GuestAddressError
            If a range is not whole pages of RAM.
        """
        pieces = pieces_of(self.memory, addr, length)
        if self.partial is not None:
            self.partial.deflate_pieces(pieces)
        self.stats.bytes_deflated += sum(piece.length for piece in pieces)
        if self.on_deflate is OnDeflate.NOTHING or self._frozen or self._stopped is not None:
            return
        for piece in pieces:
            if piece.region.backing not in (Backing.BUFFER, Backing.PRIVATE_FILE):
                self._bring_back(grown(piece))

    def reset(self) -> None:
        """Forget what is in the balloon: the device was reset."""
        if self.partial is not None:
            self.partial.reset()

    # -- inside --------------------------------------------------------------------------------------------------

    def _hold(self) -> tuple[Refusal, str] | None:
        if self._stopped is not None:
            return Refusal.STOPPED, self._stopped
        if self._frozen:
            return Refusal.FROZEN, ", ".join(self._frozen)
        if self._inhibited:
            return Refusal.INHIBITED, ", ".join(self._inhibited)
        return None

    def _pins_in(self, piece: Piece) -> list[tuple[int, int]]:
        reach = grown(piece)
        return [(gpa, gpa + size) for gpa, size in self._pins if gpa < reach.end and reach.gpa < gpa + size]

    def _pin_reasons(self, piece: Piece) -> str:
        found = self._pins_in(piece)
        return "; ".join(f"{gpa:#x}+{end - gpa:#x}: {', '.join(self._pins[gpa, end - gpa])}" for gpa, end in found)

    def _kind_refusal(self, piece: Piece) -> Refusal | None:
        if piece.region.backing is Backing.PRIVATE_FILE:
            return Refusal.PRIVATE_FILE
        if piece.region.backing is Backing.BUFFER and self.discard_buffer is None:
            return Refusal.BUFFER
        return None

    def _kind_allows(self, piece: Piece) -> bool:
        refusal = self._kind_refusal(piece)
        if refusal is None:
            return True
        self._refuse(piece, refusal, WHY_NOT[refusal])
        if self.on_refusal == "raise":
            raise DiscardRefused(self.stats.last_refused[refusal], refusal, piece)
        return False

    def _refuse(self, piece: Piece, refusal: Refusal, why: str) -> None:
        message = f"{piece.describe()} is not discarded, {refusal.value}: {why}"
        first = refusal not in self.stats.last_refused
        self.stats.bytes_refused[refusal] += piece.length
        self.stats.ranges_refused[refusal] += 1
        self.stats.last_refused[refusal] = message
        log.log(logging.WARNING if first else logging.DEBUG, "%s", message)  # a guest can cause any number of these

    def _fail(self, message: str, piece: Piece) -> DiscardFailed:
        self.stats.failures += 1
        return DiscardFailed(f"{piece.describe()}: {message}; the guest's request is not to be acknowledged", piece)

    def _tell(self, hook: Hook | None, when: str, piece: Piece) -> None:
        if hook is not None:
            try:
                hook(piece)
            except Exception as error:
                raise self._fail(f"the hook {when} the discard raised {error!r}", piece) from error

    def _drop(self, piece: Piece) -> None:
        hold = self._hold()
        if hold is None:
            self._tell(self.before, "before", piece)
            hold = self._hold()  # asked again: a hook may have frozen the guest
        if hold is not None:
            self._refuse(piece, *hold)
            return
        if piece.region.backing is Backing.BUFFER:
            self._tell(self.discard_buffer, "for", piece)
        else:
            try:
                self._system_call(piece)
            except OSError as error:
                raise self._fail(f"discarding failed: {_explain(error, piece)}", piece) from error
        if self.verify:
            self._verify(piece)
        self.stats.bytes_discarded += piece.length
        self.stats.ranges_discarded += 1
        self._tell(self.after, "after", piece)

    def _system_call(self, piece: Piece) -> None:
        if piece.region.backing is Backing.PRIVATE_ANONYMOUS:
            advise(piece.address, piece.length, mmap.MADV_DONTNEED)
        elif self.remove:
            advise(piece.address, piece.length, mmap.MADV_REMOVE)
        else:
            punch_hole(piece.region.fd, piece.offset, piece.length)

    def _verify(self, piece: Piece) -> None:
        if piece.region.backing is not Backing.BUFFER:  # first: looking at the content of private memory maps it
            left = piece_residency(piece)
            if not left.gone:
                raise self._fail(
                    f"discarding succeeded but {left.resident} bytes are still resident and {left.allocated} still "
                    "allocated",
                    piece,
                )
        if not piece_reads_zero(self.memory, piece):
            raise self._fail("discarding succeeded but the memory does not read as zero", piece)
        if piece.region.backing is Backing.PRIVATE_ANONYMOUS:
            self._system_call(piece)  # reading mapped the zero page everywhere

    def _bring_back(self, piece: Piece) -> None:
        populate = self.on_deflate is OnDeflate.POPULATE
        try:
            advise(piece.address, piece.length, MADV_POPULATE_WRITE if populate else mmap.MADV_WILLNEED)
        except OSError as error:
            if not populate:
                self.stats.hints_failed += 1
                return
            if piece.region.backing is Backing.HUGETLB and error.errno in (errno.EFAULT, errno.ENOMEM):
                why: object = no_huge_pages(piece.region.page_size, piece.length)
            elif error.errno == errno.EINVAL:
                why = "MADV_POPULATE_WRITE needs Linux 5.14"
            else:
                why = error.strerror
            raise self._fail(f"getting the memory back failed: {why}", piece) from error
        self.stats.bytes_populated += piece.length


def _leave(counter: Counter[str], reason: str) -> None:
    counter[reason] -= 1
    if counter[reason] <= 0:
        del counter[reason]


def _explain(error: OSError, piece: Piece) -> str:
    private = piece.region.backing is Backing.PRIVATE_ANONYMOUS
    reasons = {
        errno.EOPNOTSUPP: "its file system cannot punch holes; use a memfd, tmpfs, ext4, xfs or btrfs",
        errno.EPERM: "the object is sealed against writing",
        errno.EBADF: "its descriptor is not open for writing",
        errno.EINVAL: "the memory is locked (mlock), or not at a page boundary" if private else "",
    }
    why = reasons.get(error.errno or 0)
    return f"{error.strerror}: {why}" if why else str(error.strerror)
