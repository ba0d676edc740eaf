"""Memory tables that change under a guest: as a whole, or region by region (ADD_MEM_REG, REM_MEM_REG)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from front_end import BIT_30, RINGS, USER, Front

from vring import vhost_user as vu
from vring.memory import MAX_REGIONS
from vring.vhost_user import MemoryRegion, ProtocolFeature, Request

MIB = 1 << 20


@pytest.fixture
def front() -> Iterator[Front]:
    made = Front()
    yield made
    made.close()


def region(at: int, size: int = MIB, user: int | None = None) -> MemoryRegion:
    return MemoryRegion(at, size, USER + at if user is None else user, 0)


def more_memory() -> int:
    fd = os.memfd_create("more")
    os.ftruncate(fd, MIB)
    return fd


def test_memory_that_is_plugged_in_keeps_the_balloon(front: Front) -> None:
    front.probe(RINGS, BIT_30)
    front.inflate(40, 41, 42)
    fd = more_memory()
    old = front.memory.regions[0].fd
    front.say(Request.SET_MEM_TABLE, MemoryRegion.pack_table([region(0), region(1 << 30)]), (old, fd))
    os.close(fd)
    assert front.backend.memory is not None
    assert front.backend.memory.size == 2 * MIB
    assert (front.device.ballooned_pages, front.live()) == (3, 3)
    front.inflate(43, (1 << 30) // 4096 + 7)
    assert front.used() == 2
    assert front.device.ballooned_pages == 5
    front.table()
    assert front.device.ballooned_pages == 4, "what is gone is in nobody's balloon"
    assert front.live() == 3


def test_region_by_region(front: Front) -> None:
    assert vu.unpack_u64(front.ask(Request.GET_PROTOCOL_FEATURES), "") & ProtocolFeature.CONFIGURE_MEM_SLOTS
    assert vu.unpack_u64(front.ask(Request.GET_MAX_MEM_SLOTS), "") == MAX_REGIONS >= 64
    fds = [more_memory() for _ in range(MAX_REGIONS - 1)]
    front.say(Request.ADD_MEM_REG, region(0).pack(), (front.memory.regions[0].fd,))
    for number, fd in enumerate(fds, 1):
        front.say(Request.ADD_MEM_REG, region(number << 30).pack(), (fd,))
        os.close(fd)
    assert front.backend.memory is not None
    assert front.backend.memory.size == MAX_REGIONS * MIB
    front.negotiate(BIT_30)
    for message in (front.num, front.base, front.addr, front.kick, front.enable):
        message()
    far = (3 << 30) // 4096
    front.inflate(40, far)
    assert front.device.ballooned_pages == 2
    front.say(Request.REM_MEM_REG, region(3 << 30).pack())
    assert (front.device.ballooned_pages, front.live()) == (1, 1)
    front.inflate(41)
    assert front.used() == 2
    front.say(Request.REM_MEM_REG, region(0).pack())
    assert front.live() == 0, "the ring was in it"
    front.say(Request.ADD_MEM_REG, region(0).pack(), (front.memory.regions[0].fd,))
    front.inflate(42)
    assert front.used() == 3
    assert front.backend.last_error is None


class Parts:
    """A discarder that puts big pages together, which is told when to forget their parts."""

    def __init__(self) -> None:
        self.resets = 0

    def __call__(self, addr: object, length: object) -> None: ...

    def deflate(self, addr: object, length: object) -> None: ...

    def reset(self) -> None:
        self.resets += 1


def test_parts_of_big_pages_do_not_outlive_their_region(front: Front) -> None:
    """Unplugged and plugged in again it is other memory: a page completed by parts of before would be one in use."""
    parts = front.device.discard = Parts()
    front.probe(RINGS, BIT_30)
    fd = more_memory()
    front.say(Request.ADD_MEM_REG, region(1 << 30).pack(), (fd,))
    front.inflate(40)
    front.say(Request.REM_MEM_REG, region(1 << 30).pack())
    assert parts.resets == 0, "nothing of it was in the balloon"
    front.say(Request.ADD_MEM_REG, region(1 << 30).pack(), (fd,))
    front.inflate((1 << 30) // 4096)
    front.say(Request.REM_MEM_REG, region(1 << 30).pack())
    front.say(Request.ADD_MEM_REG, region(1 << 30).pack(), (fd,))
    assert parts.resets == 1
    os.close(fd)


def test_the_last_region_may_go(front: Front) -> None:
    front.probe(RINGS, BIT_30)
    front.say(Request.REM_MEM_REG, region(0).pack())
    assert front.backend.memory is None
    assert front.live() == 0
    front.table()
    assert front.live() == 3


@pytest.mark.parametrize(
    "asked",
    [region(0, MIB // 2), region(4096), region(0, MIB, USER + 4096), region(1 << 40)],
    ids=["size", "address", "user address", "elsewhere"],
)
def test_a_region_that_is_not_there_cannot_go(front: Front, asked: MemoryRegion) -> None:
    front.probe(RINGS, BIT_30)
    acked = front.acked(Request.REM_MEM_REG, asked.pack())
    assert not acked
    assert (front.live(), front.device.negotiated != 0) == (3, True)


@pytest.mark.parametrize(
    ("asked", "descriptors"),
    [
        (region(0), 1),
        (region(4096, 4096), 1),
        (region(2 << 30), 0),
        (region(2 << 30), 2),
        (region(2 << 30, 2 * MIB), 1),
    ],
    ids=["the same", "an overlap", "no descriptor", "two", "past its end"],
)
def test_a_region_that_cannot_be_is_refused(front: Front, asked: MemoryRegion, descriptors: int) -> None:
    front.probe(RINGS, BIT_30)
    fd = more_memory()
    assert not front.acked(Request.ADD_MEM_REG, asked.pack(), [fd] * descriptors)
    os.close(fd)
    assert front.backend.memory is not None
    assert front.backend.memory.size == MIB
    front.inflate(40)
    assert (front.used(), front.live()) == (1, 3)
