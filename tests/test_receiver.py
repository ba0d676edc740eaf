"""The receiver: which record may come when, what it builds, and what it refuses of a hostile source."""

from __future__ import annotations

import errno
import mmap
import os
import resource
from dataclasses import replace

import numpy as np
import pytest

from host_qemu_side.migration.ram import populated
from host_qemu_side.migration.receiver import Receiver, ReceiverState
from host_qemu_side.migration.records import Ready
from host_qemu_side.migration.stream import VERSION, Kind, Record, StreamError, StreamReader, StreamWriter
from vring.contents import digests_of
from vring.errors import MissingFacility, UsageError
from vring.memory import Backing, GuestMemory

REGIONS = [[0, 64 << 12], [128 << 12, 64 << 12]]
HEADER = {"version": VERSION, "page_size": 4096, "hand_over": True, "regions": REGIONS}
VALUES = {Kind.END: {"pages": 0, "zero_pages": 0}, Kind.ROUND: {"round": 1}, Kind.CANCEL: {"why": "no"}}
CONTENT = {Kind.PAGES: {0: b"a"}, Kind.ZERO: [0]}


def record(kind, value=None, **header):
    writer, reader = StreamWriter(), StreamReader()
    if kind in (Kind.COMMIT, Kind.LAUNCHED):
        parts = writer.commit() if kind is Kind.COMMIT else writer.launched()
    elif kind is Kind.PAGES:
        parts = writer.pages(
            np.array(sorted(value), np.uint64), memoryview(b"".join(value[p] * 4096 for p in sorted(value)))
        )
    elif kind is Kind.ZERO:
        parts = writer.zeros(np.array(value, np.uint64))
    else:
        parts = writer.json(kind, {**HEADER, **header} if kind is Kind.HEADER else value or VALUES.get(kind, {}))
    for part in parts:
        reader.feed(part)
    return reader.next()


def receiver(*records, **header):
    made = Receiver(clock=lambda: 0.0)
    made.handle(record(Kind.HEADER, **header))
    for each in records:
        made.handle(each)
    return made


def answers(buffers):
    reader, found = StreamReader(), []
    for part in buffers:
        reader.feed(part)
    while (each := reader.next()) is not None:
        found.append(each)
    return found


def test_a_whole_migration():
    """Header, pages, zero pages, rounds, state, end: READY with digests of what arrived; then COMMIT."""
    there = receiver(
        record(Kind.PAGES, {0: b"a", 1: b"b", 128: b"c"}),
        record(Kind.ROUND),
        record(Kind.PAGES, {1: b"d"}),
        record(Kind.ZERO, [0, 129]),
        record(Kind.STATE, {"device": 5}),
    )
    *digests, ready = answers(there.handle(record(Kind.END, {"pages": 4, "zero_pages": 2})))
    assert there.state is ReceiverState.READY
    assert there.memory.read(0, 8192) == bytes(4096) + b"d" * 4096
    assert there.memory.read(128 << 12, 4096) == b"c" * 4096
    assert (there.device_state, there.rounds, there.pages, there.zero_pages) == ({"device": 5}, 1, 4, 2)
    assert Ready.of(ready) == there.ready == Ready(pages=4, zero_pages=2)
    found = np.concatenate([each.digests(64) for each in digests])
    assert np.flatnonzero(found).tolist() == [1, 64], "those of RAM, one region after the other"
    there.handle(record(Kind.COMMIT))
    assert there.state is ReceiverState.COMMITTED
    assert there.complete


def test_zero_pages_take_no_memory():
    there = receiver(record(Kind.PAGES, {3: b"a", 4: b"a"}), record(Kind.ZERO, [3, 60]))
    assert populated(there.memory).numbers().tolist() == [4]


def test_an_image_needs_no_commit():
    there = receiver(record(Kind.STATE), hand_over=False)
    there.handle(record(Kind.END))
    assert there.state is ReceiverState.IMAGE
    assert there.complete


def test_cancelled_at_any_time_but_after_commit():
    there = receiver()
    there.handle(record(Kind.CANCEL, {"why": "changed my mind"}))
    assert (there.state, there.cancelled) == (ReceiverState.CANCELLED, "changed my mind")
    there = receiver(record(Kind.STATE), record(Kind.END), record(Kind.COMMIT))
    with pytest.raises(StreamError):
        there.handle(record(Kind.CANCEL, {"why": "too late"}))
    assert there.state is ReceiverState.COMMITTED


EARLIER = {
    ReceiverState.HEADER: None,
    ReceiverState.RAM: [],
    ReceiverState.STATE: [record(Kind.STATE)],
    ReceiverState.READY: [record(Kind.STATE), record(Kind.END)],
    ReceiverState.COMMITTED: [record(Kind.STATE), record(Kind.END), record(Kind.COMMIT)],
}
MAY_COME = {
    ReceiverState.HEADER: {Kind.HEADER, Kind.CANCEL},
    ReceiverState.RAM: {Kind.PAGES, Kind.ZERO, Kind.ROUND, Kind.STATE, Kind.CANCEL},
    ReceiverState.STATE: {Kind.END, Kind.CANCEL},
    ReceiverState.READY: {Kind.COMMIT, Kind.CANCEL},
    ReceiverState.COMMITTED: set(),
}


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("state", EARLIER, ids=lambda state: state.name)
def test_what_may_come_when(state, kind):
    """Every record in every state: those that may come, come; the others are refused and change nothing."""
    there = Receiver(clock=lambda: 0.0) if EARLIER[state] is None else receiver(*EARLIER[state])
    each = record(kind, CONTENT.get(kind))
    if kind in MAY_COME[state]:
        there.handle(each)
    else:
        with pytest.raises(StreamError):
            there.handle(each)
        assert there.state is state


@pytest.mark.parametrize(
    "header",
    [
        {"version": 1},
        {"version": "2"},
        {"page_size": 8192},
        {"regions": []},
        {"regions": None},
        {"regions": [[0]]},
        {"regions": [[0, 100]]},
        {"regions": [[0, 1 << 12], [0, 1 << 12]]},
        {"regions": [[-4096, 1 << 12]]},
        {"regions": [[0, 0]]},
        {"regions": [["x", "y"]]},
        {"regions": [[0, 1 << 80]]},
        {"regions": [[0, 4096], [1 << 60, 4096]]},
        {"regions": [[i << 20, 4096] for i in range(65)]},
    ],
)
def test_header_that_makes_no_sense(header):
    with pytest.raises(StreamError):
        receiver(**header)


@pytest.mark.parametrize("pages", [[64], [63, 64], [127, 128], [192], [1 << 31], [0xFFFFFFFF]])
@pytest.mark.parametrize("kind", [Kind.PAGES, Kind.ZERO])
def test_pages_outside_ram(kind, pages):
    """Nothing is written, not even the part that is RAM."""
    there = receiver()
    with pytest.raises(StreamError, match="not RAM"):
        there.handle(record(kind, dict.fromkeys(pages, b"x") if kind is Kind.PAGES else pages))
    assert not digests_of(there.memory).any()


def test_run_of_no_pages():
    words = np.array([1, 0, 5, 0], "<u4").tobytes()
    with pytest.raises(StreamError):
        receiver().handle(Record(Kind.ZERO, memoryview(words)))


def test_pages_that_got_lost():
    there = receiver(record(Kind.PAGES, {0: b"a"}), record(Kind.STATE))
    with pytest.raises(StreamError, match="2 pages, 1 arrived"):
        there.handle(record(Kind.END, {"pages": 2, "zero_pages": 0}))
    with pytest.raises(StreamError, match="7 zero pages, 0 arrived"):
        there.handle(record(Kind.END, {"pages": 1, "zero_pages": 7}))


def test_digests_do_not_allocate():
    """Digesting RAM that is mostly holes reads no hole: through a mapping that would allocate it."""
    with GuestMemory.create(4 << 20) as memory:
        memory.write(5 << 12, b"x")
        assert np.flatnonzero(digests_of(memory)).tolist() == [5]
        assert populated(memory).numbers().tolist() == [5]


@pytest.mark.parametrize("kind", ["memfd", "buffers", "hugetlb"])
def test_into_memory_that_somebody_gives(kind):
    """Its content goes, what arrives is there; it stays the giver's."""
    if kind == "buffers":
        memory = GuestMemory.from_buffers([(gpa, mmap.mmap(-1, size)) for gpa, size in REGIONS])
    else:
        memory = GuestMemory.create(REGIONS)
    if kind == "hugetlb":  # as such memory looks to whoever asks: it can be written through its mapping alone
        memory.regions = tuple(replace(region, backing=Backing.HUGETLB) for region in memory.regions)
    with memory:
        memory.write(7 << 12, b"old")
        memory.write(130 << 12, b"old")
        there = Receiver(memory=memory)
        for each in (record(Kind.HEADER), record(Kind.PAGES, {1: b"a", 63: b"b", 128: b"c"}), record(Kind.ZERO, [1])):
            there.handle(each)
        assert there.memory is memory
        expected = bytearray(memory.size)
        expected[63 << 12 : 65 << 12] = b"b" * 4096 + b"c" * 4096
        assert memory.read(0, 64 << 12) + memory.read(128 << 12, 64 << 12) == expected


@pytest.mark.parametrize("regions", [[[0, 64 << 12]], [[0, 64 << 12], [128 << 12, 65 << 12]], [[0, 128 << 12]]])
def test_memory_of_another_shape(regions):
    with GuestMemory.create(REGIONS) as memory:
        memory.write(0, b"old")
        there = Receiver(memory=memory)
        with pytest.raises(StreamError, match=r"RAM at 0x0\+0x\w+.*, here is 0x0\+0x40000, 0x80000\+0x40000"):
            there.handle(record(Kind.HEADER, regions=regions))
        assert there.state is ReceiverState.HEADER
        assert memory.read(0, 3) == b"old"


def test_memory_that_cannot_be_had_is_lacking_here():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(MissingFacility, match="cannot make 2097152 bytes of guest memory: File too large"):
            receiver(regions=[[0, 2 << 20]])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_guest_is_refused_before_there_is_memory_for_it():
    def no(header):
        raise UsageError(f"no {header.guest} here, nor {header.size} bytes")

    there = Receiver(on_header=no)
    with pytest.raises(UsageError, match="no linux here, nor 524288 bytes"):
        there.handle(record(Kind.HEADER, guest="linux"))
    assert there.memory is None


def test_what_arrived_is_refused_before_ready():
    def no(there):
        raise UsageError(f"no use for {dict(there.device_state)}")

    there = Receiver(inspect=no)
    for each in (record(Kind.HEADER), record(Kind.STATE, {"a": 1})):
        there.handle(each)
    with pytest.raises(UsageError, match=r"no use for \{'a': 1\}"):
        there.handle(record(Kind.END))
    assert there.state is ReceiverState.STATE


def test_a_refusal_at_the_end_is_the_next_record_that_the_source_hears():
    """Also if digests were due before READY: a record that nobody sends would leave a gap before it."""

    def no(there):
        raise UsageError("no room")

    there = Receiver(prepare=no)
    said = there.hello(launches=True) + there.launched()
    for each in (record(Kind.HEADER), record(Kind.STATE)):
        there.handle(each)
    with pytest.raises(UsageError, match="no room"):
        there.handle(record(Kind.END))
    assert [each.kind for each in answers(said + there.refuse("no room"))] == [Kind.HELLO, Kind.LAUNCHED, Kind.REFUSED]


def test_pages_are_stored_however_little_is_taken_at_a_time(monkeypatch):
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: whole(fd, data[:1000], offset))
    there = receiver(record(Kind.PAGES, {62: b"a", 63: b"b", 128: b"c", 129: b"d"}))
    assert there.memory.read(62 << 12, 8192) == b"a" * 4096 + b"b" * 4096
    assert there.memory.read(128 << 12, 8192) == b"c" * 4096 + b"d" * 4096


def test_no_room_for_pages_is_said(monkeypatch):
    there = receiver()

    def full(fd, data, offset):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(MissingFacility, match="no room for the guest's memory: No space left on device"):
        there.handle(record(Kind.PAGES, {0: b"a"}))


def test_a_reader_that_reuses_its_memory():
    """The payload is good until the next record is asked for; what came glued behind it is not lost."""
    writer, reader = StreamWriter(), StreamReader(reuse=True)
    sent = [bytes([n]) * size for n, size in enumerate([10, 100_000, 0, 300_000, 7])]
    data = b"".join(part for text in sent for part in writer._record(Kind.PAGES, text))
    found = []
    while data:
        room = reader.room() if len(data) % 3 else reader.room(min(len(data), 70_000))
        n = min(len(room), len(data), 65_536)
        room[:n] = data[:n]
        reader.filled(n)
        data = data[n:]
        while (each := reader.next()) is not None:
            found.append(bytes(each.payload))
    assert found == sent
    assert reader.at_boundary
