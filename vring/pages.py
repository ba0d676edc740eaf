"""Which pages a guest has, and sets of them. Both are sized by the pages that exist, not by their numbers.

A page is named by its number: guest address divided by 4096. Inside arrays it has a *slot*, its place among the pages
that exist, ascending; with all of RAM in one piece from address 0 on the two are equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from vring import bitmap
from vring._vring import ffi, lib
from vring.bitmap import Bitmap
from vring.errors import UsageError

__all__ = ["PAGE_SHIFT", "PAGE_SIZE", "PageLayout", "PageSet", "byte_ranges"]

U64 = npt.NDArray[np.uint64]
PAGE_SIZE: int = lib.DIRTY_PAGE_SIZE
PAGE_SHIFT = PAGE_SIZE.bit_length() - 1
MAX_PAGE = 1 << 64 - PAGE_SHIFT


class PageLayout:
    """The pages that exist, and the slot of each. Immutable.

    Parameters
    ----------
    runs
        ``(first page, pages)`` pairs in any order, or one number for pages 0, 1, ...

    Raises
    ------
    UsageError
        If pages are given twice, or have numbers that no 64-bit address has.
    """

    __slots__ = ("_ends", "_firsts", "_keep", "_slots", "c_table", "count", "runs")

    def __init__(self, runs: int | Iterable[tuple[int, int]]) -> None:
        joined: list[tuple[int, int]] = []
        for first, pages in [(0, runs)] if isinstance(runs, int) else sorted(runs):
            end = joined[-1][0] + joined[-1][1] if joined else 0
            if first < end or pages < 0 or first + pages > MAX_PAGE:
                raise UsageError(f"pages {first:#x}+{pages:#x} are given twice, or are not below {MAX_PAGE:#x}")
            if joined and first == end:
                joined[-1] = joined[-1][0], joined[-1][1] + pages
            elif pages:
                joined.append((first, pages))
        self.runs: tuple[tuple[int, int], ...] = tuple(joined)
        """``(first page, pages)`` of each run, ascending; runs do not touch."""
        self.count = sum(pages for _, pages in joined)
        """Number of pages: the length of arrays by slot."""
        self._firsts: U64 = np.array([first for first, _ in joined], np.uint64)
        self._ends: U64 = np.array([first + pages for first, pages in joined], np.uint64)
        self._slots: U64 = np.concatenate(([0], np.cumsum(self._ends - self._firsts))).astype(np.uint64)[:-1]
        rows = [(first, pages, int(slot)) for (first, pages), slot in zip(joined, self._slots, strict=True)]
        self._keep = ffi.new("struct dirty_run[]", rows)
        self.c_table = ffi.new("struct dirty_layout *", (self._keep, len(rows)))
        """The same for C (``struct dirty_layout *``); lives as long as this object."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PageLayout) and self.runs == other.runs

    def __hash__(self) -> int:
        return hash(self.runs)

    def __repr__(self) -> str:
        return f"PageLayout([{', '.join(f'({first:#x}, {pages:#x})' for first, pages in self.runs)}])"

    def has(self, first: int, pages: int = 1) -> bool:
        """Whether all of these pages exist."""
        return self._find(first, pages) is not None

    def covers(self, other: PageLayout) -> bool:
        """Whether every page of `other` exists here too."""
        return all(self.has(first, pages) for first, pages in other.runs)

    def slot(self, first: int, pages: int = 1) -> int:
        """Return the slot of page `first`; the `pages` pages from there on have the slots that follow.

        Raises
        ------
        UsageError
            If they do not all exist.
        """
        if (found := self._find(first, pages)) is None:
            known = ", ".join(f"{f:#x}..{f + n - 1:#x}" for f, n in self.runs) or "none"
            raise UsageError(f"pages {first:#x}+{pages:#x} are not all among those that exist ({known})")
        return found

    def slots(self, pages: U64) -> npt.NDArray[np.int64]:
        """Return the slot of each of these pages.

        Raises
        ------
        UsageError
            If one does not exist.
        """
        wanted = np.asarray(pages, np.uint64)
        if len(self.runs) == 1 and self.runs[0][0] == 0:
            if wanted.size and int(wanted.max()) >= self.count:
                self.slot(int(wanted.max()))
            return wanted.astype(np.int64)
        row = np.searchsorted(self._firsts, wanted, side="right") - 1
        bad = row < 0
        if self.runs:
            bad |= wanted >= self._ends[row]
        if bad.any():
            self.slot(int(wanted[bad][0]))
        return (wanted - self._firsts[row] + self._slots[row]).astype(np.int64)

    def numbers(self, slots: npt.NDArray[Any]) -> U64:
        """Return the number of the page in each of these slots, which must be below `count`."""
        at = np.asarray(slots).astype(np.uint64)
        row = np.searchsorted(self._slots, at, side="right") - 1
        found: U64 = at - self._slots[row] + self._firsts[row]
        return found

    def pick(self, by_number: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the items of an array with one for each page number (so with room for holes) that pages here have.

        Raises
        ------
        UsageError
            If it is too short.
        """
        if self.runs and len(by_number) < sum(self.runs[-1]):
            raise UsageError(f"{len(by_number)} items for page numbers up to {sum(self.runs[-1]) - 1:#x}")
        return np.concatenate([by_number[:0], *(by_number[first : first + pages] for first, pages in self.runs)])

    def _find(self, first: int, pages: int) -> int | None:
        if not 0 <= first < MAX_PAGE or pages < 0:
            return None
        row = int(np.searchsorted(self._firsts, np.uint64(first), side="right")) - 1
        if row < 0 or first + pages > int(self._ends[row]):
            return None
        return int(self._slots[row]) + first - int(self._firsts[row])


class PageSet:
    """A set of pages of one layout: a bitmap by slot.

    Parameters
    ----------
    layout
        The pages that exist.
    words
        The bitmap, to share it with somebody; None: an empty one.
    """

    __slots__ = ("layout", "words")

    def __init__(self, layout: PageLayout, words: Bitmap | None = None) -> None:
        self.layout = layout
        self.words: Bitmap = bitmap.empty(layout.count) if words is None else words
        """Bit ``s % 64`` of item ``s // 64`` is the page in slot ``s``."""
        if len(self.words) * 64 < layout.count:
            raise UsageError(f"a bitmap of {len(self.words) * 64} bits for {layout.count} pages")

    def __len__(self) -> int:
        return bitmap.count(self.words)

    def __bool__(self) -> bool:
        return bool(self.words.any())

    def __contains__(self, page: int) -> bool:
        if not self.layout.has(page):
            return False
        slot = self.layout.slot(page)
        return bool(int(self.words[slot // 64]) >> slot % 64 & 1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PageSet) and self.layout == other.layout and np.array_equal(self.words, other.words)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<PageSet: {len(self)} of {self.layout.count} pages>"

    def __ior__(self, other: PageSet) -> PageSet:
        self.words |= self._same(other)
        return self

    def __iand__(self, other: PageSet) -> PageSet:
        self.words &= self._same(other)
        return self

    def __isub__(self, other: PageSet) -> PageSet:
        self.words &= ~self._same(other)
        return self

    def __sub__(self, other: PageSet) -> PageSet:
        return PageSet(self.layout, self.words & ~self._same(other))

    def __xor__(self, other: PageSet) -> PageSet:
        return PageSet(self.layout, self.words ^ self._same(other))

    def _same(self, other: PageSet) -> Bitmap:
        if other.layout != self.layout:
            raise UsageError(f"sets of pages of two memories: {self.layout!r} and {other.layout!r}")
        return other.words

    def copy(self) -> PageSet:
        """Return another set with the same pages."""
        return PageSet(self.layout, self.words.copy())

    def clear(self) -> None:
        """Take all pages out."""
        self.words[:] = 0

    def set_run(self, first: int, pages: int = 1) -> int:
        """Put pages ``[first, first + pages)`` in; return how many were not in it.

        Raises
        ------
        UsageError
            If they do not all exist.
        """
        return bitmap.set_run(self.words, self.layout.slot(first, pages), pages)

    def clear_run(self, first: int, pages: int = 1) -> int:
        """Take pages ``[first, first + pages)`` out; return how many were in it.

        Raises
        ------
        UsageError
            If they do not all exist.
        """
        return bitmap.clear_run(self.words, self.layout.slot(first, pages), pages)

    def set_ranges(self, addr: U64, length: U64) -> int:
        """Put in the pages wholly inside the byte ranges ``addr[i], length[i]``; return how many were not in it.

        What does not exist is left out.

        Raises
        ------
        UsageError
            If the arrays are of two lengths.
        """
        return int(lib.dirty_set_ranges(bitmap.words(self.words), self.layout.c_table, *byte_ranges(addr, length)))

    def clear_ranges(self, addr: U64, length: U64) -> int:
        """Take out the pages wholly inside the byte ranges ``addr[i], length[i]``; return how many were in it.

        A page that a range covers only in part stays; what does not exist is left alone.

        Raises
        ------
        UsageError
            If the arrays are of two lengths.
        """
        return int(lib.dirty_clear_ranges(bitmap.words(self.words), self.layout.c_table, *byte_ranges(addr, length)))

    def set_bools(self, pages: npt.NDArray[np.bool_]) -> None:
        """Put in the pages of an array of one bool for each slot."""
        packed = np.packbits(pages[: self.layout.count], bitorder="little")
        self.words.view(np.uint8)[: packed.size] |= packed

    def to_bools(self) -> npt.NDArray[np.bool_]:
        """Return one bool for each slot."""
        return bitmap.to_bools(self.words, self.layout.count)

    def bools_of(self, first: int, pages: int) -> npt.NDArray[np.bool_]:
        """Return one bool for each of the pages ``[first, first + pages)``, which must all exist."""
        slot = self.layout.slot(first, pages) if pages else 0
        words = self.words[slot // 64 : (slot + pages + 63) // 64]
        return bitmap.to_bools(words, slot % 64 + pages)[slot % 64 :]

    def numbers(self) -> U64:
        """Return the numbers of the pages, ascending."""
        return self.layout.numbers(bitmap.pages_of(self.words))

    def runs(self) -> tuple[U64, U64]:
        """Return the runs of pages as arrays of first page numbers and of lengths in pages."""
        firsts, counts, slot = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)], 0
        for first, pages in self.layout.runs:
            found, lengths = bitmap.runs(self.words, slot, slot + pages)
            firsts.append(found + np.uint64(first) - np.uint64(slot))
            counts.append(lengths)
            slot += pages
        return np.concatenate(firsts), np.concatenate(counts)

    def within(self, layout: PageLayout) -> PageSet:
        """Return the pages that exist in another layout too, as a set of that one."""
        moved = PageSet(layout)
        if layout == self.layout:
            moved.words[:] = self.words[: len(moved.words)]
        else:
            firsts, counts = self.runs()
            moved.set_ranges(firsts << np.uint64(PAGE_SHIFT), counts << np.uint64(PAGE_SHIFT))
        return moved


def byte_ranges(addr: U64, length: U64) -> tuple[Any, Any, int]:
    """Return byte ranges as C takes them: two pointers, which keep their arrays alive, and how many there are.

    Raises
    ------
    UsageError
        If the arrays are of two lengths.
    """
    a, n = np.ascontiguousarray(addr, dtype=np.uint64), np.ascontiguousarray(length, dtype=np.uint64)
    if a.shape != n.shape or a.ndim != 1:
        raise UsageError(f"byte ranges of {a.size} addresses and {n.size} lengths")
    return bitmap.words(a), bitmap.words(n), a.size
