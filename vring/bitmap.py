"""Bitmaps as numpy arrays over the C functions of ``csrc/dirty``, and digests of pages.

A bitmap is an array of uint64, bit ``p % 64`` of word ``p // 64`` stands for page ``p``. What a bit means to a guest's
memory with holes is `vring.pages.PageSet`'s matter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vring._vring import ffi, lib

__all__ = [
    "Bitmap",
    "clear_run",
    "count",
    "digest_pages",
    "empty",
    "pages_of",
    "runs",
    "set_run",
    "to_bools",
]

Bitmap = npt.NDArray[np.uint64]
_RUNS = 4096


def words(array: npt.NDArray[np.uint64]) -> Any:
    """Return the C pointer ``uint64_t *`` of a contiguous uint64 array. The pointer keeps the array alive."""
    return ffi.from_buffer("uint64_t[]", array)


def empty(pages: int) -> Bitmap:
    """Return a bitmap with room for `pages` pages, none set."""
    return np.zeros((pages + 63) // 64, dtype=np.uint64)


def count(bitmap: Bitmap) -> int:
    """Return how many pages are set."""
    return int(lib.dirty_count(words(bitmap), 0, bitmap.size * 64))


def set_run(bitmap: Bitmap, first: int, pages: int) -> int:
    """Set pages ``[first, first + pages)``; return how many were not set."""
    _check(bitmap, first, first + pages)
    return int(lib.dirty_set(words(bitmap), first, pages))


def clear_run(bitmap: Bitmap, first: int, pages: int) -> int:
    """Clear pages ``[first, first + pages)``; return how many were set."""
    _check(bitmap, first, first + pages)
    return int(lib.dirty_clear(words(bitmap), first, pages))


def _check(bitmap: Bitmap, first: int, end: int) -> None:
    if not 0 <= first <= end <= bitmap.size * 64:
        raise IndexError(f"pages {first}..{end} are outside a bitmap of {bitmap.size * 64}")


def runs(
    bitmap: Bitmap, first: int = 0, end: int | None = None
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Return the runs of set pages in ``[first, end)`` as arrays of first pages and of lengths in pages."""
    stop = bitmap.size * 64 if end is None else end
    _check(bitmap, first, stop)
    resume = ffi.new("uint64_t *")
    starts: list[npt.NDArray[np.uint64]] = []
    lengths: list[npt.NDArray[np.uint64]] = []
    at = first
    while at < stop:
        s, n = np.empty(_RUNS, np.uint64), np.empty(_RUNS, np.uint64)
        found = lib.dirty_runs(words(bitmap), at, stop, words(s), words(n), _RUNS, resume)
        starts.append(s[:found])
        lengths.append(n[:found])
        at = resume[0]
    if not starts:
        return np.empty(0, np.uint64), np.empty(0, np.uint64)
    return np.concatenate(starts), np.concatenate(lengths)


def to_bools(bitmap: Bitmap, pages: int) -> npt.NDArray[np.bool_]:
    """Return one bool per page for the first `pages` pages."""
    _check(bitmap, 0, pages)
    return np.unpackbits(bitmap.view(np.uint8), bitorder="little", count=pages).astype(np.bool_)


def pages_of(bitmap: Bitmap) -> npt.NDArray[np.int64]:
    """Return the numbers of all set pages, ascending."""
    return np.flatnonzero(np.unpackbits(bitmap.view(np.uint8), bitorder="little"))


def digest_pages(
    address: int, pages: int, out: npt.NDArray[np.uint64], present: Bitmap | None = None, first: int = 0
) -> None:
    """Digest `pages` pages at host address `address` into ``out[:pages]``; 0 means all zero.

    Parameters
    ----------
    address
        Where the first page is mapped in this process.
    pages
        How many pages.
    out
        Array of at least `pages` uint64.
    present
        Pages whose bit (counted from `first`) is clear are holes of a sparse file: digest 0, never read.
    first
        Bit of `present` for the first page.
    """
    if out.size < pages or out.dtype != np.uint64 or not out.flags.c_contiguous:
        raise ValueError("out must be a contiguous uint64 array of at least `pages` items")
    if present is not None:
        _check(present, first, first + pages)
    held = ffi.NULL if present is None else words(present)
    lib.dirty_digest_pages(ffi.cast("uint8_t *", address), pages, held, first, words(out))
