"""Inflate and deflate: any target, memory that runs out, full rings, compaction, hostile lists of pages."""

import numpy as np
import pytest
from features_pair import ALL, Pair

from balloon_dev.config import ACTUAL, NUM_PAGES
from balloon_dev.features import BalloonFeature, QueueRole
from balloon_dev.rules import BadRequest, Rule
from guest_driver.balloon import Request
from guest_driver.balloon.state import RETRY_DELAY
from guest_driver.memory_manager import HINT_ORDER, Alloc, Owner
from vring.errors import DeviceError, PeerVanished, UsageError
from vring.split import SEG, SEG_WRITE

OOM = int(BalloonFeature.DEFLATE_ON_OOM)


def steps(pair, n, now=None, serve=False):
    done = 0
    for _ in range(n):
        done += pair.step(now)
        if serve:
            pair.serve_all()
    return done


def post(pair, role, data, flags=0, pieces=1):
    gpa = pair.manager.alloc_pages(9, Owner.KERNEL) << 12
    pair.memory.write(gpa, data)
    cut = [len(data) * i // pieces for i in range(pieces + 1)]
    segs = np.zeros(pieces, SEG)
    segs["addr"], segs["len"], segs["flags"] = [gpa + at for at in cut[:-1]], np.diff(cut), flags
    queue = pair.queue(role)
    assert queue.add(segs, [1], [pieces]) == 1
    queue.publish()
    assert pair.serve(role) == 1
    assert len(queue.collect()[0]) == 1


# -- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [1, 15, 16, 17, 255, 256, 257, 511, 3001, 10_000])
def test_any_target_is_a_fixed_point(target):
    """A target that is no multiple of some unit made the driver inflate and deflate for ever (number 13)."""
    with Pair(ALL) as pair:
        pair.target(5000)
        pair.target(target)
        assert pair.device.actual == pair.device.ballooned_pages == target
        pair.agree()
        kicks = len(pair.transport.trace)
        for now in range(1, 50):
            pair.settle(now=float(now))
        assert [e for e in pair.transport.trace[kicks:] if e[0] == "write"] == []
        pair.target(0)
        pair.unchanged()


@pytest.mark.parametrize("target", [1 << 20, 0xFFFFFFFF])
def test_balloon_bigger_than_memory_is_tried_slowly(target):
    """A balloon larger than free memory made driver and allocator fight (number 47f)."""
    with Pair(ALL & ~int(BalloonFeature.REPORTING)) as pair:
        pair.target(target, now=0.0)
        assert pair.manager.free_pages == 0
        full = pair.device.actual
        assert full == pair.manager.total_pages
        assert pair.driver.next_wake == RETRY_DELAY
        failures = pair.manager.statistics()["failures"]
        assert steps(pair, 1000, now=RETRY_DELAY / 2) == 0
        assert pair.manager.statistics()["failures"] == failures
        for i in range(1, 11):
            assert steps(pair, 100, now=i * RETRY_DELAY * 1.01) == 0
        assert pair.manager.statistics()["failures"] <= failures + 10
        pair.target(0, now=10.0)
        pair.unchanged()


def test_inflating_goes_on_when_memory_comes_back():
    with Pair(ALL & ~OOM) as pair:
        held = pair.manager.alloc_pages_bulk(0, 4000, Owner.WORKLOAD)
        want = pair.manager.total_pages
        pair.target(want, now=0.0)
        assert pair.device.actual == want - 4000
        pair.manager.free_bulk(held)
        pair.settle(now=RETRY_DELAY)
        assert pair.device.actual == want


def test_requests_are_of_256_pages_and_actual_follows_each():
    with Pair(ALL) as pair:
        pair.target(600)
        writes = [event[2] for event in pair.transport.trace if event[:2] == ("write", ACTUAL)]
        assert writes == [256, 512, 600]
        assert pair.device.counters["pages inflated"] == 600
        pair.target(0)
        assert pair.device.counters["pages deflated"] == 600


@pytest.mark.parametrize("must_tell", [0, int(BalloonFeature.MUST_TELL_HOST)])
def test_pages_are_not_reused_before_the_deflate_is_acknowledged(must_tell):
    """balloon.operation.driver-7; the driver behaves so whether or not the bit was negotiated."""
    with Pair(ALL & ~int(BalloonFeature.MUST_TELL_HOST) | must_tell) as pair:
        pair.target(300)
        free = pair.manager.free_pages
        pair.device.set_target(0)
        pair.transport.collect()
        steps(pair, 20)
        assert pair.manager.free_pages == free
        pair.serve_all()
        assert pair.manager.free_pages == free
        pair.step()
        assert pair.manager.free_pages == free + 256


def test_inflate_is_not_undone_before_its_acknowledgement():
    """balloon.operation.driver-10: no deflate for a page whose inflate is on its way."""
    with Pair(ALL) as pair:
        pair.device.set_target(100)
        steps(pair, 10)
        pair.device.set_target(0)
        pair.transport.collect()
        steps(pair, 10)
        assert pair.queue(QueueRole.DEFLATE).outstanding == 0
        pair.settle()
        pair.unchanged()
        assert pair.device.actual == 0


def test_config_space_is_written_only_where_it_may_be():
    """A guest could overwrite num_pages and the command id (number 48)."""
    with Pair(ALL) as pair:
        pair.device.set_target(77)
        before = pair.device.read_config(0, 16)
        pair.device.write_config(0, b"\xff" * 4)
        pair.device.write_config(8, b"\xff" * 4)
        pair.device.write_config(200, b"\xff" * 4)
        assert pair.device.read_config(0, 16) == before
        assert pair.device.bad_requests == {BadRequest(Rule.CONFIG_READ_ONLY): 3}
        generation = pair.device.config_generation
        pair.device.set_target(78)
        assert pair.device.config_generation != generation  # and a constant generation (48)
        assert pair.device.read_config(NUM_PAGES, 4) == (78).to_bytes(4, "little")


# -- memory runs out --------------------------------------------------------------------------------------------------


def fill_memory(pair):
    return pair.manager.alloc_pages_bulk(0, pair.manager.free_pages, Owner.WORKLOAD, Alloc.ATOMIC)


def test_oom_deflates_256_pages_and_waits_for_the_acknowledgement():
    with Pair(ALL) as pair:
        pair.target(1000)
        fill_memory(pair)
        got = pair.manager.alloc_pages(0, Owner.WORKLOAD)
        assert got is not None
        assert pair.driver.statistics()["oom_deflated"] == 256
        assert pair.device.actual == pair.device.ballooned_pages == 744
        pair.agree()


def test_without_the_bit_never():
    with Pair(ALL & ~OOM) as pair:
        pair.target(1000)
        fill_memory(pair)
        assert pair.manager.alloc_pages(0, Owner.WORKLOAD) is None
        assert pair.device.ballooned_pages == 1000


@pytest.mark.parametrize("flags", [Alloc.NORETRY, Alloc.ATOMIC])
def test_not_for_allocations_that_may_fail(flags):
    """The balloon was deflated by ordinary page cache pressure (number 9)."""
    with Pair(ALL) as pair:
        pair.target(1000)
        fill_memory(pair)
        assert pair.manager.alloc_pages(0, Owner.WORKLOAD, flags) is None
        assert not len(pair.manager.alloc_hint_blocks(4))
        pair.settle(now=10.0)
        assert pair.device.ballooned_pages == 1000


def test_not_while_the_shrinker_has_something():
    with Pair(ALL) as pair:
        pair.target(1000)
        pair.device.start_hinting()
        pair.settle()
        fill_memory(pair)
        assert pair.manager.alloc_pages(0, Owner.WORKLOAD) is not None
        assert pair.driver.statistics()["reclaimed"] == 1
        assert pair.device.ballooned_pages == 1000


def test_device_that_does_not_answer_is_waited_for_once():
    """The wait is bounded, the pages come back when the device answers at last."""
    with Pair(ALL) as pair:
        pair.target(1000)
        fill_memory(pair)
        pair.transport.answers = False
        assert pair.manager.alloc_pages(0, Owner.WORKLOAD) is None
        assert pair.transport.waits == 1
        assert pair.owned(Owner.BALLOON) == 1000  # none is used before its acknowledgement
        assert pair.manager.alloc_pages(0, Owner.WORKLOAD) is None
        pair.settle()
        assert pair.manager.free_pages == 256
        pair.agree()


def test_device_that_interrupts_without_using_anything():
    with Pair(ALL) as pair:
        pair.target(1000)
        fill_memory(pair)
        pair.transport.wait = lambda index: True
        assert pair.manager.alloc_pages(0, Owner.WORKLOAD) is None


@pytest.mark.parametrize("error", [PeerVanished("gone"), DeviceError("nonsense")], ids=["gone", "broken"])
def test_out_of_memory_is_not_the_place_to_hear_that_the_device_is_gone(error):
    with Pair(ALL) as pair:
        pair.target(1000)
        fill_memory(pair)

        def fail(index):
            raise error

        pair.transport.wait = fail
        assert pair.manager.alloc_pages(0, Owner.WORKLOAD) is None
        pair.manager.verify()


@pytest.mark.parametrize("at", range(1, 7))
def test_oom_while_a_request_is_on_its_way(at):
    with Pair(ALL) as pair:
        pair.target(600)
        rest = fill_memory(pair)
        pair.manager.free_bulk(rest[:300])
        pair.device.set_target(800)
        pair.transport.collect()
        steps(pair, at, serve=at % 2 == 0)
        got = [pair.manager.alloc_pages(0, Owner.WORKLOAD) for _ in range(500)]
        assert None not in got
        pair.settle(now=100.0)
        pair.agree()
        assert len(set(got)) == 500


@pytest.mark.parametrize("more", [0, 100_000])
def test_oom_and_a_high_target_settle(more):
    """Filling and leaking took turns for ever (number 47f): after an OOM the driver waits for the host."""
    with Pair(ALL & ~int(BalloonFeature.REPORTING)) as pair:
        total = pair.manager.total_pages
        pair.target(total + more, now=0.0)
        assert pair.device.actual == total
        page = pair.manager.alloc_pages(0, Owner.WORKLOAD)
        assert page is not None
        for i in range(20):
            pair.settle(now=float(i))
        assert pair.device.actual == total - 256
        pair.manager.free(page)
        pair.target(total + more, now=30.0)  # only now the host says something
        assert pair.device.actual == total


# -- full rings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", [QueueRole.INFLATE, QueueRole.DEFLATE])
def test_ring_full_is_tried_again(role):
    """Waiting for ever after an add that failed (number 18)."""
    with Pair(ALL) as pair:
        pair.target(300)
        queue, add = pair.queue(role), pair.queue(role).add
        queue.add = lambda *a: 0
        pair.device.set_target(600 if role is QueueRole.INFLATE else 0)
        pair.transport.collect()
        assert steps(pair, 50) < 10
        queue.add = add
        pair.settle()
        assert pair.device.actual == pair.device.config[NUM_PAGES]
        pair.agree()


def test_hint_ring_full_gives_the_blocks_back():
    """Waiting for ever after an add that failed (number 18), here on the free page queue."""
    with Pair(ALL) as pair:
        pair.settle()
        queue, add = pair.queue(QueueRole.FREE_PAGE), pair.queue(QueueRole.FREE_PAGE).add
        pair.device.start_hinting()
        queue.add = lambda *a: 0
        assert steps(pair, 20) < 20
        assert pair.driver.hinted_blocks == 0
        queue.add = add
        assert pair.hint_run() > 5
        pair.unchanged()


# -- compaction -------------------------------------------------------------------------------------------------------


def scattered(pair):
    """A balloon with few pages in each of several blocks, everything else there free."""
    pair.settle()
    pages = pair.manager.alloc_pages_bulk(0, 6 * 1024, Owner.WORKLOAD)
    balloon = np.sort(pages)[::100].copy()
    pair.manager.free_bulk(balloon)
    pair.target(len(balloon))
    pair.manager.free_bulk(np.setdiff1d(pages, balloon))
    assert np.array_equal(pair.manager.owned(Owner.BALLOON)[0], balloon)


def test_scattered_balloon_is_gathered():
    with Pair(ALL) as pair:
        scattered(pair)
        before = pair.manager.free_blocks(HINT_ORDER)
        free = pair.manager.free_pages
        moved = 0
        while n := pair.manager.compact():
            assert pair.manager.compact() == 0  # busy with one move
            pair.settle()
            pair.agree()
            moved += n
        assert pair.driver.statistics()["moved"] == moved > 0
        assert pair.device.actual == pair.device.ballooned_pages
        assert pair.manager.free_blocks(HINT_ORDER) >= before + 4
        assert pair.manager.free_pages == free
        pair.agree()


def test_move_is_inflate_then_deflate_and_frees_only_after_both():
    with Pair(ALL) as pair:
        scattered(pair)
        free = pair.manager.free_pages
        moved = pair.manager.compact()
        assert pair.driver._state["request"] == Request.MOVE_IN
        assert pair.manager.free_pages == free - moved
        pair.serve(QueueRole.INFLATE)
        assert pair.step()
        assert pair.driver._state["request"] == Request.MOVE_OUT
        assert pair.manager.free_pages == free - moved
        pair.serve(QueueRole.DEFLATE)
        assert pair.manager.free_pages == free - moved
        assert pair.step()
        assert pair.manager.free_pages == free


@pytest.mark.parametrize("at", range(5))
def test_removed_while_pages_are_moved(at):
    """A page isolated for a move was used after free by remove or deflate (number 14)."""
    with Pair(ALL) as pair:
        scattered(pair)
        assert pair.manager.compact()
        for i in range(at):
            pair.step()
            if i % 2 == 0:
                pair.serve_all()
        pair.driver.remove()
        pair.unchanged()


def test_target_changes_while_pages_are_moved():
    with Pair(ALL) as pair:
        scattered(pair)
        assert pair.manager.compact()
        pair.target(5)
        assert pair.device.actual == 5
        pair.agree()


def test_nothing_to_compact():
    with Pair(ALL) as pair:
        assert pair.manager.compact() == 0
        pair.target(1024)
        assert pair.manager.compact(limit=0) == 0
        pair.driver.remove()
        assert pair.manager.compact() == 0


# -- hostile lists ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", [QueueRole.INFLATE, QueueRole.DEFLATE])
@pytest.mark.parametrize("pieces", [1, 3, 9])
def test_bad_pfns_are_left_out_and_the_queue_lives_on(role, pieces):
    """Addresses were not checked, or a bad one ended the worker (numbers 38, 50, 51)."""
    with Pair(ALL) as pair:
        pair.target(10)
        pfns = np.array([0xFFFFFFFF, 16384, 16383, 16383, 5000, 4999], "<u4")
        post(pair, role, pfns.tobytes() + b"\x01", pieces=pieces)
        inside = {16383, 5000, 4999}
        assert pair.device.bad_requests == {
            BadRequest(Rule.PFN_OUTSIDE_RAM, role): 2,
            BadRequest(Rule.PFNS_LENGTH, role): 1,
        }
        if role is QueueRole.INFLATE:
            assert pair.device.ballooned_pages == 13
            assert {a >> 12 for a, _ in pair.discarded} >= inside - {5000}
        pair.target(20)
        assert pair.device.actual == 20


def test_writable_list_has_no_effect():
    with Pair(ALL) as pair:
        pair.settle()
        post(pair, QueueRole.INFLATE, bytes(16), flags=SEG_WRITE)
        assert pair.device.ballooned_pages == 0
        assert sum(pair.device.bad_requests.values()) == 1


def test_target_must_fit():
    with Pair(ALL) as pair, pytest.raises(UsageError):
        pair.device.set_target(1 << 32)
