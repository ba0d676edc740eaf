"""When a ring runs: once its last piece has come, in whatever order, and not before; after a pause and after a stop."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import pytest
from front_end import BIT_30, FEATURES, RINGS, USER, Front

from vring import vhost_user as vu
from vring.vhost_user import Request

ORDER = ("features", "table", "num", "base", "addr", "kick", "enable")


@pytest.fixture
def front() -> Iterator[Front]:
    made = Front()
    yield made
    made.close()


def messages(front: Front, bit_30: int) -> dict[str, partial[None]]:
    """The seven messages of a ring, to be said in any order."""
    said = (partial(front.negotiate, bit_30), front.table, front.num, front.base, front.addr, front.kick, front.enable)
    return {name: partial(what) for name, what in zip(ORDER, said, strict=True)}


def wiped(front: Front) -> None:
    """As on a new connection, and with an empty ring."""
    front.say(Request.RESET_DEVICE)
    if front.backend.memory is not None:
        front.say(Request.REM_MEM_REG, vu.MemoryRegion(0, front.memory.size, USER, 0).pack())
    front.begin(1)


@pytest.mark.parametrize("bit_30", [BIT_30, 0], ids=["with bit 30", "without"])
def test_every_order_of_the_seven_messages_serves(front: Front, bit_30: int) -> None:
    """With a buffer that waits already: it is served when the last piece is there, without a kick, and not before.

    Without bit 30 a ring needs no ENABLE.
    """
    failed = []
    say = messages(front, bit_30)
    for order in itertools.permutations(ORDER):
        wiped(front)
        front.put(b"\x28\0\0\0", kick=False)
        left = set(ORDER) - (set() if bit_30 else {"enable"})
        for name in order:
            say[name]()
            left.discard(name)
            if front.used() != int(not left):
                failed.append((order, name))
                break
    assert not failed, f"{len(failed)} of 5040, such as {failed[0]}"
    assert front.backend.last_error is None
    assert front.device.counters["pages inflated"] == 5040


def test_a_ring_of_which_no_base_was_said_starts_at_a_kick(front: Front) -> None:
    say = messages(front, BIT_30)
    for name in ORDER:
        if name != "base":
            say[name]()
    assert front.live() == 0
    front.inflate(40)
    assert front.used() == 1


def test_a_kick_that_comes_last_with_base_0(front: Front) -> None:
    """As User-Mode Linux has it: all KICKs come after all else, and every ring begins at 0."""
    front.negotiate()
    front.table()
    for index in range(3):
        front.call(index)
        front.num(index)
        front.base(index)
        front.addr(index)
    assert front.live() == 0
    for index in range(3):
        front.kick(index)
        assert front.live() == index + 1
    front.inflate(40)
    assert (front.used(), front.rung()) == (1, 1)


def test_a_pause_by_enable_alone(front: Front) -> None:
    front.probe(RINGS, BIT_30)
    front.inflate(40)
    for _ in range(3):
        front.enable(on=False)
        assert front.live() == 2
        before = front.used()
        front.put(b"\x29\0\0\0")
        assert front.used() == before, "a ring that is disabled is not served"
        front.enable()
        assert front.used() == before + 1
    assert front.device.ballooned_pages == 2


STOPS = {
    "GET_VRING_BASE": lambda front: front.get_base(),
    "SET_STATUS 0": lambda front: front.say(Request.SET_STATUS, vu.pack_u64(0)),
    "RESET_OWNER": lambda front: front.say(Request.RESET_OWNER),
}


@pytest.mark.parametrize("stop", STOPS.values(), ids=list(STOPS))
@pytest.mark.parametrize("order", list(itertools.permutations(["base", "addr", "kick"])), ids="-".join)
def test_after_a_stop_a_ring_needs_its_pieces_anew(front: Front, stop, order: tuple[str, ...]) -> None:
    """Nothing else is lost: neither the balloon nor the features, the size and that it is enabled."""
    front.probe(RINGS, BIT_30)
    front.inflate(40)
    stop(front)
    front.inflate(41)
    for message in (front.enable, front.num, front.table, partial(front.negotiate, BIT_30)):
        message()
        assert (front.used(), front.live()) == (1, 0 if stop is not STOPS["GET_VRING_BASE"] else 2)
    say = {"base": partial(front.base, base=1), "addr": front.addr, "kick": front.kick}
    for name in order:
        assert front.used() == 1
        say[name]()
    assert front.used() == 2
    assert front.device.ballooned_pages == 2


def test_a_base_is_handed_out_as_often_as_it_is_asked_for(front: Front) -> None:
    front.negotiate(BIT_30)
    front.base(base=77)
    assert [front.get_base(), front.get_base()] == [77, 77]
    front.probe(RINGS, BIT_30, bases=[0] * 5)
    front.inflate(40)
    assert [front.get_base(), front.get_base()] == [1, 1]


def test_the_same_features_change_nothing(front: Front) -> None:
    for bit_30 in (BIT_30, 0):
        front.say(Request.RESET_DEVICE)
        front.begin()
        front.probe(RINGS, bit_30)
        front.inflate(40)
        front.negotiate(bit_30)
        front.negotiate(bit_30 | vu.F_LOG_ALL)
        front.inflate(41)
        assert (front.used(), front.live()) == (2, 3)


def test_a_table_that_moves_lets_a_ring_wait_for_its_address(front: Front) -> None:
    front.probe(RINGS, BIT_30)
    front.inflate(40)
    moved = USER + (1 << 32)
    front.table(moved)
    assert front.live() == 0
    assert front.backend.at_rest(0)["needs"] == ["a region with the ring's address"]
    front.inflate(41)
    assert front.used() == 1
    for index in range(3):
        front.addr(index, moved)
    assert (front.used(), front.live()) == (2, 3)
    front.table(USER)
    front.table(moved)
    front.inflate(42)
    assert front.used() == 3, "one that comes back where it was"
    assert front.device.ballooned_pages == 3
    assert front.backend.last_error is None


def test_a_ring_that_reaches_out_of_its_region_waits(front: Front) -> None:
    front.at[0] = (1 << 20) - 0x1000  # its avail ring would lie behind the end
    front.negotiate(BIT_30)
    for message in (front.table, front.num, front.base, front.addr, front.kick, front.enable):
        message()
    assert front.live() == 0
    assert front.backend.last_error is None
    front.at[0] = RINGS
    front.addr()
    assert front.live() == 1


def test_a_running_ring_may_be_given_another_place(front: Front) -> None:
    front.probe(RINGS, BIT_30)
    front.inflate(40)
    front.memory.write(RINGS + 0x20000, front.memory.read(RINGS, 0x4000))
    front.at[0] = RINGS + 0x20000
    front.addr()
    front.inflate(41)
    assert front.used() == 2
    assert front.device.ballooned_pages == 2


@pytest.mark.parametrize("size", [1, 2, 64, 512, 1024, 4096, 32768])
def test_any_legal_size_is_taken(size: int) -> None:
    front = Front(size=size)
    try:
        front.negotiate(BIT_30)
        front.table()
        front.num()
        front.base()
        at = USER + RINGS
        front.say(Request.SET_VRING_ADDR, vu.VringAddr(0, 0, at, at + 0x91000, at + 0x80000, 0).pack())
        front.kick()
        front.enable()
        assert front.live() == 1
        front.memory.write(0x8000, (40).to_bytes(4, "little"))
        front.memory.write(RINGS, (0x8000).to_bytes(8, "little") + (4).to_bytes(8, "little"))
        front.memory.write(RINGS + 0x80002, (1).to_bytes(2, "little"))
        front.backend.process(0)
        assert front.device.ballooned_pages == 1
    finally:
        front.close()


@pytest.mark.parametrize("size", [0, 3, 100, 65536, 0xFFFFFFFF])
def test_no_other_size_is(front: Front, size: int) -> None:
    front.say(Request.SET_VRING_NUM, vu.VringState(0, size).pack())
    assert f"ring of {size} entries" in str(front.backend.last_error)


def test_reset_device_forgets_all_but_the_memory() -> None:
    front = Front(FEATURES)
    try:
        front.probe(RINGS, BIT_30)
        front.inflate(40)
        front.set_config(4, b"\x01\0\0\0")
        front.say(Request.RESET_DEVICE)
        assert front.live() == 0
        assert (front.device.actual, front.device.ballooned_pages, front.device.negotiated) == (0, 0, 0)
        assert front.backend.memory is not None
        assert front.get_base() == 0
    finally:
        front.close()
