"""What stands behind a piece of guest RAM: the kinds of backing, how one is recognised, huge page objects.

Knows descriptors and the kernel's tables; knows nothing of guest addresses.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import fcntl
import mmap
import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vring._vring import lib
from vring.decode import visible
from vring.errors import MissingFacility, UsageError

__all__ = [
    "Backing",
    "classify",
    "close_with",
    "describe_fd",
    "huge_page_counts",
    "keep_size",
    "keeps_size",
    "make_memfd",
    "no_huge_pages",
]

PAGE_SIZE: int = lib.DIRTY_PAGE_SIZE
HOST_PAGE_SIZE = max(PAGE_SIZE, mmap.PAGESIZE)
HUGETLBFS_MAGIC = 0x958458F6
TMPFS_MAGIC = 0x01021994
MFD_HUGE_SHIFT = 26

_libc = ctypes.CDLL(None, use_errno=True)


class Backing(enum.Enum):
    """Kinds of memory behind a region."""

    MEMFD = "shared memory object"
    """A memfd or a file on tmpfs, mapped shared."""
    FILE = "shared file"
    """A file on another file system, mapped shared."""
    HUGETLB = "huge page object"
    """A memfd of huge pages or a file on hugetlbfs, mapped shared."""
    PRIVATE_ANONYMOUS = "private anonymous memory"
    """Memory of this process alone, with nothing behind it."""
    PRIVATE_FILE = "private mapping of a file"
    """What was written is this process's own copy; what was not is the file."""
    BUFFER = "buffer of the embedder's"
    """Memory somebody else made; nothing is known about it."""


def classify(fd: int) -> tuple[Backing, int]:
    """Return what a shared mapping of `fd` is backed by, and its page size in bytes.

    Raises
    ------
    OSError
        If the descriptor is bad.
    """
    statfs = (ctypes.c_long * 64)()
    if _libc.fstatfs(fd, statfs):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    kind = statfs[0] & 0xFFFFFFFF
    if kind == HUGETLBFS_MAGIC:
        return Backing.HUGETLB, os.fstatvfs(fd).f_bsize
    return (Backing.MEMFD if kind == TMPFS_MAGIC else Backing.FILE), HOST_PAGE_SIZE


def describe_fd(fd: int) -> str:
    """Return the name of what a descriptor refers to, fit to be shown; empty if it cannot be had."""
    try:
        return visible(os.readlink(f"/proc/self/fd/{fd}"))
    except OSError:
        return ""


def close_with(owner: object, fds: Iterable[int]) -> weakref.finalize[..., Any]:
    """Have descriptors closed with the object that owns them, even if nobody calls its `close`.

    Parameters
    ----------
    owner
        The object; the caller must not close the descriptors in another way.
    fds
        What it owns.

    Returns
    -------
    finalize
        Call it to close them now; later calls do nothing, and its ``alive`` is false from then on.
    """
    return weakref.finalize(owner, _close_all, tuple(fds))


def _close_all(fds: tuple[int, ...]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def huge_page_counts(page_size: int) -> tuple[int, int] | None:
    """Return how many huge pages of this size the machine has, and how many of them are free; None: no such size."""
    folder = Path(f"/sys/kernel/mm/hugepages/hugepages-{page_size >> 10}kB")
    try:
        return int((folder / "nr_hugepages").read_text()), int((folder / "free_hugepages").read_text())
    except (OSError, ValueError):
        return None


def no_huge_pages(page_size: int, wanted: int) -> MissingFacility:
    """Return the error that says what is missing for `wanted` bytes of huge pages, and how to get it."""
    counts = huge_page_counts(page_size)
    if counts is None:
        return MissingFacility(f"this kernel has no huge pages of {page_size} bytes (see /sys/kernel/mm/hugepages)")
    return MissingFacility(
        f"{wanted} bytes in huge pages of {page_size} bytes are needed ({-(-wanted // page_size)} pages), but of the "
        f"{counts[0]} this machine has {counts[1]} are free, less what others reserved: as root, write a larger number "
        f"to /sys/kernel/mm/hugepages/hugepages-{page_size >> 10}kB/nr_hugepages"
    )


def make_memfd(name: str, page_size: int = PAGE_SIZE) -> int:
    """Make an empty memory object; one of huge pages if `page_size` is larger than the host's pages.

    Raises
    ------
    UsageError
        If the page size is no power of two of at least 4096.
    MissingFacility
        If the kernel has no huge pages of that size.
    """
    if page_size < PAGE_SIZE or page_size & (page_size - 1):
        raise UsageError(f"page size {page_size}: it must be a power of two of at least {PAGE_SIZE} bytes")
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    if page_size > HOST_PAGE_SIZE:
        if huge_page_counts(page_size) is None:
            raise no_huge_pages(page_size, page_size)
        flags |= os.MFD_HUGETLB | ((page_size.bit_length() - 1) << MFD_HUGE_SHIFT)
    return os.memfd_create(name, flags)


def keep_size(fd: int) -> None:
    """See that nobody who has a memory object of ours can make it shorter: an access past its end kills a process."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)


def keeps_size(fd: int) -> bool:
    """Whether nobody can make a file shorter: a memory object that `keep_size` was called for, by whomever."""
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:  # a file of another kind
        return False
