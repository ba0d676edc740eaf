"""Whether guest memory is there: what it takes of the machine, and whether it reads as zero.

A return code of 0 says little: some calls succeed on some kinds of memory and free nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from host_qemu_side.discard.calls import allocated_bytes, resident_bytes
from host_qemu_side.discard.pieces import Piece, pieces_of
from vring.memory import Backing, GuestMemory

__all__ = ["Residency", "piece_reads_zero", "piece_residency", "reads_zero", "residency"]

CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Residency:
    """What a range of guest memory takes."""

    length: int
    """Bytes asked about."""
    resident: int
    """Bytes in RAM, by mincore. For shared objects and files: in the page cache, whoever mapped them. For private
    memory and huge pages: mapped by this process."""
    allocated: int | None
    """Bytes that the object behind holds (memory, swap or disk), by SEEK_DATA. None: there is none, or it cannot tell
    (huge pages)."""
    object_bytes: int | None
    """Bytes that all of the objects behind the range hold, by fstat. Falls when memory is really freed."""

    @property
    def gone(self) -> bool:
        """Whether nothing of the range takes memory, as far as can be seen."""
        return self.resident == 0 and not self.allocated


def residency(memory: GuestMemory, gpa: int, length: int) -> Residency:
    """Find out what guest memory takes. Nothing is read, so that nothing is allocated by asking.

    Parameters
    ----------
    gpa, length
        Bytes, multiples of 4096; may cross regions that touch.

    Raises
    ------
    UsageError, GuestAddressError
        If the range is not whole pages of RAM.
    """
    pieces = pieces_of(memory, np.array([gpa], dtype=np.uint64), np.array([length], dtype=np.uint64))
    parts = [piece_residency(piece) for piece in pieces]
    allocated = [part.allocated for part in parts if part.allocated is not None]
    objects = {os.fstat(p.region.fd).st_ino: os.fstat(p.region.fd).st_blocks * 512 for p in pieces if p.region.fd >= 0}
    return Residency(
        length,
        sum(part.resident for part in parts),
        sum(allocated) if allocated else None,
        sum(objects.values()) if objects else None,
    )


def piece_residency(piece: Piece) -> Residency:
    """As `residency`, for a piece of one region."""
    region = piece.region
    allocated = blocks = None
    if region.fd >= 0:
        blocks = os.fstat(region.fd).st_blocks * 512
        if region.backing in (Backing.MEMFD, Backing.FILE):  # SEEK_DATA on hugetlbfs takes all of a file for data
            allocated = allocated_bytes(region.fd, piece.offset, piece.length)
    return Residency(piece.length, resident_bytes(piece.address, piece.length), allocated, blocks)


def reads_zero(memory: GuestMemory, gpa: int, length: int) -> bool:
    """Whether guest memory is all zero. Where there is a descriptor holes are read through it, which allocates nothing.

    Raises
    ------
    UsageError, GuestAddressError
        If the range is not whole pages of RAM.
    """
    pieces = pieces_of(memory, np.array([gpa], dtype=np.uint64), np.array([length], dtype=np.uint64))
    return all(piece_reads_zero(memory, piece) for piece in pieces)


def piece_reads_zero(memory: GuestMemory, piece: Piece) -> bool:
    """As `reads_zero`, for a piece of one region."""
    for at in range(0, piece.length, CHUNK):
        size = min(CHUNK, piece.length - at)
        if piece.region.fd >= 0:
            data = os.pread(piece.region.fd, size, piece.offset + at)
            if len(data) != size or data.count(0) != size:
                return False
        elif memory.array(piece.gpa + at, size).any():
            return False
    if piece.region.backing is Backing.FILE:  # reading left clean pages of zeros in the page cache
        os.posix_fadvise(piece.region.fd, piece.offset, piece.length, os.POSIX_FADV_DONTNEED)
    return True
