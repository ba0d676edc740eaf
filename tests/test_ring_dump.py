"""A dump says what is there, and ends on any ring."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, settings
from models.ring_model import INDIRECT, NEXT, RawRing

from vring.dump import dump_queue
from vring.memory import GuestMemory
from vring.split import DeviceQueue, DriverQueue, QueueLayout


def test_dump_of_an_ordinary_ring():
    memory = GuestMemory.create(0x10000)
    layout = QueueLayout.place(0x1000, 8)
    driver = DriverQueue(memory, layout, indirect=0x4000, indirect_len=2)
    device = DeviceQueue(memory, layout, indirect=True)
    driver.add([(0x5000, 16, 0), (0x6000, 32, 2), (0x7000, 8, 0)], [1, 2], [2, 1])
    driver.publish()
    device.push(device.pop(1).heads, [5])
    text = dump_queue(memory, layout, next_avail=device.next_avail, next_used=driver.used_idx, index=3)
    for part in (
        "queue 3: size 8",
        "avail idx 2, used idx 1, 1 not yet used",
        "device pops next at 1: 1 waiting",
        "driver collects next at 0: 1 waiting",
        "[0] 0x4000 +0x20 indirect",
        "  [1] 0x6000 +0x20 write",
        "[1] 0x7000 +0x8 read",
        "id 0 len 5",
    ):
        assert part in text


def test_dump_names_what_is_wrong():
    memory = GuestMemory.create(0x10000)
    layout = QueueLayout.place(0x1000, 4)
    raw = RawRing(memory, layout)
    raw.put(0, 0x5000, 4, NEXT, 0)
    raw.put(1, 1 << 60, 4, NEXT, 9)
    raw.put(2, 0x8000, 16, INDIRECT)
    raw.table(0x8000, (0x8000, 16, INDIRECT, 0))
    raw.expose(0, 1, 2, 77)
    text = dump_queue(memory, layout)
    for part in ("circle", "NOT IN RAM", "[9] is outside the table", "a table inside a table", "[77] is outside"):
        assert part in text
    raw.avail[1] = 9000
    assert "MORE THAN THE QUEUE HOLDS" in dump_queue(memory, layout)
    assert "not all RAM" in dump_queue(memory, QueueLayout(4, 0x1000, 0x20000, 0x3000))
    assert "power of two" in dump_queue(memory, QueueLayout(5, 0x1000, 0x2000, 0x3000))


@settings(max_examples=100, deadline=None)
@given(noise=st.binary(min_size=512, max_size=512), size=st.sampled_from([1, 2, 8, 16]))
def test_dump_ends_on_noise(noise, size):
    with GuestMemory.create(0x2000) as memory:
        memory.write(0, noise)
        before = memory.read(0, 0x2000)
        assert len(dump_queue(memory, QueueLayout.place(0, size)).splitlines()) < 600
        assert memory.read(0, 0x2000) == before
