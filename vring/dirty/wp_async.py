"""Dirty log by userfaultfd WP_ASYNC and PAGEMAP_SCAN (Linux 6.7): the kernel notes each first write to a page.

The process that owns the mapping registers it (`WriteProtection`); whoever migrates it scans its pagemap
(`WpAsyncDirtyLog`). Covers stores of that process through that mapping, also those the kernel makes for it while the
call lasts (`recv`, `read` from the page cache). Not seen: a second mapping, another process, a forked child; the
mapping is therefore MADV_DONTFORK and what a device writes goes into a `vring.dirty.software.SoftwareDirtyLog` beside
it. Nor is data seen that lands in pages which the kernel has pinned (O_DIRECT reads, registered buffers of io_uring):
they count as written when they are pinned, not when the data comes. Whoever does such I/O marks its pages in that same
log when it has completed.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

from vring import bitmap
from vring._vring import lib
from vring.backing import close_with
from vring.errors import MissingFacility, UsageError
from vring.memory import PAGE_SHIFT, PAGE_SIZE, GuestMemory
from vring.pages import PageLayout, PageSet

__all__ = ["TrackedRange", "WpAsyncDirtyLog", "WriteProtection", "probe"]

_NEEDS = "it needs Linux 6.7 or newer with CONFIG_USERFAULTFD and CONFIG_PTE_MARKER_UFFD_WP"


@dataclass(frozen=True, slots=True)
class TrackedRange:
    """Where a region of guest memory is mapped in the tracked process."""

    gpa: int
    """First guest physical address, bytes."""
    size: int
    """Bytes."""
    address: int
    """Start of the mapping in the tracked process."""


class WriteProtection:
    """Registers this process's mapping of guest memory for asynchronous write protection.

    The descriptor stays open as long as this object: closing it ends the tracking, so `close` only when nobody scans.

    Raises
    ------
    MissingFacility
        If the kernel cannot do it; the message says what it needs.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._fd = lib.dirty_uffd_open()
        if self._fd < 0:
            raise MissingFacility(f"dirty log wp-async: userfaultfd WP_ASYNC: {os.strerror(-self._fd)}; {_NEEDS}")
        self._close_fd = close_with(self, (self._fd,))
        self.ranges = []
        for region in memory.regions:
            address = memory.host_address(region.gpa, region.size)
            error = lib.dirty_uffd_register(self._fd, address, region.size)
            if error:
                self.close()
                raise MissingFacility(
                    f"dirty log wp-async: cannot register guest memory: {os.strerror(-error)}; {_NEEDS}"
                )
            self.ranges.append(TrackedRange(region.gpa, region.size, address))

    def close(self) -> None:
        """End the tracking."""
        self._close_fd()


class WpAsyncDirtyLog:
    """Pages that a process wrote in its registered mapping of guest memory.

    Direct and asynchronous I/O into that memory needs a `vring.dirty.software.SoftwareDirtyLog` beside this log, joined
    by `vring.dirty.combined.CombinedLog` and marked when the I/O has completed: here its pages count as written when it
    is submitted, and a sync before the data lands would be the last to report them.

    Parameters
    ----------
    pid
        The process that made a `WriteProtection`; its pagemap must be readable (same user).
    ranges
        Its mappings.
    layout
        The pages of guest memory.
    """

    name = "wp-async"
    needs_frozen_guest = False
    hints_safe = True

    def __init__(self, pid: int, ranges: Sequence[TrackedRange], layout: PageLayout) -> None:
        self.layout = layout
        self._ranges = list(ranges)
        for r in self._ranges:
            said = f"dirty log wp-async: process {pid} tracks {r.gpa:#x}+{r.size:#x}"
            if not 0 <= r.address < 1 << 64 or (r.gpa | r.size | r.address) & PAGE_SIZE - 1:
                raise MissingFacility(f"{said} at {r.address:#x}, which is not made of whole pages")
            if r.size <= 0 or not layout.has(r.gpa >> PAGE_SHIFT, r.size >> PAGE_SHIFT):
                raise MissingFacility(f"{said}, outside guest memory")
        try:
            self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise MissingFacility(
                f"dirty log wp-async: cannot open the pagemap of process {pid}: {error.strerror}"
            ) from error
        self._close_pagemap = close_with(self, (self._pagemap,))

    def check_memory(self, memory: GuestMemory) -> None:
        """Raise `UsageError` if the process tracks only a part of `memory`."""
        if not PageLayout((r.gpa >> PAGE_SHIFT, r.size >> PAGE_SHIFT) for r in self._ranges).covers(memory.page_layout):
            raise UsageError(f"dirty log wp-async: the process does not track all of memory ({memory.describe()})")

    def start(self) -> None:
        """Forget what was written so far (the first scan also reports pages that were never populated)."""
        self.sync(PageSet(self.layout))

    def sync(self, into: PageSet) -> int:
        """Add the pages written since the last sync to `into` and re-protect them, in one step per page.

        Raises
        ------
        UsageError
            If `into` lacks a page that is tracked.
        MissingFacility
            If the pages cannot be scanned; what was written then is lost to this log.
        """
        written = 0
        slots = [into.layout.slot(r.gpa >> PAGE_SHIFT, r.size >> PAGE_SHIFT) for r in self._ranges]
        for r, slot in zip(self._ranges, slots, strict=True):
            n = lib.dirty_pagemap_scan(self._pagemap, r.address, r.size, slot, bitmap.words(into.words))
            if n < 0:
                raise MissingFacility(
                    f"dirty log wp-async: PAGEMAP_SCAN: {os.strerror(-n)} (is the process gone?); {_NEEDS}"
                )
            written += n
        return written

    def stop(self) -> None:
        """Close the pagemap."""
        self._close_pagemap()
        self._pagemap = -1


def probe() -> None:
    """Try the log on a small mapping of this process, with a rewrite of the same content.

    Raises
    ------
    MissingFacility
        If it does not work here; the message says why.
    """
    with GuestMemory.create(16 * mmap.PAGESIZE, name="wp-async-probe") as memory:
        memory.write(0, b"\x01" * memory.size)
        protection = WriteProtection(memory)
        log = WpAsyncDirtyLog(os.getpid(), protection.ranges, memory.page_layout)
        try:
            log.start()
            memory.write(5 << PAGE_SHIFT, b"\x01")
            seen = PageSet(memory.page_layout)
            log.sync(seen)
            again = PageSet(memory.page_layout)
            log.sync(again)
            if (found := seen.numbers().tolist()) != [5] or again:
                raise MissingFacility(f"dirty log wp-async: page 5 was written, the scan reports {found}; {_NEEDS}")
        finally:
            log.stop()
            protection.close()
