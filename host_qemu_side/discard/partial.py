"""Balloon pages smaller than the host's: which pages of 4096 bytes are in the balloon, and which host pages are whole.

A host page of 64 KiB or 2 MiB can only be dropped as one; it may go when the guest has given up all of it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from host_qemu_side.discard.pieces import Piece, pieces_of
from vring.memory import PAGE_SIZE, GuestMemory, Region

__all__ = ["PartialPages", "whole_pages"]

U64 = npt.NDArray[np.uint64]


def whole_pages(piece: Piece) -> list[Piece]:
    """Return what of a piece is whole host pages: none, or one piece."""
    base, page = piece.region.gpa, piece.region.page_size
    start, end = base - (base - piece.gpa) // page * page, base + (piece.end - base) // page * page
    return [piece.part(start, end)] if start < end else []


class PartialPages:
    """Remembers over all requests which small pages are in the balloon, in regions of larger host pages.

    Right only if the guest never uses a page of the balloon before its deflate request was returned, that is with
    MUST_TELL_HOST negotiated (`balloon.operation.driver-7`; without it, `balloon.operation.driver-8` lets a driver
    use them earlier, and completing the host page would drop such a page), and only if every deflate is told, before
    it is returned to the guest.

    Parameters
    ----------
    memory
        Guest memory; regions whose host pages are 4096 bytes are not tracked.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self._given: dict[int, npt.NDArray[np.bool_]] = {
            region.gpa: np.zeros(region.size // PAGE_SIZE, dtype=np.bool_)
            for region in memory.regions
            if region.page_size > PAGE_SIZE
        }

    @property
    def pages(self) -> int:
        """Pages of 4096 bytes that are in the balloon, in the tracked regions."""
        return sum(int(given.sum()) for given in self._given.values())

    @property
    def waiting(self) -> int:
        """Those of them that still take memory because their host page is not whole."""
        return sum(
            int(given.sum()) - int(self._by_page(given, region).all(axis=1).sum()) * (region.page_size // PAGE_SIZE)
            for region, given in self._tracked()
        )

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
        last: tuple[int, int] = (-1, 0)
        for piece in pieces:
            region, given = piece.region, self._given.get(piece.region.gpa)
            if given is None:
                found.append(piece)
                continue
            page = region.page_size
            first = (piece.gpa - region.gpa) // page
            if last[0] == region.gpa:
                first = max(first, last[1])  # two pieces may meet in one host page
            end = -(-(piece.end - region.gpa) // page)
            last = (region.gpa, end)
            whole = self._by_page(given, region)[first:end].all(axis=1)
            edges = np.flatnonzero(np.diff(np.concatenate(([False], whole, [False])).astype(np.int8)))
            for start, stop in edges.reshape(-1, 2).tolist():
                found.append(piece.part(region.gpa + (first + start) * page, region.gpa + (first + stop) * page))
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
        """Forget everything: the device was reset, the balloon is empty."""
        for given in self._given.values():
            given[:] = False

    def _tracked(self) -> list[tuple[Region, npt.NDArray[np.bool_]]]:
        return [(r, self._given[r.gpa]) for r in self.memory.regions if r.gpa in self._given]

    def _by_page(self, given: npt.NDArray[np.bool_], region: Region) -> npt.NDArray[np.bool_]:
        return given.reshape(-1, region.page_size // PAGE_SIZE)

    def _set(self, piece: Piece, value: bool) -> None:
        given = self._given.get(piece.region.gpa)
        if given is not None:
            start = (piece.gpa - piece.region.gpa) // PAGE_SIZE
            given[start : start + piece.length // PAGE_SIZE] = value
