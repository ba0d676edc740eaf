"""What is in guest memory: which pages have memory behind them, and their digests. Reads only, allocates nothing."""

from __future__ import annotations

import errno
import os

import numpy as np
import numpy.typing as npt

from vring import bitmap
from vring.bitmap import Bitmap
from vring.memory import PAGE_SHIFT, PAGE_SIZE, GuestMemory

__all__ = ["digest_range", "digests_of", "populated"]


def populated(memory: GuestMemory) -> Bitmap:
    """Return the pages that have memory behind them, by walking SEEK_DATA; nothing is read, so nothing is allocated.

    Regions without a descriptor (an emulator's own buffers) count as populated throughout.
    """
    present = bitmap.empty(memory.page_span)
    for region in memory.regions:
        if region.fd < 0:
            bitmap.set_run(present, region.gpa >> PAGE_SHIFT, region.size >> PAGE_SHIFT)
            continue
        at, end = region.offset, region.offset + region.size
        while at < end:
            try:
                data = os.lseek(region.fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # only a hole up to the end of the file
                    break
                raise
            if data >= end:
                break
            hole = min(os.lseek(region.fd, data, os.SEEK_HOLE), end)
            first = (data - region.offset + region.gpa) >> PAGE_SHIFT
            last = (hole - region.offset + region.gpa + PAGE_SIZE - 1) >> PAGE_SHIFT
            bitmap.set_run(present, first, last - first)
            at = hole
    return present


def digest_range(memory: GuestMemory, present: Bitmap, first: int, digests: npt.NDArray[np.uint64]) -> None:
    """Write the digests of pages ``first, first + 1, ...`` into `digests`, as many as it has room for.

    Pages that are not RAM get 0, and so do those that are clear in `present`, which are not read.
    """
    digests[:] = 0
    for region in memory.regions:
        start, end = max(first, region.gpa >> PAGE_SHIFT), min(first + len(digests), region.end >> PAGE_SHIFT)
        if start < end:
            address = memory.host_address(start << PAGE_SHIFT, (end - start) << PAGE_SHIFT)
            bitmap.digest_pages(address, end - start, digests[start - first : end - first], present, start)


def digests_of(memory: GuestMemory, out: npt.NDArray[np.uint64] | None = None) -> npt.NDArray[np.uint64]:
    """Return one digest per page of `memory` (holes between regions: 0); holes of a sparse object are not read."""
    digests = np.zeros(memory.page_span, np.uint64) if out is None else out
    present = populated(memory)
    for region in memory.regions:
        first, pages = region.gpa >> PAGE_SHIFT, region.size >> PAGE_SHIFT
        bitmap.digest_pages(memory.host_address(region.gpa), pages, digests[first : first + pages], present, first)
    return digests
