"""Giving guest memory back to the host: pages are punched out of the memory object behind them."""

from __future__ import annotations

import ctypes
import os

import numpy as np
import numpy.typing as npt

from vring.errors import UsageError
from vring.memory import GuestMemory

__all__ = ["Discarder", "punch_hole"]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
KEEP_SIZE, PUNCH_HOLE = 1, 2


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Drop bytes of a memory object or file; they read as zero and take no memory afterwards.

    Raises
    ------
    OSError
        If the file system cannot.
    """
    if _libc.fallocate(fd, KEEP_SIZE | PUNCH_HOLE, offset, length):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


class Discarder:
    """Discards ranges of guest memory.

    Parameters
    ----------
    memory
        Guest memory whose regions have descriptors.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.bytes_discarded = 0

    def __call__(self, addr: npt.NDArray[np.uint64], length: npt.NDArray[np.uint64]) -> None:
        """Punch out ``addr[i], length[i]`` (bytes, inside RAM)."""
        for gpa, size in zip(addr.tolist(), length.tolist(), strict=True):
            at, end = gpa, gpa + size
            while at < end:
                region = self.memory.regions[self.memory.region_index(at)]
                if region.fd < 0:
                    raise UsageError("this guest memory has no descriptor to punch holes into: give the device a hook of yours")
                n = min(end, region.end) - at
                punch_hole(region.fd, at - region.gpa + region.offset, n)
                self.bytes_discarded += n
                at += n
