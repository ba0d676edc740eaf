"""What a hint does to a migration, and only that: bugs of other hosts (numbers as in docs/bug-history.md)."""

from __future__ import annotations

import numpy as np
import pytest
from harness import MIB, Shape, Violation, World
from wire import Destination

from host_qemu_side.migration.ram import RamState
from host_qemu_side.migration.stream import Kind
from vring.memory import GuestMemory

PAGE = 4096
FREED = 256


@pytest.fixture
def world():
    made = World()
    yield made
    made.close()


class Log:
    """Which pages went over the wire, round by round: read from the stream, not from the engine."""

    def __init__(self, destination: Destination) -> None:
        self.rounds: list[set[int]] = [set()]
        handle = destination.receiver.handle

        def look(record):
            if record.kind is Kind.ROUND:
                self.rounds.append(set())
            elif record.kind in (Kind.PAGES, Kind.ZERO):
                for run in record.runs()[0].tolist():
                    self.rounds[-1].update(range(run[0], run[0] + run[1]))
            return handle(record)

        destination.receiver.handle = look


def migrate(world: World, *, hints: bool, rounds: int) -> tuple[Log, set[int]]:
    """Free pages with content, migrate in so many rounds; return what was sent and the pages that were freed."""
    freed = world.alloc(0, FREED)
    for pfn in freed:
        world.free(pfn)
    migration = world.migrate(hints=hints, max_rounds=rounds)
    log = Log(world.destination)
    for number in range(rounds):
        world.to_round(number)
        world.deliver()
        world.run_driver()
        world.serve()
        world.touch()
    world.judge(world.finish()).close()
    assert len(migration.result.rounds) == rounds + 1
    return log, set(freed)


def test_hints_in_the_first_round_reduce_what_is_sent():
    """Hints took effect from the second round on (number 32)."""
    first = []
    for hints in (False, True):
        world = World()
        log, freed = migrate(world, hints=hints, rounds=1)
        assert (freed <= log.rounds[0]) is not hints
        assert bool(freed & log.rounds[0]) is not hints
        first.append(len(log.rounds[0]))
        world.close()
    assert first[0] - first[1] >= FREED


def test_a_hinted_untouched_page_is_not_sent_in_any_round(world):
    """It was sent one round later (number 33a). The guest writes other pages all the time."""
    log, freed = migrate(world, hints=True, rounds=4)
    assert len(log.rounds) >= 5
    assert all(log.rounds[:5])
    for number, pages in enumerate(log.rounds):
        assert not pages & freed, f"round {number}"


HOLED = ((0, 8 * PAGE), (16 * PAGE, 8 * PAGE))
TOUCHING = ((0, 8 * PAGE), (8 * PAGE, 8 * PAGE))
RANGES = {
    "ends exactly at a region's end": (HOLED, 6 * PAGE, 2 * PAGE),
    "ends exactly at the last": (HOLED, 22 * PAGE, 2 * PAGE),
    "begins at a region": (HOLED, 16 * PAGE, PAGE),
    "crosses into a region that touches": (TOUCHING, 6 * PAGE, 4 * PAGE),
    "reaches into a hole": (HOLED, 6 * PAGE, 4 * PAGE),
    "comes out of a hole": (HOLED, 14 * PAGE, 4 * PAGE),
    "lies over a hole": (HOLED, 6 * PAGE, 12 * PAGE),
    "is a hole": (HOLED, 8 * PAGE, 8 * PAGE),
    "exceeds the last region": (HOLED, 22 * PAGE, 100 * PAGE),
    "lies beyond RAM": (HOLED, 24 * PAGE, PAGE),
    "wraps around": (HOLED, (1 << 64) - PAGE, 4 * PAGE),
    "covers everything": (HOLED, 0, 1 << 40),
    "covers pages in part": (HOLED, PAGE + 1, 3 * PAGE),
}


@pytest.mark.parametrize("name", RANGES)
def test_hints_at_the_edges_of_regions(name):
    """A range that ends at, crosses or exceeds a region, and holes (number 33): just the whole pages of RAM in it."""
    regions, addr, length = RANGES[name]
    memory = GuestMemory.create(regions)
    for words in memory.arrays:
        words[:] = 1
    exists = {page for gpa, size in regions for page in range(gpa // PAGE, (gpa + size) // PAGE)}
    covered = {page for page in exists if addr <= page * PAGE and (page + 1) * PAGE <= addr + length}
    ram = RamState(memory)
    assert set(ram.to_send.numbers().tolist()) == exists
    spared = ram.hint(np.array([addr], np.uint64), np.array([length], np.uint64))
    assert spared == len(covered)
    sent: set[int] = set()
    while (taken := ram.take()) is not None:
        sent |= {*taken[0].tolist(), *taken[2].tolist()}
    assert sent == exists - covered
    assert ram.void_hints() == len(covered)
    memory.close()


@pytest.mark.parametrize(
    ("addr", "length"),
    [
        (24 * MIB - PAGE, 2 * PAGE),
        (24 * MIB - PAGE, 8 * MIB + 2 * PAGE),
        (25 * MIB, PAGE),
        (56 * MIB - PAGE, 2 * PAGE),
        (1 << 50, PAGE),
    ],
    ids=["into a hole", "over a hole", "in a hole", "past the end", "far away"],
)
def test_a_hint_outside_ram_breaks_the_queue_and_nothing_else(addr, length):
    """The ring checks every address before the device sees it: no hint, and the migration is right (number 33)."""
    world = World(Shape(regions=((0, 24 * MIB), (32 * MIB, 24 * MIB))))
    migration = world.migrate()
    world.to_round(0)
    world.deliver()
    world.step_driver()  # reads the config space
    world.step_driver()  # sends the id
    world.raw_hint(addr, length)
    with pytest.raises(Violation, match="VQ_EADDR"):
        world.serve()
    assert world.hints_applied == 0
    arrived = world.finish()
    assert arrived.phase == "done"
    assert arrived.verdict is not None
    assert arrived.verdict.pages_wrong == 0
    assert migration.result.pages()["skipped"] == 0
    world.close()
