"""The guest's journal of writes: evidence for the oracle, in shared memory outside guest RAM.

The guest stamps every page it stores to, before and after the store, with the current epoch. The host side moves the
epoch on before it issues a command id, so for any hint it can be told whether its page was written since the id. The
layout is that of ``struct pa_journal`` in ``csrc/page_alloc/page_alloc_api.h`` (a test compares the two):

=====  ====  =====================================================================
0      u64   magic, ``VBJOURNL`` in ASCII
8      u32   version, 1
12     u32   header bytes, 4096
16     u64   pages
24     u32   current epoch
28     u32   reserved
4096   u64   one entry for each page: high 32 bits the epoch of the last write, low 32 bits the
             number of distinct epochs in which it was written; 0 if it never was
=====  ====  =====================================================================

The guest stamps in C; this class makes, opens and reads journals and moves the epoch. It needs numpy and nothing else.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading

import numpy as np
import numpy.typing as npt

from vring.backing import close_with, keep_size, make_memfd

__all__ = ["Journal", "JournalError"]

MAGIC = int.from_bytes(b"VBJOURNL", "little")
VERSION = 1
HEADER_BYTES = 4096


class JournalError(ValueError):
    """A descriptor does not hold a journal, or one too small."""


class Journal:
    """A journal, mapped. Make one with `create` or `open`.

    Parameters
    ----------
    fd
        Descriptor of the memory object; owned by the journal from now on.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        """The memory object, for passing to the guest."""
        self._fence = threading.Lock()
        have = os.fstat(fd).st_size
        if have < HEADER_BYTES:
            raise JournalError(f"no journal: the object has {have} bytes, less than a header")
        self.buffer = mmap.mmap(fd, have, mmap.MAP_SHARED)
        """The whole mapping, header included."""
        words = np.frombuffer(self.buffer, dtype="<u8", count=3)
        halves = np.frombuffer(self.buffer, dtype="<u4", count=8)
        self._epoch: npt.NDArray[np.uint32] = halves[6:7]
        self.pages = int(words[2])
        """Number of entries, index = guest address divided by 4096."""
        if int(words[0]) != MAGIC or int(halves[2]) != VERSION or int(halves[3]) != HEADER_BYTES:
            raise JournalError("no journal: magic or version is wrong")
        if HEADER_BYTES + 8 * self.pages > have:
            raise JournalError(f"damaged journal: {self.pages} entries do not fit into {have} bytes")
        self.entries: npt.NDArray[np.uint64] = np.frombuffer(
            self.buffer, dtype="<u8", count=self.pages, offset=HEADER_BYTES
        )
        """Raw entries, uint64, over the shared memory itself."""
        self._close_fd = close_with(self, (fd,))

    @classmethod
    def create(cls, pages: int) -> Journal:
        """Make an empty journal for `pages` pages, epoch 0, in a memfd of its own."""
        fd = make_memfd("guest-journal")
        try:
            os.ftruncate(fd, HEADER_BYTES + 8 * pages)
            keep_size(fd)
            header = np.zeros(8, dtype="<u4")
            header[:6].view("<u8")[:] = (MAGIC, VERSION | HEADER_BYTES << 32, pages)
            os.pwrite(fd, header.tobytes(), 0)
            return cls(fd)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def open(cls, fd: int) -> Journal:
        """Map a journal made elsewhere. The descriptor is duplicated; the caller keeps its own.

        Raises
        ------
        JournalError
            If it holds none.
        """
        mine = os.dup(fd)
        try:
            return cls(mine)
        except BaseException:
            os.close(mine)
            raise

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return int(self._epoch[0])

    def next_epoch(self) -> int:
        """Move the epoch on and return it. For the host side, before it issues a command id and before it reads pages.

        There is one writer. Between the store (one aligned 32-bit store) and the reading of pages must stand a full
        fence; here a lock taken and released gives it.
        """
        self._epoch[0] = (self.epoch + 1) & 0xFFFFFFFF
        with self._fence:
            pass
        return self.epoch

    def last_epochs(self) -> npt.NDArray[np.uint32]:
        """Epoch of the last write of each page (a view, no copy); only meaningful where `write_epochs` is not 0."""
        return self.entries.view("<u4")[1::2]

    def write_epochs(self) -> npt.NDArray[np.uint32]:
        """In how many distinct epochs each page was written (a view, no copy)."""
        return self.entries.view("<u4")[0::2]

    def written_since(self, epoch: int) -> npt.NDArray[np.bool_]:
        """Which pages were written in `epoch` or later."""
        entries = self.entries.copy()
        written: npt.NDArray[np.bool_] = np.logical_and(entries != 0, entries >> np.uint64(32) >= np.uint64(epoch))
        return written

    def close(self) -> None:
        """Unmap and close. Arrays handed out keep the mapping until they are gone."""
        if self.fd >= 0:
            self.entries = np.zeros(0, dtype=np.uint64)
            self._epoch = np.zeros(1, dtype=np.uint32)
            with contextlib.suppress(BufferError):  # somebody still holds an array: it keeps the mapping
                self.buffer.close()
            self._close_fd()
            self.fd = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
