"""Life cycle: probing that fails, removal, suspend, reset and migration with anything in flight."""

import json

import numpy as np
import pytest
from features_pair import ALL, Pair, PairTransport

from balloon_dev.config import ACTUAL, CMD_ID
from balloon_dev.device import BalloonDevice
from balloon_dev.features import QueueRole
from balloon_dev.hinting import HintState
from guest_driver.balloon import BalloonDriver
from guest_driver.memory_manager import HINT_ORDER, MemoryManager, Owner
from vring.errors import DeviceError, PeerVanished, UsageError

BUSY_STEPS = 40


def make_busy(pair):
    """Have a request, statistics, a report and a hint run on their way at once, none of them answered."""
    pair.settle()
    pair.target(600)
    pair.device.set_target(900)
    pair.device.request_stats()
    pair.device.start_hinting()
    pair.transport.collect()


def busy_step(pair, i):
    """One of many small steps; each queue is served now and then, in an order of its own."""
    pair.step(now=100.0)
    if i % 3 == 2:
        pair.serve(list(QueueRole)[i // 3 % 5])


# -- probing ----------------------------------------------------------------------------------------------------------


def probe_calls():
    with Pair(ALL, poison=5) as pair:
        return [event for event in pair.transport.trace if event[0] != "kick"]


@pytest.mark.parametrize("at", range(len(probe_calls())))
def test_failure_at_each_step_of_probing_leaves_nothing_behind(at):
    """Error paths of probe leaked (number 6)."""
    with Pair(ALL, poison=5, probe=False) as pair:
        pair.transport.fail_at = at
        with pytest.raises(DeviceError, match="injected"):
            pair.driver.probe()
        pair.unchanged()
        assert pair.device.negotiated == 0
        pair.driver.probe()
        pair.target(30)
        assert pair.device.actual == 30


def test_init_order():
    """No notification before DRIVER_OK, poison before it, features before queues (number 17)."""
    with Pair(ALL, poison=5) as pair:
        names = [event[0] for event in pair.transport.trace]
        assert names.index("features") < names.index("setup") < names.index("driver_ok") < names.index("kick")
        assert names.index("write") < names.index("driver_ok")
        assert "read" not in names  # the config space is the worker's


def test_config_is_not_read_in_the_interrupt():
    """Reading the config space in its interrupt handler dead-locked (number 1)."""
    with Pair(ALL) as pair:
        pair.settle()
        pair.device.start_hinting()
        pair.transport.collect()
        before = len(pair.transport.trace)
        pair.driver.interrupt(pair.transport.interrupts())
        assert len(pair.transport.trace) == before
        pair.driver.step()
        assert ("read", CMD_ID) in pair.transport.trace[before:]


def test_probe_again_with_smaller_and_larger_queues():
    from dataclasses import replace

    from balloon_dev.profiles import SPEC

    with Pair(ALL) as pair:
        for sizes in ((16, 16, 16, 16, 16), (256, 256, 256, 1024, 256), (128, 128, 128, 1024, 32)):
            pair.driver.remove()
            pair.device.profile = replace(SPEC, queue_sizes=sizes)
            pair.driver.probe()
            pair.target(300)
            assert pair.device.actual == 300
            assert pair.hint_run() > 5


@pytest.mark.parametrize("sizes", [(100, 3, 1000, 1023, 31), (1, 1, 1, 1, 1), (65535, 32769, 5, 6, 7)])
def test_sizes_that_are_no_power_of_two(sizes):
    """The largest size of a queue may be any number: the driver takes the power of two below it (ring.size-1)."""
    from dataclasses import replace

    from balloon_dev.profiles import SPEC

    with Pair(ALL) as pair:
        pair.driver.remove()
        pair.device.profile = replace(SPEC, queue_sizes=sizes)
        pair.driver.probe()
        taken = [queue.size for _, queue in sorted(pair.transport.queues.items())]
        most = SPEC.queue_sizes
        assert taken == [1 << min(size, limit).bit_length() - 1 for size, limit in zip(sizes, most, strict=True)]
        pair.target(300)
        assert pair.device.actual == 300
        pair.settle(now=100.0)
        assert pair.hint_run() > 0
        assert pair.driver.statistics()["reported"] > 0
        pair.driver.remove()
        pair.unchanged()


# -- removal, suspend, reset ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.parametrize("steps", range(BUSY_STEPS))
def test_removed_at_any_step(steps, answers):
    """Memory was lost when the driver went away during a run of hints (number 5)."""
    with Pair(ALL) as pair:
        make_busy(pair)
        for i in range(steps):
            busy_step(pair, i)
        pair.transport.answers = answers
        pair.driver.remove()
        pair.unchanged()
        assert pair.device.ballooned_pages == 0
        assert not pair.driver.step(now=1000.0)
        pair.driver.probe()
        pair.settle(now=2000.0)
        pair.agree()
        assert pair.device.actual == 900


@pytest.mark.parametrize("steps", range(0, BUSY_STEPS, 3))
def test_suspended_and_resumed_at_any_step(steps):
    """The driver empties its balloon, forgets the device, and fills the balloon again after that (numbers 15, 19)."""
    with Pair(ALL) as pair:
        make_busy(pair)
        for i in range(steps):
            busy_step(pair, i)
        pair.driver.freeze()
        pair.unchanged()
        assert not pair.driver.step(now=500.0)
        pair.driver.restore()
        pair.settle(now=501.0)
        pair.agree()
        assert pair.device.actual == 900
        with pytest.raises(UsageError, match="not frozen"):
            pair.driver.restore()


@pytest.mark.parametrize("steps", range(0, BUSY_STEPS, 3))
def test_device_reset_with_anything_outstanding(steps):
    """Requests raced with the shutdown of the device (number 19); it touches no queue after its reset."""
    with Pair(ALL) as pair:
        make_busy(pair)
        for i in range(steps):
            busy_step(pair, i)
        used = [bytes(pair.memory.read(q.layout.used, 4)) for q in pair.driver._queues.values()]
        discarded = len(pair.discarded)
        pair.transport.reset()
        for index in range(5):
            assert pair.device.process(index) == 0
        assert not pair.device.request_stats()
        assert used == [bytes(pair.memory.read(q.layout.used, 4)) for q in pair.driver._queues.values()]
        assert len(pair.discarded) == discarded
        pair.transport.answers = False
        pair.driver.remove()
        pair.unchanged()


def test_leaves_the_balloon_politely():
    """Pages are announced on the deflateq before the driver goes (balloon.operation.driver-6)."""
    with Pair(ALL) as pair:
        pair.target(700)
        reset, actual = pair.transport.reset, []
        pair.transport.reset = lambda: (actual.append((pair.device.actual, pair.device.ballooned_pages)), reset())
        pair.driver.remove()
        assert actual == [(0, 0)]
        pair.unchanged()


def test_peer_that_vanished_leaves_the_allocator_whole():
    with Pair(ALL) as pair:
        pair.target(700)

        def gone(*args):
            raise PeerVanished("gone")

        pair.transport.wait = pair.transport.reset = gone
        with pytest.raises(PeerVanished):
            pair.driver.remove()
        pair.unchanged()


@pytest.mark.parametrize("who", ["guest", "both"])
def test_first_run_after_a_reset(who):
    """After suspend the driver ignored a device that began again with the same first id (number 24)."""
    with Pair(ALL) as pair:
        pair.settle()
        first = pair.device.start_hinting()
        pair.settle()
        assert pair.driver.hinted_blocks
        if who == "both":  # another device, which counts from the beginning
            there = BalloonDevice(ALL)
            there.set_memory(pair.host)
            pair.driver.freeze()
            pair.transport.device = pair.device = there
        else:
            pair.driver.freeze()
        pair.unchanged()
        pair.driver.restore()
        pair.settle()
        second = pair.device.start_hinting()
        assert (second == first) is (who == "both")
        pair.settle()
        assert pair.driver.hinted_blocks > 5
        assert pair.device.hinting.state is HintState.STOP
        pair.device.finish_hinting()
        pair.settle()
        pair.unchanged()


# -- hint races -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["stop_hinting", "finish_hinting"])
@pytest.mark.parametrize("when", range(6))
def test_id_sent_is_the_id_decided_on(end, when):
    """STOP between two reads of the config space opened a run under id 0 that took all memory (number 23)."""

    class Tap:
        def __init__(self):
            self.ids = []

        def command(self, command_id):
            self.ids.append(command_id)

        def pages(self, addr, length):
            assert self.ids
            assert self.ids[-1] >= 2

    with Pair(ALL) as pair:
        pair.settle()
        pair.device.tap = tap = Tap()
        command_id = pair.device.start_hinting()
        for _ in range(when):
            pair.step()
        getattr(pair.device, end)()
        pair.settle()
        assert set(tap.ids) <= {0, command_id}
        assert tap.ids.count(command_id) <= 1
        assert pair.driver.hinted_blocks == 0 or end == "stop_hinting"
        pair.device.finish_hinting()
        pair.settle()
        pair.unchanged()


@pytest.mark.parametrize("pressure", range(1, 8))
def test_shrinker_during_a_run(pressure):
    """The shrinker counted pages for blocks and gave back none, or the wrong number (number 4): none is lost."""
    with Pair(ALL) as pair:
        pair.settle()
        pair.device.start_hinting()
        total, seen = pair.manager.total_pages, []
        for i in range(60):
            pair.step()
            if i % 5 == 4:
                pair.serve_all()
            held = pair.owned(Owner.HINT)
            if i % pressure == 0 and held:
                freed = pair.driver._shrink(1000 * pressure)
                assert freed == min(-(-1000 * pressure // 1024) * 1024, held)
                assert held - pair.owned(Owner.HINT) == freed
                seen.append(freed)
            owners = pair.manager.pages_by_owner()
            assert sum(owners.values()) == total
        assert pair.driver.statistics()["reclaimed"] == sum(seen) // 1024
        pair.device.finish_hinting()
        pair.settle()
        pair.unchanged()


# -- migration --------------------------------------------------------------------------------------------------------


def migrate(pair):
    """Device and driver go on elsewhere: what was in flight is in RAM and in the saved state, nothing else travels."""
    bases = {i: q.next_avail - pair.device.held_buffers(i) & 0xFFFF for i, q in pair.device._queues.items()}
    saved = json.loads(json.dumps(pair.device.save()))
    there = BalloonDevice(ALL, discard=pair._discard)
    there.set_memory(pair.host)
    there.load(saved)
    assert there.save() == saved
    pair.device, pair.transport = there, PairTransport(there, pair.host)
    pair.manager = MemoryManager.attach(pair.memory)
    pair.driver = BalloonDriver.attach(pair.manager, pair.transport, bases, batch=4)


@pytest.mark.parametrize("steps", range(BUSY_STEPS))
def test_migrated_with_anything_in_flight(steps):
    """A held buffer was lost, heads were trusted, hints ran on after the load (number 42)."""
    with Pair(ALL) as pair:
        make_busy(pair)
        for i in range(steps):
            busy_step(pair, i)
        migrate(pair)
        pair.settle(now=100.0)
        pair.agree()
        assert pair.device.actual == 900
        pair.target(50, now=101.0)
        assert pair.device.actual == 50
        assert pair.device.request_stats()
        pair.settle(now=101.0)
        assert pair.device.stats.values["stat-total-memory"]
        pair.device.finish_hinting()
        pair.settle(now=120.0)
        assert pair.driver.hinted_blocks == 0
        assert pair.manager.reported_blocks == pair.manager.free_blocks(HINT_ORDER)
        assert pair.hint_run(now=121.0) > 5
        pair.driver.remove()
        pair.unchanged()


def test_migrated_while_pages_are_moved():
    with Pair(ALL) as pair:
        pair.settle()
        pages = pair.manager.alloc_pages_bulk(0, 4 * 1024, Owner.WORKLOAD)
        balloon = np.sort(pages)[::100].copy()
        pair.manager.free_bulk(balloon)
        pair.target(len(balloon))
        pair.manager.free_bulk(np.setdiff1d(pages, balloon))
        assert pair.manager.compact()
        pair.serve_all()
        pair.step()
        migrate(pair)
        pair.settle()
        pair.agree()
        pair.target(0)
        pair.unchanged()
        assert pair.device.config[ACTUAL] == 0


def test_frozen_guest_cannot_be_attached():
    with Pair(ALL) as pair:
        pair.settle()
        pair.driver.freeze()
        with pytest.raises(UsageError, match="was not running"):
            BalloonDriver.attach(pair.manager, pair.transport, {})


@pytest.mark.parametrize("off", [-1, 5, 0x8000])
def test_a_device_that_goes_on_elsewhere_in_a_ring_is_refused(off):
    """It would take buffers again that it gave back long ago: pages in use that were once inflated would be dropped."""
    with Pair(ALL) as pair:
        pair.settle()
        pair.target(300)
        bases = {i: q.next_avail - pair.device.held_buffers(i) & 0xFFFF for i, q in pair.device._queues.items()}
        bases[0] = bases[0] + off & 0xFFFF
        there = BalloonDevice(ALL)
        there.set_memory(pair.host)
        manager = MemoryManager.attach(pair.memory)
        with pytest.raises(DeviceError, match=r"queue 0: a device cannot go on at avail index \d+"):
            BalloonDriver.attach(manager, PairTransport(there, pair.host), bases, batch=4)
