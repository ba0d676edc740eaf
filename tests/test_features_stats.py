"""Memory statistics: tags, the one buffer, hostile buffers, and the buffer over a migration."""

import numpy as np
import pytest
from features_pair import ALL, Pair

from balloon_dev.device import BalloonDevice
from balloon_dev.features import BalloonFeature, QueueRole
from balloon_dev.rules import BadRequest, Rule
from balloon_dev.stats import ENTRY, MAX_ENTRIES, STAT_NAMES, SavedStats, StatTag
from guest_driver.memory_manager import Owner
from vring.errors import UsageError
from vring.split import SEG, SEG_WRITE, DeviceQueue

STATS = QueueRole.STATS


def entries(*pairs):
    return np.array(list(pairs), dtype=ENTRY).tobytes()


@pytest.fixture
def pair():
    with Pair(ALL) as pair:
        pair.settle()
        yield pair


def expose(pair, data, *, flags=0, pieces=1):
    """Put a buffer on the statsq past the driver, cut into pieces."""
    gpa = pair.manager.alloc_pages(4, Owner.KERNEL) << 12
    pair.memory.write(gpa, data)
    cut = [len(data) * i // pieces for i in range(pieces + 1)]
    segs = np.zeros(pieces, SEG)
    segs["addr"] = [gpa + at for at in cut[:-1]]
    segs["len"] = np.diff(cut)
    segs["flags"] = flags
    queue = pair.queue(STATS)
    assert queue.add(segs, [7], [pieces]) == 1
    queue.publish()
    pair.serve(STATS)


def test_sixteen_tags_with_the_names_of_qemu():
    """A name was missing after the list of tags had grown (number 42)."""
    assert ENTRY.itemsize == 10
    assert [int(tag) for tag in STAT_NAMES] == list(range(16))
    assert list(STAT_NAMES.values()) == [
        "stat-swap-in",
        "stat-swap-out",
        "stat-major-faults",
        "stat-minor-faults",
        "stat-free-memory",
        "stat-total-memory",
        "stat-available-memory",
        "stat-disk-caches",
        "stat-htlb-pgalloc",
        "stat-htlb-pgfail",
        "stat-oom-kills",
        "stat-alloc-stalls",
        "stat-async-scans",
        "stat-direct-scans",
        "stat-async-reclaims",
        "stat-direct-reclaims",
    ]


def test_primed_before_driver_ok_and_notified_after(pair):
    """The statsq was kicked before DRIVER_OK; a device may ignore or reject that (number 17; basic.init.driver-7)."""
    trace = pair.transport.trace
    assert ("kick", pair.device.queue_number(STATS), True) in trace
    assert not [event for event in trace if event[0] == "kick" and not event[2]]
    assert pair.device.stats.updates == 1
    assert pair.device.stats.values["stat-total-memory"] == pair.manager.total_pages * 4096


def test_poll_brings_fresh_figures_of_the_same_tags(pair):
    names = set(pair.device.stats.values)
    free = pair.device.stats.values["stat-free-memory"]
    pair.manager.alloc_pages_bulk(0, 100, Owner.WORKLOAD)
    assert pair.device.stats.values["stat-free-memory"] == free
    assert pair.device.request_stats()
    assert not pair.device.request_stats()  # the driver has the buffer now
    pair.settle()
    assert pair.device.stats.values["stat-free-memory"] == free - 100 * 4096
    assert set(pair.device.stats.values) == names
    assert pair.queue(STATS).outstanding == 1
    assert pair.device.stats.updates == 2


def test_without_the_feature_there_is_nobody_to_ask():
    with Pair(ALL & ~int(BalloonFeature.STATS_VQ)) as pair:
        assert not pair.device.request_stats()


def test_any_order_and_unknown_tags(pair):
    pair.device.request_stats()
    pair.serve(STATS)
    pair.queue(STATS).collect()
    expose(pair, entries((15, 1), (77, 2), (4, 3), (0xFFFF, 4)), pieces=7)
    assert pair.device.stats.values == {"stat-direct-reclaims": 1, "stat-free-memory": 3}
    assert pair.device.bad_requests == {}
    assert pair.device.counters["unknown statistics"] == 2


@pytest.mark.parametrize("extra", [1, 5, 6, 9])
def test_odd_length_counts_whole_entries(pair, extra):
    pair.device.request_stats()
    pair.queue(STATS).collect()
    expose(pair, entries((4, 9)) + bytes(extra))
    assert pair.device.stats.values == {"stat-free-memory": 9}
    assert pair.device.bad_requests == {BadRequest(Rule.STATS_LENGTH, QueueRole.STATS): 1}


def test_too_many_entries_are_not_looked_at(pair):
    """A device copied as many bytes as the guest said (number 51)."""
    pair.device.request_stats()
    pair.queue(STATS).collect()
    expose(pair, entries(*[(4, 1)] * MAX_ENTRIES, (5, 2), (6, 3)))
    assert pair.device.stats.values == {"stat-free-memory": 1}
    assert pair.device.bad_requests == {BadRequest(Rule.STATS_ENTRIES, QueueRole.STATS): 1}


def test_writable_buffer_is_returned_without_effect(pair):
    pair.device.request_stats()
    pair.queue(STATS).collect()
    before = dict(pair.device.stats.values)
    expose(pair, bytes(20), flags=SEG_WRITE)
    assert pair.device.stats.values == before
    assert len(pair.queue(STATS).collect()[0]) == 1
    assert pair.device.bad_requests == {BadRequest(Rule.STATS_WRITABLE, QueueRole.STATS): 1}


def test_second_buffer_sends_the_first_one_back(pair):
    expose(pair, entries((5, 5)))
    assert pair.device.bad_requests == {BadRequest(Rule.STATS_BUFFERS, QueueRole.STATS): 1}
    assert pair.device.stats.values == {"stat-total-memory": 5}
    assert pair.queue(STATS).collect()[0].tolist() == [0]
    assert pair.device.held_buffers(2) == 1


def test_reset_forgets_figures(pair):
    """Stale statistics were shown after a reset (number 42)."""
    pair.transport.reset()
    assert pair.device.stats.values == {}
    assert pair.device.held_buffers(2) == 0
    assert not pair.device.request_stats()


@pytest.mark.parametrize("held", [True, False])
def test_buffer_survives_save_and_load(pair, held):
    """The buffer was lost, or its head trusted, over a migration (number 42): it is saved as base index minus one."""
    if not held:
        assert pair.device.request_stats()
    queue = pair.device.queue(STATS)
    base = queue.next_avail - pair.device.held_buffers(2)
    saved = pair.device.save()
    there = BalloonDevice(ALL)
    there.set_memory(pair.host)
    there.load(saved)
    assert there.stats.values == pair.device.stats.values
    there.set_features(pair.device.negotiated)
    there.attach_queue(2, DeviceQueue(pair.host, queue.layout, base=base, event_idx=True, index=2))
    assert there.process(2) == int(held)
    assert there.held_buffers(2) == int(held)
    pair.transport.device = pair.device = there
    if held:
        assert there.request_stats()
    pair.manager.alloc_pages_bulk(0, 50, Owner.WORKLOAD)
    pair.settle()
    assert there.stats.values["stat-free-memory"] == pair.manager.free_pages * 4096
    assert there.held_buffers(2) == 1


@pytest.mark.parametrize("bad", [None, {}, {"values": {"x": 1}, "updates": 0}, {"values": {"stat-swap-in": "y"}}])
def test_malformed_saved_statistics(bad):
    with pytest.raises(UsageError, match="saved statistics"):
        SavedStats.from_json(bad)


def test_malformed_statistics_change_nothing_of_a_device():
    with Pair(ALL) as pair:
        pair.settle()
        saved = pair.device.save()
        there = BalloonDevice(ALL)
        there.set_memory(pair.host)
        before = there.save()
        with pytest.raises(UsageError, match="saved statistics"):
            there.load({**saved, "stats": {}})
        assert there.save() == before


def test_ring_full_is_tried_again(pair):
    """Waiting for ever after an add that failed (number 18), here on the statsq."""
    assert pair.device.request_stats()
    queue, add = pair.queue(STATS), pair.queue(STATS).add
    queue.add = lambda *a: 0
    for _ in range(3):
        assert not pair.step()
    queue.add = add
    pair.manager.alloc_pages_bulk(0, 10, Owner.WORKLOAD)
    pair.settle()
    assert pair.device.stats.updates == 2
    assert pair.device.stats.values["stat-free-memory"] == pair.manager.free_pages * 4096
    assert StatTag.FREE_MEMORY in pair.driver.memory_statistics()
