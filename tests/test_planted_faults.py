"""One scenario for each planted fault: red with it, green without. Only the oracles judge, not the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from faults import FAULTS
from harness import MIB, Shape, Violation, World

from balloon_dev.features import QueueRole
from balloon_dev.profiles import SPEC
from guest_driver.memory_manager import HINT_ORDER

ORACLES_ONLY = Shape(model=False)
SCENARIOS: dict[str, tuple[Shape, Callable[[World], None]]] = {}


def scenario(*faults: str, shape: Shape = ORACLES_ONLY):
    """Register a scenario for faults; it ends with everything judged."""

    def register(function: Callable[[World], None]) -> Callable[[World], None]:
        for name in faults:
            SCENARIOS[name] = shape, function
        return function

    return register


def written_and_freed(world: World, pages: int = 8) -> list[int]:
    """Leave content in pages that are free again: a destination that is not sent them holds something else."""
    pfns = world.alloc(0, pages)
    for pfn in pfns:
        world.free(pfn)
    return pfns


def guest_answers(world: World) -> None:
    world.deliver()
    world.run_driver()


def arrive(world: World) -> World | None:
    there = world.judge(world.finish())
    if there is not None:
        there.close()
    return there


@scenario("hint_clears_the_log", "late_discard")
def test_taken_back_before_the_hint_is_seen(world):
    """The stale hint: hinted, taken back, written, and only then does the host see the hint."""
    pfns = written_and_freed(world)
    world.migrate()
    world.to_round(0)
    guest_answers(world)
    assert world.take_back(8) == pfns
    world.serve()
    assert world.hints_applied
    arrive(world)


@scenario("pages_of_another_run")
def test_old_pages_under_a_new_id(world):
    """Hints of run 1 are still on the ring when run 2 is requested; their pages were written meanwhile."""
    written_and_freed(world)
    world.migrate()
    world.to_round(0)
    guest_answers(world)
    world.to_end_of_round()
    world.take_back(8)
    world.to_round(1)
    world.serve()
    arrive(world)


@scenario("hint_after_stop")
def test_pages_after_stop(world):
    """The run began; its pages come after the host's STOP and after the sync behind it."""
    written_and_freed(world)
    world.migrate()
    world.to_round(0)
    guest_answers(world)
    world.serve(limit=1)
    world.to_end_of_round()
    world.take_back(8)
    while world.migration.phase.value != "sync":
        world.advance(1e7)
    world.serve()
    arrive(world)


@scenario("id_before_sync")
def test_written_between_id_and_sync(world):
    """Whatever the guest does at the very moment of the sync between two rounds."""
    world.migrate()
    world.to_round(0)
    while world.migration.phase.value != "sync":
        world.advance(1e7)
    guest_answers(world)
    if not world.driver.hinted_blocks:  # no id was to be seen, as it must be: take pages as they are
        world.alloc(0, 8)
    else:
        world.take_back(8)
    world.advance(0)
    world.serve()
    arrive(world)


@scenario("hint_rounded_outward")
def test_a_hint_that_covers_pages_in_part(world):
    """The host leaves alone what a hint covers only in part (a guest has no business hinting that)."""
    pfn = world.alloc(2)[0]
    world.migrate()
    world.to_round(0)
    world.deliver()
    world.step_driver()  # reads the config space
    world.step_driver()  # sends the id
    world.raw_hint((pfn << 12) + 1, 2 * 4096 - 2)
    world.serve()
    assert world.hints_applied
    world.run_driver()
    arrive(world)


@scenario("zero_pages_not_sent", "discard_not_logged")
def test_sent_with_content_then_zero(world):
    """A page that was sent goes into the balloon and is dropped: the destination must have it zero as well."""
    pfns = written_and_freed(world)
    world.migrate(hints=False)
    world.to_round(1)
    world.set_target(8)
    guest_answers(world)
    world.serve(QueueRole.INFLATE)
    guest_answers(world)
    assert world.manager.mem_map[pfns[0] - world.manager.base_pfn]["owner"] == 3
    arrive(world)


@scenario("same_content_is_no_write")
def test_same_content_again(world):
    """A skipped page is taken back and gets the very content it had: nothing to see for who compares."""
    pfns = written_and_freed(world)
    world.migrate()
    world.to_round(0)
    guest_answers(world)
    world.serve()
    assert world.take_back(8, bump=0) == pfns
    arrive(world)


@scenario("old_stop_ends_new_run")
def test_stop_of_an_old_run(world):
    """The guest's stop of run 1 comes when run 2 is requested; run 2 is answered and counts."""
    world.migrate()
    world.to_round(0)
    guest_answers(world)
    world.shrink(1 << 20)  # the guest has all its blocks to send again
    world.to_round(1)
    guest_answers(world)
    for _ in range(8):  # the queue is small: what fits, then served, then the rest
        world.serve(limit=1)
        guest_answers(world)
    world.serve()
    if not world.hints_applied:
        raise Violation("the guest answered the run, and not one hint came through")
    arrive(world)


@scenario("stop_after_done")
def test_stop_when_all_is_over(world):
    """A management that says stop once more does not take DONE back."""
    world.migrate()
    world.to_round(0)
    guest_answers(world)
    world.serve()
    world.migration.cancel()
    arrived = world.advance()
    world.stop()
    world.judge(arrived)
    if world.driver.hinted_blocks:
        raise Violation("the migration is over and the guest still keeps its hinted blocks")


@scenario("done_without_interrupt", "done_leaks")
def test_done_after_cancel(world):
    """A migration that is cancelled gives every block back to the guest."""
    before = world.manager.snapshot()
    world.migrate()
    world.to_round(0)
    guest_answers(world)
    assert world.driver.hinted_blocks
    world.serve()
    world.migration.cancel()
    world.judge(world.advance())
    if before.difference(world.manager.snapshot()):
        raise Violation(f"the guest did not get back what it had: {before.difference(world.manager.snapshot())}")


@scenario("stop_frees")
def test_blocks_are_kept_at_stop(world):
    """At STOP the guest keeps its blocks: freeing them would dirty memory, and the migration would not converge."""
    world.migrate()
    world.to_round(0)
    guest_answers(world)
    world.serve()
    kept = world.driver.hinted_blocks
    world.to_round(1)
    world.stop()
    guest_answers(world)
    if world.driver.hinted_blocks != kept:
        raise Violation(f"{kept - world.driver.hinted_blocks} blocks were freed at STOP")
    arrive(world)


@scenario("torn_index")
def test_index_passes_256(world):
    """Many runs: the avail index passes 256 and more, and never may the device see half of it."""
    for _ in range(150):
        world.start()
        guest_answers(world)
        world.serve()
        guest_answers(world)
    world.done()
    world.settle()
    assert world.driver._queues[QueueRole.FREE_PAGE].avail_idx > 256


@scenario("used_ring_not_logged", shape=replace(ORACLES_ONLY, log="wp-async"))
def test_used_ring_written_by_the_device(world):
    """The guest's tracker does not see what the device writes; the device's log has to."""
    world.migrate(max_rounds=4)
    world.to_round(1)
    guest_answers(world)
    world.to_round(2)
    world.advance(1e7)
    world.serve()
    arrive(world)


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(name):
    """With the fault the scenario is red."""
    shape, run = SCENARIOS[name]
    with FAULTS[name](), pytest.raises(Violation):
        run(World(shape))


@pytest.fixture
def world(request):
    shape = next(shape for shape, run in SCENARIOS.values() if run is request.function)
    made = World(shape)
    yield made
    made.close()


@pytest.mark.parametrize(
    "shape",
    [
        replace(ORACLES_ONLY, log="wp-async"),
        replace(ORACLES_ONLY, regions=((0, 24 * MIB), (32 * MIB, 24 * MIB))),
        replace(ORACLES_ONLY, profile=SPEC, batch=64),
    ],
    ids=["wp-async", "two regions", "large queues"],
)
@pytest.mark.parametrize("name", [name for name in FAULTS if name != "used_ring_not_logged"])
def test_green_in_other_shapes(name, shape):
    """Without the fault the scenario is green also with another log, memory or queues."""
    made = World(shape)
    SCENARIOS[name][1](made)
    made.close()


def test_all_blocks_of_the_zone_are_whole():
    """What the scenarios rely on: nothing but whole 4 MiB blocks is free at first."""
    made = World()
    assert made.manager.free_blocks(HINT_ORDER) == 10
    made.close()
