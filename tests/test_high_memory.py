"""RAM that lies high: whoever keeps books about it keeps them by the pages there are; and a whole migration of it."""

from __future__ import annotations

import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from balloon_dev.device import BalloonDevice
from host_qemu_side.discard.current import CurrentDiscarder
from host_qemu_side.migration import Limits, Migration
from host_qemu_side.migration.ram import RamState
from host_qemu_side.migration.receiver import Receiver
from host_qemu_side.witness import MigrationClock, Witness
from vring.contents import digests_of
from vring.dirty.digest import DigestLog
from vring.dirty.software import SoftwareDirtyLog
from vring.errors import UsageError
from vring.memory import GuestMemory
from vring.pages import PageSet

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from migrate_an_emulator import IntoReceiver

PAGE = 4096
MIB = 1 << 20
LAYOUTS = [[(1 << 45, MIB)], [(0, MIB // 2), ((1 << 52) - MIB // 2, MIB // 2)]]


def device(memory: GuestMemory) -> Any:
    made = BalloonDevice()
    made.discard = CurrentDiscarder(lambda: memory, lambda: True)
    made.set_memory(memory)
    made._ballooned.set_run(memory.regions[-1].gpa >> 12, 5)
    assert made.save()["ballooned"] == [[memory.regions[-1].gpa >> 12, 5]]
    made.set_memory(memory)
    made.reset()
    return made


def software(memory: GuestMemory) -> Any:
    log = SoftwareDirtyLog.for_memory(memory)  # a mapping, which tracemalloc does not count
    assert log.bits.nbytes == 256 // 8
    log.start()
    log.mark_range(memory.regions[-1].gpa, PAGE)
    assert log.sync(PageSet(memory.page_layout)) == 1
    return log


def digest(memory: GuestMemory) -> Any:
    log = DigestLog(memory)
    log.start()
    log.note_sent(np.array([memory.regions[-1].gpa >> 12], np.uint64))
    log.sync(PageSet(memory.page_layout))
    return log


def sender(memory: GuestMemory) -> Any:
    ram = RamState(memory)
    ram.hint(np.array([memory.regions[-1].gpa], np.uint64), np.array([PAGE], np.uint64))
    ram.void_hints()
    ram._data = np.empty(0, np.uint8)  # buffers for what is sent at a time are as large for any memory
    return ram


def witness(memory: GuestMemory) -> Any:
    made = Witness(memory, None, None, MigrationClock())
    made.round_begins(0)
    made.frozen()
    made.arrived(digests_of(memory))
    assert made.verdict(digests_of(memory)).pages_checked == 256
    assert made.at_pause.nbytes == made.oracle.at_issue.nbytes == 256 * 8
    return made


@pytest.mark.parametrize("keeper", [device, software, digest, sender, witness])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_allocated_does_not_depend_on_where_ram_is(keeper, layout):
    """To the kilobyte: a bitmap up to the address would have 1 GiB and more."""
    allocated = []
    for places in ([(0, MIB)], layout):
        with GuestMemory.create(places) as memory:
            keeper(memory)  # what is made once for the process
            tracemalloc.start()
            kept = keeper(memory)
            allocated.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            del kept
    assert allocated[1] < allocated[0] + 8192


class Guest:
    """An emulated guest whose RAM has these regions, and stores at random."""

    def __init__(self, places: list[tuple[int, int]]) -> None:
        self.memory = GuestMemory.create(places)
        self.log = SoftwareDirtyLog.for_memory(self.memory)
        self.running, self.random = True, np.random.default_rng(1)

    def step(self) -> None:
        if self.running:
            region = self.memory.regions[self.random.integers(len(self.memory.regions))]
            gpa = region.gpa + int(self.random.integers(region.size))
            self.memory.write(gpa, b"\x55")
            self.log.mark(gpa // PAGE)

    def freeze(self) -> None:
        self.running = False

    def thaw(self) -> None:
        self.running = True


PLACES = [[(0x80000000, MIB)], [(0, MIB), (0x90000000, MIB), ((1 << 44) - MIB, MIB)]]


@pytest.mark.parametrize("places", PLACES)
def test_a_migration_of_it(places):
    guest, there = Guest(places), Receiver()
    migration = Migration(
        guest.memory, guest.log, IntoReceiver(there), guest, limits=Limits(bandwidth=0, downtime=0.001)
    )
    now = 0.0
    while not migration.finished:
        for _ in range(20):
            guest.step()
        migration.step(now)
        now += 0.001
    assert there.memory is not None
    for gpa, size in places:
        assert there.memory.read(gpa, size) == guest.memory.read(gpa, size)


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("pages", [0, 10, 256])
def test_a_log_that_does_not_cover_ram_is_refused_at_once(places, pages):
    """Before anything is sent, and the guest is not touched."""
    guest, there = Guest(places), Receiver()
    with pytest.raises(UsageError, match="does not cover all of memory"):
        Migration(guest.memory, SoftwareDirtyLog(pages), IntoReceiver(there), guest)
    assert guest.running
    assert there.memory is None
