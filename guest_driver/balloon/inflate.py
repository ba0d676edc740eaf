"""Inflate, deflate, deflate on OOM, and pages of the balloon moved by compaction (VIRTIO 5.5.6.1).

One request is on its way at a time. A page is used again only when its deflate was acknowledged, whether or not
MUST_TELL_HOST was negotiated (balloon.operation.driver-7 to -10).
"""

from __future__ import annotations

import contextlib

import numpy as np

from balloon_dev.config import ACTUAL
from balloon_dev.features import QueueRole
from guest_driver.balloon.core import DriverCore
from guest_driver.balloon.state import PFNS_PER_REQUEST, RETRY_DELAY, Request
from guest_driver.memory_manager import Alloc, Owner, Pfns
from vring.errors import DeviceError, PeerVanished
from vring.split import SEG

__all__ = ["Inflating"]

_ROLE = {
    Request.INFLATE: QueueRole.INFLATE,
    Request.MOVE_IN: QueueRole.INFLATE,
    Request.DEFLATE: QueueRole.DEFLATE,
    Request.MOVE_OUT: QueueRole.DEFLATE,
}
_MAX_WAITS = 64
"""Interrupts that an out-of-memory notifier waits for; a device that only ever interrupts does not stop the guest."""


class Inflating(DriverCore):
    """The inflateq and the deflateq."""

    _search_from = 0

    def _balloon_step(self) -> bool:
        if int(self._state["request"]) != Request.NONE:
            return self._go_on_with_request()
        return self._start_request()

    def _start_request(self) -> bool:
        """Go one request towards the target, if that is not reached."""
        actual, target = int(self._state["ballooned"]), int(self._state["target"])
        if actual == target:
            self._state["working"] = 0
        if not int(self._state["working"]):
            return False
        n = min(abs(target - actual), PFNS_PER_REQUEST)
        if target < actual:
            pages = self._balloon_pages(n)
            if len(pages):
                self._begin(Request.DEFLATE, pages)
            return bool(len(pages))
        if self._now < float(self._state["retry_at"]):
            return False
        pages = self.manager.alloc_pages_bulk(0, n, Owner.BALLOON, Alloc.NORETRY)
        if not len(pages):
            self._state["retry_at"] = self._now + RETRY_DELAY  # there is no memory: do not spin
            return False
        self._begin(Request.INFLATE, pages)
        return True

    def _begin(self, request: Request, pages: Pfns) -> None:
        """Make a request of these pages, and put it on the ring if there is room."""
        self._pfns[: len(pages)] = pages
        self._state["request"], self._state["request_pages"] = request, len(pages)
        self._state["request_posted"] = 0
        self._post_request()

    def _post_request(self) -> bool:
        request = self._request()
        segment = np.zeros(1, dtype=SEG)
        segment["addr"] = self._moved_gpa if request is Request.MOVE_OUT else self._pfns_gpa
        segment["len"] = 4 * self._number("request_pages", PFNS_PER_REQUEST)
        if not self._post(self._queues[_ROLE[request]], segment):
            return False
        self._state["request_posted"] = 1
        return True

    def _request(self) -> Request:
        """Return the request that is on its way."""
        return Request(self._number("request", max(Request)))

    def _request_role(self) -> QueueRole | None:
        """Which queue the request that is on its way goes over, None if there is none."""
        return _ROLE.get(self._request())

    def _go_on_with_request(self) -> bool:
        """Post the request, or see to its end. Return whether there was something to do."""
        if not int(self._state["request_posted"]):
            return self._post_request()
        request = self._request()
        if not len(self._queues[_ROLE[request]].collect(1)[0]):
            return False
        # Acknowledged: only now may pages that left the balloon be reused.
        pages = self._number("request_pages", PFNS_PER_REQUEST)
        if request is Request.MOVE_IN:
            self._state["request"], self._state["request_posted"] = Request.MOVE_OUT, 0
            self._post_request()
            return True
        self._state["request"] = Request.NONE
        if request is Request.MOVE_OUT:
            self.manager.free_bulk(self._moved[:pages].astype(np.uint64), 0)
            self._state["moved"] += pages
            return True
        actual = int(self._state["ballooned"])
        if request is Request.DEFLATE:
            self.manager.free_bulk(self._pfns[:pages].astype(np.uint64), 0)
            self._state["ballooned"] = max(actual - pages, 0)
        else:
            self._state["ballooned"] = min(actual + pages, 0xFFFFFFFF)
        self.transport.write_config(ACTUAL, int(self._state["ballooned"]).to_bytes(4, "little"))
        return True

    def _balloon_pages(self, n: int) -> Pfns:
        """Return up to `n` pages of the balloon; the search goes on where the last one ended."""
        found: list[Pfns] = []
        start = at = self._search_from
        left, wrapped = n, False
        while left:
            pages, _, at = self.manager.owned_from(at, Owner.BALLOON, limit=left, scan=1 << 16)
            if wrapped:
                pages = pages[pages < start]  # from there on all were seen
            if len(pages):
                found.append(pages)
                left -= len(pages)
            if wrapped and at >= start:
                break
            if at >= self.manager.end_pfn:
                at, wrapped = 0, True
        self._search_from = at if at < self.manager.end_pfn else 0
        return np.concatenate(found) if found else np.empty(0, dtype=np.uint64)

    # -- memory runs out ------------------------------------------------------------------------------------------

    def _await_request(self) -> bool:
        """See a request to its end, waiting for the device for a bounded time. Return whether none is open any more."""
        for _ in range(_MAX_WAITS):
            if int(self._state["request"]) == Request.NONE:
                return True
            if self._go_on_with_request():
                continue
            request = self._request()
            if not self._wait(self._queues[_ROLE[request]].index):
                return False
        return int(self._state["request"]) == Request.NONE

    def _out_of_memory(self) -> int:
        """Give up to 256 pages back because an allocation failed (DEFLATE_ON_OOM; balloon.operation.driver-5).

        The pages are usable when the device has acknowledged; one that takes too long is not waited for. The balloon
        is not filled again until the host says something: else driver and allocator would take turns for ever.
        That the device broke or is gone is not for who wanted memory to hear: the next `step` or interrupt says it.
        """
        with contextlib.suppress(DeviceError, PeerVanished):
            return self._deflate_once()
        return 0

    def _deflate_once(self) -> int:
        if not self._await_request():
            return 0
        pages = self._balloon_pages(PFNS_PER_REQUEST)
        if not len(pages):
            return 0
        if int(self._state["target"]) >= int(self._state["ballooned"]):
            self._state["working"] = 0
        self._begin(Request.DEFLATE, pages)
        if not self._await_request():
            return 0
        self._state["oom_deflated"] += len(pages)
        return len(pages)

    def _leak_all(self) -> None:
        """Take every page out of the balloon, telling the device, as long as it answers."""
        while self._await_request():
            pages = self._balloon_pages(PFNS_PER_REQUEST)
            if not len(pages):
                return
            self._begin(Request.DEFLATE, pages)

    # -- compaction -----------------------------------------------------------------------------------------------

    def _move(self, old: Pfns, new: Pfns) -> bool:
        """Let pages of the balloon be replaced by others: the new ones go in, then the old ones come out.

        Takes two requests, which `step` sees through; the old pages are free after that.
        """
        n = len(old)
        if int(self._state["request"]) != Request.NONE or not 0 < n <= PFNS_PER_REQUEST:
            return False
        self._moved[:n] = old
        self._begin(Request.MOVE_IN, new)
        return True
