"""What the buffers on each queue mean to a balloon device: hints, PFNs, reports, statistics.

Whatever is merely a bad request, or late, is counted and returned without effect; the queue lives on. Taking buffers
off the rings and giving them back is `balloon_dev.device`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from balloon_dev.config import POISON_VAL, BalloonConfig
from balloon_dev.features import BalloonFeature, QueueRole
from balloon_dev.hinting import Action, HintEvent, HintRun
from balloon_dev.rules import BadRequest, Late, Rule
from balloon_dev.stats import ENTRY, MAX_ENTRIES, GuestStats
from vring.dirty.software import SoftwareDirtyLog
from vring.memory import PAGE_SHIFT, PAGE_SIZE, GuestMemory
from vring.pages import PageSet

__all__ = ["Discard", "HintSink", "Requests", "RingTap"]

U64 = npt.NDArray[np.uint64]
HintSink = Callable[[int, U64, U64], None]
Discard = Callable[[U64, U64], None]

MAX_REQUEST_BYTES = 1 << 14
"""A list of PFNs longer than this is a bad request: no driver sends one, and it would take long."""
MAX_REPORT_RANGES = 256
"""Ranges of one report; Linux sends 32."""
_STATS_BYTES = (MAX_ENTRIES + 1) * ENTRY.itemsize


class RingTap(Protocol):
    """Sees what the driver put on the free page queue, before the device judges it."""

    def command(self, command_id: int) -> None:
        """See a 4-byte command."""

    def pages(self, addr: U64, length: U64) -> None:
        """See blocks of pages, guest addresses and bytes."""


@runtime_checkable
class LearnsDeflate(Protocol):
    """A `discard` that wants to know what comes back, e.g. to put big host pages together from several requests."""

    def deflate(self, addr: U64, length: U64) -> None:
        """Learn that the guest takes these pages back; called before the request is returned."""

    def reset(self) -> None:
        """Learn that the balloon is empty, or that it is in doubt what is in it."""


class Requests:
    """The part of `balloon_dev.device.BalloonDevice` that gives buffers their meaning."""

    config: BalloonConfig
    hinting: HintRun
    negotiated: int
    host_page: int
    discard: Discard | None
    hint_sink: HintSink | None
    tap: RingTap | None
    dirty_log: SoftwareDirtyLog | None
    _memory: GuestMemory | None
    _ballooned: PageSet
    ballooned_pages: int

    def __init__(self) -> None:
        self.stats = GuestStats()
        """The guest's memory statistics as it sent them last."""
        self.counters: Counter[str] = Counter()
        """What was done since the device was made: pages inflated and deflated, bytes reported and discarded, unknown
        statistics skipped (balloon.stats.device-1)."""
        self.bad_requests: Counter[BadRequest] = Counter()
        """Requests returned without effect, by the rule they break and the queue."""
        self.late: Counter[Late] = Counter()
        """Buffers returned without effect because their run was over: no offence of the driver's."""
        self._held_stats: int | None = None
        self._poison_told = False

    def _gather(self, segs: npt.NDArray[Any], limit: int | None = None) -> bytes:
        """Return the bytes of a buffer, however it is cut into descriptors; at most `limit`."""
        assert self._memory is not None
        parts, left = [], limit
        for seg in segs:
            length = int(seg["len"]) if left is None else min(int(seg["len"]), left)
            parts.append(self._memory.read(int(seg["addr"]), length))
            left = None if left is None else left - length
        return b"".join(parts)

    def _bad(self, rule: Rule, role: QueueRole | None = None, times: int = 1) -> None:
        self.bad_requests[BadRequest(rule, role)] += times

    def _judged(self, verdict: Rule | Late | None, times: int = 1) -> None:
        """Count what the hint run finds wrong."""
        if isinstance(verdict, Late):
            self.late[verdict] += times
        elif verdict is not None:
            self._bad(verdict, QueueRole.FREE_PAGE, times)

    def _publish(self, *, notify: bool = True) -> None:
        """Show the state of the hint run in the config space."""
        raise NotImplementedError

    @property
    def poison_val(self) -> int:
        """The value the guest fills free pages with, as far as it has told (balloon.poison.device-1); 0 otherwise."""
        return self.config[POISON_VAL] if self.negotiated & BalloonFeature.PAGE_POISON else 0

    @property
    def poison_unknown(self) -> bool:
        """Whether the guest fills free pages with a value that it has not told: its driver came from another host."""
        return bool(self.negotiated & BalloonFeature.PAGE_POISON) and not self._poison_told

    # -- free page hinting ----------------------------------------------------------------------------------------

    def _hint_batch(self, chains: npt.NDArray[Any], segs: npt.NDArray[Any]) -> None:
        """Handle chains in order; runs of page chains between commands are handled as one."""
        commands = np.flatnonzero(chains["n_readable"] > 0)
        start = 0
        for at in [*commands.tolist(), len(chains)]:
            if at > start:
                first = int(chains[start]["first_seg"])
                end = int(chains[at - 1]["first_seg"]) + int(chains[at - 1]["n_segs"])
                self._hint_pages(segs["addr"][first:end].copy(), segs["len"][first:end].astype(np.uint64))
            if at < len(chains):
                self._hint_command(chains[at], segs)
            start = at + 1

    def _hint_command(self, chain: Any, segs: npt.NDArray[Any]) -> None:
        first, count = int(chain["first_seg"]), int(chain["n_segs"])
        if int(chain["readable"]) != 4 or int(chain["n_readable"]) != count:
            self._bad(Rule.HINT_COMMAND_SIZE, QueueRole.FREE_PAGE)
            return
        command_id = int.from_bytes(self._gather(segs[first : first + count]), "little")
        if self.tap is not None:
            self.tap.command(command_id)
        self._judged(self.hinting.judge_command(command_id))
        self.hinting.guest_command(command_id)
        self._publish(notify=False)  # START and STOP may read differently; the driver caused it and needs no interrupt

    def _hint_pages(self, addr: U64, length: U64) -> None:
        if self.tap is not None:
            self.tap.pages(addr, length)
        if self.hinting.handle(HintEvent.GUEST_PAGES) is not Action.APPLY:
            self._judged(self.hinting.judge_pages(), len(addr))
        elif self.hint_sink is not None:
            self.hint_sink(self.hinting.command_id, addr, length)

    # -- inflate and deflate --------------------------------------------------------------------------------------

    def _pfn_request(self, role: QueueRole, segs: npt.NDArray[Any], chain: Any) -> None:
        """One array of 32-bit little-endian PFNs of 4096 bytes, however it is cut into descriptors."""
        if int(chain["n_readable"]) != len(segs) or int(chain["readable"]) > MAX_REQUEST_BYTES:
            self._bad(Rule.PFNS_BUFFER, role)
            return
        data = self._gather(segs)
        if len(data) % 4:
            self._bad(Rule.PFNS_LENGTH, role)
        pfns = np.unique(np.frombuffer(data, dtype="<u4", count=len(data) // 4).astype(np.uint64))
        assert self._memory is not None
        inside = np.zeros(len(pfns), dtype=np.bool_)
        for region in self._memory.regions:
            inside |= (pfns >= region.gpa >> PAGE_SHIFT) & (pfns < region.end >> PAGE_SHIFT)
        if not inside.all():
            self._bad(Rule.PFN_OUTSIDE_RAM, role, int((~inside).sum()))
            pfns = pfns[inside]
        if not len(pfns):
            return
        breaks = np.flatnonzero(np.diff(pfns) != 1) + 1
        firsts = pfns[np.concatenate(([0], breaks))]
        counts = np.diff(np.concatenate(([0], breaks, [len(pfns)]))).astype(np.uint64)
        inflate = role is QueueRole.INFLATE
        addr, length = firsts << np.uint64(PAGE_SHIFT), counts << np.uint64(PAGE_SHIFT)
        if inflate:
            self._discard(addr, length)
            self.ballooned_pages += self._ballooned.set_ranges(addr, length)
        else:
            if isinstance(self.discard, LearnsDeflate):
                self.discard.deflate(addr, length)
            self.ballooned_pages -= self._ballooned.clear_ranges(addr, length)
        self.counters["pages inflated" if inflate else "pages deflated"] += len(pfns)

    def _discard(self, addr: U64, length: U64) -> None:
        """Let the host drop pages, and log that they changed: no guest-side tracker sees it."""
        if self.discard is None:
            return
        self.discard(addr, length)
        self.counters["bytes discarded"] += int(length.sum())
        if self.dirty_log is not None:
            self.dirty_log.mark_ranges(addr, length)

    # -- free page reporting --------------------------------------------------------------------------------------

    def _report(self, segs: npt.NDArray[Any], chain: Any) -> None:
        """One report: device-writable ranges of free pages, dropped before the buffer is given back.

        While the guest fills its free pages with a value other than 0, or one not known, they are left alone, as QEMU
        does: what comes back would not hold that value (balloon.report.device-2). One range that is not made of whole
        host pages makes the whole report a bad request.
        """
        if int(chain["n_readable"]) or len(segs) > MAX_REPORT_RANGES:
            self._bad(Rule.REPORT_BUFFER, QueueRole.REPORTING)
            return
        addr, length = segs["addr"].astype(np.uint64), segs["len"].astype(np.uint64)
        mask = np.uint64(max(self.host_page, PAGE_SIZE) - 1)
        if ((addr | length) & mask).any() or not length.all():
            self._bad(Rule.REPORT_RANGE, QueueRole.REPORTING)
            return
        self.counters["bytes reported"] += int(length.sum())
        if not self.poison_val and not self.poison_unknown:
            self._discard(addr, length)

    # -- statistics -----------------------------------------------------------------------------------------------

    def _stats_buffer(self, segs: npt.NDArray[Any], chain: Any) -> list[int]:
        """Take in a statistics buffer and hold it. Return heads to give back: its own if it is no good, or the one
        held before, since a driver may have only one with the device (balloon.stats.driver-1).
        """
        head = int(chain["head"])
        if int(chain["n_readable"]) != len(segs):
            self._bad(Rule.STATS_WRITABLE, QueueRole.STATS)
            return [head]
        broken, unknown = self.stats.take(self._gather(segs, _STATS_BYTES))
        for rule in broken:
            self._bad(rule, QueueRole.STATS)
        if unknown:
            self.counters["unknown statistics"] += unknown
        before, self._held_stats = self._held_stats, head
        if before is None:
            return []
        self._bad(Rule.STATS_BUFFERS, QueueRole.STATS)
        return [before]
