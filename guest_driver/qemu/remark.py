"""Marks in QEMU's dirty log what the driver wrote through its own mapping of guest RAM.

QEMU's log sees stores made through QEMU. A qtest ``writeb`` of the byte that is there already changes nothing and marks
its page. The used rings are QEMU's to write: a byte of one is never written back, it might be old by then.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from guest_driver.memory_manager import MemoryManager
from guest_driver.qemu.qtest import QtestClient
from vring.dirty import DirtyLog
from vring.dirty.combined import CombinedLog
from vring.dirty.software import SoftwareDirtyLog
from vring.dirty.wp_async import WpAsyncDirtyLog, WriteProtection
from vring.errors import MissingFacility, UsageError
from vring.memory import PAGE_SIZE, GuestMemory
from vring.pages import PageSet
from vring.split import QueueLayout

__all__ = ["WriteLog", "mark_written", "marks"]


class WriteLog:
    """Which pages this process wrote in guest RAM since the last look.

    Parameters
    ----------
    manager
        The guest's memory manager.
    wanted
        ``wp-async`` (the kernel tells, page by page), ``software`` (the memory manager marks pages of the zone, and
        the kernel area counts as always written), or ``auto``: the first that works.

    Raises
    ------
    MissingFacility
        If the one wanted does not work on this machine.
    """

    def __init__(self, manager: MemoryManager, wanted: str = "auto") -> None:
        if wanted not in ("auto", "wp-async", "software"):
            raise UsageError(f"no dirty log {wanted!r} for a guest on QEMU; there are auto, wp-async, software")
        self._manager = manager
        self._protection: WriteProtection | None = None
        memory = manager.memory
        self._log: DirtyLog
        if wanted != "software":
            try:
                self._log = self._wp_async(memory)
            except MissingFacility:
                if wanted == "wp-async":
                    raise
        if self._protection is None:
            software = SoftwareDirtyLog(memory.page_span)
            manager.use_dirty_log(software.bits)
            self._log = CombinedLog("software", [software], always=[(0, manager.kernel.size)])
        self.name = self._log.name

    def _wp_async(self, memory: GuestMemory) -> DirtyLog:
        protection = WriteProtection(memory)
        try:
            log = WpAsyncDirtyLog(os.getpid(), protection.ranges, memory.page_layout)
            log.start()
        except MissingFacility:
            protection.close()
            raise
        self._protection = protection
        return log

    def start(self) -> None:
        """Forget what was written so far."""
        self._log.start()

    def sync(self) -> PageSet:
        """Return the pages written since `start` or the last sync."""
        written = PageSet(self._manager.memory.page_layout)
        self._log.sync(written)
        return written

    def close(self) -> None:
        """End it."""
        self._log.stop()
        if self._protection is not None:
            self._protection.close()
        else:
            self._manager.use_dirty_log(None)


def marks(memory: GuestMemory, pages: Iterable[int], queues: Iterable[QueueLayout]) -> list[tuple[int, int]]:
    """Return ``(address, byte)`` to write so that QEMU logs these pages.

    A page that is nothing but used ring is left out: only QEMU writes it, and logs that itself.
    """
    used = [(q.used, q.used + q.used_bytes) for q in queues]
    result = []
    for page in pages:
        at, end = page * PAGE_SIZE, (page + 1) * PAGE_SIZE
        for start, stop in sorted(used):
            if start <= at < stop:
                at = stop
        if at < end:
            result.append((at, memory.read(at, 1)[0]))
    return result


def mark_written(qtest: QtestClient, memory: GuestMemory, written: PageSet, queues: Iterable[QueueLayout]) -> int:
    """Have QEMU log these pages; return how many."""
    pages = written.numbers().tolist()
    qtest.write_bytes(marks(memory, pages, queues))
    return len(pages)
