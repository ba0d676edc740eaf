"""Guest memory: regions and holes, access across regions, objects shared by descriptor, memory of somebody else."""

from __future__ import annotations

import os

import numpy as np
import pytest

from host_qemu_side.discard import Discarder, punch_hole
from vring._vring import ffi, lib
from vring.contents import look_again, populated
from vring.errors import GuestAddressError, UsageError
from vring.memory import MAX_REGIONS, GuestMemory, Region
from vring.pages import PageSet

PAGE = 4096
MIB = 1 << 20


@pytest.fixture
def memory():
    """Two regions that touch, a hole, and a third."""
    with GuestMemory.create([(0, 4 * PAGE), (4 * PAGE, 4 * PAGE), (16 * PAGE, 4 * PAGE)]) as made:
        yield made


def test_facts(memory):
    assert (memory.size, memory.end, memory.page_span) == (12 * PAGE, 20 * PAGE, 20)
    assert memory.describe() == "0x0..0x3fff, 0x4000..0x7fff, 0x10000..0x13fff"


def test_access_across_regions_that_touch(memory):
    data = bytes(range(256)) * 32
    memory.write(3 * PAGE, data)
    assert memory.read(3 * PAGE, len(data)) == data
    assert memory.read(0, 0) == b""
    with pytest.raises(GuestAddressError):
        memory.view(3 * PAGE, 2 * PAGE)


@pytest.mark.parametrize(
    ("gpa", "length"), [(7 * PAGE, 2 * PAGE), (8 * PAGE, 1), (20 * PAGE, 1), (20 * PAGE - 1, 2), (-1, 1), (1 << 70, 1)]
)
def test_what_is_not_all_ram(memory, gpa, length):
    """Refused before anything is written."""
    before = memory.read(0, 8 * PAGE)
    assert not memory.covers(gpa, length)
    for access in (lambda: memory.read(gpa, length), lambda: memory.write(gpa, bytes([7]) * length),
                   lambda: memory.array(gpa, length), lambda: memory.host_address(gpa, length)):  # fmt: skip
        with pytest.raises(GuestAddressError):
            access()
    assert memory.read(0, 8 * PAGE) == before


def test_covers(memory):
    assert memory.covers(0, 8 * PAGE)
    assert memory.covers(16 * PAGE, 4 * PAGE)
    assert not memory.covers(0, 0)


def test_arrays_are_the_memory_itself(memory):
    memory.array(16 * PAGE, 4, "<u4")[:] = (1, 2, 3, 4)
    assert memory.read(16 * PAGE, 8) == b"\1\0\0\0\2\0\0\0"
    memory.view(16 * PAGE, 1)[0] = 9
    assert memory.arrays[2][0] == 9


@pytest.mark.parametrize(
    "layout", [[], [(0, 0)], [(0, 100)], [(1, PAGE)], [(0, 2 * PAGE), (PAGE, PAGE)], [(-PAGE, PAGE)],
               [(i * 2 * PAGE, PAGE) for i in range(MAX_REGIONS + 1)]],
)  # fmt: skip
def test_layouts_that_cannot_be(layout):
    for make in (GuestMemory.create, lambda pairs: GuestMemory.from_buffers([(g, bytearray(n)) for g, n in pairs])):
        with pytest.raises(UsageError):
            make(layout)


def test_many_regions():
    """As many as a front end with hot-plugged memory has; an access finds the right one, and holes stay holes."""
    places = [(i * i * MIB, (i % 3 + 1) * PAGE) for i in range(MAX_REGIONS)]
    assert MAX_REGIONS >= 64
    with GuestMemory.create(places[::-1]) as memory:
        for gpa, size in places:
            memory.write(gpa + size - 8, gpa.to_bytes(8, "little"))
            host = lib.vq_memory_at(memory.c_table, gpa + size - 8, 8)
            assert int(ffi.cast("uint64_t *", host)[0]) == gpa
            assert lib.vq_memory_covers(memory.c_table, gpa, size)
            assert not lib.vq_memory_at(memory.c_table, gpa + size, 1)
            assert not lib.vq_memory_covers(memory.c_table, gpa, size + 1)
        assert len(populated(memory)) == MAX_REGIONS


def test_shared_by_descriptor(memory):
    """A second mapping sees the same bytes, and outlives the first."""
    with GuestMemory.from_fds(memory.regions) as other:
        memory.write(17 * PAGE, b"hello")
        memory.close()
        assert other.read(17 * PAGE, 5) == b"hello"


def test_objects_that_are_too_small():
    fd = os.memfd_create("short")
    os.ftruncate(fd, PAGE)
    try:
        for region in (Region(0, 2 * PAGE, fd), Region(0, PAGE, fd, PAGE), Region(0, PAGE, fd, 100)):
            with pytest.raises(UsageError):
                GuestMemory.from_fds([region])
    finally:
        os.close(fd)


def test_memory_of_somebody_else():
    """Wrapped without a copy; it has no descriptor, so nothing can be discarded and all of it counts as present."""
    buffer = bytearray(2 * PAGE)
    with GuestMemory.from_buffers([(0, buffer)]) as memory:
        memory.write(5, b"x")
        assert buffer[5:6] == b"x"
        assert len(populated(memory)) == 2
        with pytest.raises(UsageError, match="discard_buffer"):
            Discarder(memory)(np.array([0], np.uint64), np.array([PAGE], np.uint64))
    with pytest.raises((UsageError, ValueError, TypeError)):
        GuestMemory.from_buffers([(0, bytes(PAGE))])


def test_backed_by_a_file(tmp_path):
    """An unlinked file leaves nothing behind in its folder."""
    with GuestMemory.create(4 * PAGE, path=tmp_path) as memory:
        memory.write(PAGE, b"x")
        assert memory.read(PAGE, 1) == b"x"
        assert list(tmp_path.iterdir()) == []


def test_populated_and_discard(memory):
    """Pages with memory behind them are found without reading any; discarded ones are gone and read as zero."""
    for p in (1, 5, 6, 17):
        memory.write(p * PAGE, b"x")
    assert populated(memory).numbers().tolist() == [1, 5, 6, 17]
    discard = Discarder(memory)
    discard(np.array([PAGE, 16 * PAGE], np.uint64), np.array([5 * PAGE, 2 * PAGE], np.uint64))
    assert populated(memory).numbers().tolist() == [6]
    assert discard.bytes_discarded == 7 * PAGE
    assert memory.read(PAGE, 1) == b"\0"


def test_punch_hole_says_what_is_wrong():
    with pytest.raises(OSError):
        punch_hole(-1, 0, PAGE)


def test_descriptors_go_with_the_memory_that_owns_them():
    """An embedder that drops a memory table, or gets the next one, need not close it: descriptors are not lost."""

    def make() -> None:
        for _ in range(20):
            GuestMemory.create(1 << 16).write(0, b"content")

    make()
    before = len(os.listdir("/proc/self/fd"))
    make()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("every", [1, 3, 64, 300])
def test_look_again_at_some_pages(every):
    """Written, dropped and untouched pages, in two objects with a hole between, and one buffer without an object."""
    with GuestMemory.create([(0, 512 * PAGE), (1 << 24, 700 * PAGE)]) as memory:
        rng = np.random.default_rng(every)
        for page in rng.choice(512, 200, replace=False).tolist():
            memory.write(page * PAGE, b"x")
        memory.write(1 << 24, b"x" * (300 * PAGE))
        present = populated(memory)
        before = present.copy()
        pages = np.concatenate([np.arange(0, 512, every), (1 << 24 >> 12) + np.arange(0, 700, every)])
        for page in pages[::2].tolist():
            memory.write(page * PAGE, b"y")
        for page in pages[1::2].tolist():
            region = memory.regions[memory.region_index(page * PAGE)]
            punch_hole(region.fd, page * PAGE - region.gpa + region.offset, PAGE)
        among = PageSet(memory.page_layout)
        for page in pages.tolist():
            among.set_run(page)
        look_again(memory, present, among)
        assert present == populated(memory)
        assert before != present
        nothing = present.copy()
        memory.write(511 * PAGE, b"z")
        look_again(memory, present, PageSet(memory.page_layout))
        assert present == nothing
        look_again(memory, present, None)
        assert present == populated(memory)


def test_look_again_where_there_is_no_object():
    memory = GuestMemory.from_buffers([(0, bytearray(8 * PAGE))])
    present = populated(memory)
    look_again(memory, present, populated(memory))
    assert len(present) == 8
