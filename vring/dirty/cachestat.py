"""Dirty log for memory in a file that other processes write: page cache state joined with page digests.

For a guest that cannot be asked to help (User-Mode Linux). The file must lie on a file system that tracks writes
through mappings (ext4, not tmpfs). Nothing here freezes the guest: the caller does, around `start` and `sync`.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vring import bitmap
from vring._vring import ffi, lib
from vring.contents import digests_of, populated
from vring.dirty import DirtyLogVoid
from vring.errors import MissingFacility, UsageError
from vring.memory import PAGE_SHIFT, PAGE_SIZE, GuestMemory
from vring.pages import PageSet

__all__ = ["CachestatLog", "CachestatRound"]

_Bools = npt.NDArray[np.bool_]
_CANARY_PAGES = 256
_ROOM_MARGIN = 16 << 20


@dataclass(frozen=True, slots=True)
class CachestatRound:
    """What one sync saw; pages and seconds."""

    cachestat: int
    """Pages the page cache says were dirty: whole folios, so more than were written."""
    digest_only: int
    """Pages that the page cache calls clean but whose content changed: somebody else's writeback hid them."""
    dropped: int
    """Pages left out because the destination has this very content (`CachestatLog.note_sent`)."""
    reported: int
    """Pages reported."""
    canaries: int
    """Pages that were made dirty on purpose at the last sync."""
    canaries_lost: int
    """Of these, how many were found clean."""
    cleaned: bool
    """Whether pages were cleaned; not done when the disk has no room for it, and then the next sync reports more."""
    scan_seconds: float
    """Asking the page cache."""
    digest_seconds: float
    """Reading and comparing all pages that hold data."""
    clean_seconds: float
    """Writing back, and placing the canaries."""


class CachestatLog:
    """Dirty log from ``cachestat(2)``, page digests and canaries. See `vring.dirty.DirtyLog`.

    A sync reports a page if the page cache says it is dirty or under writeback (whoever mapped the file wrote it since
    the last clean), or if its digest differs from the one taken at the last sync. Then it writes the dirty pages back,
    which write-protects them in all mappings, and dirties one page per MiB again by storing a byte over itself: the
    canaries. Somebody else's writeback (``sync`` on the host, the kernel's flusher after 30 s, reclaim) cleans pages
    behind our back; it cleans canaries too, and a canary found clean makes `sync` raise `DirtyLogVoid` after it
    reported every page that it cannot prove unchanged on the destination.

    Tell it what was sent (`note_sent`), and two things get better. Where the digest of the last content sent is known,
    the comparison with it decides for pages that no hint made the migration skip: nothing can be missed, and what
    large folios over-report falls away (the page cache knows only whole folios, and a canary dirties all of its own).
    And a hinted page (`note_hinted`) that was sent before is dropped only if the destination has exactly its present
    content.

    What may still be missed: between two syncs somebody else's writeback hits part of a MiB without touching that
    MiB's canary, *and* a page in that part

    - was hinted, hence skipped, and was rewritten with the content it had at the last sync; or
    - was sent without `note_sent` being called, was changed, sent in that state, and changed back.

    Digests have 64 bits: two contents with one digest (not made on purpose) count as equal.
    Writes that bypass mappings and page cache (direct I/O) are not seen, except by their content.

    Parameters
    ----------
    memory
        Guest memory whose regions all have a descriptor of their file.
    canary_pages
        One canary in every this many pages.
    """

    name = "cachestat"
    needs_frozen_guest = True
    hints_safe = True

    def __init__(self, memory: GuestMemory, *, canary_pages: int = _CANARY_PAGES) -> None:
        if canary_pages < 1:
            raise UsageError(f"one canary in {canary_pages} pages is not possible")
        self._memory = memory
        self._layout = memory.page_layout
        self._canary_pages = canary_pages
        self._running = False
        self._canaries: list[npt.NDArray[np.uint64]] = []
        self._digest = np.zeros(0, dtype=np.uint64)
        self._sent = np.zeros(0, dtype=np.uint64)
        self._sent_known: _Bools = np.zeros(0, dtype=bool)
        self._hinted: _Bools = np.zeros(0, dtype=bool)
        self._cleaned = False
        self.last_round: CachestatRound | None = None
        """What the last sync saw."""

    def prepare(self) -> None:
        """Write memory back while the guest still runs, so that `start` has less to write while it is frozen.

        Optional; nothing is tracked yet.

        Raises
        ------
        MissingFacility
            As `start`, for what can be seen without writing to memory.
        OSError
            If the file cannot be written back.
        """
        self._check_files()
        for region in self._memory.regions:
            _check(lib.dirty_file_clean(region.fd, region.offset, region.size))

    # -- the protocol ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to track; the guest must be frozen. May write all of its memory to disk.

        Raises
        ------
        MissingFacility
            If the kernel lacks ``cachestat``, the memory is in no file, the file system does not count dirty pages or
            does not protect clean ones, or the disk has no room for the rest of a sparse file.
        """
        self._check_files()
        for i in range(len(self._memory.regions)):
            self._probe(i)
        self._digest = digests_of(self._memory)
        self._sent = np.zeros(self._layout.count, dtype=np.uint64)
        self._sent_known = np.zeros(self._layout.count, dtype=bool)
        self._hinted = np.zeros(self._layout.count, dtype=bool)
        self._clean()
        self._running = True

    def sync(self, into: PageSet) -> int:
        """Add the pages written since the last sync to `into`; return how many. The guest must be frozen.

        Parameters
        ----------
        into
            A set of pages of this memory.

        Raises
        ------
        DirtyLogVoid
            If somebody else's writeback was noticed.
        UsageError
            If the log was not started, or `into` is of other memory.
        OSError
            If the file cannot be asked or written back; pages found are in `into`.
        """
        if not self._running:
            raise UsageError("the cachestat log was not started")
        if into.layout != self._layout:
            raise UsageError(f"a set of {into.layout!r} for memory of {self._layout!r}")
        began = time.perf_counter()
        fetched = self._fetch()
        lost, canaries = self._canaries_lost()
        scanned = time.perf_counter()
        now = digests_of(self._memory)
        changed = now != self._digest
        same_as_sent = self._sent_known & (now == self._sent)
        report = fetched | changed | (self._sent_known & ~self._hinted & ~same_as_sent)
        if lost:
            report[:] = True
        dropped = int((report & same_as_sent).sum())
        report &= ~same_as_sent
        self._digest = now
        into.set_bools(report)
        count = int(report.sum())
        compared = time.perf_counter()
        hidden = int((changed & ~fetched).sum())
        self._clean()
        done = time.perf_counter()
        self.last_round = CachestatRound(
            cachestat=int(fetched.sum()),
            digest_only=hidden,
            dropped=dropped,
            reported=count,
            canaries=canaries,
            canaries_lost=lost,
            cleaned=self._cleaned,
            scan_seconds=scanned - began,
            digest_seconds=compared - scanned,
            clean_seconds=done - compared,
        )
        if lost:
            raise DirtyLogVoid(
                f"{lost} of {canaries} canary pages were written back by somebody else since the last sync (a sync on "
                f"this host, the kernel's flusher, memory pressure); {hidden} changed pages were found by their content"
            )
        return count

    def stop(self) -> None:
        """End tracking. May be called at any time, more than once."""
        self._running = False
        self._canaries = []
        self._digest = self._sent = np.zeros(0, dtype=np.uint64)
        self._sent_known = self._hinted = np.zeros(0, dtype=bool)

    # -- what the migration tells -------------------------------------------------------------------------------------

    def note_hinted(self, pages: PageSet) -> None:
        """Add pages that a hint made the migration skip (their dirty bit was cleared, they were not sent)."""
        if self._running:
            self._hinted |= pages.to_bools()

    def note_sent(self, pages: npt.NDArray[np.uint64], data: Any = None) -> None:
        """Tell which content the destination now has.

        Parameters
        ----------
        pages
            Page numbers (guest address divided by 4096).
        data
            The bytes that were sent for them, 4096 each, one after another: the copy, not guest memory, which may
            have changed since. None: they were sent as zero pages.

        Raises
        ------
        UsageError
            If `data` has another size, or a page is outside of memory.
        """
        if not self._running or not len(pages):
            return
        slots = self._layout.slots(pages)
        if data is None:
            self._sent[slots] = 0
        else:
            buffer = np.frombuffer(data, dtype=np.uint8)
            if buffer.size != len(pages) * PAGE_SIZE:
                raise UsageError(f"{buffer.size} bytes for {len(pages)} pages")
            digests = np.empty(len(pages), dtype=np.uint64)
            lib.dirty_digest_pages(ffi.cast("uint8_t *", buffer.ctypes.data), len(pages), ffi.NULL, 0, _words(digests))
            self._sent[slots] = digests
        self._sent_known[slots] = True
        self._hinted[slots] = False

    # -- parts --------------------------------------------------------------------------------------------------------

    def _check_files(self) -> None:
        for region in self._memory.regions:
            if region.fd < 0:
                raise MissingFacility(
                    "the cachestat log needs guest memory that is a file, this is an anonymous buffer"
                )
            if not self._room(region.fd):
                raise MissingFacility(self._no_room(region.fd))

    def _room(self, fd: int) -> bool:
        volume, file = os.fstatvfs(fd), os.fstat(fd)
        if not volume.f_blocks:  # an anonymous memory file: no limit, and the probe refuses it
            return True
        return volume.f_bavail * volume.f_frsize >= max(0, file.st_size - file.st_blocks * 512) + _ROOM_MARGIN

    def _no_room(self, fd: int) -> str:
        volume, file = os.fstatvfs(fd), os.fstat(fd)
        free, need = volume.f_bavail * volume.f_frsize, file.st_size - file.st_blocks * 512 + _ROOM_MARGIN
        return (
            f"the file system of the guest's memory has {free >> 20} MiB free, writing all of the memory back may need "
            f"{need >> 20} MiB: free some, or put the memory elsewhere"
        )

    def _probe(self, index: int) -> None:
        """Dirty one page of the region, clean it, dirty it again, and see each time what the kernel says."""
        region, array = self._memory.regions[index], self._memory.arrays[index]
        pages = region.size >> PAGE_SHIFT
        present = bitmap.empty(pages)
        _check(lib.dirty_present_scan(region.fd, region.offset, region.size, 0, _words(present)))
        page = int(np.argmax(bitmap.to_bools(present, pages)))
        at = region.offset + page * PAGE_SIZE
        scratch = np.zeros(1, dtype=np.uint64)
        for again in (False, True):
            array[page * PAGE_SIZE] = array[page * PAGE_SIZE]
            found = lib.dirty_cachestat_scan(region.fd, at, PAGE_SIZE, 0, _words(scratch))
            if found < 0:
                raise MissingFacility(
                    f"cachestat (Linux 6.5) does not work here: {os.strerror(-found)}; use another dirty log"
                )
            if found != 1:
                what = "does not protect pages after writing them back" if again else "does not count dirty pages"
                raise MissingFacility(
                    f"the file system of the guest's memory {what} (tmpfs and overlayfs do not): "
                    "put the memory on ext4 or xfs, or migrate without hints"
                )
            _check(lib.dirty_file_clean(region.fd, at, PAGE_SIZE))
            if lib.dirty_cachestat_scan(region.fd, at, PAGE_SIZE, 0, _words(scratch)) != 0:
                raise MissingFacility(
                    "a page stays dirty on the file system of the guest's memory although it was written back: "
                    "put the memory on ext4 or xfs, or migrate without hints"
                )

    def _fetch(self) -> _Bools:
        found = PageSet(self._layout)
        for region in self._memory.regions:
            slot = self._layout.slot(region.gpa >> PAGE_SHIFT, region.size >> PAGE_SHIFT)
            _check(lib.dirty_cachestat_scan(region.fd, region.offset, region.size, slot, _words(found.words)))
        return found.to_bools()

    def _clean(self) -> None:
        """Write dirty pages back, then dirty one page per MiB."""
        self._cleaned = all(self._room(region.fd) for region in self._memory.regions)
        self._canaries = []
        if not self._cleaned:
            # ext4 throws pages away that it finds no block for. Left dirty, they are only reported once more.
            return
        present = populated(self._memory).to_bools()
        for region, array in zip(self._memory.regions, self._memory.arrays, strict=True):
            _check(lib.dirty_file_clean(region.fd, region.offset, region.size))
            n = region.size >> PAGE_SHIFT
            first = self._layout.slot(region.gpa >> PAGE_SHIFT, n)
            # Best is a page that holds data and was not hinted: for a hinted one "dirty" has to be believed.
            score = np.zeros(-(-n // self._canary_pages) * self._canary_pages, dtype=np.uint8)
            score[:n] = present[first : first + n]
            score[:n] *= np.where(self._hinted[first : first + n], 1, 2).astype(np.uint8)
            table = score.reshape(-1, self._canary_pages)
            chosen = table.argmax(axis=1)
            rows = np.flatnonzero(table[np.arange(len(table)), chosen])
            at = (rows * self._canary_pages + chosen[rows]) * PAGE_SIZE
            array[at] = array[at]
            self._canaries.append((at + region.offset).astype(np.uint64))

    def _canaries_lost(self) -> tuple[int, int]:
        lost = total = 0
        for region, offsets in zip(self._memory.regions, self._canaries, strict=False):
            lost += _check(lib.dirty_cachestat_lost(region.fd, _words(offsets), len(offsets)))
            total += len(offsets)
        return lost, total


def _words(array: npt.NDArray[np.uint64]) -> Any:
    return ffi.cast("uint64_t *", array.ctypes.data)


def _check(result: int) -> int:
    if result < 0:
        raise OSError(-result, f"guest memory file: {os.strerror(-result)}")
    return result
