"""A driver with other habits than Linux has: what is allowed, and what is not but happens, on the free page queue."""

from __future__ import annotations

import numpy as np

from balloon_dev.features import QueueRole
from balloon_dev.hinting import CMD_ID_DONE, CMD_ID_STOP
from guest_driver.balloon import BalloonDriver
from guest_driver.memory_manager import Alloc, Owner
from vring.memory import PAGE_SIZE
from vring.split import SEG, SEG_WRITE, DriverQueue

CHAIN = 32
TOKEN = 1


class ChainDriver(BalloonDriver):
    """Hints single pages in chains of up to 32, waits for each chain, frees at its own stop, takes id 0 for a request.

    A driver of a system derived from FreeBSD is like that. Freed at its own stop, a hinted page is in use again while
    the run's hints still count; and under the id 0 it sends pages that must never count.
    """

    zeros = 0
    """Runs opened under id 0."""

    def _hint_step(self) -> bool:
        queue, state = self._queues.get(QueueRole.FREE_PAGE), self._state
        if queue is None:
            return False
        received, active = int(state["received"]), int(state["active"])
        if int(state["sending"]):
            return self._close_run(queue) if received != active else self._send_blocks(queue)
        if received != CMD_ID_DONE and received != active and self._send_command(queue, received):
            state["active"], state["sending"] = received, 1
            self.zeros += received == CMD_ID_STOP
            return True
        return False

    def _send_blocks(self, queue: DriverQueue) -> bool:
        self._reclaim(queue)
        if queue.size - queue.num_free > int(np.count_nonzero(self._busy)):  # a chain is with the device
            return queue.enable_callbacks()
        pages = self.manager.alloc_pages_bulk(0, CHAIN, Owner.HINT, Alloc.NORETRY).copy()
        if not len(pages):
            return self._close_run(queue)
        segments = np.zeros(len(pages), SEG)
        segments["addr"], segments["len"], segments["flags"] = pages << np.uint64(12), PAGE_SIZE, SEG_WRITE
        self._state["blocks"] += len(pages)
        assert self._post(queue, segments, TOKEN)
        return True

    def _after_run(self) -> None:
        self._free_hinted()

    def _shrink(self, pages: int) -> int:
        return 0
