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
from vring.memory import GuestMemory

__all__ = ["SoftwareDirtyLog"]


class SoftwareDirtyLog:
    """A bitmap that the writer marks *after* each store, shared between threads or processes.

    Parameters
    ----------
    pages
        Length of the bitmap: `GuestMemory.page_span` of the memory it is for.
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

    def __init__(self, pages: int, fd: int | None = None) -> None:
        self.pages = pages
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
        """The log itself, for a writer that marks it in C (with release order, as `mark`)."""
        return self._log

    @classmethod
    def for_memory(cls, memory: GuestMemory) -> SoftwareDirtyLog:
        """Return a private log as long as `memory`."""
        return cls(memory.page_span)

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
            If they are not all inside the log.
        """
        if first < 0 or first + pages > self.pages:
            raise UsageError(f"pages {first}..{first + pages} are outside a dirty log of {self.pages} pages")
        lib.dirty_log_mark(self._words, first, pages)

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
            If they are not all inside the log.
        """
        if length > 0:
            self.mark(gpa >> 12, ((gpa + length - 1) >> 12) - (gpa >> 12) + 1)

    def mark_ranges(self, addr: npt.NDArray[np.uint64], length: npt.NDArray[np.uint64]) -> None:
        """Log all pages that the byte ranges ``addr[i], length[i]`` touch; what is outside the log is left out."""
        a, n = np.ascontiguousarray(addr, dtype=np.uint64), np.ascontiguousarray(length, dtype=np.uint64)
        lib.dirty_log_mark_ranges(self._words, self.pages, bitmap.words(a), bitmap.words(n), a.size)

    def start(self) -> None:
        """Forget what was marked so far."""
        self.sync(bitmap.empty(self.pages))  # by name: a C pointer alone would not keep it alive

    def sync(self, into: Bitmap) -> int:
        """Or the pages marked since the last sync into `into` and clear them; return how many there were."""
        if into.size * 64 < self.pages:
            raise UsageError(f"bitmap of {into.size * 64} pages for a dirty log of {self.pages}")
        return int(lib.dirty_log_fetch(self._words, bitmap.words(into), self.pages))

    def stop(self) -> None:
        """Nothing to give back: the log may be marked and synced again."""
