"""Balloon pages smaller than the host's: which pages of 4096 bytes are in the balloon, and which host pages are whole.

A host page of 64 KiB or 2 MiB can only be dropped as one; it may go when the guest has given up all of it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from host_qemu_side.discard.pieces import Piece, grown, pieces_of
from vring.memory import PAGE_SHIFT, PAGE_SIZE, GuestMemory, Region
from vring.pages import PageLayout, PageSet

__all__ = ["PartialPages", "whole_pages"]

U64 = npt.NDArray[np.uint64]


def whole_pages(piece: Piece) -> list[Piece]:
    """Return what of a piece is whole host pages: none, or one piece."""
    start, end = _whole(piece.region, piece.gpa, piece.end)
    return [piece.part(start, end)] if start < end else []


def _whole(region: Region, start: int, end: int) -> tuple[int, int]:
    """Shrink a guest address range to whole host pages (perhaps to less than nothing)."""
    base, page = region.host_page_base, region.page_size
    return base - (base - start) // page * page, base + (end - base) // page * page


class PartialPages:
    """Remembers over all requests which small pages are in the balloon, in regions of larger host pages.

    Right only if the guest never uses a page of the balloon before its deflate request was returned, that is with
    MUST_TELL_HOST negotiated (`balloon.operation.driver-7`; without it, `balloon.operation.driver-8` lets a driver
    use them earlier, and completing the host page would drop such a page), and only if every deflate is told, before
    it is returned to the guest.

    Parameters
    ----------
    memory
        Guest memory; regions whose host pages are 4096 bytes are not tracked. A host page of which a part is in no
        region, or in another one, is never whole.
    before
        Those of the memory that the guest had until now: what they know of pages that it still has is kept.
    """

    def __init__(self, memory: GuestMemory, before: PartialPages | None = None) -> None:
        self.memory = memory
        self._tracked = [region for region in memory.regions if region.page_size > PAGE_SIZE]
        layout = PageLayout((region.gpa >> PAGE_SHIFT, region.size >> PAGE_SHIFT) for region in self._tracked)
        self._given: PageSet = PageSet(layout) if before is None else before._given.within(layout)

    @property
    def pages(self) -> int:
        """Pages of 4096 bytes that are in the balloon, in the tracked regions."""
        return len(self._given)

    @property
    def waiting(self) -> int:
        """Those of them that still take memory because their host page is not whole."""
        whole = 0
        for region in self._tracked:
            first, end = _whole(region, region.gpa, region.end)
            whole += int(self._are_whole(region, first, end).sum()) * (region.page_size // PAGE_SIZE)
        return len(self._given) - whole

    def inflate(self, addr: U64, length: U64) -> list[Piece]:
        """Take pages into the balloon; return the host pages that are whole now and that these pages are in.

        Parameters
        ----------
        addr, length
            Guest addresses and bytes, multiples of 4096. Pages that were there already may be among them.

        Raises
        ------
        UsageError, GuestAddressError
            If a range is not whole pages of RAM; nothing is changed then.
        """
        return self.inflate_pieces(pieces_of(self.memory, addr, length))

    def inflate_pieces(self, pieces: list[Piece]) -> list[Piece]:
        """As `inflate`, for pieces; those of untracked regions are returned as they are."""
        for piece in pieces:
            self._set(piece, True)
        found: list[Piece] = []
        done = 0
        for piece in pieces:
            region = piece.region
            if region.page_size <= PAGE_SIZE:
                found.append(piece)
                continue
            reach = grown(piece)
            first, end = _whole(region, max(reach.gpa, region.gpa, done), min(reach.end, region.end))
            done = max(done, end)  # two pieces may meet in one host page
            whole = self._are_whole(region, first, end)
            edges = np.flatnonzero(np.diff(np.concatenate(([False], whole, [False])).astype(np.int8)))
            for start, stop in (edges.reshape(-1, 2) * region.page_size).tolist():
                found.append(piece.part(first + start, first + stop))
        return found

    def deflate(self, addr: U64, length: U64) -> None:
        """Take pages out of the balloon. Call it before the request is returned to the guest.

        Raises
        ------
        UsageError, GuestAddressError
            If a range is not whole pages of RAM; nothing is changed then.
        """
        self.deflate_pieces(pieces_of(self.memory, addr, length))

    def deflate_pieces(self, pieces: list[Piece]) -> None:
        """As `deflate`, for pieces."""
        for piece in pieces:
            self._set(piece, False)

    def reset(self) -> None:
        """Forget everything: the device was reset, or it is in doubt what is in the balloon."""
        self._given = PageSet(self._given.layout)

    def _are_whole(self, region: Region, start: int, end: int) -> npt.NDArray[np.bool_]:
        """Tell for each host page of a range of whole ones whether all of it is in the balloon."""
        pages = max(end - start, 0) >> PAGE_SHIFT
        given = self._given.bools_of(start >> PAGE_SHIFT, pages).reshape(-1, region.page_size // PAGE_SIZE)
        whole: npt.NDArray[np.bool_] = np.logical_and.reduce(given, axis=1)
        return whole

    def _set(self, piece: Piece, value: bool) -> None:
        if piece.region.page_size > PAGE_SIZE:
            change = self._given.set_run if value else self._given.clear_run
            change(piece.gpa >> PAGE_SHIFT, piece.length >> PAGE_SHIFT)
