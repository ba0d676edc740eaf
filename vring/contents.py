"""What is in guest memory: which pages have memory behind them, and their digests. Reads only, allocates nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from vring import bitmap
from vring._vring import lib
from vring.bitmap import Bitmap
from vring.memory import PAGE_SHIFT, GuestMemory

__all__ = ["digests_in_order", "digests_of", "look_again", "populated"]


def populated(memory: GuestMemory) -> Bitmap:
    """Return the pages that have memory behind them, by walking SEEK_DATA; nothing is read, so nothing is allocated.

    Regions without a descriptor (an emulator's own buffers) count as populated throughout.

    Raises
    ------
    OSError
        If an object cannot be asked.
    """
    present = bitmap.empty(memory.page_span)
    for region in memory.regions:
        first = region.gpa >> PAGE_SHIFT
        if region.fd < 0:
            bitmap.set_run(present, first, region.size >> PAGE_SHIFT)
        else:
            _check(lib.dirty_present_scan(region.fd, region.offset, region.size, first, bitmap.words(present)))
    return present


def look_again(memory: GuestMemory, present: Bitmap, among: Bitmap | None) -> None:
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
    if (
        among is None or bitmap.count(among) > memory.size >> PAGE_SHIFT + 2
    ):  # one page costs four times as much as in a walk of all
        present[:] = populated(memory)
        return
    for region in memory.regions:
        if region.fd >= 0:
            first, pages = region.gpa >> PAGE_SHIFT, region.size >> PAGE_SHIFT
            words = bitmap.words(among), bitmap.words(present)
            _check(lib.dirty_present_check(region.fd, region.offset, first, pages, *words))


def _check(result: int) -> None:
    if result < 0:
        raise OSError(-result, f"guest memory: {os.strerror(-result)}")


def digests_in_order(memory: GuestMemory, most: int = 1 << 17) -> Iterator[npt.NDArray[np.uint64]]:
    """Yield the digests of all pages of RAM in ascending order, at most `most` at a time; holes between regions have
    none, holes of a sparse object 0 and are not read.
    """
    present = populated(memory)
    for region in memory.regions:
        first, pages = region.gpa >> PAGE_SHIFT, region.size >> PAGE_SHIFT
        for at in range(0, pages, most):
            digests = np.zeros(min(most, pages - at), np.uint64)
            address = memory.host_address(region.gpa + (at << PAGE_SHIFT), len(digests) << PAGE_SHIFT)
            bitmap.digest_pages(address, len(digests), digests, present, first + at)
            yield digests


def digests_of(memory: GuestMemory, out: npt.NDArray[np.uint64] | None = None) -> npt.NDArray[np.uint64]:
    """Return one digest per page of `memory` (holes between regions: 0); holes of a sparse object are not read."""
    digests = np.zeros(memory.page_span, np.uint64) if out is None else out
    present = populated(memory)
    for region in memory.regions:
        first, pages = region.gpa >> PAGE_SHIFT, region.size >> PAGE_SHIFT
        bitmap.digest_pages(memory.host_address(region.gpa), pages, digests[first : first + pages], present, first)
    return digests
