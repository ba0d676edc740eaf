"""What is in guest memory: which pages have memory behind them, and their digests. Reads only, allocates nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from vring import bitmap
from vring._vring import lib
from vring.memory import PAGE_SHIFT, GuestMemory
from vring.pages import PageSet

__all__ = ["digests_in_order", "digests_of", "look_again", "populated"]


def populated(memory: GuestMemory) -> PageSet:
    """Return the pages that have memory behind them, by walking SEEK_DATA; nothing is read, so nothing is allocated.

    Regions without a descriptor (an emulator's own buffers) count as populated throughout.

    Raises
    ------
    OSError
        If an object cannot be asked.
    """
    memory.check_open()
    present = PageSet(memory.page_layout)
    for region in memory.regions:
        first, pages = region.gpa >> PAGE_SHIFT, region.size >> PAGE_SHIFT
        if region.fd < 0:
            present.set_run(first, pages)
        else:
            slot = memory.page_layout.slot(first, pages)
            _check(lib.dirty_present_scan(region.fd, region.offset, region.size, slot, bitmap.words(present.words)))
    return present


def look_again(memory: GuestMemory, present: PageSet, among: PageSet | None) -> None:
    """Correct `present` for some pages: those that were written, or dropped, since it was right for all.

    Parameters
    ----------
    memory
        The guest's.
    present
        As `populated` returned it; changed in place.
    among
        Pages to look at. Where they are many, or for None, all are.

    Raises
    ------
    OSError
        If an object cannot be asked.
    """
    if among is None or len(among) > memory.size >> PAGE_SHIFT + 2:  # one page costs four times as much as in a walk
        present.words[:] = populated(memory).words
        return
    memory.check_open()
    words = bitmap.words(among.words), bitmap.words(present.words)
    for region in memory.regions:
        if region.fd >= 0:
            first, pages = region.gpa >> PAGE_SHIFT, region.size >> PAGE_SHIFT
            slot = memory.page_layout.slot(first, pages)
            _check(lib.dirty_present_check(region.fd, region.offset, slot, pages, *words))


def _check(result: int) -> None:
    if result < 0:
        raise OSError(-result, f"guest memory: {os.strerror(-result)}")


def digests_in_order(memory: GuestMemory, most: int = 1 << 17) -> Iterator[npt.NDArray[np.uint64]]:
    """Yield the digests of all pages of RAM by slot, at most `most` at a time; holes of sparse objects are not read."""
    present = populated(memory)
    for region in memory.regions:
        pages = region.size >> PAGE_SHIFT
        slot = memory.page_layout.slot(region.gpa >> PAGE_SHIFT, pages)
        for at in range(0, pages, most):
            digests = np.empty(min(most, pages - at), np.uint64)
            address = memory.host_address(region.gpa + (at << PAGE_SHIFT), len(digests) << PAGE_SHIFT)
            bitmap.digest_pages(address, len(digests), digests, present.words, slot + at)
            yield digests


def digests_of(memory: GuestMemory, out: npt.NDArray[np.uint64] | None = None) -> npt.NDArray[np.uint64]:
    """Return one digest for each page of RAM, by slot; holes of a sparse object are not read."""
    digests = np.empty(memory.page_layout.count, np.uint64) if out is None else out
    at = 0
    for part in digests_in_order(memory):
        digests[at : at + len(part)] = part
        at += len(part)
    return digests
