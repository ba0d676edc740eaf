"""The balloon device alone: features, config space, bad requests, the balloon, saving and loading.

A request goes onto a real queue; what is bad about it must come back used, be counted, and have no effect.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest

from balloon_dev.config import ACTUAL, CMD_ID, NUM_PAGES, POISON_VAL
from balloon_dev.device import DEFAULT_FEATURES, BalloonDevice
from balloon_dev.features import BalloonFeature, QueueRole
from balloon_dev.hinting import HintState
from balloon_dev.profiles import LINUX, QEMU, SPEC
from balloon_dev.requests import MAX_REQUEST_BYTES
from vring.dirty.software import SoftwareDirtyLog
from vring.errors import DriverError, UsageError
from vring.features import CommonFeature
from vring.memory import GuestMemory
from vring.pages import PageSet
from vring.split import SEG_WRITE, DeviceQueue, DriverQueue, QueueLayout

HINT = int(BalloonFeature.FREE_PAGE_HINT)
MIB = 1 << 20
DATA = 0x40000


class Bench:
    """A device with its queues on the tests' own driver halves."""

    def __init__(self, profile=SPEC):
        self.memory = GuestMemory.create([(0, MIB), (2 * MIB, MIB)])
        self.discarded, self.hints = [], []
        self.device = BalloonDevice(profile=profile, discard=self.discard)
        self.device.set_memory(self.memory)
        self.device.dirty_log = SoftwareDirtyLog.for_memory(self.memory)
        assert self.device.set_features(DEFAULT_FEATURES)
        self.device.hint_sink = lambda i, a, n: self.hints.append((i, a.tolist(), n.tolist()))
        self.queues = {}
        for i, role in enumerate((QueueRole.INFLATE, QueueRole.DEFLATE, QueueRole.FREE_PAGE)):
            layout = QueueLayout.place(i * 0x4000, 16)
            self.queues[role] = DriverQueue(self.memory, layout)
            self.device.attach_queue(self.device.queue_number(role), DeviceQueue(self.memory, layout, event_idx=False))

    def discard(self, addr, length):
        self.discarded += zip(addr.tolist(), length.tolist(), strict=True)

    def send(self, role, *segs):
        """One buffer of segments ``(bytes or None for pages, addr, length)``; returns what had no effect."""
        before = self.without_effect
        queue, index = self.queues[role], self.device.queue_number(role)
        queue.add([(a, n, f) for a, n, f in segs], [1], [len(segs)])
        queue.publish()
        assert self.device.process(index) == 1
        assert queue.collect()[0].tolist() == [1]
        assert index in self.device.take_calls()
        return self.without_effect - before

    @property
    def without_effect(self):
        return self.device.bad_requests.total() + self.device.late.total()

    def command(self, command_id, size=4):
        self.memory.write(DATA, command_id.to_bytes(8, "little"))
        return self.send(QueueRole.FREE_PAGE, (DATA, size, 0))

    def pages(self, addr, length):
        return self.send(QueueRole.FREE_PAGE, (addr, length, SEG_WRITE))

    def pfns(self, role, *pfns, at=DATA, extra=b""):
        data = np.array(pfns, "<u4").tobytes() + extra
        self.memory.write(at, data)
        return self.send(role, (at, len(data), 0))

    def in_balloon(self):
        return self.device._ballooned.numbers().tolist()

    def dirty(self):
        found = PageSet(self.memory.page_layout)
        self.device.dirty_log.sync(found)
        return set(found.numbers().tolist())


@pytest.fixture
def bench():
    made = Bench()
    yield made
    made.memory.close()


# -- features and config space --------------------------------------------------------------------------


def test_features():
    device = BalloonDevice()
    assert device.offered_features & BalloonFeature.FREE_PAGE_HINT
    assert not device.set_features(device.offered_features | 1 << 50)
    assert device.negotiated == 0
    assert device.set_features(int(CommonFeature.VERSION_1))
    assert not device.hinting_negotiated


@pytest.mark.parametrize("bit", [1 << 6, 1 << 27, 1 << 33, 1 << 40])
def test_features_that_are_not_served_are_refused(bit):
    with pytest.raises(UsageError, match="not served"):
        BalloonDevice(DEFAULT_FEATURES | bit)


def test_nobody_to_ask_for_hints():
    device = BalloonDevice()
    with pytest.raises(UsageError, match="FREE_PAGE_HINT"):
        device.start_hinting()
    device.finish_hinting()
    assert device.read_config(CMD_ID, 4) == bytes(4)


def test_config_reads(bench):
    """Little-endian, any offset and length; past the end it is 0."""
    device = bench.device
    device.set_target(0x01020304)
    assert device.read_config(NUM_PAGES, 4) == b"\x04\x03\x02\x01"
    assert device.read_config(1, 2) == b"\x03\x02"
    assert device.read_config(0, 64) == b"\x04\x03\x02\x01" + bytes(60)
    assert device.read_config(100, 4) == bytes(4)
    assert device.read_config(2, 0) == b""
    assert device.read_config(-4, 4) == bytes(4)


def test_config_writes(bench):
    """actual is the driver's to write, also in pieces; everything else is not, and that is counted."""
    device = bench.device
    device.write_config(ACTUAL, (77).to_bytes(4, "little"))
    assert device.actual == 77
    device.write_config(ACTUAL + 1, b"\x01")
    assert device.actual == 77 + 256
    assert not device.bad_requests
    for offset in (NUM_PAGES, CMD_ID, POISON_VAL, 400):
        device.write_config(offset, b"\xff\xff\xff\xff")
    assert device.bad_requests.total() == 4
    assert device.read_config(0, 4) + device.read_config(8, 8) == bytes(12)


def test_config_generation_moves_with_changes_by_the_device(bench):
    device = bench.device
    start = device.config_generation
    device.set_target(5)
    assert device.config_generation != start
    assert device.take_config_change()
    assert not device.take_config_change()
    now = device.config_generation
    device.set_target(5)
    device.write_config(ACTUAL, b"\x05\0\0\0")
    assert device.config_generation == now


@pytest.mark.parametrize("target", [-1, 1 << 32])
def test_target_that_does_not_fit(bench, target):
    with pytest.raises(UsageError):
        bench.device.set_target(target)


@pytest.mark.parametrize(("profile", "number"), [(SPEC, 3), (QEMU, 2), (LINUX, 2)])
def test_number_of_the_hint_queue(profile, number):
    bench = Bench(profile)
    assert bench.device.queue_number(QueueRole.FREE_PAGE) == number
    assert bench.device.role_of(number) is QueueRole.FREE_PAGE
    assert bench.device.queue_number(QueueRole.STATS) is None
    bench.device.start_hinting()
    assert bench.command(0x80000001) == 0
    assert bench.device.hinting.state is HintState.START


# -- hints ----------------------------------------------------------------------------------------------


def test_a_run(bench):
    """Id, pages, stop: the sink gets the pages with the id, before their buffers are returned."""
    bench.device.start_hinting()
    assert bench.command(0x80000001) == 0
    assert bench.pages(0x80000, 0x10000) == 0
    assert bench.command(0) == 0
    assert bench.hints == [(0x80000001, [0x80000], [0x10000])]
    assert bench.device.hinting.state is HintState.STOP


@pytest.mark.parametrize("size", [1, 3, 5, 8])
def test_command_of_another_size(bench, size):
    """balloon.hint.driver-1: exactly 4 bytes, neither cut nor padded."""
    bench.device.start_hinting()
    assert bench.command(0x80000001, size) == 1
    assert bench.device.hinting.state is HintState.REQUESTED


def test_command_in_pieces(bench):
    """4 bytes are 4 bytes, however they are cut into descriptors."""
    bench.device.start_hinting()
    bench.memory.write(DATA, (0x80000001).to_bytes(4, "little"))
    assert bench.send(QueueRole.FREE_PAGE, (DATA, 1, 0), (DATA + 1, 3, 0)) == 0
    assert bench.device.hinting.state is HintState.START


def test_mixed_chain(bench):
    """A buffer that is command and page at once is neither."""
    bench.device.start_hinting()
    bench.memory.write(DATA, (0x80000001).to_bytes(4, "little"))
    assert bench.send(QueueRole.FREE_PAGE, (DATA, 4, 0), (0x80000, 4096, SEG_WRITE)) == 1
    assert bench.device.hinting.state is HintState.REQUESTED
    assert not bench.hints


def test_hints_outside_a_run(bench):
    assert bench.pages(0x80000, 4096) == 1
    bench.device.start_hinting()
    assert bench.pages(0x80000, 4096) == 1
    bench.command(0x80000001)
    bench.device.stop_hinting()
    assert bench.pages(0x80000, 4096) == 1
    bench.device.finish_hinting()
    assert bench.pages(0x80000, 4096) == 1
    assert not bench.hints


def test_id_of_another_run(bench):
    bench.device.start_hinting()
    bench.device.start_hinting()
    assert bench.command(0x80000001) == 1
    assert bench.pages(0x80000, 4096) == 1
    assert not bench.hints


def test_page_outside_ram_breaks_the_ring(bench):
    """An address in a descriptor is the ring's matter, not the request's: queue and device keep still."""
    queue = bench.queues[QueueRole.FREE_PAGE]
    queue.add([(1 << 40, 4096, SEG_WRITE)], [1])
    queue.publish()
    with pytest.raises(DriverError):
        bench.device.process(3)
    assert not bench.hints


def test_batches_may_be_as_small_as_one(bench):
    """Everything may come between two buffers: here the host's stop."""
    bench.device.start_hinting()
    bench.memory.write(DATA, (0x80000001).to_bytes(4, "little"))
    queue = bench.queues[QueueRole.FREE_PAGE]
    queue.add([(DATA, 4, 0), (0x80000, 4096, SEG_WRITE), (0x90000, 4096, SEG_WRITE)], [1, 2, 3])
    queue.publish()
    assert [bench.device.process_batch(3, 1) for _ in range(2)] == [1, 1]
    bench.device.stop_hinting()
    assert [bench.device.process_batch(3, 1) for _ in range(2)] == [1, 0]
    assert [addr for _, addr, _ in bench.hints] == [[0x80000]]
    assert bench.device.process_batch(9) == 0


# -- the balloon ----------------------------------------------------------------------------------------


def test_inflate_discard_deflate(bench):
    """Pages come merged to the discard, are logged as written, and leave the balloon again."""
    assert bench.pfns(QueueRole.INFLATE, 20, 22, 21, 20, 40) == 0
    assert bench.discarded == [(20 << 12, 3 << 12), (40 << 12, 1 << 12)]
    assert bench.in_balloon() == [20, 21, 22, 40]
    assert {20, 21, 22, 40} <= bench.dirty()
    assert bench.pfns(QueueRole.DEFLATE, 21, 40) == 0
    assert bench.in_balloon() == [20, 22]
    assert len(bench.discarded) == 2


def test_pages_given_twice_count_once(bench):
    bench.pfns(QueueRole.INFLATE, 20, 21)
    bench.pfns(QueueRole.INFLATE, 21, 22)
    assert bench.device.ballooned_pages == 3
    bench.pfns(QueueRole.DEFLATE, 22, 40)
    assert bench.device.ballooned_pages == 2
    bench.pfns(QueueRole.DEFLATE, 22)
    assert (bench.device.ballooned_pages, bench.in_balloon()) == (2, [20, 21])


def test_pfns_outside_ram(bench):
    """Those inside count, those in a hole or past the end are counted as bad."""
    span = bench.memory.page_span
    assert bench.pfns(QueueRole.INFLATE, 20, 256, 511, span, 0xFFFFFFFF, 512) == 4
    assert bench.in_balloon() == [20, 512]
    assert bench.discarded == [(20 << 12, 4096), (512 << 12, 4096)]


@pytest.mark.parametrize("extra", [b"\1", b"\1\2", b"\1\2\3"])
def test_odd_length(bench, extra):
    """Whole PFNs count, the rest of a PFN does not."""
    assert bench.pfns(QueueRole.INFLATE, 20, extra=extra) == 1
    assert bench.in_balloon() == [20]


def test_pfn_split_over_two_descriptors(bench):
    """Framing means nothing: a PFN may lie across two descriptors."""
    bench.memory.write(DATA, np.array([20, 0x112], "<u4").tobytes()[:5])
    bench.memory.write(DATA + 100, np.array([20, 0x2C0], "<u4").tobytes()[5:])
    expected = int.from_bytes(bench.memory.read(DATA + 4, 1) + bench.memory.read(DATA + 100, 3), "little")
    assert bench.send(QueueRole.INFLATE, (DATA, 5, 0), (DATA + 100, 3, 0)) == 0
    assert bench.in_balloon() == [20, expected]


def test_writable_or_too_long_request(bench):
    assert bench.send(QueueRole.INFLATE, (DATA, 4, SEG_WRITE)) == 1
    half = MAX_REQUEST_BYTES // 2
    segs = [(2 * MIB, half, 0), (2 * MIB, half, 0), (2 * MIB, 4, 0)]
    assert bench.send(QueueRole.INFLATE, *segs) == 1
    assert not bench.in_balloon()


def test_used_rings_are_logged(bench):
    """What the device writes itself no guest-side tracker sees."""
    bench.dirty()
    bench.pfns(QueueRole.DEFLATE, 20)
    assert set(bench.queues[QueueRole.DEFLATE].layout.used_pages) <= bench.dirty()


def test_reset(bench):
    bench.pfns(QueueRole.INFLATE, 20)
    bench.device.start_hinting()
    bench.device.reset()
    assert bench.in_balloon() == []
    assert bench.device.hinting.state is HintState.STOP
    assert bench.device.read_config(CMD_ID, 4) == bytes(4)
    assert bench.device.process(0) == 0
    assert bench.device.set_features(DEFAULT_FEATURES)
    assert bench.device.start_hinting() == 0x80000002


# -- save and load --------------------------------------------------------------------------------------


def test_save_and_load(bench):
    bench.pfns(QueueRole.INFLATE, 20, 21, 600)
    bench.device.set_target(3)
    bench.device.write_config(ACTUAL, b"\3\0\0\0")
    bench.device.start_hinting()
    bench.device.finish_hinting()
    other = Bench().device
    other.load(bench.device.save())
    assert other.save() == bench.device.save()
    assert other.read_config(0, 16) == bench.device.read_config(0, 16)
    assert other.take_config_change(), "or a DONE would never be seen"
    other.start_hinting()
    assert other.hinting.command_id == 0x80000002


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.clear(),
        lambda s: s.pop("hinting"),
        lambda s: s.update(profile="qemu"),
        lambda s: s.update(offered=1),
        lambda s: s.update(offered="all"),
        lambda s: s.update(negotiated=-1),
        lambda s: s.update(negotiated=1 << 60),
        lambda s: s.update(negotiated=None),
        lambda s: s.update(config="00"),
        lambda s: s.update(config="zz" * 16),
        lambda s: s.update(config=7),
        lambda s: s.update(hinting={"state": "NONE", "command_id": 1}),
        lambda s: s.update(hinting=None),
        lambda s: s.update(ballooned=[[0]]),
        lambda s: s.update(ballooned=[[20, 1], [-1, 2]]),
        lambda s: s.update(ballooned=[[20, 1], [1 << 40, 2]]),
        lambda s: s.update(ballooned=[[20, 1 << 40]]),
        lambda s: s.update(ballooned=[[20, -1]]),
        lambda s: s.update(ballooned=7),
        lambda s: s.update(negotiated=math.inf),
        lambda s: s.update(negotiated=math.nan),
        lambda s: s.update(negotiated=True),
        lambda s: s.update(negotiated=10**400),
        lambda s: s.update(offered=math.inf),
        lambda s: s.update(profile=["spec"]),
        lambda s: s.update(ballooned=[[math.inf, 1]]),
        lambda s: s.update(ballooned=[[0, 0]]),
        lambda s: s["hinting"].update(command_id=math.inf),
        lambda s: s["stats"].update(updates=math.inf),
        lambda s: s["stats"]["values"].update({"stat-swap-in": math.nan}),
    ],
)
def test_malformed_saved_state(bench, change):
    """It came out of a stream: it is refused whole, and the device is as before."""
    bench.pfns(QueueRole.INFLATE, 20)
    saved = copy.deepcopy(bench.device.save())
    change(saved)
    other = Bench().device
    before = other.save()
    with pytest.raises(UsageError):
        other.load(saved)
    assert other.save() == before


def test_what_was_in_the_balloon_before_is_not_afterwards(bench):
    bench.pfns(QueueRole.INFLATE, 20)
    saved = bench.device.save()
    bench.pfns(QueueRole.INFLATE, 30)
    bench.device.load(saved)
    assert bench.in_balloon() == [20]


def test_state_that_is_no_object(bench):
    with pytest.raises(UsageError):
        bench.device.load([])
