"""What `MmioDevice` leaves to its embedder, and that it says so: too much for one call, and resets of version 3."""

from __future__ import annotations

import pytest
from mmio_pair import ALL, MmioPair, R, Raw
from raw_driver import FEATURES, HINT, INFLATE, OurPeer, RawDriver

from balloon_dev.device import BalloonDevice
from guest_driver.mmio import MmioTransport
from vring.errors import DeviceError, UsageError
from vring.features import CommonFeature, Status
from vring.memory import GuestMemory
from vring.mmio import MmioDevice

AHEAD = 64
"""Buffers the guest below is always ahead of the device."""
LIMIT = 64 * AHEAD
"""Buffers one call serves of it then: the device looks at a queue 64 times, and the tests have `BUFFERS` lower."""


class Greedy(RawDriver):
    """A guest with a second processor that adds a buffer to the inflateq whenever one was taken off it."""

    def __init__(self, total, features=FEATURES):
        super().__init__(OurPeer())
        self.total, self.added = total, 0
        self.peer.device.discard = lambda addr, length: self.add()
        self.start(features)
        self.pfn = self.pfns(4096)
        for _ in range(AHEAD):
            self.add()

    def add(self):
        if self.added < self.total:
            head = self.added % 128
            self.put(INFLATE, self.pfn, at=head)
            self.offer(INFLATE, head)
            self.added += 1

    @property
    def left(self):
        return (self.avail[INFLATE] - self.used(INFLATE)) & 0xFFFF

    def notify(self):
        self.set(R.QueueNotify, INFLATE)


@pytest.fixture
def low_limit(monkeypatch):
    monkeypatch.setattr("vring.mmio_core.BUFFERS", 1000)


@pytest.mark.parametrize("event_idx", [0, int(CommonFeature.EVENT_IDX)])
def test_a_guest_that_never_stops_adding_is_left_and_that_is_told(event_idx, low_limit):
    guest = Greedy(LIMIT + 100, FEATURES | event_idx)
    mmio = guest.peer.mmio
    assert not mmio.waiting
    guest.notify()
    assert guest.added == LIMIT + AHEAD
    assert guest.left == AHEAD
    assert mmio.waiting
    assert "waits for poll" in mmio.dump()
    assert mmio.poll() == 100
    assert (guest.left, mmio.waiting) == (0, False)
    assert "poll" not in mmio.dump()


def test_what_is_left_is_served_at_the_next_register_that_is_written(low_limit):
    """An embedder that never heard of `waiting`: a guest that takes its interrupts is served all the same."""
    guest = Greedy(2 * LIMIT + 10)
    guest.notify()
    for _ in range(2):
        assert guest.peer.mmio.waiting
        assert guest.get(R.InterruptStatus) == 1
        guest.set(R.InterruptACK, 1)
    assert guest.left == 0
    assert not guest.peer.mmio.waiting


def test_each_call_is_bounded(low_limit):
    guest = Greedy(1 << 20)
    guest.notify()
    before = guest.added
    assert 0 < guest.peer.mmio.poll() <= LIMIT
    assert guest.added - before <= LIMIT
    assert guest.peer.mmio.waiting


def test_a_held_device_waits_for_its_release_only(low_limit):
    guest = Greedy(LIMIT + 10)
    assert guest.left == AHEAD
    guest.notify()
    guest.peer.mmio.hold()
    assert not guest.peer.mmio.waiting
    assert guest.peer.mmio.poll() == 0
    guest.peer.mmio.release()
    assert guest.left == 0


def test_without_on_notify_every_notification_waits():
    with MmioPair(on_notify=False) as pair:
        pair.mmio.poll()
        assert not pair.mmio.waiting
        pair.device.set_target(10)
        pair.mmio.deliver()
        pair.driver.interrupt(pair.transport.interrupts())
        while pair.driver.step():
            pass
        assert pair.mmio.waiting
        pair.settle()
        assert not pair.mmio.waiting


def test_a_kick_before_driver_ok_waits_for_the_driver_not_for_poll():
    guest = RawDriver(OurPeer())
    guest.start(ok=False)
    guest.set(R.QueueNotify, HINT)
    assert not guest.peer.mmio.waiting


# -- version 3 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("on_notify", [True, False])
def test_our_driver_takes_both_versions(version, on_notify):
    with MmioPair(version=version, on_notify=on_notify, probe=False) as pair:
        assert pair.mmio.read(R.Version, 4) == version
        pair.transport._pause = pair.mmio.poll
        for _ in range(3):
            pair.driver.probe()
            pair.target(300)
            assert pair.ballooned() == 300
            assert pair.hint_run()
            pair.driver.remove()
            pair.unchanged()
            assert pair.mmio.status == 0
        assert not pair.mmio.bad_accesses
        assert not pair.device.bad_requests


@pytest.mark.parametrize("version", [0, 1, 4])
def test_other_versions_are_refused_by_both_sides(version):
    with GuestMemory.create(1 << 20) as memory:
        with pytest.raises(UsageError, match=f"version {version}, there are 2 and 3"):
            MmioDevice(BalloonDevice(), memory, version=version)
        mmio = MmioDevice(BalloonDevice(), memory)
        mmio.version = version
        assert MmioTransport.find(mmio) is None
        with pytest.raises(DeviceError, match="not 2 or 3"):
            MmioTransport(mmio)


def test_a_reset_of_version_3_is_over_when_status_reads_0():
    """basic.reset.driver-1; basic.reset.device-2 and basic.reset.device-3 hold from then on."""
    with MmioPair(version=3, on_notify=False, accept=ALL) as pair:
        raw, mmio = Raw(pair.mmio), pair.mmio
        raw[R.QueueNotify] = 0
        raw[R.Status] = 0
        assert raw[R.Status] & Status.DRIVER_OK
        assert mmio.waiting
        raw[R.Status] = 1  # a driver that does not wait
        assert mmio.bad_accesses == {"Status during a reset": 1}
        assert mmio.poll() == 0
        assert raw[R.Status] == 0
        assert not mmio.waiting
        assert pair.device.negotiated == 0
        raw[R.Status] = 0  # nothing to reset: over at once
        assert raw[R.Status] == 0
        assert not mmio.waiting
        assert raw.negotiate()


def test_a_driver_that_waits_in_vain_gives_up():
    with MmioPair(version=3, on_notify=False) as pair:
        with pytest.raises(DeviceError, match="reset: the device status still reads 0xf"):
            pair.transport.reset()
        pair.mmio.poll()
        pair.transport.reset()


def test_a_reset_that_waits_is_carried_out_before_the_device_is_saved():
    with MmioPair(version=3, on_notify=False) as pair:
        Raw(pair.mmio)[R.Status] = 0
        with pytest.raises(UsageError, match="a reset waits"):
            pair.mmio.save()
        pair.mmio.hold()
        assert pair.mmio.save()["status"] == 0
        assert pair.device.save()["negotiated"] == 0
