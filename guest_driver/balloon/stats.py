"""Memory statistics in the driver (VIRTIO 5.5.6.3): one buffer, filled and exposed again whenever it comes back."""

from __future__ import annotations

import numpy as np

from balloon_dev.features import QueueRole
from balloon_dev.stats import ENTRY, StatTag
from guest_driver.balloon.core import DriverCore
from guest_driver.balloon.state import STAT_TAGS
from guest_driver.memory_manager import HINT_ORDER, Owner
from vring.memory import PAGE_SIZE
from vring.split import SEG, DriverQueue

__all__ = ["Statistics"]


class Statistics(DriverCore):
    """The statsq."""

    def memory_statistics(self) -> dict[StatTag, int]:
        """Return what the host is told: always the same tags; memory in bytes, all else counts events."""
        manager = self.manager
        hinted = manager.pages_by_owner().get(int(Owner.HINT), 0) >> HINT_ORDER << HINT_ORDER
        available = max(manager.free_pages - manager.watermark, 0) + hinted
        return {
            StatTag.FREE_MEMORY: manager.free_pages * PAGE_SIZE,
            StatTag.TOTAL_MEMORY: manager.total_pages * PAGE_SIZE,
            StatTag.AVAILABLE_MEMORY: available * PAGE_SIZE,
            StatTag.OOM_KILLS: 0,
            StatTag.ALLOC_STALLS: manager.reclaims,
        }

    def _fill_stats(self) -> None:
        figures = self.memory_statistics()
        entries = np.zeros(len(STAT_TAGS), dtype=ENTRY)
        entries["tag"] = STAT_TAGS
        entries["value"] = [figures[tag] for tag in STAT_TAGS]
        self._stats_bytes[:] = entries.view(np.uint8)

    def _stats_segment(self) -> np.ndarray[tuple[int], np.dtype[np.void]]:
        segment = np.zeros(1, dtype=SEG)
        segment["addr"], segment["len"] = self._stats_gpa, len(self._stats_bytes)
        return segment

    def _prime_stats(self, queue: DriverQueue) -> None:
        """Expose the first buffer before DRIVER_OK, without a notification (balloon.init-1, basic.init.driver-7)."""
        self._fill_stats()
        queue.enable_callbacks()
        self._state["stats_due"] = int(queue.add(self._stats_segment(), [0]) != 1)
        queue.publish()

    def _stats_step(self) -> bool:
        queue = self._queues.get(QueueRole.STATS)
        if queue is None:
            return False
        if not int(self._state["stats_due"]):
            if not len(queue.collect(1)[0]):
                return False
            self._state["stats_due"] = 1
        self._fill_stats()
        if not self._post(queue, self._stats_segment()):
            return False
        self._state["stats_due"] = 0
        self._state["stats_sent"] += 1
        return True
