"""The kernel area: the first pages of guest RAM, where everything lives that must survive a migration.

A header page names the pieces; a tiny boot allocator hands them out and never takes one back. The page allocator
manages what lies behind. Nothing here knows what the pieces hold.

Whoever shares the RAM can write that page: it is read once, by `KernelArea.attach`, and checked; from then on it is
only written, for the process that attaches next.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vring.errors import UsageError, VirtioError
from vring.memory import PAGE_SIZE, GuestMemory

__all__ = ["KernelArea"]

MAGIC = int.from_bytes(b"VBKERNEL", "little")
VERSION = 1
HEADER = np.dtype(
    [
        ("magic", "<u8"),
        ("version", "<u4"),
        ("count", "<u4"),
        ("seed", "<u8"),
        ("page_span", "<u8"),
        ("brk", "<u8"),
        ("limit", "<u8"),
        ("reserved", "<u8", (2,)),
    ]
)
ENTRY = np.dtype([("name", "S32"), ("gpa", "<u8"), ("size", "<u8")])
MAX_ENTRIES = (PAGE_SIZE - HEADER.itemsize) // ENTRY.itemsize
_DAMAGED = "the kernel area header of this RAM is damaged"


class KernelArea:
    """The header page at guest address 0 and the pieces it names.

    Use `format` for a guest that boots and `attach` for one that goes on in another process, and only one of them for
    one RAM at a time.
    """

    def __init__(
        self, memory: GuestMemory, seed: int, size: int, used: int, pieces: dict[str, tuple[int, int]]
    ) -> None:
        self.memory = memory
        self._seed, self._size, self._used, self._pieces = seed, size, used, pieces
        self._header: npt.NDArray[Any] = memory.array(0, 1, HEADER)
        self._entries: npt.NDArray[Any] = memory.array(HEADER.itemsize, MAX_ENTRIES, ENTRY)

    @classmethod
    def format(cls, memory: GuestMemory, size: int, *, seed: int = 0) -> KernelArea:
        """Make the area: `size` bytes from guest address 0, a whole number of pages, header page included.

        Raises
        ------
        UsageError
            If the first region does not start at 0 or leaves no page behind the area.
        """
        first = memory.regions[0]
        if first.gpa != 0:
            raise UsageError(f"the kernel area needs RAM at guest address 0, the first region starts at {first.gpa:#x}")
        if size % PAGE_SIZE or not PAGE_SIZE < size < first.size:
            raise UsageError(
                f"a kernel area of {size} bytes does not fit: the region at 0 has {first.size} bytes, "
                "and pages must be left behind it; give the guest more RAM"
            )
        memory.array(0, PAGE_SIZE)[:] = 0
        area = cls(memory, seed & (1 << 64) - 1, size, PAGE_SIZE, {})
        head = area._header[0]
        head["version"] = VERSION
        head["seed"] = area.seed
        head["page_span"] = memory.page_span
        head["brk"] = PAGE_SIZE
        head["limit"] = size
        head["magic"] = MAGIC
        return area

    @classmethod
    def attach(cls, memory: GuestMemory) -> KernelArea:
        """Find the area that another process has made in this RAM.

        Raises
        ------
        VirtioError
            If there is none, or it is not for RAM of this size.
        """
        if memory.regions[0].gpa:
            raise VirtioError(f"this RAM holds no guest: it has no page at address 0 ({memory.describe()})")
        page = memory.read(0, PAGE_SIZE)
        magic, version, count, seed, span, used, size = np.frombuffer(page, HEADER, 1)[0].tolist()[:7]
        if magic != MAGIC or version != VERSION:
            raise VirtioError(f"this RAM holds no guest: its first page has no kernel area header of version {VERSION}")
        if span != memory.page_span:
            raise VirtioError(f"the guest in this RAM was made for {span} pages, not {memory.page_span}")
        if not PAGE_SIZE <= used <= size < memory.regions[0].size or size % PAGE_SIZE or count > MAX_ENTRIES:
            raise VirtioError(_DAMAGED)
        pieces: dict[str, tuple[int, int]] = {}
        for i, (key, gpa, length) in enumerate(np.frombuffer(page, ENTRY, count, HEADER.itemsize).tolist()):
            name = key.decode("ascii", "replace")
            if not name.isascii() or not name.isprintable() or not name or name in pieces:
                raise VirtioError(f"{_DAMAGED}: piece {i} is named {key!r}")
            if gpa < PAGE_SIZE or gpa + length > used:
                raise VirtioError(f"{_DAMAGED}: piece {name!r} lies outside the area")
            pieces[name] = gpa, length
        return cls(memory, seed, size, used, pieces)

    @property
    def seed(self) -> int:
        """The seed given to `format`, 64 bits."""
        return self._seed

    @property
    def size(self) -> int:
        """Bytes of the area, header page included."""
        return self._size

    @property
    def used(self) -> int:
        """Bytes handed out, header page and alignment included."""
        return self._used

    @property
    def pieces(self) -> dict[str, tuple[int, int]]:
        """Guest address and bytes of every piece by name."""
        return dict(self._pieces)

    def find(self, name: str) -> int | None:
        """Return the guest address of a piece, or None."""
        piece = self._pieces.get(name)
        return piece[0] if piece else None

    def reserve(self, name: str, size: int, align: int = 64) -> int:
        """Hand out `size` zeroed bytes and record them by name.

        Parameters
        ----------
        name
            Up to 32 printable characters of ASCII, not used before.
        size
            Bytes.
        align
            Alignment of the guest address, a power of two.

        Returns
        -------
        int
            Guest physical address.

        Raises
        ------
        UsageError
            If the name is taken or unusable, or the area is full.
        """
        if not 0 < len(name) <= 32 or not name.isascii() or not name.isprintable():
            raise UsageError(f"{name!r} cannot name a piece of the kernel area: use 1 to 32 ASCII characters")
        if size <= 0 or align <= 0 or align & (align - 1):
            raise UsageError(f"cannot reserve {size} bytes aligned to {align}")
        count = len(self._pieces)
        if name in self._pieces:
            raise UsageError(f"the kernel area already has a piece named {name!r}")
        gpa = (self._used + align - 1) & -align
        if gpa + size > self._size or count == MAX_ENTRIES:
            raise UsageError(
                f"the kernel area is full: {name!r} wants {size} bytes, {max(0, self._size - gpa)} of {self._size} "
                "are left; make the area with more spare bytes"
            )
        self.memory.array(gpa, size)[:] = 0
        self._entries[count] = (name.encode(), gpa, size)
        self._pieces[name], self._used = (gpa, size), gpa + size
        self._header[0]["count"], self._header[0]["brk"] = count + 1, self._used
        return gpa
