"""The migration engine with a guest and a destination in memory: rounds, limits, failures, cancels, ownership."""

from __future__ import annotations

import math

import pytest
from harness import MIB, Shape, Violation, World

from host_qemu_side import deadlines
from host_qemu_side.migration import Cancelled, Limits, Migration
from host_qemu_side.migration.receiver import ReceiverState
from host_qemu_side.migration.records import Hello
from host_qemu_side.migration.stream import Kind, StreamError
from vring.dirty import DirtyLogVoid
from vring.errors import PeerVanished, UsageError, VirtioError


@pytest.fixture
def world():
    made = World()
    yield made
    made.close()


def answer(world):
    world.deliver()
    world.run_driver()


def to_phase(world, phase):
    """Step until the migration is in `phase`, nothing else happening."""
    for _ in range(2000):
        if world.migration is None or world.migration.phase.value == phase:
            return
        world.advance(1e7 if world.migration.phase.value == "round" else 0.0)
    raise AssertionError(f"never in {phase}")


# -- rounds and limits ------------------------------------------------------------------------------------------------


def test_rounds_end_at_max_rounds(world):
    """A guest that always writes is frozen in the end however much is left; that is said."""
    migration = world.migrate(max_rounds=3)
    for _ in range(2000):
        if not world.frozen:
            world.touch()
        arrived = world.advance(1e7)
        if arrived:
            break
    assert len(migration.result.rounds) == 4, "three while it runs, the last one frozen"
    assert migration.result.converged is False
    assert [r.command_id for r in migration.result.hint_runs] == [0x80000001, 0x80000002, 0x80000003]
    world.judge(arrived).close()


@pytest.mark.parametrize(
    ("bandwidth", "downtime", "rounds"), [(64.0 * MIB, 1.0, 2), (64.0 * MIB, 0.0001, 6), (0.0, 10.0, 2)]
)
def test_freezes_when_the_rest_fits_the_downtime(world, bandwidth, downtime, rounds):
    """What is left after a round is compared with what the link takes within the downtime limit."""
    migration = world.migrate(bandwidth=bandwidth, downtime=downtime, max_rounds=5)
    arrived = world.finish(1.0)
    assert len(migration.result.rounds) == rounds
    assert migration.result.converged == (rounds == 2)
    world.judge(arrived).close()


def test_rate_limit(world):
    """Bytes sent while the guest runs stay within the limit; the last round is not limited."""
    for pfn in world.alloc(0, 512):
        world.write(pfn)
    rate = float(MIB)
    migration = world.migrate(bandwidth=rate, max_rounds=1)
    while not world.frozen:
        wake = migration.step(world.clock.now)
        assert wake >= world.clock.now
        assert migration.result.bytes_sent <= rate * (world.clock.now + 0.05) + (2 * MIB)
        world.clock.now = max(wake, world.clock.now)
    assert 2.0 < world.clock.now < 4.0, "3 MiB at 1 MiB/s, the last one of them ahead of its time"
    frozen_at = world.clock.now
    world.judge(world.finish(0.0)).close()
    assert world.clock.now == frozen_at


@pytest.mark.parametrize("limits", [{"bandwidth": -1.0}, {"downtime": -1.0}, {"downtime": math.nan}, {"max_rounds": 0}])
def test_limits_that_make_no_sense(world, limits):
    with pytest.raises(UsageError):
        Migration(world.host_memory, world.guest_log, None, world, limits=Limits(**limits))


@pytest.mark.parametrize(
    ("bandwidth", "bytes_at_a_time"), [(4096.0, 4096), (MIB / 2, 48 << 10), (64.0 * MIB, MIB), (0, MIB)]
)
def test_pieces_follow_the_bandwidth(world, bandwidth, bytes_at_a_time):
    """Few pages at a time on a slow link: a destination that hears nothing for a minute takes the source for dead."""
    for pfn in world.alloc(0, 600):
        world.write(pfn)
    migration = world.migrate(bandwidth=bandwidth, piece=0.1, max_rounds=1)
    world.to_round(0)
    sent, largest, longest = migration.result.bytes_sent, 0, 0.0
    while not world.frozen and world.clock.now < 400:
        wake = migration.step(world.clock.now)
        largest = max(largest, migration.result.bytes_sent - sent)
        longest = max(longest, wake - world.clock.now)
        sent = migration.result.bytes_sent
        world.clock.now = max(wake, world.clock.now)
    assert bytes_at_a_time <= largest <= bytes_at_a_time * 2.1, "content, and as much again of numbers of zero pages"
    assert longest <= 1.2


def test_pages_add_up(world):
    """Every page is sent, zero, a hole, or spared by a hint."""
    for pfn in world.alloc(0, 64):
        world.free(pfn)
    migration = world.migrate(max_rounds=1)
    world.to_round(0)
    answer(world)
    world.serve()
    assert migration.current_round.pages_skipped == 64
    world.judge(world.finish()).close()
    assert migration.result.hint_runs[0].pages_spared == 64
    assert migration.result.pages()["skipped"] == 64
    first = migration.result.rounds[0]
    assert first.pages_normal + first.pages_zero + first.pages_skipped == first.pages_dirty


def test_without_hints(world):
    """A migration without hints always works, and says nothing to the guest."""
    before = world.device.read_config(0, 12)
    world.migrate(hints=False)
    there = world.judge(world.finish())
    assert world.device.read_config(0, 12) == before
    there.close()


def test_without_a_driver(world):
    """The guest unloads its driver, before or during a migration: the rounds do without ids."""
    world.migrate(max_rounds=3)
    world.to_round(0)
    answer(world)
    world.driver.remove()
    arrived = world.finish()
    assert arrived.phase == "done"
    assert arrived.verdict.pages_wrong == 0
    assert world.device.negotiated == 0


@pytest.mark.parametrize("name", ["one-way", "two-way"])
def test_hand_over_and_again(world, name):
    """It goes on at the destination, and from there to the next, with another run of hints each time."""
    here = world
    for hop in range(3):
        here.migrate(two_way=name == "two-way", max_rounds=2)
        here.to_round(0)
        answer(here)
        here.serve()
        there = here.judge(here.finish())
        assert there.device.hinting.command_id == 0x80000000 + 2 * (hop + 1)
        assert there.driver.hinted_blocks == 0
        there.work(1.0)
        there.work(1.1)
        there.check_content()
        if here is not world:
            here.close()
        here = there
    here.close()


def test_image_without_hand_over(world):
    """The guest goes on here; the image is complete and needs no COMMIT."""
    world.migrate(hand_over=False, two_way=False)
    arrived = world.finish()
    assert world.judge(arrived) is None
    assert arrived.destination.receiver.state is ReceiverState.IMAGE
    assert world.events == ["freeze", "thaw"]


# -- cancel and failure ------------------------------------------------------------------------------------------------

PHASES = ["setup", "round", "sync", "frozen", "handover"]


@pytest.mark.parametrize("phase", PHASES)
def test_cancel(world, phase):
    """Cancelled in any phase before COMMIT: the guest gets DONE and all its blocks, runs, and the other end is told."""
    before = world.manager.snapshot()
    migration = world.migrate(max_rounds=2)
    if phase == "handover":
        migration.output.answer = lambda: None
    to_phase(world, "round" if phase in ("sync", "frozen", "handover") else phase)
    answer(world)
    world.serve()
    to_phase(world, phase)
    migration.cancel("enough")
    arrived = world.advance()
    assert isinstance(arrived.error, Cancelled)
    assert arrived.phase == "cancelled"
    world.judge(arrived)
    assert before.difference(world.manager.snapshot()) == []
    assert arrived.destination.receiver.state in (ReceiverState.CANCELLED, ReceiverState.HEADER)


@pytest.mark.parametrize("kind", [Kind.HEADER, Kind.PAGES, Kind.ROUND, Kind.STATE, Kind.END])
def test_output_fails(world, kind):
    """The destination vanishes at any record: the guest is given back."""
    before = world.manager.snapshot()
    world.migrate(max_rounds=2)
    if kind not in (Kind.HEADER, Kind.PAGES):
        world.to_round(0)
        answer(world)
        world.serve()
    world.destination.vanish_at = kind
    arrived = world.finish()
    assert isinstance(arrived.error, PeerVanished)
    assert arrived.phase == "failed"
    world.judge(arrived)
    assert before.difference(world.manager.snapshot()) == []


def test_output_that_takes_nothing(world):
    """A slow destination holds nothing up but the sending: hints are served meanwhile, and it can be cancelled."""
    world.migrate()
    world.destination.room = 100
    world.serve_limit = 8
    for _ in range(5):
        assert world.advance(1.0) is None
    world.destination.room = None
    world.to_round(0)
    world.destination.room = 0
    answer(world)
    for _ in range(5):
        world.advance(1e7)
    assert world.hints_applied > 0
    world.migration.cancel()
    world.judge(world.advance())


def test_after_commit_the_guest_is_gone(world):
    """COMMIT may have left, then the connection breaks: it is not ours to start again."""
    world.migrate()
    world.destination.vanish_at = Kind.COMMIT
    arrived = world.finish()
    assert isinstance(arrived.error, PeerVanished)
    assert world.frozen
    assert world.events == ["freeze"]


def test_cancel_after_commit_is_too_late(world):
    """Once COMMIT is out, a cancel changes nothing: the guest is the destination's."""
    world.migrate()
    to_phase(world, "committed")
    world.migration.cancel()
    arrived = world.finish()
    assert arrived.phase == "done"
    assert world.frozen
    world.judge(arrived).close()


def test_destination_refuses(world):
    world.migrate()
    to_phase(world, "frozen")
    world.destination.refuses = True
    arrived = world.finish(0.0)
    assert isinstance(arrived.error, StreamError)
    assert "refused: no" in str(arrived.error)
    world.judge(arrived)


def test_destination_never_answers(world):
    """It is given two minutes, then the guest goes on here."""
    world.migrate()
    to_phase(world, "handover")
    world.destination.answer = lambda: None
    arrived = None
    while arrived is None:
        arrived = world.advance(1.0)
    assert "did not confirm" in str(arrived.error)
    world.judge(arrived)


def test_a_process_that_is_never_launched_is_waited_for_once(world):
    """Ten seconds in all, however many rounds there are; then it costs downtime only."""
    migration = world.migrate(bandwidth=0.0, max_rounds=5)
    migration.greeted(Hello(launches=True))
    began = world.clock.now
    to_phase(world, "round")
    while migration.phase.value in ("round", "sync"):
        world.advance(0.5)
    assert deadlines.LAUNCHED <= world.clock.now - began < 2 * deadlines.LAUNCHED
    world.judge(world.finish())


def test_a_migration_takes_hello_itself(world):
    """Nobody read the destination's HELLO before: what it announces may come all the same."""
    migration = world.migrate(bandwidth=0.0)
    said = world.destination.receiver
    for part in said.hello(launches=True) + said.launched():
        world.destination._answers.feed(part)
    arrived = world.finish()
    assert arrived.error is None
    assert not migration.awaits_launch
    world.judge(arrived).close()


def test_nothing_follows_a_torn_commit(world):
    """A part of COMMIT never left: the guest is ours, and what is said after it would be read as the rest of it."""
    world.migrate(bandwidth=0.0)
    to_phase(world, "handover")
    while Kind.END not in world.destination.kinds:
        world.advance()
    world.destination.room = 10
    to_phase(world, "committed")
    world.advance()
    world.migration.abort(PeerVanished("gone"))
    assert not world.migration.committed
    assert world.events[-1] == "thaw"
    assert not world.destination.blocked
    assert not world.destination.receiver_owns_guest


def test_guest_that_cannot_be_frozen(world):
    world.migrate()
    world.fail_freeze = True
    arrived = world.finish()
    assert "does not answer" in str(arrived.error)
    assert world.events[-1] == "thaw"  # it may come to stop after all, and nobody would let it go on
    world.fail_freeze = False
    world.judge(arrived)


def test_log_that_cannot_even_stop(world):
    """Whatever else fails while giving the guest back, it gets DONE and goes on."""

    def broken():
        raise OSError("no")

    world.migrate()
    to_phase(world, "frozen")
    world.migration.log.stop = broken
    world.migration.cancel()
    arrived = world.advance()
    assert isinstance(arrived.error, Cancelled)
    world.judge(arrived)


def test_abort_from_outside(world):
    """Something else went wrong: no exception, and the guest is given back."""
    migration = world.migrate()
    world.to_round(0)
    answer(world)
    migration.abort(VirtioError("the display is gone"))
    assert migration.finished
    assert migration.phase.value == "failed"
    world.migration = None
    world.settle()


# -- a log that cannot be trusted ------------------------------------------------------------------------------------


def test_void_log_sends_all_that_was_skipped(world):
    """The log says that it may have missed writes: what hints spared is sent after all."""
    pfns = world.alloc(0, 16)
    for pfn in pfns:
        world.free(pfn)
    migration = world.migrate(max_rounds=2)
    world.to_round(0)
    answer(world)
    world.serve()
    world.to_end_of_round()
    sync = migration.log.sync

    def void(into):
        sync(into)
        migration.log.sync = sync
        raise DirtyLogVoid("canary died")

    migration.log.sync = void
    world.to_round(1)
    assert migration.current_round.log_voided == "canary died"
    assert set(pfns) <= set(migration.ram.to_send.numbers().tolist())
    world.judge(world.finish()).close()


def test_log_that_needs_a_frozen_guest(world):
    """It is frozen for each sync, no longer, and the last time for good."""
    migration = world.migrate(max_rounds=2)
    migration.log.needs_frozen_guest = True
    world.judge(world.finish()).close()
    assert world.events == ["freeze", "thaw", "freeze", "thaw", "freeze"]


def test_the_harness_notices_a_thaw_after_commit(world):
    """The check that other tests rely on."""
    world.migrate()
    world.finish()
    with pytest.raises(Violation, match="after COMMIT"):
        world.thaw()


def test_other_shapes():
    """Two regions and the kernel's own dirty log."""
    for shape in (Shape(regions=((0, 24 * MIB), (32 * MIB, 24 * MIB))), Shape(log="wp-async")):
        made = World(shape)
        made.migrate(answer=1e9)
        there = made.judge(made.finish())
        there.close()
        made.close()
