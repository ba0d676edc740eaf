"""The driver's private state in guest RAM, where the device can write it: written and not believed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from models.ring_model import WRITE, RawRing

from vring._vring import ffi
from vring.errors import DeviceError, UsageError
from vring.memory import GuestMemory
from vring.split import DriverQueue, QueueLayout

SIZE = 8
BASE, STATE = 0x1000, 0x4000


@pytest.fixture
def memory():
    with GuestMemory.create(0x10000) as m:
        yield m


@pytest.fixture
def layout():
    return QueueLayout.place(BASE, SIZE)


@pytest.fixture
def raw(memory, layout):
    return RawRing(memory, layout)


def breaks(call, error, code, **facts):
    with pytest.raises(error) as caught:
        call()
    assert caught.value.code == code
    for name, value in facts.items():
        assert getattr(caught.value, name) == value


FIELDS = [name for name, _ in ffi.typeof("struct vq_driver_state").fields if name != "padding"]
VALUES = (0, 1, 3, 17, 512, 0x7FFF, 0xFFFF)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("field", FIELDS)
def test_a_scribbled_state_is_not_believed(memory, layout, raw, field, value):
    """All that is counted goes on as if nothing were; who binds to it is refused, or it was a state that can be."""
    d = DriverQueue(memory, layout, state=STATE)
    d.add([(0x5000, 4, WRITE)] * 6, range(6))
    d.publish()
    raw.used[:2] = [(4, 4), (2, 3)]
    raw.used_flags[1] = 2
    setattr(d._q.state, field, value)
    with contextlib.suppress(UsageError):
        DriverQueue.attach(memory, STATE)
    assert (d.outstanding, d.num_free, d.used_idx, d.avail_idx, d.broken) == (6, 2, 0, 6, False)
    tokens, lens = d.collect()
    assert (tokens.tolist(), lens.tolist()) == ([4, 2], [4, 3])
    setattr(d._q.state, field, value)
    d.tokens[:] = 9
    d.segs[:] = (0x5000, 4, WRITE)
    assert d.exchange(4) == 0
    assert (d.added, d.outstanding, d.num_free) == (4, 8, 0)
    assert sorted(d.detach().tolist()) == [0, 1, 3, 5, 9, 9, 9, 9]
    assert DriverQueue.attach(memory, STATE).num_free == SIZE


@pytest.mark.parametrize(
    ("field", "value"),
    [("pending", 1000000), ("pending", -1), ("pending", -7), ("pending", -43), ("error", 1), ("error", -4)],
)
def test_a_saved_error_that_is_none(memory, layout, field, value):
    d = DriverQueue(memory, layout, state=STATE)
    setattr(d._q.state, field, value)
    breaks(lambda: DriverQueue.attach(memory, STATE), UsageError, "VQ_ESTATE")


def test_a_saved_error_is_met_by_who_goes_on(memory, layout, raw):
    d = DriverQueue(memory, layout, state=STATE)
    d.add([(0x5000, 4, WRITE)] * 2, range(2))
    d.publish()
    raw.used[:2] = [(0, 0), (7, 0)]
    raw.used_flags[1] = 2
    assert d.collect()[0].tolist() == [0]
    d = DriverQueue.attach(memory, STATE)
    breaks(d.collect, DeviceError, "VQ_EUSED_ID", index=1)
    assert DriverQueue.attach(memory, STATE).broken


def test_chains_that_grew_in_the_state(memory, layout, raw):
    """A chain cannot have more descriptors than are in use: the free list never holds more than there are."""
    d = DriverQueue(memory, layout, state=STATE)
    d.add([(0x5000, 4, WRITE)] * 3, range(3))
    d.publish()
    raw.used[:3] = [(0, 0), (1, 0), (2, 0)]
    raw.used_flags[1] = 3
    d._q.heads[1].count = 60000
    assert d.collect()[0].tolist() == [0]
    breaks(d.collect, DeviceError, "VQ_EUSED_ID", index=1)
    assert d.num_free == SIZE - 2
    for head in range(SIZE):
        d._q.heads[head].count = 1
    assert len(d.detach()) == 2
    assert d.num_free == SIZE


SCRIBBLER = """
import mmap, random, sys
ram = mmap.mmap(int(sys.argv[1]), int(sys.argv[2]))
start, length = int(sys.argv[3]), int(sys.argv[4])
sound = ram[start : start + length]
rng = random.Random(1)
print("going", flush=True)
while True:
    for _ in range(4):
        at = start + rng.choice((rng.randrange(128), rng.randrange(length)))
        ram[at] = rng.choice((0, 1, 2, 127, 128, 255, rng.randrange(256)))
    if rng.random() < 0.2:
        ram[start : start + length] = sound
"""


def test_while_another_process_scribbles(layout):
    """Every call gives no more than was asked, or an error of the right kind; the queue can always be started anew."""
    size = 256
    with GuestMemory.create(1 << 20) as memory:
        place, state = QueueLayout.place(0, size), 0x40000
        d = DriverQueue(memory, place, state=state)
        raw = RawRing(memory, place)
        fd = memory.regions[0].fd
        command = [sys.executable, "-c", SCRIBBLER, *map(str, (fd, memory.size, state, d.state_bytes(size)))]
        segs = np.zeros(size, dtype=d.segs.dtype)
        segs["addr"], segs["len"], segs["flags"] = 0x5000, 4, WRITE
        seen = Counter()
        with subprocess.Popen(command, pass_fds=[fd], stdout=subprocess.PIPE) as other:
            assert other.stdout.readline() == b"going\n"
            end = time.monotonic() + 2
            while time.monotonic() < end:
                n = d.add(segs[:100], np.arange(100, dtype=np.uint64))
                assert n == 100
                d.publish()
                raw.used["id"], raw.used["len"] = np.arange(size), 0
                raw.used_flags[1] = 100
                try:
                    got = len(d.collect(60)[0])
                    assert got <= 60
                    seen["collected"] += got
                except DeviceError:
                    seen["broken"] += 1
                assert len(d.detach()) <= 100
                assert d.num_free == size
                try:
                    d = DriverQueue.attach(memory, state)
                    d.detach()
                    seen["attached"] += 1
                except UsageError:
                    seen["refused"] += 1
            other.kill()
        assert seen["collected"]
        assert seen["attached"] + seen["refused"]
        del raw
