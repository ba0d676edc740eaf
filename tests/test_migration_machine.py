"""Any order of everything: guest, device, migration, interrupts early and late, cancels, failures, under both oracles.

Whatever hypothesis does, no page may be wrong at the destination, no page of the guest may be lost on either side, and
after DONE, cancel, reset or hand-over the allocator holds exactly what it should. `test_machine_finds` runs the same
machine on a broken engine, device or driver and shows that it notices.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from faults import FAULTS
from harness import MIB, SMALL_QUEUES, Shape, Violation, World
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from balloon_dev.features import QueueRole
from balloon_dev.profiles import LINUX, QEMU, SPEC
from guest_driver.memory_manager import HINT_ORDER, Alloc
from guest_driver.transport import Interrupts
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


options = st.fixed_dictionaries(
    {
        "hints": st.sampled_from([True, True, True, False]),
        "two_way": st.booleans(),
        "hand_over": st.sampled_from([True, True, True, False]),
        "max_rounds": st.integers(2, 5),
        "downtime": st.sampled_from([0.0, 0.0, 0.3]),
        "bandwidth": st.sampled_from([1.0, 1.0, 0.0, float(MIB)]),
    }
)
ACTIONS = ["answer", "answer", "take", "serve", "all sent", "synced", "next round", "step"]


class Machine(RuleBasedStateMachine):
    """One guest; migrations of it, one after another, here and on from wherever it arrives."""

    @initialize(
        shape=shapes,
        serve_limit=st.sampled_from([0, 0, 0, 1, 8]),
        in_the_end=st.sampled_from(["finish", "finish", "finish", "cancel"]),
    )
    def boot(self, shape, serve_limit, in_the_end):
        self.world = World(shape)
        self.world.serve_limit = serve_limit
        self.in_the_end = in_the_end
        for pfn in self.world.alloc(0, 16):  # content in pages that are free
            self.world.free(pfn)

    # -- the guest ------------------------------------------------------------------------------------------------

    @guest_runs
    @rule()
    def guest_answers(self):
        self.world.deliver()
        self.world.run_driver()

    @guest_runs
    @rule(deliver=st.booleans(), steps=st.integers(1, 4))
    def driver_steps(self, deliver, steps):
        if deliver:
            self.world.deliver()
        for _ in range(steps):
            self.world.step_driver()

    @guest_runs
    @rule(order=st.sampled_from([0, 0, 3, HINT_ORDER]), n=st.integers(1, 4), bump=st.integers(0, 1), hard=st.booleans())
    def allocate(self, order, n, bump, hard):
        if len(self.world.own) < 64:
            n = 1 if order == HINT_ORDER else n
            self.world.alloc(order, n, bump=bump, flags=Alloc.NORMAL if hard else Alloc.NORETRY)

    @guest_runs
    @rule(n=st.integers(1, 16), bump=st.integers(0, 1))
    def take_back(self, n, bump):
        if len(self.world.own) < 64:
            self.world.take_back(n, bump=bump)

    @guest_runs
    @rule(n=st.integers(1, 64), last=st.booleans())
    def free(self, n, last):
        for pfn in self.world.own[-n:] if last else self.world.own[:n]:
            self.world.free(pfn)

    @guest_runs
    @rule(at=st.integers(0, 63), bump=st.integers(0, 1))
    def rewrite(self, at, bump):
        if self.world.own:
            self.world.write(self.world.own[at % len(self.world.own)], bump=bump)

    @guest_runs
    @rule(seconds=st.sampled_from([0.0, 0.002, 0.1]))
    def workload_runs(self, seconds):
        self.world.work(seconds)

    @guest_runs
    @rule(at=st.integers(0, 63), offset=st.integers(1, 4095), length=st.integers(1, 2 * 4096))
    def odd_hint(self, at, offset, length):
        """A hint of a range that covers no page wholly, of pages in use."""
        pages = self.world.own or self.world.workload.pages().tolist()
        self.world.raw_hint((pages[at % len(pages)] << 12) + offset, min(length, 2 * 4096 - offset - 1))

    # -- the device -----------------------------------------------------------------------------------------------

    @guest_runs
    @rule(limit=st.sampled_from([None, None, 1, 2, 5]))
    def device_serves_hints(self, limit):
        self.world.serve(limit=limit)

    @guest_runs
    @rule(pages=st.sampled_from([0, 3, 20, 1500]), served=st.booleans())
    def balloon(self, pages, served):
        self.world.set_target(pages)
        self.guest_answers()
        if served:
            for role in (QueueRole.INFLATE, QueueRole.DEFLATE):
                self.world.serve(role)
            self.guest_answers()

    @guest_runs
    @rule(role=st.sampled_from([QueueRole.INFLATE, QueueRole.DEFLATE]))
    def device_serves_the_balloon(self, role):
        self.world.serve(role)

    # -- the migration --------------------------------------------------------------------------------------------

    @idle
    @rule(how=options)
    def migration_begins(self, how):
        self.world.migrate(**how)
        for _ in range(3):
            self.came_of(self.world.advance())

    @migrating
    @rule(seconds=st.sampled_from([0.0, 0.02, 1e7]), steps=st.integers(1, 3))
    def migration_steps(self, seconds, steps):
        for _ in range(steps):
            if self.world.migration is not None:
                self.came_of(self.world.advance(seconds))

    @migrating
    @rule(where=st.sampled_from(["all sent", "synced", "next round", "next round", "frozen"]))
    def migration_goes_on(self, where):
        """To one of the moments where something is decided (it may be stuck at a destination that takes nothing)."""
        rounds = len(self.world.migration.result.rounds)
        for _ in range(100):
            migration = self.world.migration
            if migration is None or self.world.frozen:
                return
            if where == "all sent" and migration.ram is not None and not migration.ram.to_send:
                return
            if where == "synced" and migration.phase.value == "sync":
                return
            if where == "next round" and len(migration.result.rounds) > rounds:
                return
            self.came_of(self.world.advance(0.0 if migration.phase.value == "sync" else 1e7))

    @migrating
    @rule()
    def migration_ends(self):
        self.world.destination.room = None
        self.came_of(self.world.finish())

    @migrating
    @rule(
        kind=st.sampled_from(
            [Kind.ROUND, Kind.PAGES, Kind.STATE, Kind.END, Kind.CANCEL, "refuse", 0, 100, 70_000, "cancel"]
        )
    )
    def trouble(self, kind):
        """The destination vanishes at a record, refuses, takes only so many bytes more; or somebody cancels."""
        if kind == "cancel":
            self.world.migration.cancel()
        elif kind == "refuse":
            self.world.destination.refuses = True
        elif isinstance(kind, Kind):
            self.world.destination.vanish_at = kind
        else:
            self.world.destination.room = kind

    @guest_runs
    @rule(actions=st.lists(st.sampled_from(ACTIONS), min_size=5, max_size=20), bump=st.integers(0, 1))
    def race(self, actions, bump):
        """What matters in the stale hint, in any order, with nothing else between."""
        for action in actions:
            if self.world.frozen:
                return
            if action == "answer":
                self.guest_answers()
            elif action == "take":
                self.world.take_back(16, bump=bump)
            elif action == "serve":
                self.world.serve()
            elif self.world.migration is None:
                self.world.migrate()
                self.world.to_round(0)
            elif action == "step":
                self.came_of(self.world.advance())
            else:
                self.migration_goes_on(action)

    @guest_runs
    @rule(what=st.sampled_from(["driver reloaded", "stop out of turn", "interrupts lost their cause"]))
    def out_of_turn(self, what):
        if what == "driver reloaded":
            self.world.reload_driver()
        elif what == "interrupts lost their cause":
            self.world.driver.interrupt(Interrupts(config=True))
        elif self.world.migration is None:
            self.world.stop()

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
        if not hasattr(self, "world") or sys.exc_info()[0] is not None:
            return  # what went wrong is told already
        if self.world.migration is not None:
            if self.in_the_end == "cancel":
                self.world.migration.cancel()
            self.world.destination.room = None
            self.came_of(self.world.finish())
        self.world.settle()
        self.world.close()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


# -- the same with nothing but what matters to hints ------------------------------------------------------------------

RACE_ACTIONS = [*ACTIONS, "same", "serve one", "give", "in", "out", "odd"]
races = st.lists(st.sampled_from(RACE_ACTIONS), min_size=3, max_size=30)


def race(actions: list[str], shape: Shape) -> None:
    """One migration from its first round to its end, the guest and the device doing `actions` meanwhile; then judge."""
    machine = Machine()
    machine.boot(shape, 0, "finish")
    world = machine.world
    world.migrate(max_rounds=4)
    world.to_round(0)
    given = {
        "answer": machine.guest_answers,
        "take": lambda: world.take_back(16),
        "same": lambda: world.take_back(16, bump=0),
        "give": lambda: machine.free(64, last=True),
        "in": lambda: machine.balloon(20, served=True),
        "out": lambda: machine.balloon(0, served=True),
        "odd": lambda: machine.odd_hint(0, 1, 8000),
        "serve": world.serve,
        "serve one": lambda: world.serve(limit=1),
        "step": lambda: machine.came_of(world.advance()),
    }
    for action in actions:
        if machine.world is not world or world.frozen or world.migration is None:
            break
        if action in given:
            given[action]()
        else:
            machine.migration_goes_on(action)
    machine.teardown()


@given(races)
@settings(max_examples=120, deadline=None)
def test_races(actions):
    """Without a fault no order of these actions is wrong."""
    race(actions, Shape())


# -- and broken -------------------------------------------------------------------------------------------------------

BY_RACES = [
    "late_discard",
    "hint_clears_the_log",
    "discard_not_logged",
    "zero_pages_not_sent",
    "old_stop_ends_new_run",
    "stop_frees",
    "done_leaks",
]
BY_MACHINE = ["pages_of_another_run", "hint_after_stop", "done_without_interrupt", "stop_frees", "done_leaks"]
"""What a few hundred examples run into. test_planted_faults.py has a scenario for each fault, these and the others."""


def bounded(max_examples: int) -> settings:
    """Examples that are the same every time, and no shrinking: one failure is all that is wanted."""
    return settings(
        max_examples=max_examples,
        stateful_step_count=50,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("name", BY_RACES)
def test_races_find(name):
    """Random orders of a few actions turn red on a planted fault; the table is not compared: an oracle finds it."""

    @bounded(400)
    @given(races)
    def search(actions):
        race(actions, Shape(model=name == "old_stop_ends_new_run"))  # which harms nobody: it only wastes a run

    with FAULTS[name](), pytest.raises(Violation):
        search()


@pytest.mark.parametrize("name", BY_MACHINE)
def test_machine_finds(name):
    """The whole machine turns red too."""
    with FAULTS[name](), pytest.raises(Violation):
        run_state_machine_as_test(Machine, settings=bounded(400))
