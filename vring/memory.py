"""Guest memory: regions of shared memory under guest physical addresses.

Owns memfd and file mappings; also wraps memory an emulator already has. Knows nothing of queues or balloons.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vring._vring import ffi, lib
from vring.backing import HOST_PAGE_SIZE, Backing, classify, close_with, describe_fd, make_memfd, no_huge_pages
from vring.errors import GuestAddressError, UsageError

__all__ = ["MAX_REGIONS", "PAGE_SHIFT", "PAGE_SIZE", "Backing", "GuestMemory", "Region"]

PAGE_SIZE: int = lib.DIRTY_PAGE_SIZE
PAGE_SHIFT = PAGE_SIZE.bit_length() - 1
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

    def check_pages(self) -> None:
        """Raise `UsageError` if the region is not made of whole pages of the host."""
        page = self.page_size
        if page < PAGE_SIZE or page & (page - 1) or self.size % page or self.offset % page:
            raise UsageError(
                f"{self.describe()} of {self.size} bytes at offset {self.offset:#x} is not made of whole pages of "
                f"{page} bytes"
            )


def _mapped(region: Region, flags: int) -> mmap.mmap:
    try:
        return mmap.mmap(region.fd, region.size, flags, offset=region.offset)
    except OSError as error:
        if region.backing is Backing.HUGETLB and error.errno == errno.ENOMEM:
            raise no_huge_pages(region.page_size, region.size) from error
        raise


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
        If regions overlap, are empty, misaligned, more than 16, or a buffer has another size.
    """

    def __init__(self, regions: Sequence[Region], buffers: Sequence[Any]) -> None:
        order = sorted(range(len(regions)), key=lambda i: regions[i].gpa)
        self.regions: tuple[Region, ...] = tuple(regions[i].resolved() for i in order)
        self._buffers = [buffers[i] for i in order]
        if not self.regions:
            raise UsageError("guest memory needs at least one region")
        if len(self.regions) > lib.VQ_MAX_REGIONS:
            raise UsageError(f"{len(self.regions)} regions of guest memory, at most {lib.VQ_MAX_REGIONS} are supported")
        last_end = 0
        for region in self.regions:
            if region.size <= 0 or region.size % PAGE_SIZE or region.gpa % PAGE_SIZE or region.gpa < 0:
                raise UsageError(
                    f"region at {region.gpa:#x} of {region.size} bytes is not made of whole 4096-byte pages"
                )
            region.check_pages()
            if region.gpa < last_end:
                raise UsageError(f"region at {region.gpa:#x} overlaps the one before it, which ends at {last_end:#x}")
            last_end = region.end
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
        self._close_fds = close_with(self, ())

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
            If there are not enough huge pages.
        OSError
            If the memory cannot be had.
        """
        pairs = [(0, layout)] if isinstance(layout, int) else list(layout)
        if path is None:
            fd = make_memfd(name, page_size)
        elif page_size != PAGE_SIZE:
            raise UsageError("pages of a file are as large as its file system has them: give page_size or path")
        else:
            fd = os.open(path, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, sum(size for _, size in pairs))
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
            If a region is malformed or reaches past the end of its object.
        MissingFacility
            If it is of huge pages, and there are not enough of them.
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
        """
        return cls._map(regions, mmap.MAP_PRIVATE)

    @classmethod
    def _map(cls, regions: Iterable[Region], flags: int) -> GuestMemory:
        owned: dict[int, int] = {}
        mine, maps = [], []
        try:
            for region in regions:
                if region.size <= 0 or region.offset < 0 or region.offset % PAGE_SIZE:
                    raise UsageError(
                        f"region at {region.gpa:#x}: size {region.size}, offset {region.offset} cannot be mapped"
                    )
                if flags == mmap.MAP_PRIVATE and region.fd < 0:
                    maps.append(mmap.mmap(-1, region.size, flags | mmap.MAP_ANONYMOUS))
                    mine.append(replace(region, fd=-1, offset=0, backing=Backing.PRIVATE_ANONYMOUS))
                    continue
                have = os.fstat(region.fd).st_size
                if region.offset + region.size > have:
                    raise UsageError(
                        f"region at {region.gpa:#x} needs bytes up to {region.offset + region.size:#x} "
                        f"of an object that has {have:#x}"
                    )
                if flags == mmap.MAP_PRIVATE:
                    maps.append(_mapped(region, flags))
                    mine.append(replace(region, fd=-1, backing=Backing.PRIVATE_FILE, name=describe_fd(region.fd)))
                    continue
                if region.fd not in owned:
                    owned[region.fd] = os.dup(region.fd)
                shared = replace(region, fd=owned[region.fd]).resolved()
                shared.check_pages()
                maps.append(_mapped(shared, flags))
                mine.append(shared)
            memory = cls(mine, maps)
        except BaseException:
            for fd in owned.values():
                os.close(fd)
            raise
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
    def end(self) -> int:
        """First guest address after all regions."""
        return self.regions[-1].end

    @property
    def page_span(self) -> int:
        """Number of pages from address 0 to `end`, holes counted: the length of a page bitmap."""
        return self.end >> PAGE_SHIFT

    @property
    def arrays(self) -> tuple[npt.NDArray[np.uint8], ...]:
        """One uint8 array per region, over the shared memory itself."""
        return tuple(self._arrays)

    def region_index(self, gpa: int, length: int = 1) -> int:
        """Return the index of the region that holds ``[gpa, gpa + length)``.

        Raises
        ------
        GuestAddressError
            If no single region does.
        """
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

    # -- end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Unmap and close what this object owns. Arrays handed out before must not be used afterwards.

        A mapping that an array still refers to is unmapped by Python once that array is gone.
        """
        self._arrays.clear()
        for view in self._views:
            view.release()
        self._views.clear()
        for buffer in self._buffers:
            if isinstance(buffer, mmap.mmap):
                with contextlib.suppress(BufferError):  # an array handed out is still alive: it keeps the mapping
                    buffer.close()
        self._buffers.clear()
        self.c_table.count = 0
        self._close_fds()

    def __enter__(self) -> GuestMemory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
