"""Where a split virtqueue lies and what its structs look like, taken from the C headers; no queue operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vring._vring import ffi, lib
from vring.errors import UsageError
from vring.memory import PAGE_SIZE

__all__ = [
    "CHAIN",
    "DESC",
    "MAX_SIZE",
    "SEG",
    "SEG_WRITE",
    "USED_ELEM",
    "QueueLayout",
    "dtype_of",
]


def dtype_of(cname: str) -> np.dtype[Any]:
    """Return the numpy dtype of a C struct of the extension, with its offsets and size.

    Parameters
    ----------
    cname
        Such as ``"struct vq_seg"``; its fields must be integers.
    """
    ctype = ffi.typeof(cname)
    names, formats, offsets = [], [], []
    for name, field in ctype.fields:
        signed = int(ffi.cast(field.type, -1)) < 0
        names.append(name)
        formats.append(f"<{'i' if signed else 'u'}{ffi.sizeof(field.type)}")
        offsets.append(field.offset)
    spec: Any = {"names": names, "formats": formats, "offsets": offsets, "itemsize": ffi.sizeof(ctype)}
    dtype: np.dtype[Any] = np.dtype(spec)
    return dtype


DESC = dtype_of("struct vring_desc")
"""One descriptor: ``addr``, ``len``, ``flags``, ``next``."""
USED_ELEM = dtype_of("struct vring_used_elem")
"""One used element: ``id``, ``len``."""
SEG = dtype_of("struct vq_seg")
"""One segment of a buffer: ``addr`` (guest address), ``len`` (bytes), ``flags`` (0, or `SEG_WRITE`)."""
CHAIN = dtype_of("struct vq_chain")
"""One buffer in the device half: ``head``, ``n_segs``, ``first_seg``, ``n_readable`` (segments), and the bytes
``readable`` and ``writable``."""

MAX_SIZE: Final[int] = lib.VRING_MAX_SIZE
SEG_WRITE: Final[int] = lib.VQ_SEG_WRITE
"""Segment flag: the device writes it. Without it the device reads it."""

_LINE = 64
Array = npt.NDArray[Any]


def _up(value: int, to: int) -> int:
    return -(-value // to) * to


@dataclass(frozen=True, slots=True)
class QueueLayout:
    """Where the three parts of a queue lie: guest addresses, in bytes."""

    size: int
    """Entries: a power of two from 1 to 32768 (ring.size-1)."""
    desc: int
    """Descriptor table, aligned to 16."""
    avail: int
    """Avail ring, aligned to 2."""
    used: int
    """Used ring, aligned to 4."""

    @classmethod
    def place(cls, base: int, size: int) -> QueueLayout:
        """Lay a queue out from `base` on, each part on cache lines of its own.

        Raises
        ------
        UsageError
            If the size is no power of two up to 32768 or `base` is no multiple of 16.
        """
        if not lib.vq_desc_bytes(size) if 0 < size <= MAX_SIZE else True:
            raise UsageError(f"queue size {size} is no power of two from 1 to {MAX_SIZE}", clause="ring.size-1")
        if base < 0 or base % 16:
            raise UsageError(f"ring at {base:#x} is not aligned to 16 bytes", clause="split.layout.driver-1")
        avail = _up(base + lib.vq_desc_bytes(size), _LINE)
        used = _up(avail + lib.vq_avail_bytes(size), _LINE)
        return cls(size, base, avail, used)

    @property
    def bytes(self) -> int:
        """Bytes from the first to behind the last part, rounded up to a cache line."""
        return _up(self.end - min(self.desc, self.avail, self.used), _LINE)

    @property
    def end(self) -> int:
        """First guest address behind all parts."""
        return max(self.desc + self.desc_bytes, self.avail + self.avail_bytes, self.used + self.used_bytes)

    @property
    def desc_bytes(self) -> int:
        """Bytes of the descriptor table."""
        return int(lib.vq_desc_bytes(self.size)) if 0 < self.size <= MAX_SIZE else 0

    @property
    def avail_bytes(self) -> int:
        """Bytes of the avail ring with used_event."""
        return int(lib.vq_avail_bytes(self.size))

    @property
    def used_bytes(self) -> int:
        """Bytes of the used ring with avail_event."""
        return int(lib.vq_used_bytes(self.size))

    @property
    def used_pages(self) -> range:
        """Guest pages (of 4096 bytes) of the used ring: all that the device half ever writes of a ring."""
        return range(self.used // PAGE_SIZE, (self.used + self.used_bytes - 1) // PAGE_SIZE + 1)


def c_ring(layout: QueueLayout, flags: int) -> Any:
    """Return the layout as a new ``struct vq_ring *``."""
    for name in ("size", "desc", "avail", "used"):
        value = getattr(layout, name)
        if not 0 <= value < (1 << 32 if name == "size" else 1 << 64):
            raise UsageError(f"queue layout: {name} {value} is out of range")
    return ffi.new("struct vq_ring *", {**{k: getattr(layout, k) for k in QueueLayout.__slots__}, "flags": flags})


def permanent_array(ctype: str, count: int, dtype: npt.DTypeLike) -> tuple[Any, Array]:
    """Make a permanent array: the pointer for C and the numpy view of the same memory."""
    pointer = ffi.new(f"{ctype}[]", count)
    return pointer, np.frombuffer(ffi.buffer(pointer), dtype=dtype)


class Results:
    """Result fields of an ``io`` struct, read without cffi's field access (a third of its cost)."""

    def __init__(self, io: Any, *names: str) -> None:
        self.words = memoryview(ffi.buffer(io)).cast("I")
        ctype = ffi.typeof(io).item
        self.at = tuple(ffi.offsetof(ctype, name) // 4 for name in names)
