"""Dirty log that compares every page with what the destination has: works anywhere, and is no ground for hints."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vring import bitmap
from vring.contents import digests_of
from vring.memory import PAGE_SHIFT, GuestMemory
from vring.pages import PageSet

__all__ = ["DigestLog"]


class DigestLog:
    """Reports each page whose digest differs from that of the content last sent.

    Correct for pages that are sent (to within 64-bit digests, of contents not made to collide). It cannot see a page
    rewritten with the content it had, so a page skipped because of a hint would be lost: hints must be refused.

    Parameters
    ----------
    memory
        Guest memory; holes of its objects are not read.

    Notes
    -----
    The destination starts out as zeros, so a page never sent counts as sent with zeros. `note_sent` must be told of
    every page. Reading all of RAM at each sync is what it costs; the guest must be frozen meanwhile.
    """

    name = "digest"
    needs_frozen_guest = True
    hints_safe = False

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._sent: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)

    def start(self) -> None:
        """Forget what was sent."""
        self._sent = np.zeros(self._memory.page_layout.count, np.uint64)

    def sync(self, into: PageSet) -> int:
        """Add the pages whose content is not what was sent to `into`."""
        changed = digests_of(self._memory) != self._sent
        into.set_bools(changed)
        return int(changed.sum())

    def note_sent(self, pages: npt.NDArray[np.uint64], data: Any = None) -> None:
        """Learn that these pages were sent with these bytes (None: as zero pages)."""
        if not len(pages) or not len(self._sent):
            return
        slots = self._memory.page_layout.slots(pages)
        if data is None:
            self._sent[slots] = 0
            return
        buffer = np.frombuffer(data, dtype=np.uint8)
        digests = np.zeros(len(pages), np.uint64)
        bitmap.digest_pages(int(buffer.ctypes.data), buffer.size >> PAGE_SHIFT, digests)
        self._sent[slots] = digests

    def note_hinted(self, pages: PageSet) -> None:
        """Nothing is skipped with this log."""

    def stop(self) -> None:
        """Give the digests back."""
        self._sent = np.zeros(0, np.uint64)
