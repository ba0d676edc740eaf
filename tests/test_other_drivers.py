"""Drivers with other habits than Linux has are served rightly: the oracle of content judges, page by page."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from chain_driver import ChainDriver
from faults import FAULTS
from features_pair import ALL, Pair
from harness import MIB, Shape, Violation, World

from balloon_dev.features import BalloonFeature, QueueRole
from balloon_dev.profiles import QEMU, SPEC
from balloon_dev.rules import BadRequest, Rule
from guest_driver.memory_manager import Owner
from vring.features import CommonFeature
from vring.memory import PAGE_SIZE
from vring.split import SEG, SEG_WRITE

QUEUES = (4, 4, 4, 64, 4)
"""Room for a chain of 32 and commands."""
CHAINS = Shape(
    profile=replace(SPEC, queue_sizes=QUEUES), regions=((0, 16 * MIB),), driver=ChainDriver, frees_early=True
)
CHAINS_0 = replace(CHAINS, profile=replace(QEMU, queue_sizes=QUEUES))
"""The config space reads 0 while a run is open: the driver opens another one, under id 0."""
shapes = pytest.mark.parametrize("shape", [CHAINS, CHAINS_0], ids=["id shown", "0 shown"])


def answer(world, steps=10_000):
    """Driver and device by turns, until neither has anything to do."""
    for _ in range(steps):
        world.deliver()
        more = world.step_driver()
        if not world.serve() and not more and not world.transport.pending:
            return
    raise AssertionError("they never come to rest")


@shapes
def test_chains_of_single_pages_count(shape):
    """Hinted pages are spared, and what the guest wrote to them after its stop is sent; it goes on at the other end."""
    world = World(shape)
    junk = world.alloc(0, 512)
    for pfn in junk:
        world.free(pfn)
    migration = world.migrate(max_rounds=3)
    world.to_round(0)
    answer(world)
    assert world.hints_applied >= 512
    reused = world.alloc(0, 64)  # free since the driver's stop, hinted all the same
    for number in (1, 2):
        world.to_round(number)
        answer(world)
    arrived = world.finish()
    assert arrived.verdict is not None
    assert arrived.verdict.pages_skipped >= len(junk) - len(reused)
    there = world.judge(arrived)
    assert there is not None
    assert migration.result.hint_runs[0].blocks >= 512
    there.close()
    world.close()


def test_a_run_under_id_0_never_counts():
    """QEMU shows 0 while a run is open; this driver takes that for a request, and hints all it has under it."""
    world = World(CHAINS_0)
    world.migrate(max_rounds=3)
    world.to_round(0)
    world.deliver()
    world.step_driver()
    world.step_driver()  # the run's id is sent
    world.serve()
    world.set_target(0)  # an interrupt that has nothing to do with it: the config space is read, and reads 0
    answer(world)
    assert world.driver.zeros == 1
    applied, bad = world.hints_applied, dict(world.device.bad_requests)
    assert set(bad) == {BadRequest(Rule.HINT_OUTSIDE_RUN, QueueRole.FREE_PAGE)}
    assert world.driver.statistics()["blocks"] - applied == sum(bad.values()) > 1000
    there = world.judge(world.finish())
    assert there is not None
    there.close()
    world.close()


@shapes
@pytest.mark.parametrize("seed", range(12))
def test_any_order(shape, seed):
    """Stops, new ids, interrupts that come late, pages used again at once: two migrations, each judged."""
    chance = random.Random(seed)
    world = World(shape)
    for _ in range(2):
        world.migrate(max_rounds=chance.randint(1, 4), two_way=chance.random() < 0.7)
        world.serve_limit = chance.choice([0, 1, 8])
        arrived = None
        while arrived is None:
            kind = chance.choice(["deliver", "driver", "driver", "serve", "use", "free", "write", "advance"])
            if kind == "advance":
                arrived = world.advance(chance.choice([0.0, 1.0, 1e4, 1e7]))
            elif world.frozen:
                continue
            elif kind == "deliver":
                world.deliver()
            elif kind == "driver":
                for _ in range(chance.randint(1, 40)):
                    world.step_driver()
            elif kind == "serve":
                world.serve(limit=chance.choice([None, 1, 3]))
            elif kind == "use" and len(world.own) < 200:
                world.alloc(0, chance.randint(1, 50), bump=chance.randint(0, 1))
            elif kind == "free":
                for pfn in world.own[: chance.randint(0, 40)]:
                    world.free(pfn)
            elif kind == "write" and world.own:
                world.write(chance.choice(world.own), bump=chance.randint(0, 1))
        there = world.judge(arrived)
        if there is not None:
            world.close()
            world = there
    assert not world.device.bad_requests.keys() - {BadRequest(Rule.HINT_OUTSIDE_RUN, QueueRole.FREE_PAGE)}
    world.close()


def every_order(shape):
    for seed in range(12):
        test_any_order(shape, seed)


@pytest.mark.parametrize("name", ["late_discard", "hint_clears_the_log", "same_content_is_no_write"])
def test_the_walks_above_find(name):
    """A fault of the engine shows with this driver too."""
    with FAULTS[name](), pytest.raises(Violation):
        every_order(CHAINS)


# -- reports of other sizes than 4 MiB ----------------------------------------------------------------------------


def report(pair, ranges):
    """Report ranges as a driver does: out of the allocator until they are acknowledged. Ring and table are real."""
    segments = np.zeros(len(ranges), SEG)
    segments["addr"], segments["len"] = [a for a, _ in ranges], [n for _, n in ranges]
    segments["flags"] = SEG_WRITE
    queue = pair.queue(QueueRole.REPORTING)
    assert queue.add(segments, [1], [len(ranges)]) == 1
    queue.publish()
    assert pair.serve(QueueRole.REPORTING) == 1
    assert queue.collect()[0].tolist() == [1]


MIXES = {
    "4 KiB": [0] * 32,
    "2 MiB": [9] * 8,
    "2 and 4 MiB": [9, 10, 9, 10, 10, 9],
    "all orders": [0, 3, 9, 10, 1, 0, 5],
    "one": [0],
}


@pytest.mark.parametrize("indirect", [True, False])
@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("poison", [None, 0xAAAAAAAA])
def test_reports_of_any_size(name, indirect, poison):
    """Just the reported pages are dropped, and none while the guest counts on what it filled them with."""
    features = ALL if indirect else ALL & ~int(CommonFeature.INDIRECT_DESC)
    with Pair(features, accept=features, mib=64, poison=poison) as pair:
        assert pair.device.negotiated & BalloonFeature.REPORTING
        blocks = [(int(pair.manager.alloc_pages_bulk(order, 1, Owner.REPORT)[0]), order) for order in MIXES[name]]
        ranges = [(pfn * PAGE_SIZE, PAGE_SIZE << order) for pfn, order in blocks]
        filler = b"\x55" * PAGE_SIZE
        for pfn in range(1024, 64 * MIB // PAGE_SIZE):
            pair.memory.write(pfn * PAGE_SIZE, filler)
        report(pair, ranges)
        gone = {pfn + i for pfn, order in blocks for i in range(1 << order)} if poison is None else set()
        for pfn in range(1024, 64 * MIB // PAGE_SIZE):
            expected = bytes(PAGE_SIZE) if pfn in gone else filler
            assert pair.memory.read(pfn * PAGE_SIZE, PAGE_SIZE) == expected, f"page {pfn:#x}"
        assert pair.device.counters["bytes reported"] == sum(n for _, n in ranges)
        assert not pair.device.bad_requests
