"""What is left to send of a guest's RAM: the migration bitmap, the holes, and what hints let us skip."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from host_qemu_side.migration.stream import MAX_PAGES
from vring import bitmap
from vring._vring import ffi, lib
from vring.contents import look_again, populated
from vring.memory import PAGE_SHIFT, PAGE_SIZE, GuestMemory
from vring.pages import PageSet

__all__ = ["RamState"]

MAX_ZEROS = 1 << 16


class RamState:
    """The sender's view of RAM.

    Parameters
    ----------
    memory
        The guest's memory, read through this process's mapping.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.present = populated(memory)
        self.to_send = self.present.copy()
        """The migration bitmap. Holes need not be sent at first: the destination starts out as zeros."""
        self.skipped = PageSet(memory.page_layout)
        """Pages that a hint took out of the migration bitmap and that were not written since."""
        self.pages_total = memory.page_layout.count
        self.holes = self.pages_total - len(self.present)
        self._region = 0
        self._cursor = 0
        self._data: npt.NDArray[np.uint8] = np.empty(MAX_PAGES * PAGE_SIZE, np.uint8)
        self._contents = memoryview(self._data.data)
        self._pages: npt.NDArray[np.uint64] = np.empty(MAX_PAGES, np.uint64)
        self._zeros: npt.NDArray[np.uint64] = np.empty(MAX_ZEROS, np.uint64)
        self._out = ffi.new("struct dirty_take *")
        self._at = ffi.new("uint64_t *")

    def rewind(self) -> None:
        """Begin a new pass over RAM."""
        self._region = self._cursor = 0

    def take(
        self, max_pages: int = MAX_PAGES
    ) -> tuple[npt.NDArray[np.uint64], memoryview, npt.NDArray[np.uint64]] | None:
        """Take the next pages of this pass out of the bitmap.

        Returns
        -------
        tuple or None
            Numbers of at most `max_pages` non-zero pages, their contents one after another, and the numbers of zero
            pages met on the way, which take no more room than those; None when the pass is over. All three are valid
            until the next call.

        Raises
        ------
        PeerVanished
            If the memory is lost: what was found is not the guest's.
        """
        while self._region < len(self.memory.regions):
            region = self.memory.regions[self._region]
            first, pages = region.gpa >> PAGE_SHIFT, region.size >> PAGE_SHIFT
            base = self.memory.page_layout.slot(first, pages)
            end = base + pages
            self._at[0] = self._cursor
            lib.dirty_take_pages(
                bitmap.words(self.to_send.words),
                bitmap.words(self.present.words),
                ffi.cast("uint8_t *", self.memory.host_address(region.gpa)),
                base,
                self._at,
                end,
                ffi.cast("uint8_t *", self._data.ctypes.data),
                bitmap.words(self._pages),
                min(max_pages, MAX_PAGES),
                bitmap.words(self._zeros),
                min(max_pages * (PAGE_SIZE // self._zeros.itemsize), MAX_ZEROS),
                self._out,
            )
            self.memory.check_lost()
            self._cursor = self._at[0]
            n, z = self._out.n_pages, self._out.n_zeros
            if self._cursor >= end:
                self._region += 1
            if n or z:
                self._pages[:n] += np.uint64(first - base)  # from slots to page numbers
                self._zeros[:z] += np.uint64(first - base)
                return self._pages[:n], self._contents[: n * PAGE_SIZE], self._zeros[:z]
        return None

    def hint(self, addr: npt.NDArray[np.uint64], length: npt.NDArray[np.uint64]) -> int:
        """Take hinted blocks out of the migration bitmap, never out of the dirty log; return the pages that spared.

        A page only partly covered stays, and so does one outside RAM.
        """
        spared = self.to_send.clear_ranges(addr, length)
        self.skipped.set_ranges(addr, length)
        return spared

    def merge_dirty(self, dirty: PageSet) -> int:
        """Add what the dirty log found; return how many pages are to be sent now."""
        self.to_send |= dirty
        self.skipped -= dirty
        return len(self.to_send)

    def void_hints(self) -> int:
        """Put every page that was skipped back into the bitmap; return how many."""
        self.skipped &= self.present
        voided = len(self.skipped - self.to_send)
        self.to_send |= self.skipped
        self.skipped.clear()
        return voided

    def refresh_holes(self, dirty: PageSet | None) -> None:
        """Look again where there is memory, at pages written or dropped since; before they are taken. None: at all."""
        look_again(self.memory, self.present, dirty)
