"""When memory is not dropped, who is told, and what is counted."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from discard_support import fill, ranges, zero_pages

from balloon_dev.device import DEFAULT_FEATURES, BalloonDevice
from balloon_dev.features import QueueRole
from host_qemu_side.discard import Discarder, DiscardFailed, OnDeflate, Refusal, discarder, residency
from vring.errors import GuestAddressError, UsageError
from vring.memory import PAGE_SIZE, GuestMemory, Region
from vring.split import DeviceQueue, DriverQueue, QueueLayout

MIB = 1 << 20


@pytest.fixture
def memory():
    with GuestMemory.create([(0, MIB), (MIB, MIB)]) as made:
        fill(made)
        yield made


def test_inhibited_discards_are_counted_and_not_done(memory, caplog):
    discard = Discarder(memory)
    with caplog.at_level(logging.WARNING), discard.inhibit("background snapshot"), discard.inhibit("VFIO"):
        assert discard.inhibitors == ["background snapshot", "VFIO"]
        discard(*ranges((0, 8192)))
        discard(*ranges((0, 4096)))
    assert not zero_pages(memory)
    assert discard.stats.bytes_inhibited == 12288
    assert discard.stats.ranges_refused == {Refusal.INHIBITED: 2}
    assert "inhibited: background snapshot, VFIO" in discard.stats.last_refused[Refusal.INHIBITED]
    assert len(caplog.records) == 1  # the first of a kind; a guest could cause any number
    discard(*ranges((0, 4096)))
    assert zero_pages(memory) == {0}
    assert discard.inhibitors == []


def test_inhibit_ends_with_an_exception_and_nests(memory):
    discard = Discarder(memory)
    with discard.inhibit("same"):
        with pytest.raises(KeyError), discard.inhibit("same"):
            raise KeyError
        assert discard.inhibitors == ["same"]
        discard(*ranges((0, 4096)))
    assert discard.bytes_discarded == 0
    assert discard.inhibitors == []


def test_frozen_and_stopped(memory):
    discard = Discarder(memory)
    with discard.frozen("migration"):
        discard(*ranges((0, 4096)))
    assert "the guest is frozen: migration" in discard.stats.last_refused[Refusal.FROZEN]
    discard(*ranges((4096, 4096)))
    discard.stop("handed over")
    discard(*ranges((8192, 4096)))
    assert zero_pages(memory) == {1}
    assert discard.stats.bytes_refused == {Refusal.FROZEN: 4096, Refusal.STOPPED: 4096}


def test_freezing_in_a_hook_stops_the_same_request(memory):
    discard = Discarder(memory)
    discard.before = lambda piece: discard.stop("snapshot began") if piece.gpa >= MIB else None
    discard(*ranges((0, 4096), (MIB, 4096), (MIB + 8192, 4096)))
    assert zero_pages(memory) == {0}
    assert discard.stats.ranges_refused == {Refusal.STOPPED: 2}


def test_pinned_pages_stay_and_the_rest_goes(memory):
    discard = Discarder(memory)
    discard.pin(4096 + 10, 4096, "rdma region 7")  # touches pages 1 and 2
    discard.pin(4096 + 10, 4096, "again")
    discard.pin(MIB - 1, 2)  # the last page of one region and the first of the next
    discard(*ranges((0, 5 * 4096), (MIB - 8192, 16384)))
    assert zero_pages(memory) == {0, 3, 4, 254, 257}
    assert discard.stats.bytes_refused[Refusal.PINNED] == 4 * 4096
    assert "0xfffff+0x2: pinned" in discard.stats.last_refused[Refusal.PINNED]
    discard.unpin(4096 + 10, 4096)
    discard(*ranges((4096, 4096)))
    assert 1 not in zero_pages(memory)  # pinned twice
    assert "rdma region 7" in discard.stats.last_refused[Refusal.PINNED]
    discard.unpin(4096 + 10, 4096)
    discard(*ranges((4096, 4096)))
    assert 1 in zero_pages(memory)
    with pytest.raises(UsageError, match="is not pinned"):
        discard.unpin(4096 + 10, 4096)
    with pytest.raises(GuestAddressError, match="cannot pin"):
        discard.pin(2 * MIB - 4096, 8192)


@pytest.mark.parametrize("kind", ["memfd", "file", "private", "buffer"])
def test_hooks_see_every_range_before_and_after(kind, tmp_path):
    memory = {
        "memfd": lambda: GuestMemory.create(MIB),
        "file": lambda: GuestMemory.create(MIB, path=tmp_path),
        "private": lambda: GuestMemory.from_private([Region(0, MIB)]),
        "buffer": lambda: GuestMemory.from_buffers([(0, bytearray(MIB))]),
    }[kind]()
    fill(memory)
    seen = []

    def look(when):
        return lambda p: seen.append((when, p.gpa, p.length, bool(memory.array(p.gpa, p.length).any())))

    def wipe(piece):
        memory.array(piece.gpa, piece.length)[:] = 0

    discard = Discarder(memory, before=look("before"), after=look("after"), discard_buffer=wipe)
    discard(*ranges((0, 8192), (16384, 4096)))
    assert seen == [
        ("before", 0, 8192, True),
        ("after", 0, 8192, False),
        ("before", 16384, 4096, True),
        ("after", 16384, 4096, False),
    ]
    piece = discard.memory.regions[0]
    assert piece.backing is not None
    memory.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_that_raises_fails_the_request(memory, when):
    def hook(piece):
        if piece.gpa == 8192:
            raise RuntimeError("handler is gone")

    discard = Discarder(memory, **{when: hook})
    with pytest.raises(DiscardFailed, match=f"hook {when} the discard raised RuntimeError.*not to be ack") as got:
        discard(*ranges((0, 4096), (8192, 4096), (16384, 4096)))
    assert isinstance(got.value.__cause__, RuntimeError)
    assert got.value.piece.gpa == 8192
    assert zero_pages(memory) == ({0} if when == "before" else {0, 2})
    assert discard.stats.failures == 1
    setattr(discard, when, None)
    discard(*ranges((0, 4096), (8192, 4096), (16384, 4096)))  # the request may be tried again
    assert zero_pages(memory) == {0, 2, 4}


def inflate(memory, device, pages, ring=0x10000, state=0x20000):
    """A driver's inflate request on the device's queue; return the driver's end."""
    layout = QueueLayout.place(ring, 8)
    index = device.queue_number(QueueRole.INFLATE)
    driver = DriverQueue(memory, layout, state=state)
    device.attach_queue(index, DeviceQueue(memory, layout, index=index))
    memory.write(0x30000, np.array(pages, dtype="<u4").tobytes())
    driver.add([(0x30000, 4 * len(pages), 0)], np.array([1], dtype=np.uint64))
    driver.publish()
    return driver, index


def test_device_acknowledges_after_the_discard_and_not_without_it(memory):
    """The order is drop, tell, acknowledge; a hook that raises leaves the buffer with the device."""
    answered = []
    discard = Discarder(memory, after=lambda piece: answered.append(driver.used_idx), verify=True)
    device = BalloonDevice(discard=discard)
    device.set_memory(memory)
    device.set_features(DEFAULT_FEATURES)
    driver, index = inflate(memory, device, [300, 301, 100])
    assert device.process(index) == 1
    assert answered == [0, 0]  # two ranges, neither answered yet
    assert len(driver.collect()[0]) == 1
    assert {100, 300, 301} <= zero_pages(memory)

    def broken(piece):
        raise RuntimeError("handler is gone")

    memory.write(0x10000, bytes(0x10000))
    discard.before = broken
    driver, index = inflate(memory, device, [302])
    with pytest.raises(DiscardFailed):
        device.process(index)
    assert len(driver.collect()[0]) == 0
    assert 302 not in zero_pages(memory)


@pytest.mark.parametrize("how", [OnDeflate.NOTHING, OnDeflate.WILLNEED, OnDeflate.POPULATE])
def test_deflate(memory, how):
    discard = Discarder(memory, on_deflate=how)
    discard(*ranges((0, 2 * MIB)))
    discard.deflate(*ranges((MIB - 8192, 16384)))
    assert discard.stats.bytes_deflated == 16384
    assert discard.stats.bytes_populated == (0 if how is OnDeflate.NOTHING else 16384)
    assert residency(memory, 0, 2 * MIB).allocated == (16384 if how is OnDeflate.POPULATE else 0)
    discard.stop()
    discard.deflate(*ranges((0, 4096)))
    assert residency(memory, 0, 4096).gone  # RAM stays as it is after the end


def test_deflate_hints_that_fail(memory, monkeypatch):
    def fail(address, length, advice):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(discarder, "advise", fail)
    discard = Discarder(memory, on_deflate=OnDeflate.WILLNEED)
    discard.deflate(*ranges((0, PAGE_SIZE)))
    assert discard.stats.hints_failed == 1
    discard.on_deflate = OnDeflate.POPULATE
    with pytest.raises(DiscardFailed, match=r"needs Linux 5\.14"):
        discard.deflate(*ranges((0, PAGE_SIZE)))
    buffer = GuestMemory.from_buffers([(0, bytearray(MIB))])
    Discarder(buffer, on_deflate=OnDeflate.POPULATE).deflate(*ranges((0, PAGE_SIZE)))  # not ours to touch
