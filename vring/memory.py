"""Guest memory: regions of shared memory under guest physical addresses.

Owns memfd and file mappings; also wraps memory an emulator already has. Knows nothing of queues or balloons.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vring._vring import ffi, lib
from vring.backing import (
    HOST_PAGE_SIZE,
    Backing,
    classify,
    close_with,
    describe_fd,
    keep_size,
    make_memfd,
    no_huge_pages,
)
from vring.errors import GuestAddressError, MissingFacility, PeerVanished, UsageError
from vring.pages import PAGE_SHIFT, PAGE_SIZE, PageLayout
from vring.peer import Guard

__all__ = ["ADDRESS_LIMIT", "MAX_REGIONS", "PAGE_SHIFT", "PAGE_SIZE", "Backing", "GuestMemory", "Region"]

ADDRESS_LIMIT = 1 << 52
"""Guest addresses are below this: no architecture has physical addresses of more bits."""
MAX_REGIONS: int = lib.VQ_MAX_REGIONS


@dataclass(frozen=True, slots=True)
class Region:
    """One contiguous piece of guest RAM."""

    gpa: int
    """First guest physical address, bytes, a multiple of 4096."""
    size: int
    """Bytes, a multiple of 4096."""
    fd: int = -1
    """Descriptor of the memory object behind it, or -1 where there is none (an emulator's own buffer)."""
    offset: int = 0
    """Where the region starts in that object, bytes."""
    backing: Backing | None = None
    """What kind of memory it is. None: found out by `GuestMemory` (no descriptor is taken for `Backing.BUFFER`)."""
    page_size: int = 0
    """Bytes of the host's pages there, in which alone memory can be dropped; 0: found out by `GuestMemory`."""
    name: str = ""
    """What is behind it, for messages."""

    @property
    def end(self) -> int:
        """First guest address after the region."""
        return self.gpa + self.size

    @property
    def host_page_base(self) -> int:
        """Guest address at which the first host page begins that has a part of the region: perhaps before it."""
        return self.gpa - self.offset % (self.page_size or PAGE_SIZE)

    def describe(self) -> str:
        """Return the region and its kind in words, for messages."""
        kind = (self.backing or Backing.BUFFER).value
        return f"region {self.gpa:#x}..{self.end - 1:#x} ({kind}{f', {self.name}' if self.name else ''})"

    def resolved(self) -> Region:
        """Return the same region with its kind of backing and page size filled in."""
        backing, page_size = self.backing, self.page_size
        if backing is None and self.fd >= 0:
            backing, found = classify(self.fd)
            page_size = page_size or found
        backing = backing or Backing.BUFFER
        page_size = page_size or (PAGE_SIZE if backing is Backing.BUFFER else HOST_PAGE_SIZE)
        return replace(self, backing=backing, page_size=page_size, name=self.name or describe_fd(self.fd))

    def check(self) -> None:
        """Raise `UsageError` if no memory can be like that, whatever is behind it."""
        where = f"region at {self.gpa:#x} of {self.size:#x} bytes"
        if self.size <= 0 or (self.gpa | self.size | self.offset) % PAGE_SIZE or self.offset < 0:
            raise UsageError(f"{where} at offset {self.offset:#x} is not made of whole {PAGE_SIZE}-byte pages")
        if not 0 <= self.gpa <= ADDRESS_LIMIT - self.size:
            raise UsageError(f"{where} is not below {ADDRESS_LIMIT:#x}, the most an address can be")
        if self.page_size and (self.page_size < PAGE_SIZE or self.page_size & (self.page_size - 1)):
            raise UsageError(
                f"{where} in pages of {self.page_size} bytes: it must be a power of two, {PAGE_SIZE} or more"
            )


def _check_table(regions: Sequence[Region]) -> None:
    """Raise `UsageError` if these regions, ascending, cannot be one guest's."""
    if not 0 < len(regions) <= MAX_REGIONS:
        raise UsageError(f"{len(regions)} regions of guest memory: there must be one, and at most {MAX_REGIONS}")
    last_end = 0
    for region in regions:
        region.check()
        if region.gpa < last_end:
            raise UsageError(f"region at {region.gpa:#x} overlaps the one before it, which ends at {last_end:#x}")
        last_end = region.end


def _mapped(region: Region, flags: int) -> tuple[mmap.mmap, memoryview]:
    """Map a region and all of the host pages that have a part of it; return the mapping and the region in it."""
    page = region.page_size or PAGE_SIZE
    lead = region.offset % page
    size = -(-(lead + region.size) // page) * page
    try:
        if region.fd < 0:
            made = mmap.mmap(-1, size, flags | mmap.MAP_ANONYMOUS)
        else:
            start = region.offset - lead
            made = mmap.mmap(region.fd, min(size, os.fstat(region.fd).st_size - start), flags, offset=start)
    except ValueError as error:
        raise UsageError(f"region at {region.gpa:#x}: the object behind it was just made shorter") from error
    except OSError as error:
        if region.backing is Backing.HUGETLB and error.errno == errno.ENOMEM:
            raise no_huge_pages(region.page_size, region.size) from error
        raise _not_had(error, f"region at {region.gpa:#x} of {region.size:#x} bytes cannot be mapped") from error
    return made, memoryview(made)[lead : lead + region.size]


def _guard(made: mmap.mmap, region: Region) -> Guard:
    """Guard a mapping, whole pages of it."""
    page = region.page_size or PAGE_SIZE
    return Guard(np.frombuffer(made, np.uint8).ctypes.data, -(-len(made) // page) * page, page)


def _not_had(error: OSError, what: str) -> UsageError | MissingFacility:
    lacking = error.errno in (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EFBIG, errno.EAGAIN)
    return (MissingFacility if lacking else UsageError)(f"{what}: {error.strerror}")


def _check_object(region: Region) -> None:
    """Raise `UsageError` if what is behind a region cannot be guest memory or is too short."""
    try:
        found = os.fstat(region.fd)
    except OSError as error:
        raise UsageError(f"region at {region.gpa:#x}: descriptor {region.fd}: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        name = describe_fd(region.fd) or f"descriptor {region.fd}"
        raise UsageError(f"region at {region.gpa:#x}: {name} is no memory object and no regular file")
    if region.offset + region.size > found.st_size:
        raise UsageError(
            f"region at {region.gpa:#x} needs bytes up to {region.offset + region.size:#x} "
            f"of an object that has {found.st_size:#x}"
        )


def _owned(fd: int, owned: dict[int, int]) -> int:
    """Return the duplicate of a descriptor, made once."""
    if fd not in owned:
        try:
            owned[fd] = os.dup(fd)
        except OSError as error:
            raise _not_had(error, f"descriptor {fd} cannot be duplicated") from error
    return owned[fd]


class GuestMemory:
    """RAM of a guest: one or more regions, with holes between them.

    Make one with `create`, `from_fds`, `from_private` or `from_buffers`. A page is 4096 bytes and is numbered by its
    guest address divided by 4096, so page numbers have holes where the memory has.

    Parameters
    ----------
    regions
        The pieces, in any order; they must not overlap.
    buffers
        A writable buffer of exactly ``region.size`` bytes for each region.

    Raises
    ------
    UsageError
        If regions overlap, are empty, misaligned, too many (`MAX_REGIONS`) or not below `ADDRESS_LIMIT`, or a buffer
        has another size.
    """

    def __init__(self, regions: Sequence[Region], buffers: Sequence[Any]) -> None:
        order = sorted(range(len(regions)), key=lambda i: regions[i].gpa)
        self.regions: tuple[Region, ...] = tuple(regions[i].resolved() for i in order)
        _check_table(self.regions)
        self._buffers = [buffers[i] for i in order]
        self._maps: Sequence[mmap.mmap] = ()
        self._arrays: list[npt.NDArray[np.uint8]] = []
        self._views: list[memoryview] = []
        self.c_table = ffi.new("struct vq_memory *")
        """The same table for C (``struct vq_memory *``); lives as long as this object."""
        for i, (region, buffer) in enumerate(zip(self.regions, self._buffers, strict=True)):
            array: npt.NDArray[np.uint8] = np.frombuffer(buffer, dtype=np.uint8)
            if array.size != region.size:
                raise UsageError(f"buffer for the region at {region.gpa:#x} has {array.size} bytes, not {region.size}")
            if not array.flags.writeable:
                raise UsageError(f"buffer for the region at {region.gpa:#x} is read-only")
            self._arrays.append(array)
            self._views.append(memoryview(buffer).cast("B"))
            entry = self.c_table.region[i]
            entry.gpa, entry.size = region.gpa, region.size
            entry.host = ffi.cast("uint8_t *", array.ctypes.data)
        self.c_table.count = len(self.regions)
        self.page_layout = PageLayout((r.gpa >> PAGE_SHIFT, r.size >> PAGE_SHIFT) for r in self.regions)
        """The pages of RAM: what bookkeeping about them is sized by."""
        self._close_fds = close_with(self, ())
        self._guards: list[Guard] = []

    # -- making one ---------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        layout: int | Iterable[tuple[int, int]],
        *,
        name: str = "guest-ram",
        path: str | os.PathLike[str] | None = None,
        page_size: int = PAGE_SIZE,
    ) -> GuestMemory:
        """Make fresh, sparse, shared memory: a memfd, or an unlinked file.

        Parameters
        ----------
        layout
            Size in bytes of one region at address 0, or ``(gpa, size)`` pairs.
        name
            Shown in ``/proc/PID/maps``.
        path
            A folder: back the memory by an unlinked file there instead of a memfd.
        page_size
            Bytes, e.g. ``2 << 20``: a memfd of huge pages.

        Raises
        ------
        UsageError
            If the layout is malformed.
        MissingFacility
            If the machine does not have that much address space, or not enough huge pages.
        OSError
            If no object can be made.
        """
        pairs = [(0, layout)] if isinstance(layout, int) else list(layout)
        _check_table(sorted((Region(gpa, size) for gpa, size in pairs), key=lambda region: region.gpa))
        if path is None:
            fd = make_memfd(name, page_size)
        elif page_size != PAGE_SIZE:
            raise UsageError("pages of a file are as large as its file system has them: give page_size or path")
        else:
            fd = os.open(path, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            offset = sum(size for _, size in pairs)
            try:
                os.ftruncate(fd, offset)
            except OSError as error:
                raise _not_had(error, f"cannot make {offset} bytes of guest memory") from error
            if path is None:
                keep_size(fd)
            offset = 0
            regions = []
            for gpa, size in pairs:
                regions.append(Region(gpa, size, fd, offset))
                offset += size
            memory = cls.from_fds(regions)
        finally:
            os.close(fd)
        return memory

    @classmethod
    def from_fds(cls, regions: Iterable[Region]) -> GuestMemory:
        """Map memory objects shared by descriptor, as in a vhost-user memory table.

        Descriptors are duplicated; the caller keeps its own.

        Raises
        ------
        UsageError
            If a region is malformed, its descriptor is no memory object or file open for reading and writing, or it
            reaches past the end of that.
        MissingFacility
            If the machine cannot map it: no address space, no descriptors, not enough huge pages.
        """
        return cls._map(regions, mmap.MAP_SHARED)

    @classmethod
    def from_private(cls, regions: Iterable[Region]) -> GuestMemory:
        """Make private memory: anonymous where a region has no descriptor, else a private mapping of that file.

        Such memory cannot be shared with another process. The regions of the result have no descriptor, because
        what is in the file is not what is in RAM.

        Raises
        ------
        UsageError
            If a region is malformed or reaches past the end of its file.
        MissingFacility
            If the machine cannot map it.
        """
        return cls._map(regions, mmap.MAP_PRIVATE)

    @classmethod
    def _map(cls, regions: Iterable[Region], flags: int) -> GuestMemory:
        ordered = sorted(regions, key=lambda region: region.gpa)
        _check_table(ordered)
        owned: dict[int, int] = {}
        mine: list[Region] = []
        maps: list[mmap.mmap] = []
        views: list[memoryview] = []
        try:
            for region in ordered:
                if flags == mmap.MAP_PRIVATE and region.fd < 0:
                    kept = placed = replace(region, fd=-1, offset=0, backing=Backing.PRIVATE_ANONYMOUS)
                else:
                    _check_object(region)
                    if flags == mmap.MAP_PRIVATE:
                        placed, name = region, describe_fd(region.fd)
                        kept = replace(region, fd=-1, backing=Backing.PRIVATE_FILE, name=name)
                    else:
                        kept = placed = replace(region, fd=_owned(region.fd, owned)).resolved()
                made, view = _mapped(placed, flags)
                maps.append(made)
                views.append(view)
                mine.append(kept)
            memory = cls(mine, views)
            memory._guards = [
                _guard(made, region)
                for made, region in zip(maps, mine, strict=True)
                if region.backing is not Backing.PRIVATE_ANONYMOUS
            ]
        except BaseException:
            for give_back in (*(view.release for view in views), *(made.close for made in maps)):
                with contextlib.suppress(BufferError):
                    give_back()
            for fd in owned.values():
                os.close(fd)
            raise
        memory._maps = maps
        memory._close_fds = close_with(memory, owned.values())
        return memory

    @classmethod
    def from_buffers(cls, buffers: Iterable[tuple[int, Any]]) -> GuestMemory:
        """Wrap memory that somebody else owns, with no copy: ``(gpa, writable buffer)`` pairs."""
        pairs = list(buffers)
        regions = [Region(gpa, memoryview(buffer).nbytes) for gpa, buffer in pairs]
        return cls(regions, [buffer for _, buffer in pairs])

    # -- what there is --------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Bytes of RAM, holes not counted."""
        return sum(region.size for region in self.regions)

    @property
    def lost(self) -> bool:
        """Whether somebody made a file behind it shorter, and that was met (`vring.peer.survive_lost_memory`).

        What is in such memory is no longer the guest's: whoever used it gives up.
        """
        return any(guard.lost for guard in self._guards)

    def check_lost(self) -> None:
        """See that the memory is all there: before what was read from it is given away.

        Raises
        ------
        PeerVanished
            If it is `lost`, or a file behind it is shorter than its regions: what is missing may pass for a hole.
        """
        short = any(r.fd >= 0 and os.fstat(r.fd).st_size < r.offset + r.size for r in self.regions)
        if short or self.lost:
            raise PeerVanished("the guest's memory is lost: its file was made shorter, or its storage is full")

    @property
    def end(self) -> int:
        """First guest address after all regions."""
        return self.regions[-1].end

    @property
    def page_span(self) -> int:
        """Number of pages from address 0 to `end`, holes counted: for what is indexed by page number."""
        return self.end >> PAGE_SHIFT

    @property
    def arrays(self) -> tuple[npt.NDArray[np.uint8], ...]:
        """One uint8 array per region, over the shared memory itself."""
        self.check_open()
        return tuple(self._arrays)

    def region_index(self, gpa: int, length: int = 1) -> int:
        """Return the index of the region that holds ``[gpa, gpa + length)``.

        Raises
        ------
        GuestAddressError
            If no single region does.
        UsageError
            If the memory was closed.
        """
        self.check_open()
        for i, region in enumerate(self.regions):
            if region.gpa <= gpa and gpa + length <= region.end:
                return i
        raise GuestAddressError(f"guest range {gpa:#x}+{length:#x} is not inside one region of RAM ({self.describe()})")

    def covers(self, gpa: int, length: int) -> bool:
        """Whether all of ``[gpa, gpa + length)`` is RAM, in one region or in several that touch."""
        at, end = gpa, gpa + length
        for region in self.regions:
            if region.gpa <= at < region.end:
                at = min(end, region.end)
        return at >= end and length > 0

    def describe(self) -> str:
        """Return the regions in words, for messages."""
        return ", ".join(f"{r.gpa:#x}..{r.end - 1:#x}" for r in self.regions)

    # -- access ---------------------------------------------------------------------------------------------------

    def view(self, gpa: int, length: int) -> memoryview:
        """Return a writable memoryview of bytes inside one region, no copy."""
        i = self.region_index(gpa, length)
        start = gpa - self.regions[i].gpa
        return self._views[i][start : start + length]

    def array(self, gpa: int, count: int, dtype: npt.DTypeLike = np.uint8) -> npt.NDArray[Any]:
        """Return a numpy array of `count` items of `dtype` over the shared memory at `gpa`, no copy."""
        kind = np.dtype(dtype)
        i = self.region_index(gpa, count * kind.itemsize)
        start = gpa - self.regions[i].gpa
        return self._arrays[i][start : start + count * kind.itemsize].view(kind)

    def read(self, gpa: int, length: int) -> bytes:
        """Return a copy of `length` bytes at `gpa`; the range may cross regions that touch."""
        parts = []
        for i, start, n in self.pieces(gpa, length):
            parts.append(bytes(self._views[i][start : start + n]))
        return b"".join(parts)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store `data` at `gpa`; the range may cross regions that touch."""
        done = 0
        for i, start, n in self.pieces(gpa, len(data)):
            self._views[i][start : start + n] = data[done : done + n]
            done += n

    def pieces(self, gpa: int, length: int) -> list[tuple[int, int, int]]:
        """Return a range that may cross regions as (region index, offset in that region, bytes).

        Raises
        ------
        GuestAddressError
            If it is not all RAM.
        """
        if length and not self.covers(gpa, length):
            raise GuestAddressError(f"guest range {gpa:#x}+{length:#x} is not all RAM ({self.describe()})")
        pieces = []
        while length > 0:
            i = self.region_index(gpa)
            n = min(length, self.regions[i].end - gpa)
            pieces.append((i, gpa - self.regions[i].gpa, n))
            gpa += n
            length -= n
        return pieces

    def host_address(self, gpa: int, length: int = 1) -> int:
        """Return the address in this process of guest bytes inside one region (a C pointer as an int)."""
        i = self.region_index(gpa, length)
        return int(self._arrays[i].ctypes.data) + gpa - self.regions[i].gpa

    def check_open(self) -> None:
        """Raise `UsageError` if the memory was closed."""
        if not self._arrays:
            raise UsageError(f"guest memory ({self.describe()}) was closed")

    # -- end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Unmap and close what this object owns. Arrays handed out before must not be used afterwards.

        A mapping that an array still refers to is unmapped by Python once that array is gone.
        """
        ffi.memmove(self.c_table, bytes(ffi.sizeof("struct vq_memory")), ffi.sizeof("struct vq_memory"))
        for guard in self._guards:
            guard.close()
        self._guards.clear()
        self._arrays.clear()
        for view in self._views:
            view.release()
        self._views.clear()
        self._buffers.clear()
        for made in self._maps:
            with contextlib.suppress(BufferError):  # an array handed out is still alive: it keeps the mapping
                made.close()
        self._close_fds()

    def __enter__(self) -> GuestMemory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
