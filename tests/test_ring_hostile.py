"""Every way to break a ring is its own error, names queue and index, and stays broken until a reset."""

from __future__ import annotations

import numpy as np
import pytest
from models.ring_model import INDIRECT, NEXT, WRITE, RawRing

from vring.codes import CODES, error_for
from vring.errors import DeviceError, DriverError, UsageError, VirtioError
from vring.memory import GuestMemory
from vring.split import DESC, DeviceQueue, DriverQueue, QueueLayout

SIZE = 8
RAM = 0x10000
BASE, STATE, TABLE = 0x1000, 0x4000, 0x8000
covered: set[str] = set()


@pytest.fixture
def memory():
    with GuestMemory.create([(0, RAM), (RAM, RAM), (0x100000, 3 << 30)]) as m:
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
    assert type(caught.value) is error
    assert caught.value.clause == CODES[code][2]
    for name, value in facts.items():
        assert getattr(caught.value, name) == value
    covered.add(code)


# name: (descriptors, heads exposed, code). The first buffer is always good, the second is not.
CHAINS = {
    "head outside the table": ([], [SIZE], "VQ_EHEAD"),
    "head far outside the table": ([], [0xFFFF], "VQ_EHEAD"),
    "next outside the table": ([(1, 0x5000, 4, NEXT, SIZE)], [1], "VQ_ENEXT"),
    "chain to itself": ([(1, 0x5000, 4, NEXT, 1)], [1], "VQ_ELOOP"),
    "chain of two in a circle": ([(1, 0x5000, 4, NEXT, 2), (2, 0x5000, 4, NEXT, 1)], [1], "VQ_ELOOP"),
    "readable after writable": ([(1, 0x5000, 4, NEXT | WRITE, 2), (2, 0x5000, 4, 0, 0)], [1], "VQ_EORDER"),
    "length zero": ([(1, 0x5000, 0, 0, 0)], [1], "VQ_EZERO"),
    "behind RAM": ([(1, 2 * RAM - 1, 2, 0, 0)], [1], "VQ_EADDR"),
    "in a hole": ([(1, 0x80000, 1, 0, 0)], [1], "VQ_EADDR"),
    "address wraps": ([(1, (1 << 64) - 1, 4, 0, 0)], [1], "VQ_EADDR"),
    "length to the end of all addresses": ([(1, 0x5000, 0xFFFFFFFF, 0, 0)], [1], "VQ_EADDR"),
    "over 4 GiB": (
        [(1, 0x100000, 0x60000000, NEXT, 2), (2, 0x100000, 0x60000000, NEXT, 3), (3, 0x100000, 0x60000000, 0, 0)],
        [1],
        "VQ_ETOTAL",
    ),
    "the same head twice in one batch": ([(1, 0x5000, 4, 0, 0)], [1, 1], "VQ_EINUSE"),
    "a table inside a table": ([(1, TABLE, 16, INDIRECT, 0)], [1], "VQ_EINDIRECT_NEST"),
    "a table with a next": ([(1, TABLE, 16, INDIRECT | NEXT, 2)], [1], "VQ_EINDIRECT_NEXT"),
    "an empty table": ([(1, TABLE, 0, INDIRECT, 0)], [1], "VQ_EINDIRECT_SIZE"),
    "a table of 17 bytes": ([(1, TABLE, 17, INDIRECT, 0)], [1], "VQ_EINDIRECT_SIZE"),
    "a chain over the queue size in a longer table": (
        [(1, TABLE + 0x300, 16 * (SIZE + 1), INDIRECT, 0)],
        [1],
        "VQ_ELOOP",
    ),
    "a longer table partly outside RAM": ([(1, 2 * RAM - 64, 16 * (SIZE + 1), INDIRECT, 0)], [1], "VQ_EADDR"),
    "a table outside RAM": ([(1, 2 * RAM - 16, 32, INDIRECT, 0)], [1], "VQ_EADDR"),
    "a next outside its table": ([(1, TABLE + 0x100, 32, INDIRECT, 0)], [1], "VQ_ENEXT"),
    "a loop inside a table": ([(1, TABLE + 0x200, 32, INDIRECT, 0)], [1], "VQ_ELOOP"),
}


@pytest.mark.parametrize("name", CHAINS)
def test_bad_chain(memory, layout, raw, name):
    """split.desc.driver-1, split.framing.driver-1, split.indirect.driver-2..4: good buffers first, then the error."""
    descs, heads, code = CHAINS[name]
    device = DeviceQueue(memory, layout, indirect=True, index=3)
    raw.table(TABLE, (0x8100, 16, INDIRECT, 0))
    raw.table(TABLE + 0x100, (0x5000, 4, NEXT, 2), (0x5000, 4, 0, 0))
    raw.table(TABLE + 0x200, (0x5000, 4, NEXT, 1), (0x5000, 4, NEXT, 0))
    raw.table(TABLE + 0x300, *[(0x5000, 4, NEXT, i + 1) for i in range(SIZE)], (0x5000, 4, 0, 0))
    raw.put(0, 0x6000, 16)
    for desc in descs:
        raw.put(*desc)
    raw.expose(0, *heads)
    good = device.pop()
    assert good.heads.tolist()[0] == 0
    where = len(good)
    if len(good) > 1:
        assert code == "VQ_EINUSE"
    before = memory.read(layout.desc, layout.avail + layout.avail_bytes - layout.desc)
    device.push([0])  # what was good can still be given back
    breaks(device.pop, DriverError, code, queue=3, index=where)
    assert device.broken
    for call in (device.pop, lambda: device.push([0]), device.enable_notify, device.disable_notify):
        breaks(call, DriverError, "VQ_EBROKEN")
    assert memory.read(layout.desc, len(before)) == before  # split.desc.device-4


def test_bad_first_chain_is_reported_at_once(memory, layout, raw):
    device = DeviceQueue(memory, layout)
    raw.put(0, 0x6000, 0)
    raw.expose(0)
    breaks(device.pop, DriverError, "VQ_EZERO", index=0)


def test_error_is_not_looked_at_twice(memory, layout, raw):
    """A driver that mends its ring after the device saw the fault gets the error nevertheless."""
    device = DeviceQueue(memory, layout)
    raw.put(0, 0x6000, 4)
    raw.put(1, 0x6000, 0)
    raw.expose(0, 1)
    assert len(device.pop()) == 1
    raw.put(1, 0x6000, 4)
    breaks(device.pop, DriverError, "VQ_EZERO", index=1)


def test_indirect_not_negotiated(memory, layout, raw):
    """split.indirect.driver-1."""
    device = DeviceQueue(memory, layout)
    raw.put(0, TABLE, 16, INDIRECT)
    raw.expose(0)
    breaks(device.pop, DriverError, "VQ_EINDIRECT", index=0)


def test_indirect_as_the_standard_allows_it(memory, layout, raw):
    """split.indirect.device-1 and -2: WRITE on the table's descriptor is nothing; direct links may end in a table."""
    device = DeviceQueue(memory, layout, indirect=True)
    raw.table(TABLE, (0x5000, 4, NEXT, 1), (RAM - 8, 16, WRITE, 0))
    raw.put(0, 0x7000, 12, NEXT, 5)
    raw.put(5, TABLE, 32, INDIRECT | WRITE)
    raw.expose(0)
    batch = device.pop()
    assert batch.segs.tolist() == [(0x7000, 12, 0), (0x5000, 4, 0), (RAM - 8, 16, 2)]
    assert batch.chains.tolist() == [(0, 3, 0, 2, 16, 16)]


def test_indirect_table_across_two_regions(memory, layout, raw):
    """A table, even one entry of it, may lie across regions that touch."""
    device = DeviceQueue(memory, layout, indirect=True)
    entries = b"".join(
        np.array([e], dtype="<u8,<u4,<u2,<u2").tobytes()
        for e in [(0x5000, 4, NEXT, 1), (0x5100, 5, NEXT, 2), (0x5200, 6, 0, 0)]
    )
    memory.write(RAM - 24, entries)
    raw.put(0, RAM - 24, 48, INDIRECT)
    raw.expose(0)
    assert device.pop().segs.tolist() == [(0x5000, 4, 0), (0x5100, 5, 0), (0x5200, 6, 0)]


@pytest.mark.parametrize("idx", [SIZE + 1, 0x8000, 0xFFFF])
def test_avail_idx_ahead(memory, layout, raw, idx):
    """split.avail.driver-1: more buffers than the queue has room for, or an index moved back."""
    device = DeviceQueue(memory, layout, index=1)
    raw.avail[1] = idx
    breaks(device.pop, DriverError, "VQ_EAVAIL_AHEAD", queue=1, index=0)


def test_avail_idx_moved_back(memory, layout, raw):
    device = DeviceQueue(memory, layout)
    for i in range(4):
        raw.put(i, 0x5000, 4)
    raw.expose(0, 1, 2, 3)
    assert len(device.pop(2)) == 2
    raw.avail[1] = 3
    breaks(device.enable_notify, DriverError, "VQ_EAVAIL_AHEAD")


def test_more_available_than_descriptors_left(memory, layout, raw):
    """Buffers held by the device count against the queue size."""
    device = DeviceQueue(memory, layout)
    for i in range(SIZE):
        raw.put(i, 0x5000, 4)
    raw.expose(*range(SIZE))
    assert len(device.pop()) == SIZE
    raw.expose(0)
    breaks(device.pop, DriverError, "VQ_EAVAIL_AHEAD")


def test_head_made_available_again_before_it_was_used(memory, layout, raw):
    device = DeviceQueue(memory, layout)
    raw.put(2, 0x5000, 4)
    raw.expose(2)
    assert len(device.pop()) == 1
    raw.expose(2)
    breaks(device.pop, DriverError, "VQ_EINUSE", index=1)


# -- the driver half -------------------------------------------------------------------------------------------------


@pytest.fixture
def driver(memory, layout):
    d = DriverQueue(memory, layout, state=STATE, index=2)
    assert d.add([(0x5000, 4, 0), (0x6000, 8, WRITE), (0x7000, 16, WRITE)], [10, 11], [1, 2]) == 2
    d.publish()
    return d


@pytest.mark.parametrize("idx", [3, SIZE, 0x8000, 0xFFFF])
def test_used_idx_ahead(driver, raw, idx):
    raw.used_flags[1] = idx
    breaks(driver.collect, DeviceError, "VQ_EUSED_AHEAD", queue=2, index=0)
    for call in (driver.collect, driver.publish, driver.enable_callbacks, driver.disable_callbacks):
        breaks(call, DeviceError, "VQ_EBROKEN")
    assert driver.broken
    assert sorted(driver.detach().tolist()) == [10, 11]
    assert not driver.broken
    assert driver.num_free == SIZE


def test_used_idx_moved_back(driver, raw):
    raw.use(0)
    raw.use(1)
    assert driver.collect(1)[0].tolist() == [10]
    raw.used_flags[1] = 1
    breaks(driver.enable_callbacks, DeviceError, "VQ_EUSED_AHEAD")


@pytest.mark.parametrize("head", [2, 3, SIZE, 0xFFFFFFFF], ids=["middle of a chain", "free", "outside", "far"])
def test_used_id_unknown(driver, raw, head):
    raw.use(head)
    breaks(driver.collect, DeviceError, "VQ_EUSED_ID", queue=2, index=0)


def test_used_id_twice(driver, raw):
    """Good elements of a batch come first, then the error."""
    raw.use(0)
    raw.use(0)
    assert driver.collect()[0].tolist() == [10]
    breaks(driver.collect, DeviceError, "VQ_EUSED_ID", index=1)


def test_used_id_of_a_buffer_not_yet_published(driver, raw):
    driver.add([(0x5000, 4, 0)], [12])
    raw.use(3)
    breaks(driver.collect, DeviceError, "VQ_EUSED_ID")


def test_old_buffer_is_not_taken_for_an_unpublished_one(memory, layout, raw):
    """One held while exactly 65536 others pass has a position that looks new."""
    d = DriverQueue(memory, layout)
    d.add([(0x5000, 4, 0)], [1])
    d.publish()
    for i in range(65535):
        d.add([(0x5000, 4, 0)], [i])
        d.publish()
        raw.use(1 + i % (SIZE - 1))
        assert d.collect()[0].tolist() == [i]
    d.add([(0x5000, 4, 0)], [7])  # not published; at the position of the first one, modulo 65536
    raw.use(0)
    assert d.collect()[0].tolist() == [1]


def test_used_len(driver, raw):
    """split.used.device-2: at most what was writable."""
    raw.use(1, 24)
    assert driver.collect()[1].tolist() == [24]
    raw.use(0, 1)
    breaks(driver.collect, DeviceError, "VQ_EUSED_LEN", index=1)


def test_used_len_is_cut_for_lax_devices(memory, layout, raw):
    d = DriverQueue(memory, layout, lax_lengths=True)
    d.add([(0x5000, 4, 0)], [5])
    d.publish()
    raw.use(0, 1024)
    assert [a.tolist() for a in d.collect()] == [[5], [0]]
    assert d.cut_lengths == 1


# -- set-up and callers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 3, 65536, 1 << 31])
def test_size(memory, size):
    """ring.size-1."""
    layout = QueueLayout(size, 0x1000, 0x2000, 0x3000)
    breaks(lambda: DeviceQueue(memory, layout), DriverError, "VQ_ESIZE")
    breaks(lambda: DriverQueue(memory, layout), UsageError, "VQ_ESIZE")
    with pytest.raises(UsageError):
        QueueLayout.place(0x1000, size)


@pytest.mark.parametrize(("desc", "avail", "used"), [(8, 0, 0), (0, 1, 0), (0, 0, 2)])
def test_alignment(memory, desc, avail, used):
    """split.layout.driver-1."""
    layout = QueueLayout(8, 0x1000 + desc, 0x2000 + avail, 0x3000 + used)
    breaks(lambda: DeviceQueue(memory, layout), DriverError, "VQ_EALIGN")
    breaks(lambda: DriverQueue(memory, layout), UsageError, "VQ_EALIGN")


@pytest.mark.parametrize("where", [2 * RAM - 16, 0x80000, (1 << 64) - 16])
def test_ring_outside_memory(memory, where):
    for layout in (QueueLayout(8, where, 0x2000, 0x3000), QueueLayout(8, 0x1000, where, 0x3000)):
        breaks(lambda layout=layout: DeviceQueue(memory, layout), DriverError, "VQ_ERANGE_RING")
    breaks(lambda: DriverQueue(memory, layout), UsageError, "VQ_ERANGE_RING")


def test_device_caller(memory, layout, raw):
    device = DeviceQueue(memory, layout)
    raw.put(0, 0x5000, 4)
    raw.put(1, 0x5000, 4, WRITE)
    raw.expose(0, 1)
    device.pop()
    breaks(lambda: device.push([0, 5]), UsageError, "VQ_ENOTHELD")
    breaks(lambda: device.push([0, 0]), UsageError, "VQ_ENOTHELD")
    breaks(lambda: device.push([0, 0xFFFFFFFF]), UsageError, "VQ_ENOTHELD")
    breaks(lambda: device.push([0, 1], [0, 5]), UsageError, "VQ_EINVAL")
    breaks(lambda: device.push([0, 1], [1, 0]), UsageError, "VQ_EINVAL")
    assert device.used_idx == 0
    assert raw.used_flags[1] == 0
    assert device.push([1, 0], [4, 0])
    assert raw.used[:2].tolist() == [(1, 4), (0, 0)]


def test_segment_array_too_small(memory, layout, raw):
    """VQ_ESEGS harms nothing: the same call with more room goes on."""
    device = DeviceQueue(memory, layout)
    raw.put(0, 0x5000, 4, NEXT, 1)
    raw.put(1, 0x6000, 4)
    raw.put(2, 0x7000, 4)
    raw.expose(2, 0)
    device._io.max_segs = 1
    assert device.pop().heads.tolist() == [2]
    breaks(device.pop, UsageError, "VQ_ESEGS")
    device._io.max_segs = SIZE
    assert device.pop().heads.tolist() == [0]


def test_driver_caller(memory, layout, raw):
    d = DriverQueue(memory, layout)
    good = (0x5000, 4, 0)
    breaks(lambda: d.add([good, (0x5000, 0, 0)], [1, 2]), UsageError, "VQ_EBADSEG")
    breaks(lambda: d.add([good, (0x5000, 4, 1)], [1, 2]), UsageError, "VQ_EBADSEG")
    breaks(lambda: d.add([good, *[(0, 0xF0000000, 0)] * 2], [1, 2], [1, 2]), UsageError, "VQ_EBADSEG")
    breaks(lambda: d.add([good, (0, 4, WRITE), good], [1, 2], [1, 2]), UsageError, "VQ_EBADORDER")
    breaks(lambda: d.add([good], [1, 2], [1, 0]), UsageError, "VQ_ETOOLONG")
    breaks(lambda: d.add([good] * 10, [1, 2], [1, 9]), UsageError, "VQ_ETOOLONG")
    assert (d.outstanding, d.num_free) == (0, SIZE)
    with pytest.raises(UsageError):
        d.add([good], [1, 2])
    with pytest.raises(UsageError):
        d.add([good], [1], [2])
    with pytest.raises(UsageError):
        d.exchange(SIZE + 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("magic", 0),
        ("size", 7),
        ("free_tail", 3),
        ("outstanding", 1),
        ("avail_next", 9),
        ("flags", 64),
        ("indirect_len", 99),
    ],
)
def test_damaged_state(memory, layout, field, value):
    DriverQueue(memory, layout, state=STATE)
    d = DriverQueue.attach(memory, STATE)
    setattr(d._q.state, field, value)
    breaks(lambda: DriverQueue.attach(memory, STATE), UsageError, "VQ_ESTATE")


def test_damaged_lists(memory, layout, driver):
    for change in (
        lambda d: d._q.free_ring.__setitem__(5, 4),
        lambda d: d._q.next.__setitem__(1, 0),
        lambda d: d._q.next.__setitem__(1, 60000),
        lambda d: setattr(d._q.heads[1], "count", 60000),
        lambda d: setattr(d._q.heads[3], "count", 1),
    ):
        d = DriverQueue.attach(memory, STATE)
        saved = memory.read(STATE, d.state_bytes(SIZE))
        change(d)
        breaks(lambda: DriverQueue.attach(memory, STATE), UsageError, "VQ_ESTATE")
        memory.write(STATE, saved)
    assert DriverQueue.attach(memory, STATE).outstanding == 2


@pytest.mark.parametrize("offset", [0, 8, 4, 1])
@pytest.mark.parametrize("entries", [SIZE + 1, 3 * SIZE, 3000])
def test_a_table_longer_than_the_queue(memory, layout, raw, offset, entries):
    """The queue size bounds the chain (split.indirect.driver-3), not the table it lies in, at whatever address."""
    device = DeviceQueue(memory, layout, indirect=True)
    table = np.zeros(entries, dtype=DESC)
    links = [0, entries - 1, 1, entries // 2]
    for at, following in zip(links, [*links[1:], None], strict=True):
        table[at] = (0x5000 + at, 4, 0 if following is None else NEXT, following or 0)
    memory.write(TABLE + offset, table.tobytes())
    raw.put(0, TABLE + offset, 16 * entries, INDIRECT)
    raw.expose(0)
    assert device.pop().segs["addr"].tolist() == [0x5000 + at for at in links]


def test_more_heads_than_are_held(memory, layout, raw):
    """The array of heads is read no further than buffers are in flight."""
    device = DeviceQueue(memory, layout)
    raw.put(0, 0x5000, 4)
    raw.expose(0)
    assert device.exchange(0, SIZE) == 1
    breaks(lambda: device.exchange(2, SIZE), UsageError, "VQ_ENOTHELD")
    breaks(lambda: device.exchange(1 << 31, SIZE), UsageError, "VQ_ENOTHELD")
    assert device.exchange(1, SIZE) == 0
    assert device.used_idx == 1


def test_an_error_behind_good_buffers_is_no_reason_to_sleep(memory, layout, raw):
    """Who arms the doorbell after the good buffers is told of the error: no interrupt and no kick would come for it."""
    device = DeviceQueue(memory, layout, event_idx=True)
    raw.put(0, 0x6000, 4)
    raw.put(1, 0x6000, 0)
    raw.expose(0, 1)
    assert len(device.pop()) == 1
    breaks(device.enable_notify, DriverError, "VQ_EZERO", index=1)
    breaks(device.enable_notify, DriverError, "VQ_EBROKEN")

    driver = DriverQueue(memory, QueueLayout.place(BASE, SIZE), event_idx=True)
    driver.add([(0x5000, 4, WRITE)] * 4, range(4))
    driver.publish()
    raw.used[:2] = [(0, 0), (7, 0)]
    raw.used_flags[1] = 2
    assert driver.collect()[0].tolist() == [0]
    breaks(lambda: driver.enable_callbacks(2), DeviceError, "VQ_EUSED_ID", index=1)
    breaks(lambda: driver.enable_callbacks(2), DeviceError, "VQ_EBROKEN")


def test_after_the_memory_was_closed(layout):
    """An error, where there was a read of what is no longer mapped."""
    memory = GuestMemory.create(RAM)
    raw = RawRing(memory, layout)
    device = DeviceQueue(memory, layout)
    driver = DriverQueue(memory, layout, state=STATE)
    raw.put(0, 0x5000, 4)
    raw.expose(0, 0)
    assert device.pop(1).heads.tolist() == [0]
    del raw
    memory.close()
    for call in (
        device.pop, lambda: device.push([0]), lambda: device.exchange(0, 1), device.enable_notify,
        device.disable_notify, lambda: driver.add([(0x5000, 4, 0)], [1]), driver.publish, driver.collect,
        lambda: driver.exchange(0), driver.enable_callbacks, driver.disable_callbacks, driver.detach,
    ):  # fmt: skip
        breaks(call, UsageError, "VQ_ECLOSED")
    with pytest.raises(DriverError):
        device.rebind(memory)
    assert (driver.num_free, driver.outstanding, device.in_flight) == (SIZE, 0, 1)


def test_a_code_nobody_knows():
    for half in ("driver", "device"):
        error = error_for(-99, half, queue=1)
        assert isinstance(error, VirtioError)
        assert "-99" in str(error)


def test_every_code_was_provoked(memory, layout):
    """Runs last in this file; meaningless on its own."""
    if len(covered) < 5:
        pytest.skip("needs the whole file")
    assert covered == set(CODES)
