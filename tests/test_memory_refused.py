"""Guest memory that a peer asks for and that cannot be: a clear error of the right class, and nothing left behind."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from vring.contents import digests_of, populated
from vring.errors import MissingFacility, UsageError
from vring.memory import ADDRESS_LIMIT, GuestMemory, Region
from vring.pages import PageSet

PAGE = 4096
MIB = 1 << 20
U64 = 1 << 64


def mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture
def ram() -> Iterator[int]:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 4 * MIB)
    yield fd
    os.close(fd)


@pytest.fixture
def nothing_left() -> Iterator[None]:
    before = descriptors()
    yield
    assert descriptors() == before


TABLES = {
    "at 2^63": [(1 << 63, MIB, 0)],
    "at the end of 64 bits": [(U64 - MIB, MIB, 0)],
    "past 64 bits": [(U64 - PAGE, 2 * PAGE, 0)],
    "past the address width": [(ADDRESS_LIMIT - PAGE, 2 * PAGE, 0)],
    "at the address width": [(ADDRESS_LIMIT, PAGE, 0)],
    "almost 2^64 bytes": [(0, U64 - PAGE, 0)],
    "2^63 bytes": [(0, 1 << 63, 0)],
    "no bytes": [(0, 0, 0)],
    "negative": [(0, -PAGE, 0)],
    "half a page": [(0, 2048, 0)],
    "address in a page": [(1, PAGE, 0)],
    "offset in a page": [(0, MIB, 123)],
    "offset at the end of 64 bits": [(0, 2 * PAGE, U64 - PAGE)],
    "negative offset": [(0, PAGE, -PAGE)],
    "offset and size wrap": [(0, MIB, U64 - MIB)],
    "past the end of the object": [(0, MIB, 4 * MIB - PAGE)],
    "overlap": [(0, MIB, 0), (PAGE, MIB, 0)],
    "the same twice": [(MIB, MIB, 0), (0, MIB, 0), (MIB, MIB, 0)],
    "a good one, then a bad one": [(0, MIB, 0), (MIB, MIB, 4 * MIB)],
    "none": [],
    "too many": [(i * MIB, PAGE, 0) for i in range(65)],
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("make", [GuestMemory.from_fds, GuestMemory.from_private])
def test_tables_that_cannot_be(
    name: str, make: Callable[[list[Region]], GuestMemory], ram: int, nothing_left: None
) -> None:
    before = mappings()
    with pytest.raises(UsageError) as raised:
        make([Region(gpa, size, ram, offset) for gpa, size, offset in TABLES[name]])
    assert str(raised.value)
    del raised
    assert mappings() <= before + 1


@pytest.mark.parametrize("gpa", [1 << 45, 1 << 48, ADDRESS_LIMIT - MIB])
def test_high_memory_costs_what_is_there(gpa: int, ram: int) -> None:
    """All that is kept about memory is sized by its pages."""
    with GuestMemory.from_fds([Region(0, MIB, ram), Region(gpa, MIB, ram, MIB)]) as memory:
        memory.write(gpa + PAGE, b"x")
        assert populated(memory).words.nbytes == 512 // 8
        assert digests_of(memory).nbytes == 512 * 8
        assert np.flatnonzero(digests_of(memory)).tolist() == [257]
        assert populated(memory).numbers().tolist() == [(gpa >> 12) + 1]


def opened() -> dict[str, Callable[[Path], int]]:
    def read_only(folder: Path) -> int:
        (folder / "file").write_bytes(bytes(PAGE))
        return os.open(folder / "file", os.O_RDONLY)

    def path_only(folder: Path) -> int:
        (folder / "file").write_bytes(bytes(PAGE))
        return os.open(folder / "file", os.O_PATH)

    def sealed(folder: Path) -> int:
        import fcntl

        fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, PAGE)
        fcntl.fcntl(fd, 1033, 8)  # F_ADD_SEALS, F_SEAL_WRITE
        return fd

    return {
        "pipe": lambda folder: os.pipe()[0],
        "socket": lambda folder: socket.socket(socket.AF_UNIX).detach(),
        "eventfd": lambda folder: os.eventfd(0),
        "directory": lambda folder: os.open(folder, os.O_RDONLY),
        "read-only file": read_only,
        "path only": path_only,
        "folder, path only": lambda folder: os.open(folder, os.O_PATH),
        "zero": lambda folder: os.open("/dev/zero", os.O_RDWR),
        "memory of a process": lambda folder: os.open("/proc/self/mem", os.O_RDWR),
        "file of the kernel": lambda folder: os.open("/sys/kernel/mm/transparent_hugepage/enabled", os.O_RDONLY),
        "sealed": sealed,
        "empty": lambda folder: os.memfd_create("empty"),
    }


@pytest.mark.parametrize("name", opened())
def test_descriptors_of_other_things(name: str, tmp_path: Path, ram: int) -> None:
    everything = descriptors()
    fd = opened()[name](tmp_path)
    try:
        before = descriptors()
        with pytest.raises(UsageError) as raised:
            GuestMemory.from_fds([Region(0, PAGE, ram), Region(MIB, PAGE, fd)])
        assert "0x100000" in str(raised.value)
        assert descriptors() == before
    finally:
        os.close(fd)
        for other in descriptors() - everything:
            if other.isdigit() and os.path.lexists(f"/proc/self/fd/{other}"):
                os.close(int(other))


def test_a_descriptor_that_is_closed(nothing_left: None) -> None:
    with pytest.raises(UsageError, match="Bad file descriptor"):
        GuestMemory.from_fds([Region(0, PAGE, 9999)])


def test_names_with_escapes_are_shown_as_text(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "a\x1b[31mb", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, PAGE)
    with GuestMemory.from_fds([Region(0, PAGE, fd)]) as memory:
        assert "\x1b" not in memory.regions[0].describe()
    os.close(fd)


def test_more_than_can_be_mapped(nothing_left: None) -> None:
    """An object may be as long as its owner likes; address space is what the machine has."""
    fd = os.memfd_create("huge")
    os.ftruncate(fd, 1 << 51)
    with pytest.raises(MissingFacility, match="cannot be mapped: Cannot allocate memory"):
        GuestMemory.from_fds([Region(0, 1 << 51, fd)])
    with pytest.raises(MissingFacility, match="cannot be mapped"):
        GuestMemory.from_private([Region(0, 1 << 51)])
    os.close(fd)
    for size in (1 << 50, 1 << 51):
        with pytest.raises(MissingFacility):
            GuestMemory.create(size)
    for size in (1 << 63, 1 << 64, 1 << 200):
        with pytest.raises(UsageError):
            GuestMemory.create(size)


def test_no_descriptors_left(ram: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    regions = [Region(0, PAGE, ram), Region(MIB, PAGE, ram, PAGE)]
    before = descriptors()
    for room in range(3):
        taken = [os.dup(ram)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken) + 1 + room, hard))
        try:
            while True:
                taken.append(os.dup(ram))
        except OSError:
            pass
        for _ in range(room):
            os.close(taken.pop())
        try:
            with pytest.raises(MissingFacility, match="Too many open files"):
                GuestMemory.from_fds(regions)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in taken:
                os.close(fd)
        assert descriptors() == before


def test_memory_that_was_closed() -> None:
    """An error, never a look at where it was mapped."""
    memory = GuestMemory.create(MIB)
    kept = memory.array(0, 8)
    memory.close()
    memory.close()
    uses: list[Callable[[], object]] = [
        lambda: memory.arrays,
        lambda: memory.view(0, 8),
        lambda: memory.array(0, 8),
        lambda: memory.read(0, 8),
        lambda: memory.write(0, b"x"),
        lambda: memory.host_address(0),
        lambda: memory.region_index(0),
        lambda: digests_of(memory),
    ]
    for use in uses:
        with pytest.raises(UsageError, match="was closed"):
            use()
    assert memory.c_table.count == 0
    assert all(region.size == 0 for region in memory.c_table.region)
    assert kept.tolist() == [0] * 8  # an array handed out before keeps its mapping
    assert PageSet(memory.page_layout).layout.count == 256


@pytest.mark.parametrize("lead", [0, 1, 15])
def test_a_region_in_the_middle_of_host_pages(lead: int, ram: int) -> None:
    """RAM with a hole that cuts a host page: what is on both sides is mapped where it belongs."""
    page = 1 << 16
    offset = 3 * page + lead * PAGE
    os.pwrite(ram, b"low", offset)
    os.pwrite(ram, b"high", offset + 20 * PAGE - 4)
    with GuestMemory.from_fds([Region(MIB, 20 * PAGE, ram, offset, page_size=page)]) as memory:
        assert memory.size == 20 * PAGE
        assert memory.read(MIB, 3) == b"low"
        assert memory.read(MIB + 20 * PAGE - 4, 4) == b"high"
        assert memory.regions[0].host_page_base == MIB - lead * PAGE
        assert memory.host_address(MIB) % PAGE == 0
        memory.write(MIB + PAGE, b"x")
    assert os.pread(ram, 1, offset + PAGE) == b"x"
