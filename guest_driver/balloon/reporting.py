"""Free page reporting in the driver (VIRTIO 5.5.6.7): a slow background pass over the free blocks, as in Linux.

Blocks are out of the free list from before the report until its acknowledgement (balloon.report.driver-3), and a block
the host knows to be free is not reported again before it was allocated.
"""

from __future__ import annotations

import numpy as np

from balloon_dev.features import QueueRole
from guest_driver.balloon.core import DriverCore
from guest_driver.balloon.state import BLOCK_BYTES, REPORT_DELAY, REPORT_RANGES, REPORT_SHARE
from guest_driver.memory_manager import HINT_ORDER
from vring.split import SEG, SEG_WRITE, DriverQueue

__all__ = ["Reporting"]


class Reporting(DriverCore):
    """The reporting_vq."""

    def _report_step(self) -> bool:
        queue = self._queues.get(QueueRole.REPORTING)
        if queue is None:
            return False
        n = self._number("report_blocks", REPORT_RANGES)
        if n and not int(self._state["report_posted"]):
            return self._post_report(queue)
        if n:
            if not len(queue.collect(1)[0]):
                return False
            self._state["report_blocks"] = 0
            self.manager.report_return(self._report_pfns[:n].copy(), reported=True)
            self._state["reported"] += n
            return True
        if not int(self._state["report_budget"]):
            if self._now < float(self._state["report_at"]):
                return False
            share = REPORT_RANGES * REPORT_SHARE
            self._state["report_budget"] = max(-(-self.manager.free_blocks(HINT_ORDER) // share), 1)
            self._state["report_at"] = self._now + REPORT_DELAY
        self._state["report_budget"] -= 1
        blocks = self.manager.report_take(min(REPORT_RANGES, queue.size))
        if not len(blocks):
            self._state["report_budget"] = 0
            return False
        self._report_pfns[: len(blocks)] = blocks
        self._state["report_blocks"], self._state["report_posted"] = len(blocks), 0
        self._post_report(queue)
        return True

    def _post_report(self, queue: DriverQueue) -> bool:
        n = self._number("report_blocks", REPORT_RANGES)
        segments = np.zeros(n, dtype=SEG)
        segments["addr"] = self._report_pfns[:n] << np.uint64(12)
        segments["len"], segments["flags"] = BLOCK_BYTES, SEG_WRITE
        if not self._post(queue, segments):
            return False
        self._state["report_posted"] = 1
        return True

    def _take_back_reported(self) -> None:
        """Put blocks of a report that will never be answered back."""
        n = self._number("report_blocks", REPORT_RANGES)
        self._state["report_blocks"] = 0
        self.manager.report_return(self._report_pfns[:n].copy(), reported=False)
