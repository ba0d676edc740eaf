"""The system calls that drop memory, bring it back and tell whether it is there. No policy."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

import numpy as np
import numpy.typing as npt

__all__ = ["MADV_POPULATE_WRITE", "advise", "allocated_bytes", "punch_hole", "resident_bytes"]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
KEEP_SIZE, PUNCH_HOLE = 1, 2
MADV_POPULATE_WRITE = 23
"""Linux 5.14; not in Python's `mmap`."""


def _check(result: int) -> None:
    if result:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Drop bytes of a memory object or file; they read as zero and take no memory afterwards.

    Raises
    ------
    OSError
        If the file system cannot, or the descriptor is read-only or sealed.
    """
    _check(_libc.fallocate(fd, KEEP_SIZE | PUNCH_HOLE, offset, length))


def advise(address: int, length: int, advice: int) -> None:
    """Call madvise on memory of this process.

    Raises
    ------
    OSError
        If the address is no page boundary, the memory is locked, or the kernel does not know the advice.
    """
    _check(_libc.madvise(address, length, advice))


def resident_bytes(address: int, length: int) -> int:
    """Return how many bytes of a mapping of this process are in RAM, by mincore.

    For a shared mapping that is what the page cache has, whoever brought it there; for private memory and for huge
    pages only what is in this process's page table.

    Raises
    ------
    OSError
        If the range is not mapped.
    """
    start = address - address % mmap.PAGESIZE
    pages = -(-(address + length - start) // mmap.PAGESIZE)
    found: npt.NDArray[np.uint8] = np.zeros(pages, dtype=np.uint8)
    _check(_libc.mincore(start, pages * mmap.PAGESIZE, found.ctypes.data))
    return min(int(np.count_nonzero(found & 1)) * mmap.PAGESIZE, length)


def allocated_bytes(fd: int, offset: int, length: int) -> int:
    """Return how many bytes of a range of an object are no hole, by SEEK_DATA; nothing is read.

    Raises
    ------
    OSError
        If the descriptor cannot seek.
    """
    at, end, total = offset, offset + length, 0
    while at < end:
        try:
            data = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data up to the end
                break
            raise
        if data >= end:
            break
        hole = min(os.lseek(fd, data, os.SEEK_HOLE), end)
        total += hole - data
        at = hole
    return total
