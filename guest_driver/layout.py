"""The kernel area: the first pages of guest RAM, where everything lives that must survive a migration.

A header page names the pieces; a tiny boot allocator hands them out and never takes one back. The page allocator
manages what lies behind. Nothing here knows what the pieces hold.
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


class KernelArea:
    """The header page at guest address 0 and the pieces it names.

    Use `format` for a guest that boots and `attach` for one that goes on in another process.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
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
        area = cls(memory)
        head = area._header[0]
        head["version"] = VERSION
        head["seed"] = seed & (1 << 64) - 1
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
        area = cls(memory)
        head = area._header[0]
        if int(head["magic"]) != MAGIC or int(head["version"]) != VERSION:
            raise VirtioError("this RAM holds no guest: its first page has no kernel area header of version 1")
        if int(head["page_span"]) != memory.page_span:
            raise VirtioError(f"the guest in this RAM was made for {head['page_span']} pages, not {memory.page_span}")
        brk, limit = area.used, area.size
        if not PAGE_SIZE <= brk <= limit < memory.regions[0].size or int(head["count"]) > MAX_ENTRIES:
            raise VirtioError("the kernel area header of this RAM is damaged")
        for gpa, size in area.pieces.values():
            if gpa < PAGE_SIZE or gpa + size > brk:
                raise VirtioError("the kernel area header of this RAM is damaged: a piece lies outside the area")
        return area

    @property
    def seed(self) -> int:
        """The seed given to `format`, 64 bits."""
        return int(self._header[0]["seed"])

    @property
    def size(self) -> int:
        """Bytes of the area, header page included."""
        return int(self._header[0]["limit"])

    @property
    def used(self) -> int:
        """Bytes handed out, header page and alignment included."""
        return int(self._header[0]["brk"])

    @property
    def pieces(self) -> dict[str, tuple[int, int]]:
        """Guest address and bytes of every piece by name."""
        entries = self._entries[: int(self._header[0]["count"])]
        return {bytes(e["name"]).decode(): (int(e["gpa"]), int(e["size"])) for e in entries}

    def find(self, name: str) -> int | None:
        """Return the guest address of a piece, or None."""
        piece = self.pieces.get(name)
        return piece[0] if piece else None

    def reserve(self, name: str, size: int, align: int = 64) -> int:
        """Hand out `size` zeroed bytes and record them by name.

        Parameters
        ----------
        name
            Up to 32 bytes of ASCII, not used before.
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
        key = name.encode("ascii", "replace")
        if not 0 < len(key) <= 32 or b"?" in key:
            raise UsageError(f"{name!r} cannot name a piece of the kernel area: use 1 to 32 ASCII characters")
        if size <= 0 or align <= 0 or align & (align - 1):
            raise UsageError(f"cannot reserve {size} bytes aligned to {align}")
        head = self._header[0]
        count = int(head["count"])
        if name in self.pieces:
            raise UsageError(f"the kernel area already has a piece named {name!r}")
        gpa = (self.used + align - 1) & -align
        if gpa + size > self.size or count == MAX_ENTRIES:
            raise UsageError(
                f"the kernel area is full: {name!r} wants {size} bytes, {max(0, self.size - gpa)} of {self.size} "
                "are left; make the area with more spare bytes"
            )
        self.memory.array(gpa, size)[:] = 0
        self._entries[count] = (key, gpa, size)
        head["count"] = count + 1
        head["brk"] = gpa + size
        return gpa
