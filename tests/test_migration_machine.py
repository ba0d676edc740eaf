"""Any order of everything: guest, device, migration, interrupts early and late, cancels, failures, under both oracles.

Whatever hypothesis does, no page may be wrong at the destination, no page of the guest may be lost on either side, and
after DONE, cancel, reset or hand-over the allocator holds exactly what it should. `test_machine_finds` runs the same
machine on a broken engine, device or driver and shows that it notices.
"""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from faults import FAULTS
from harness import MIB, SMALL_QUEUES, Shape, Violation, World
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from balloon_dev.features import QueueRole
from balloon_dev.profiles import LINUX, QEMU, SPEC
from guest_driver.memory_manager import HINT_ORDER, Alloc
from host_qemu_side.migration.stream import Kind
from vring.features import CommonFeature

guest_runs = precondition(lambda self: not self.world.frozen)
migrating = precondition(lambda self: self.world.migration is not None)
idle = precondition(lambda self: self.world.migration is None)

shapes = st.builds(
    lambda profile, regions, event_idx, batch: Shape(
        profile=replace(profile, queue_sizes=SMALL_QUEUES),
        regions=regions,
        driver_features=Shape.driver_features & ~(0 if event_idx else int(CommonFeature.EVENT_IDX)),
        batch=batch,
    ),
    profile=st.sampled_from([SPEC, QEMU, LINUX]),
    regions=st.sampled_from([((0, 32 * MIB),), ((0, 16 * MIB), (20 * MIB, 16 * MIB))]),
    event_idx=st.booleans(),
    batch=st.sampled_from([1, 4]),
)


class Machine(RuleBasedStateMachine):
    """One guest; migrations of it, one after another, here and on from wherever it arrives."""

    @initialize(shape=shapes, serve_limit=st.sampled_from([0, 0, 1, 8]))
    def boot(self, shape, serve_limit):
        self.world = World(shape)
        self.world.serve_limit = serve_limit
        for pfn in self.world.alloc(0, 16):  # content in pages that are free
            self.world.free(pfn)

    # -- the guest ------------------------------------------------------------------------------------------------

    @guest_runs
    @rule()
    def interrupts_arrive(self):
        self.world.deliver()

    @guest_runs
    @rule()
    def driver_steps(self):
        self.world.step_driver()

    @guest_runs
    @rule(late=st.booleans())
    def driver_runs(self, late):
        if not late:
            self.world.deliver()
        self.world.run_driver()

    @guest_runs
    @rule(order=st.sampled_from([0, 0, 3, HINT_ORDER]), n=st.integers(1, 4), bump=st.integers(0, 1), hard=st.booleans())
    def allocate(self, order, n, bump, hard):
        if len(self.world.own) < 64:
            self.world.alloc(order, n, bump=bump, flags=Alloc.NORMAL if hard else Alloc.NORETRY)

    @guest_runs
    @rule(n=st.integers(1, 4), bump=st.integers(0, 1))
    def take_back(self, n, bump):
        if len(self.world.own) < 64:
            self.world.take_back(n, bump=bump)

    @guest_runs
    @rule(data=st.data(), n=st.integers(1, 4))
    def free(self, data, n):
        for _ in range(min(n, len(self.world.own))):
            self.world.free(self.world.own[data.draw(st.integers(0, len(self.world.own) - 1))])

    @guest_runs
    @rule(data=st.data(), bump=st.integers(0, 1))
    def rewrite(self, data, bump):
        if self.world.own:
            self.world.write(data.draw(st.sampled_from(self.world.own)), bump=bump)

    @guest_runs
    @rule(seconds=st.sampled_from([0.0, 0.002, 0.1]))
    def workload_runs(self, seconds):
        self.world.work(seconds)

    @guest_runs
    @rule(first=st.integers(0, 4000), at=st.integers(1, 4095), length=st.integers(1, 2 * 4096))
    def odd_hint(self, first, at, length):
        """A hint of a range that covers no page wholly, of pages that may hold anything."""
        self.world.raw_hint((first << 12) + at, min(length, 2 * 4096 - at - 1))

    @guest_runs
    @rule()
    def driver_is_reloaded(self):
        self.world.reload_driver()

    # -- the device -----------------------------------------------------------------------------------------------

    @guest_runs
    @rule(limit=st.sampled_from([None, 1, 2, 5]))
    def device_serves_hints(self, limit):
        self.world.serve(limit=limit)

    @guest_runs
    @rule(role=st.sampled_from([QueueRole.INFLATE, QueueRole.DEFLATE]))
    def device_serves_the_balloon(self, role):
        self.world.serve(role)

    @guest_runs
    @rule(pages=st.sampled_from([0, 3, 300, 1 << 20]))
    def new_target(self, pages):
        self.world.set_target(pages)

    @idle
    @rule()
    def stop_out_of_turn(self):
        self.world.stop()

    # -- the migration --------------------------------------------------------------------------------------------

    @idle
    @rule(
        hints=st.sampled_from([True, True, True, False]),
        two_way=st.booleans(),
        hand_over=st.sampled_from([True, True, False]),
        max_rounds=st.integers(1, 4),
        downtime=st.sampled_from([0.0, 0.3]),
        bandwidth=st.sampled_from([0.0, float(MIB), float(64 * MIB)]),
    )
    def migration_begins(self, **options):
        self.world.migrate(**options)

    @migrating
    @rule(seconds=st.sampled_from([0.0, 0.0, 0.02, 2.0]), steps=st.integers(1, 3))
    def migration_steps(self, seconds, steps):
        for _ in range(steps):
            if self.world.migration is not None:
                self.came_of(self.world.advance(seconds))

    @migrating
    @rule()
    def migration_runs_to_the_freeze(self):
        for _ in range(200):  # it may be stuck at a destination that takes nothing
            if self.world.migration is None or self.world.frozen:
                break
            self.came_of(self.world.advance(10.0))

    @migrating
    @rule()
    def migration_runs_to_its_end(self):
        self.world.destination.room = None
        self.came_of(self.world.finish(10.0))

    @migrating
    @rule(kind=st.sampled_from([Kind.ROUND, Kind.PAGES, Kind.STATE, Kind.END, Kind.CANCEL]))
    def destination_will_vanish(self, kind):
        self.world.destination.vanish_at = kind

    @migrating
    @rule()
    def destination_will_refuse(self):
        self.world.destination.refuses = True

    @migrating
    @rule(room=st.sampled_from([None, 0, 100, 70_000]))
    def destination_takes(self, room):
        self.world.destination.room = room

    @migrating
    @rule()
    def migration_is_cancelled(self):
        self.world.migration.cancel()

    # -- judging --------------------------------------------------------------------------------------------------

    def came_of(self, arrived):
        if arrived is None:
            return
        there = self.world.judge(arrived)
        if there is not None:
            there.serve_limit = self.world.serve_limit
            self.world.close()
            self.world = there

    @guest_runs
    @idle
    @rule()
    def all_comes_to_rest(self):
        self.world.settle()

    @guest_runs
    @rule()
    def guest_checks_its_pages(self):
        self.world.check_content()

    def teardown(self):
        if not hasattr(self, "world"):
            return
        if self.world.migration is not None:
            self.world.migration.cancel()
            self.world.destination.room = None
            self.came_of(self.world.finish(10.0))
        self.world.settle()
        self.world.close()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)

FOUND_AT_RANDOM = {name: 150 for name in FAULTS if name not in ("used_ring_not_logged", "torn_index")}
"""Examples that are enough to run into each fault; the other two need the wp-async log, or hundreds of buffers."""


@pytest.mark.parametrize("name", FOUND_AT_RANDOM)
def test_machine_finds(name):
    """The machine turns red on the planted fault, with examples that are the same every time."""
    bounded = settings(
        max_examples=FOUND_AT_RANDOM[name],
        stateful_step_count=50,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    with FAULTS[name](), pytest.raises(Violation):
        run_state_machine_as_test(Machine, settings=bounded)
