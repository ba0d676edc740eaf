"""Whose ring it is that starts, which no message says; and what is forgotten if it is another driver's, or may be."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from front_end import BIT_30, RINGS, Front

from balloon_dev.config import ACTUAL, CMD_ID, POISON_VAL
from balloon_dev.device import SUPPORTED_FEATURES
from balloon_dev.features import BalloonFeature
from balloon_dev.hinting import HintState
from vring import vhost_user as vu

FEATURES = SUPPORTED_FEATURES & ~int(BalloonFeature.MUST_TELL_HOST)
POISON = b"\xaa" * 4
INFLATE, DEFLATE, STATS, FREE_PAGE, REPORTING = range(5)


class Guest(Front):
    """All five queues, each message as QEMU sends it for its generic device."""

    def __init__(self, config: int = 4) -> None:
        super().__init__(FEATURES)
        self.config = config
        self.open_channel()
        self.shown = bytearray(self.get_config(0, 16))
        """QEMU's copy of the config space, which is as old as the guest's last read."""
        self.discarded: list[int] = []
        self.device.discard = lambda addr, length: self.discarded.extend(addr.tolist())

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes one field; QEMU sends it alone, or with all that it remembers."""
        if self.config == 4:
            self.set_config(offset, data)
        else:
            self.shown[offset : offset + 4] = data
            self.set_config(0, bytes(self.shown))

    def boot(self, at: int = RINGS) -> None:
        """A driver begins: poison_val first, then, at DRIVER_OK, all else."""
        self.at = [at + index * 0x4000 for index in range(5)]
        self.begin(5)
        self.write_config(POISON_VAL, POISON)
        self.go([0] * 5, at)

    def go(self, bases: list[int], at: int = RINGS) -> None:
        self.probe(at, BIT_30, rings=5, bases=bases)
        for index in range(5):
            self.call(index)

    def live_a_little(self) -> None:
        """Use all queues: a balloon of 2 pages, figures, a run of hints."""
        self.inflate(40, 41, 42)
        self.inflate(42, index=DEFLATE)
        self.write_config(ACTUAL, (2).to_bytes(4, "little"))
        self.put(b"\x04\0" + (77).to_bytes(8, "little"), STATS)
        self.device.start_hinting()
        self.backend.deliver()
        self.put(self.device.hinting.command_id.to_bytes(4, "little"), FREE_PAGE)

    def report(self) -> list[int]:
        """Report a page as free; return what was discarded."""
        self.discarded.clear()
        self.put(bytes(4096), REPORTING, at=0x40000, writable=True)
        return list(self.discarded)

    def state(self) -> tuple[int, int, str, dict[str, int], bytes]:
        device = self.device
        poison = device.read_config(POISON_VAL, 4)
        return device.ballooned_pages, device.actual, device.hinting.state.name, dict(device.stats.values), poison


LIVING = (2, 2, "START", {"stat-free-memory": 77}, POISON)
FRESH = (0, 0, "STOP", {}, POISON)


@pytest.fixture(params=[4, 16], ids=["4-byte config", "16-byte config"])
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    made = Guest(request.param)
    yield made
    assert made.backend.last_error is None
    assert not made.device.bad_requests
    made.close()


def test_a_pause_changes_nothing(guest: Guest) -> None:
    """`stop` and `cont` of QEMU: the same features, the same table, each ring at the base that was handed out."""
    guest.boot()
    guest.live_a_little()
    assert guest.state() == LIVING
    for _ in range(3):
        bases = guest.stop(5)
        assert bases == [1, 1, 0, 1, 0], "the figures are held, and found again"
        assert guest.state() == LIVING
        guest.go(bases)
        assert guest.live() == 5
        assert guest.state() == LIVING
    guest.inflate(50)
    assert guest.device.ballooned_pages == 3
    assert guest.report() == [], "the guest poisons its free pages"


def test_a_reload_forgets_all_but_the_poison(guest: Guest) -> None:
    """The first driver has gone orderly, or crashed: the messages are the same. QEMU remembers its `actual`."""
    guest.boot()
    guest.live_a_little()
    last = guest.device.hinting.command_id
    guest.stop(5)
    guest.boot(RINGS + 0x20000)
    assert guest.state() == FRESH
    assert guest.live() == 5
    assert guest.report() == []
    assert guest.device.start_hinting() == last + 1, "the counter goes on"
    guest.live_a_little()
    assert guest.state() == LIVING


@pytest.mark.parametrize("order", list(itertools.permutations(range(5)))[::7], ids=str)
def test_whatever_the_order_of_the_rings(order: tuple[int, ...]) -> None:
    """A new driver's buffers may be served before its last ring starts: what they did is not forgotten."""
    guest = Guest()
    try:
        guest.boot()
        guest.live_a_little()
        guest.stop(5)
        guest.begin(5)
        guest.negotiate(BIT_30)
        guest.table()
        for index in range(5):
            for message in (guest.num, guest.base, guest.addr, guest.kick):
                message(index)
        for index in order:
            if index == INFLATE:
                guest.put((60).to_bytes(4, "little"), INFLATE, kick=False)
            guest.enable(index)
        assert guest.state() == (1, *FRESH[1:])
    finally:
        guest.close()


def test_other_features_are_another_driver(guest: Guest) -> None:
    """Even if its bases are those of the one before; bit 30 and the log of writes are not the driver's."""
    guest.boot()
    guest.live_a_little()
    bases = guest.stop(5)
    guest.negotiate(vu.F_LOG_ALL | BIT_30)
    guest.go(bases)
    assert guest.state() == LIVING
    bases = guest.stop(5)
    guest.features &= ~int(BalloonFeature.DEFLATE_ON_OOM)
    guest.go(bases)
    assert guest.state()[:3] == FRESH[:3]  # figures are in the ring that it took over


def test_a_feature_that_is_gone_takes_its_state_along(guest: Guest) -> None:
    """There is no queue any more whose start would say so."""
    guest.boot()
    guest.live_a_little()
    guest.stop(5)
    guest.features &= ~int(BalloonFeature.FREE_PAGE_HINT | BalloonFeature.STATS_VQ)
    guest.negotiate(BIT_30)
    assert guest.device.hinting.state is HintState.STOP
    assert not guest.device.stats.values


def test_a_driver_that_used_nothing_is_taken_for_the_next(guest: Guest) -> None:
    """It cannot be told from it, and has left nothing behind."""
    guest.boot()
    guest.stop(5)
    guest.boot()
    guest.live_a_little()
    assert guest.state() == LIVING


def in_the_midst(guest: Guest, index: int) -> None:
    """Begin with rings that another host has served."""
    guest.at = [RINGS + queue * 0x4000 for queue in range(5)]
    guest.begin(5)
    for at in guest.at:
        for part in (0x1002, 0x2002):
            guest.memory.write(at + part, index.to_bytes(2, "little"))
    guest.go([index] * 5)
    assert guest.live() == 5


def test_an_index_that_wrapped_leaves_a_doubt(guest: Guest) -> None:
    """At base 0 another driver may begin, or the same go on: what would allow to drop memory is dropped."""
    in_the_midst(guest, 0xFFFF)
    guest.write_config(POISON_VAL, POISON)
    guest.live_a_little()
    assert guest.state() == LIVING
    bases = guest.stop(5)
    assert bases == [0, 0, 0xFFFF, 0, 0xFFFF]
    last = guest.device.hinting.command_id
    guest.go(bases)
    assert guest.state() == (0, LIVING[1], "STOP", *LIVING[3:])
    assert guest.device.hinting.command_id != last


def test_a_guest_in_the_midst_of_life_on_a_new_connection(guest: Guest) -> None:
    """Its driver had another host before (this program was started anew, say): what it was told is not known."""
    in_the_midst(guest, 7)
    first = guest.device.hinting.profile.id_initial
    assert guest.device.start_hinting() > first + 1, "it has perhaps answered the first ids"
    assert guest.report() == [], "it has told nobody here with what it fills its free pages"
    guest.write_config(POISON_VAL, bytes(4))
    assert bool(guest.report()) == (guest.config == 4), "0 among other bytes is no news"


def test_with_no_poison_told_reports_are_left_alone(guest: Guest) -> None:
    guest.begin(5)
    guest.go([0] * 5)
    assert guest.report() == []
    guest.features &= ~int(BalloonFeature.PAGE_POISON)
    guest.stop(5)
    guest.begin(5)
    guest.go([0] * 5)
    assert guest.report()


def test_config_changes_wait_for_a_ring(guest: Guest) -> None:
    """Told of one while nothing runs, QEMU 11.1.3 dies; what was due is told when the first ring runs."""
    guest.device.set_target(5)
    guest.backend.deliver()
    assert guest.told() == 0
    guest.boot()
    assert guest.told() == 1
    guest.live_a_little()
    assert guest.told() == 1
    bases = guest.stop(5)
    guest.device.set_target(6)
    guest.backend.deliver()
    guest.device.stop_hinting()
    guest.backend.deliver()
    assert guest.told() == 0
    guest.negotiate(BIT_30)
    guest.table()
    assert guest.told() == 0
    guest.go(bases)
    assert guest.told() == 1
    guest.stop(5)
    assert guest.told() == 0
    guest.boot()
    assert guest.told() >= 1, "the size of the driver before was forgotten"
    assert guest.device.read_config(0, 4) == b"\x06\0\0\0"
    assert guest.device.read_config(CMD_ID, 4) == bytes(4)


@pytest.mark.parametrize("pieces", [("call",), ("stop", "call"), ("stop", "go", "call"), ("off", "off", "call")])
def test_an_interrupt_waits_for_its_descriptor(pieces: tuple[str, ...]) -> None:
    """None has come yet, or it was taken away while the interrupt was masked."""
    guest = Guest()
    try:
        guest.boot()
        guest.call(there=False)
        guest.inflate(40)
        bases = [1, 0, 0, 0, 0]
        for piece in pieces:
            assert guest.rung() == 0
            {
                "call": guest.call,
                "off": lambda: guest.call(there=False),
                "stop": lambda: guest.stop(5),
                "go": lambda: guest.probe(RINGS, BIT_30, rings=5, bases=bases),
            }[piece]()
        assert guest.rung() >= 1
        guest.call()
        assert guest.rung() == 0, "once is enough"
    finally:
        guest.close()


def test_a_call_that_comes_after_the_kick(guest: Guest) -> None:
    guest.begin(5)
    guest.put((40).to_bytes(4, "little"), kick=False)
    guest.probe(RINGS, BIT_30, rings=5)
    assert (guest.used(), guest.rung()) == (1, 0)
    guest.call()
    assert guest.rung() == 1
