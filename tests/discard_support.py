"""What the discard tests share: memory of each kind, filled; huge pages got from the machine if it lets us."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np

from vring.backing import huge_page_counts
from vring.memory import PAGE_SIZE, GuestMemory, Region

HUGE = 2 << 20
NR_HUGE = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


def ranges(*pairs):
    """(gpa, length) pairs as the device passes them."""
    return tuple(np.array(side, dtype=np.uint64) for side in zip(*pairs, strict=True))


def fill(memory):
    """Give every page a content of its own that is never zero."""
    for region, array in zip(memory.regions, memory.arrays, strict=True):
        words = array.view(np.uint64).reshape(-1, PAGE_SIZE // 8)
        words[:] = (np.arange(len(words), dtype=np.uint64) + np.uint64((region.gpa >> 12) + 1))[:, None]


def zero_pages(memory):
    """Guest page numbers that read as zero (looking maps them: ask for residency first)."""
    found = set()
    for region, array in zip(memory.regions, memory.arrays, strict=True):
        pages = array.reshape(-1, PAGE_SIZE)
        found |= {(region.gpa >> 12) + int(i) for i in np.flatnonzero(~pages.any(axis=1))}
    return found


def wrong_pages(memory):
    """Guest page numbers that hold neither zero nor what `fill` put there."""
    found = set()
    for region, array in zip(memory.regions, memory.arrays, strict=True):
        words = array.view(np.uint64).reshape(-1, PAGE_SIZE // 8)
        wanted = (np.arange(len(words), dtype=np.uint64) + np.uint64((region.gpa >> 12) + 1))[:, None]
        bad = ~((words == wanted).all(axis=1) | (words == 0).all(axis=1))
        found |= {(region.gpa >> 12) + int(i) for i in np.flatnonzero(bad)}
    return found


@contextlib.contextmanager
def huge_pages(count):
    """Make `count` more huge pages of 2 MiB; yield whether they are there. Taken back afterwards."""
    before = huge_page_counts(HUGE)
    added = 0
    try:
        with contextlib.suppress(OSError):
            if before is not None:
                NR_HUGE.write_text(str(before[0] + count))
                added = int(NR_HUGE.read_text()) - before[0]
        now = huge_page_counts(HUGE)
        yield now is not None and now[1] >= count
    finally:
        if added > 0:
            NR_HUGE.write_text(str(max(int(NR_HUGE.read_text()) - added, 0)))


def fake_huge(size, gpa=0, page_size=HUGE):
    """Shared memory that is said to have large host pages: the rules without the machine's huge pages."""
    fd = os.memfd_create("large pages")
    os.ftruncate(fd, size)
    try:
        return GuestMemory.from_fds([Region(gpa, size, fd, page_size=page_size)])
    finally:
        os.close(fd)
