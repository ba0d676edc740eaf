"""Dirty log of pages that their writer marks.

For emulators (as TCG does), for what a device itself writes, and for I/O that lands where the kernel's trackers do not
see it.
"""

from __future__ import annotations

import mmap
import os

import numpy as np
import numpy.typing as npt

from vring import bitmap
from vring._vring import lib
from vring.bitmap import Bitmap
from vring.errors import UsageError
from vring.memory import PAGE_SHIFT, GuestMemory
from vring.pages import PageLayout, PageSet, byte_ranges

__all__ = ["SoftwareDirtyLog"]


class SoftwareDirtyLog:
    """A bitmap that the writer marks *after* each store, shared between threads or processes.

    Parameters
    ----------
    pages
        The pages it is for: `GuestMemory.page_layout`; or a number, for page numbers 0, 1, ... (holes of the memory
        counted), where a writer in C marks the bit of a page's number.
    fd
        A memory object of at least ``bytes_for(pages)`` bytes to share the log between processes; without one the log
        is private to this process. The descriptor is not kept.

    Notes
    -----
    `mark` stores with release order and `sync` fetches and clears each word in one atomic step with acquire order, so
    a write that comes between is seen by this sync or by the next one.
    """

    name = "software"
    needs_frozen_guest = False
    hints_safe = True

    def __init__(self, pages: int | PageLayout, fd: int | None = None) -> None:
        self.layout = pages if isinstance(pages, PageLayout) else PageLayout(pages)
        """The pages it has a bit for."""
        pages = self.layout.count
        size = self.bytes_for(pages)
        if fd is not None and os.fstat(fd).st_size < size:
            raise UsageError(
                f"a dirty log of {pages} pages needs {size} bytes of shared memory, not {os.fstat(fd).st_size}"
            )
        self._map = mmap.mmap(-1 if fd is None else fd, size)
        self._log: Bitmap = np.frombuffer(self._map, dtype=np.uint64, count=(pages + 63) // 64)
        self._words = bitmap.words(self._log)

    @property
    def bits(self) -> Bitmap:
        """The log itself, bits by slot, for a writer that marks it in C (with release order, as `mark`)."""
        return self._log

    @classmethod
    def for_memory(cls, memory: GuestMemory) -> SoftwareDirtyLog:
        """Return a private log for all pages of `memory`, and no others."""
        return cls(memory.page_layout)

    @staticmethod
    def bytes_for(pages: int) -> int:
        """Return the size in bytes of the shared memory for a log of `pages` pages."""
        return max((pages + 63) // 64 * 8, mmap.PAGESIZE)

    def mark(self, first: int, pages: int = 1) -> None:
        """Log pages as written. Call it after the store, and for I/O in the background after its completion.

        Parameters
        ----------
        first
            Page number: guest address divided by 4096.
        pages
            How many.

        Raises
        ------
        UsageError
            If they are not all pages that the log is for.
        """
        lib.dirty_log_mark(self._words, self.layout.slot(first, pages), pages)

    def mark_range(self, gpa: int, length: int) -> None:
        """Log all pages that a range of bytes touches, as `mark`.

        Parameters
        ----------
        gpa
            Guest address of the first byte.
        length
            Bytes; 0 logs nothing.

        Raises
        ------
        UsageError
            If they are not all inside pages that the log is for.
        """
        if length > 0:
            self.mark(gpa >> PAGE_SHIFT, ((gpa + length - 1) >> PAGE_SHIFT) - (gpa >> PAGE_SHIFT) + 1)

    def mark_ranges(self, addr: npt.NDArray[np.uint64], length: npt.NDArray[np.uint64]) -> None:
        """Log all pages that the byte ranges ``addr[i], length[i]`` touch, as far as the log is for them."""
        lib.dirty_log_mark_ranges(self._words, self.layout.c_table, *byte_ranges(addr, length))

    def check_memory(self, memory: GuestMemory) -> None:
        """Raise `UsageError` if the log has no bit for a page of `memory`."""
        if not self.layout.covers(memory.page_layout):
            raise UsageError(
                f"a dirty log for {self.layout!r} does not cover all of memory ({memory.describe()}): "
                "make it with SoftwareDirtyLog.for_memory"
            )

    def start(self) -> None:
        """Forget what was marked so far."""
        self.sync(PageSet(self.layout))

    def sync(self, into: PageSet) -> int:
        """Add the pages marked since the last sync to `into` and clear them; return how many there were.

        Raises
        ------
        UsageError
            If `into` is of other memory, or pages were marked that this memory has not: whoever marks counts them
            from another address than 0.
        """
        if into.layout != self.layout:
            return self._sync_to_other(into)
        return int(lib.dirty_log_fetch(self._words, bitmap.words(into.words), self.layout.count))

    def _sync_to_other(self, into: PageSet) -> int:
        """As `sync`, where the log has bits for more pages than there are."""
        if not self.layout.covers(into.layout):
            raise UsageError(f"a dirty log for {self.layout!r} cannot be fetched into a set of {into.layout!r}")
        marked = PageSet(self.layout)
        self.sync(marked)
        here = marked.within(into.layout)
        into |= here
        if len(here) != len(marked):
            outside = (marked - here.within(self.layout)).numbers()
            raise UsageError(f"{len(outside)} pages were marked as written that are no RAM, the first {outside[0]:#x}")
        return len(here)

    def stop(self) -> None:
        """Nothing to give back: the log may be marked and synced again."""
