"""What the guest keeps in its RAM, with a host or a migration that writes over it: errors of ours, and an end."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from guest_driver.layout import ENTRY, HEADER, KernelArea
from guest_driver.memory_manager import HINT_ORDER, AllocatorError, MemoryManager, Owner
from vring.dirty.software import SoftwareDirtyLog
from vring.errors import UsageError, VirtioError
from vring.memory import PAGE_SIZE, GuestMemory
from vring.pages import PageSet

MIB = 1 << 20
WALKS = {
    "alloc": lambda m: m.alloc_pages(0),
    "alloc hint blocks": lambda m: m.alloc_hint_blocks(3),
    "free": lambda m: m.free(m.base_pfn + 3),
    "free in bulk": lambda m: m.free_bulk(np.array([m.base_pfn], dtype=np.uint64)),
    "free owned": lambda m: m.free_owned(0, 1 << 63, Owner.WORKLOAD),
    "report": lambda m: m.report_take(2),
    "report back": lambda m: m.report_return(np.array([1024], dtype=np.uint64), reported=True),
    "reported": lambda m: m.reported_blocks,
    "owned": lambda m: m.owned(),
    "owned from": lambda m: m.owned_from(0),
    "bitmap": lambda m: m.bitmap(),
    "count": lambda m: m.pages_by_owner(),
    "verify": lambda m: m.verify(),
    "write": lambda m: m.write_block(m.base_pfn),
    "check": lambda m: m.check_owned(),
}


@pytest.fixture
def manager():
    with GuestMemory.create(32 * MIB) as memory:
        yield MemoryManager.create(memory, seed=5)


@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
@pytest.mark.parametrize(
    ("field", "value"),
    [("end_pfn", 1 << 20), ("end_pfn", (1 << 64) - 1), ("end_pfn", 0), ("base_pfn", 0), ("base_pfn", (1 << 64) - 100)],
)
def test_a_zone_that_moves_while_it_is_used(manager, walk, field, value):
    """Where the zone lies is read once, when it is made or attached to."""
    before = (manager.base_pfn, manager.end_pfn, len(manager.mem_map))
    setattr(manager._zone, field, value)
    with pytest.raises(AllocatorError):
        walk(manager)
    assert (manager.base_pfn, manager.end_pfn, len(manager.mem_map)) == before
    with pytest.raises(VirtioError):
        MemoryManager.attach(manager.memory)


@pytest.mark.parametrize("offset", range(0, 512, 4))
def test_header_words(manager, offset):
    """Whatever one word of the header reads: an error or a result, and no other exception."""
    at = manager.kernel.pieces["zone"][0] + offset
    block = manager.report_take(1)
    sound = manager.memory.read(at, 4)
    for value in (0, 1, 11, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF):
        manager.memory.write(at, value.to_bytes(4, "little"))
        for name, walk in WALKS.items():
            if not name.startswith(("alloc", "free", "report")):
                _try(walk, manager)
        _try(lambda m: (m.free_pages, m.total_pages, m.watermark, m.poison, m.statistics(), m.content_seed), manager)
        _try(lambda m: [m.free_blocks(order) for order in range(HINT_ORDER + 1)], manager)
        _try(lambda m: m.report_return(block, reported=True), manager)
        _try(lambda m: m.allocated_bitmap(), manager)
        _try(MemoryManager.attach, manager.memory)
    manager.memory.write(at, sound)


def _try(call, *arguments):
    try:
        return call(*arguments)
    except VirtioError as error:
        return type(error).__name__


@pytest.mark.parametrize("length", [1, 7, 8, 9, 1 << 34, (1 << 64) - 1])
def test_a_free_list_in_a_circle(manager, length):
    """pa_verify saw it; the calls of reporting went round it as often as the list said it was long."""
    block = manager.report_take(1)
    area = manager._zone.free_area[HINT_ORDER]
    manager.mem_map[area.head]["next"] = area.head
    area.count = length
    with pytest.raises(AllocatorError):
        _ = manager.reported_blocks
    with pytest.raises(AllocatorError):
        manager.report_return(block, reported=True)
    with pytest.raises(AllocatorError):
        manager.verify()
    taken = _try(manager.report_take, 1 << 10)
    assert taken == "AllocatorError" or len(taken) == 1


def test_a_free_block_that_is_misaligned_is_not_given_out(manager):
    head = manager._zone.free_area[HINT_ORDER].head
    manager._zone.free_area[HINT_ORDER].head = head + 1
    manager.mem_map[head + 1] = manager.mem_map[head]
    for take in (lambda: manager.alloc_pages(HINT_ORDER), lambda: manager.report_take(1)):
        with pytest.raises(AllocatorError):
            take()


@pytest.mark.parametrize(
    "name", [b"\xff\xfe", b"", b"\x1b[2J", b"a\nb", "ä".encode(), b"balloon", b"\0zone"], ids=ascii
)
def test_a_damaged_name_of_a_piece(name):
    with GuestMemory.create(8 * MIB) as memory:
        area = KernelArea.format(memory, 64 << 10)
        for piece in ("zone", "balloon"):
            area.reserve(piece, 100)
        memory.array(HEADER.itemsize, 32)[:] = 0
        memory.write(HEADER.itemsize, name)
        with pytest.raises(VirtioError, match="damaged") as caught:
            KernelArea.attach(memory)
        assert str(caught.value).isprintable()
        assert list(area.pieces) == ["zone", "balloon"]  # who wrote it knows better


@pytest.mark.parametrize("gpa", [0, PAGE_SIZE - 1, 60 << 10, (1 << 64) - 1])
@pytest.mark.parametrize("size", [4 << 10, (1 << 64) - 1])
def test_a_piece_outside_the_area(gpa, size):
    with GuestMemory.create(8 * MIB) as memory:
        KernelArea.format(memory, 64 << 10).reserve("zone", 100)
        memory.array(HEADER.itemsize, 1, ENTRY)[0] = (b"zone", gpa, size)
        with pytest.raises(VirtioError, match="damaged"):
            KernelArea.attach(memory)


def test_memory_without_a_first_page():
    with GuestMemory.create([(MIB, 8 * MIB)]) as memory, pytest.raises(VirtioError, match="holds no guest"):
        KernelArea.attach(memory)


def test_random_bytes_in_the_headers(manager):
    rng = random.Random(7)
    memory, zone = manager.memory, manager.kernel.pieces["zone"][0]
    sound = {at: memory.read(at, PAGE_SIZE) for at in (0, zone)}
    seen = Counter()
    for _ in range(1500):
        for at, data in sound.items():
            memory.write(at, data)
        for _ in range(rng.randrange(1, 4)):
            at = rng.choice((rng.randrange(400), zone + rng.randrange(512)))
            memory.write(at, bytes([rng.randrange(256)]))
        again = _try(MemoryManager.attach, memory)
        seen[type(again).__name__] += 1
        if not isinstance(again, str):
            for walk in WALKS.values():
                _try(walk, again)
    assert seen["MemoryManager"]
    assert seen["str"]


SCRIBBLER = """
import mmap, random, sys
ram = mmap.mmap(int(sys.argv[1]), int(sys.argv[2]))
zone, length = int(sys.argv[3]), int(sys.argv[4])
sound = ram[zone : zone + 512]
rng = random.Random(1)
print("going", flush=True)
while True:
    ram[zone + rng.choice((rng.randrange(512), rng.randrange(length)))] = rng.choice((0, 1, 2, 10, 11, 255))
    if rng.random() < 0.3:
        ram[zone : zone + 512] = sound
"""


def test_while_another_process_scribbles(manager):
    fd, piece = manager.memory.regions[0].fd, manager.kernel.pieces["zone"]
    manager.alloc_pages_bulk(3, 50, Owner.WORKLOAD)
    command = [sys.executable, "-c", SCRIBBLER, *map(str, (fd, manager.memory.size, *piece))]
    with subprocess.Popen(command, pass_fds=[fd], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"going\n"
        for _ in range(60):
            for walk in WALKS.values():
                _try(walk, manager)
        other.kill()


def test_fill_is_in_the_dirty_log(manager):
    log = SoftwareDirtyLog.for_memory(manager.memory)
    manager.use_dirty_log(log.bits)
    pfns = manager.alloc_pages_bulk(0, 70)
    log.start()
    manager.fill(pfns, 7)
    into = PageSet(manager.memory.page_layout)
    assert log.sync(into) == 70
    assert into.numbers().tolist() == sorted(pfns.tolist())


def test_freeing_nothing_and_freeing_wrongly_in_bulk(manager):
    """The error names the first block that could not be freed, wherever it stands."""
    manager.free_bulk(np.empty(0, dtype=np.uint64))
    pfns = manager.alloc_pages_bulk(0, 3)
    for at in range(3):
        wrong = np.array([*pfns[:at], 5, *pfns[at:]], dtype=np.uint64)
        with pytest.raises(UsageError, match=f"page 5 at order 0 .number {at} of 4"):
            manager.free_bulk(wrong)
        pfns = manager.alloc_pages_bulk(0, 3) if at else pfns
        manager.verify()
