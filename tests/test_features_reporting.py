"""Free page reporting and page poison, on both sides."""

import numpy as np
import pytest
from features_pair import ALL, MIB, Pair

from balloon_dev.config import POISON_VAL
from balloon_dev.features import BalloonFeature, QueueRole
from balloon_dev.rules import BadRequest, Rule
from guest_driver.balloon.state import REPORT_DELAY, REPORT_RANGES
from guest_driver.memory_manager import HINT_ORDER, Alloc, Owner
from vring.dirty.software import SoftwareDirtyLog
from vring.pages import PageSet
from vring.split import SEG, SEG_WRITE

REPORT, POISON = int(BalloonFeature.REPORTING), int(BalloonFeature.PAGE_POISON)
REPORTING = QueueRole.REPORTING


def pages_of(ranges):
    return {p for addr, length in ranges for p in range(addr >> 12, (addr + length) >> 12)}


def post(pair, ranges, flags=SEG_WRITE):
    """A report past the driver."""
    queue = pair.queue(REPORTING)
    segs = np.array([(addr, length, flags) for addr, length in ranges], dtype=SEG)
    assert queue.add(segs, [1], [len(segs)]) == 1
    queue.publish()
    served = pair.serve(REPORTING)
    assert len(queue.collect()[0]) == served
    return served


# -- the driver -------------------------------------------------------------------------------------------------------


def test_pass_reports_every_free_block_once():
    with Pair(ALL) as pair:
        free = pair.manager.free_blocks(HINT_ORDER)
        pair.settle(now=REPORT_DELAY - 0.1)
        assert pair.driver.statistics()["reported"] == 0
        assert pair.driver.next_wake == REPORT_DELAY
        pair.settle(now=REPORT_DELAY)
        assert pair.driver.statistics()["reported"] == pair.manager.reported_blocks == free
        pair.unchanged()
        for now in range(4, 20, 2):
            pair.settle(now=now)
        assert pair.driver.statistics()["reported"] == free
        assert len(pair.discarded) == free


def test_block_is_reported_again_after_use():
    with Pair(ALL) as pair:
        pair.settle(now=2.0)
        free = pair.manager.reported_blocks
        block = pair.manager.alloc_pages(HINT_ORDER, Owner.WORKLOAD)
        one = pair.manager.alloc_pages(0, Owner.WORKLOAD)
        assert pair.manager.reported_blocks == free - 1 - (pair.manager.free_blocks(HINT_ORDER) < free - 1)
        pair.manager.free(block, HINT_ORDER)
        pair.manager.free(one)
        pair.settle(now=4.0)
        assert pair.manager.reported_blocks == pair.manager.free_blocks(HINT_ORDER)
        assert pair.driver.statistics()["reported"] in (free + 1, free + 2)
        pair.unchanged()


def test_pass_takes_a_sixteenth_in_batches():
    with Pair(ALL, mib=2304) as pair:  # more than 512 blocks: two reports are a pass
        pair.settle(now=2.0)
        assert pair.driver.statistics()["reported"] == 2 * REPORT_RANGES
        pair.settle(now=3.9)
        assert pair.driver.statistics()["reported"] == 2 * REPORT_RANGES
        pair.settle(now=4.0)
        assert pair.driver.statistics()["reported"] == 4 * REPORT_RANGES


def test_blocks_are_out_of_reach_until_the_acknowledgement():
    """balloon.report.driver-3, and never a page in use."""
    with Pair(ALL) as pair:
        used = pair.manager.alloc_pages_bulk(0, 5000, Owner.WORKLOAD)
        pair.manager.write(used)
        pair.settle()
        assert pair.step(now=2.0)
        out = pair.owned(Owner.REPORT)
        assert out > 0
        assert not pair.step(now=2.0)
        rest = pair.manager.alloc_pages_bulk(0, 1 << 20, Owner.WORKLOAD, Alloc.ATOMIC)
        assert pair.owned(Owner.REPORT) == out
        pair.manager.write(rest)
        pair.settle(now=2.0)
        assert pair.owned(Owner.REPORT) == 0
        assert pages_of(pair.discarded).isdisjoint({*used.tolist(), *rest.tolist()})
        assert pair.manager.check_owned().wrong == 0


def test_reported_blocks_are_used_last():
    """balloon.report.driver-6: needless access to reported pages is avoided."""
    with Pair(ALL) as pair:
        used = [pair.manager.alloc_pages(HINT_ORDER, Owner.WORKLOAD) for _ in range(4)]
        pair.settle(now=2.0)
        for block in used:
            pair.manager.free(block, HINT_ORDER)
        assert {pair.manager.alloc_pages(HINT_ORDER, Owner.WORKLOAD) for _ in range(4)} == set(used)


def test_watermark_is_respected():
    with Pair(ALL) as pair:
        pair.manager.watermark = pair.manager.free_pages - 3 * 1024
        pair.settle()
        pair.step(now=2.0)
        assert pair.owned(Owner.REPORT) == 3 * 1024


def test_ring_full_is_tried_again():
    """Waiting for ever after an add that failed (number 18), here on the reporting_vq."""
    with Pair(ALL) as pair:
        pair.settle()
        queue, add = pair.queue(REPORTING), pair.queue(REPORTING).add
        queue.add = lambda *a: 0
        pair.step(now=2.0)
        assert not pair.step(now=2.0)
        assert pair.owned(Owner.REPORT)
        queue.add = add
        pair.settle(now=2.0)
        assert pair.manager.reported_blocks == pair.manager.free_blocks(HINT_ORDER)


@pytest.mark.parametrize("steps", range(6))
@pytest.mark.parametrize("how", ["remove", "freeze"])
def test_suspended_at_every_step_of_a_report(steps, how):
    """CVE-2026-74481: the report worker went on after suspend and used memory that was freed (number 15)."""
    with Pair(ALL) as pair:
        pair.settle()
        for _ in range(steps):
            pair.step(now=2.0)
            if _ % 2:
                pair.serve_all()
        getattr(pair.driver, how)()
        pair.unchanged()
        discarded = len(pair.discarded)
        assert not pair.driver.step(now=100.0)
        assert len(pair.discarded) == discarded
        if how == "freeze":
            pair.driver.restore()
        else:
            pair.driver.probe()
        pair.settle(now=200.0)
        assert pair.manager.reported_blocks == pair.manager.free_blocks(HINT_ORDER)


# -- the device -------------------------------------------------------------------------------------------------------


def test_discard_comes_before_the_acknowledgement():
    """The order must be discard, then acknowledge; what failed stays unacknowledged (number 55)."""
    with Pair(ALL) as pair:
        pair.settle()
        good = pair.device.discard

        def broken(addr, length):
            raise OSError("no")

        pair.device.discard = broken
        pair.step(now=2.0)
        with pytest.raises(OSError, match="no"):
            pair.serve(REPORTING)
        assert not pair.step(now=2.0)
        assert pair.owned(Owner.REPORT)
        pair.device.discard = good
        pair.settle(now=2.0)
        assert pair.serve(REPORTING) == 0
        assert pair.owned(Owner.REPORT) == 0 or pair.step(now=2.0)


@pytest.mark.parametrize("role", [QueueRole.INFLATE, REPORTING])
def test_failed_discard_keeps_only_what_was_not_done(role):
    with Pair(ALL) as pair:
        pair.settle()
        queue = pair.queue(role)
        seen = []

        def third_fails(addr, length):
            seen.append(int(addr[0]))
            if len(seen) == 3:
                raise OSError("full")

        pair.device.discard = third_fails
        for i in range(5):
            segs = np.zeros(1, SEG)
            if role is REPORTING:
                segs[0] = ((20 + i) * MIB, 4096, SEG_WRITE)
            else:
                gpa = pair.manager.alloc_pages(0, Owner.KERNEL) << 12
                pair.memory.write(gpa, (5000 + 2 * i).to_bytes(4, "little"))
                segs[0] = (gpa, 4, 0)
            queue.add(segs, [i])
        queue.publish()
        with pytest.raises(OSError, match="full"):
            pair.serve(role)
        assert queue.collect()[0].tolist() == [0, 1]
        assert pair.serve(role) == 3
        assert queue.collect()[0].tolist() == [2, 3, 4]
        assert len(seen) == 6


@pytest.mark.parametrize(
    "ranges",
    [
        [(16 * MIB + 1, 4096)],
        [(16 * MIB, 4095)],
        [(16 * MIB, 100)],
        [(16 * MIB, 4096), (20 * MIB + 512, 4096)],
    ],
)
def test_unaligned_report_has_no_effect(ranges):
    """Unaligned ranges used to be floored: a page only partly given was dropped (number 46)."""
    with Pair(ALL) as pair:
        pair.settle()
        assert post(pair, ranges) == 1
        assert pair.discarded == []
        assert pair.device.bad_requests == {BadRequest(Rule.REPORT_RANGE, QueueRole.REPORTING): 1}
        pair.settle(now=2.0)
        assert pair.discarded  # the queue lives on


def test_report_smaller_than_a_host_page_has_no_effect():
    """The unit of discard is larger than the unit of a report, as with huge pages (numbers 21, 39)."""
    with Pair(ALL, host_page=2 * MIB) as pair:
        pair.settle()
        post(pair, [(16 * MIB, 1 * MIB)])
        post(pair, [(17 * MIB, 2 * MIB)])
        assert pair.discarded == []
        post(pair, [(16 * MIB, 2 * MIB)])
        assert pair.discarded == [(16 * MIB, 2 * MIB)]


def test_readable_report_has_no_effect():
    with Pair(ALL) as pair:
        pair.settle()
        post(pair, [(16 * MIB, 4096)], flags=0)
        assert pair.discarded == []
        assert sum(pair.device.bad_requests.values()) == 1


def test_discards_are_logged_as_written():
    with Pair(ALL) as pair:
        pair.settle()
        pair.device.dirty_log = log = SoftwareDirtyLog.for_memory(pair.host)
        log.start()
        pair.settle(now=2.0)
        found = PageSet(pair.host.page_layout)
        log.sync(found)
        written = set(found.numbers().tolist())
        assert pages_of(pair.discarded) <= written


# -- poison -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [None, 0, 0xAAAAAAAA])
@pytest.mark.parametrize("offered", [REPORT | POISON, REPORT, POISON, 0])
def test_the_table_of_poison_and_reporting(poison, offered):
    """Reporting with a poison the host does not know of: the guest's check failed on pages that came back (number 11).

    A guest without poisoning clears PAGE_POISON; one that cannot tell of it clears REPORTING.
    """
    with Pair(ALL & ~(REPORT | POISON) | offered, poison=poison) as pair:
        expected = offered
        if poison is None:
            expected &= ~POISON
        elif not offered & POISON:
            expected &= ~REPORT
        assert pair.device.negotiated & (REPORT | POISON) == expected
        writes = [event for event in pair.transport.trace if event[:2] == ("write", POISON_VAL)]
        assert writes == ([("write", POISON_VAL, poison)] if expected & POISON else [])
        if writes:
            assert pair.transport.trace.index(writes[0]) < pair.transport.trace.index(("driver_ok",))
        pair.settle(now=2.0)
        pair.target(500)
        assert bool(pair.manager.reported_blocks) is bool(expected & REPORT)
        reported = [r for r in pair.discarded if r[1] == 4 * MIB]
        assert bool(reported) is bool(expected & REPORT and not poison)
        pair.target(0)
        # Whatever came back from reports and from the balloon, what is allocated holds the poison of a free page.
        if poison is not None:
            for pfn in pair.manager.alloc_pages_bulk(0, pair.manager.free_pages, Owner.WORKLOAD, Alloc.ATOMIC).tolist():
                page = pair.memory.array(pfn << 12, 1024, "<u4")
                assert (page == poison).all()


def test_poison_value_does_not_outlive_a_reset():
    with Pair(ALL, poison=0xAAAAAAAA) as pair:
        assert pair.device.poison_val == 0xAAAAAAAA
        pair.driver.remove()
        assert pair.device.poison_val == 0
        assert pair.device.config[POISON_VAL] == 0


def test_poison_value_counts_only_when_negotiated():
    with Pair(ALL) as pair:
        pair.device.write_config(POISON_VAL, b"\xaa" * 4)
        assert pair.device.poison_val == 0
        pair.settle(now=2.0)
        assert pair.discarded
