"""The migration stream: what is written is read again, in pieces of any size, and any damage is noticed where it is."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from host_qemu_side.migration.records import State
from host_qemu_side.migration.stream import (
    HEADER_SIZE,
    LIMITS,
    MAGIC,
    Kind,
    Record,
    StreamError,
    StreamReader,
    StreamWriter,
)
from vring.errors import UsageError

page_sets = st.sets(st.integers(0, 1 << 20), min_size=1, max_size=12)
records = st.lists(
    st.one_of(
        st.tuples(st.just("json"), st.dictionaries(st.text(max_size=5), st.integers(-9, (1 << 64) - 1), max_size=3)),
        st.tuples(st.just("pages"), page_sets),
        st.tuples(st.just("zeros"), page_sets),
        st.tuples(st.just("digests"), st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=9)),
        st.tuples(st.just("commit"), st.none()),
    ),
    min_size=1,
    max_size=6,
)


def content(pages):
    return memoryview(b"".join(bytes([p % 251]) * 4096 for p in sorted(pages)))


def write(writer, what, value):
    pages = np.array(sorted(value), np.uint64) if what in ("pages", "zeros") else None
    if what == "json":
        return writer.json(Kind.STATE, value)
    if what == "pages":
        return writer.pages(pages, content(value))
    if what == "zeros":
        return writer.zeros(pages)
    if what == "digests":
        return writer.digests(np.array(value, np.uint64))
    return writer.commit()


def pieces_of(script):
    writer = StreamWriter()
    return [b"".join(bytes(b) for b in write(writer, *item)) for item in script]


def read_all(data, sizes=()):
    """Feed in pieces of the given sizes, the rest at once; return all records."""
    reader, found, at = StreamReader(), [], 0
    for size in [*sizes, len(data)]:
        reader.feed(data[at : at + size])
        at += size
        while (record := reader.next()) is not None:
            found.append(record)
    return found, reader


SCRIPT = [("json", {"a": 1}), ("pages", {1, 2, 3, 9}), ("zeros", {5, 6}), ("digests", [1, 2]), ("commit", None)]


@given(records, st.lists(st.integers(1, 5000), max_size=20))
@settings(max_examples=80)
def test_round_trip_in_arbitrary_pieces(script, sizes):
    found, reader = read_all(b"".join(pieces_of(script)), sizes)
    assert reader.at_boundary
    assert len(found) == len(script)
    for record, (what, value) in zip(found, script, strict=True):
        if what == "json":
            assert State.of(record).to_json() == value
        elif what == "digests":
            assert record.digests(len(value)).tolist() == value
        elif what in ("pages", "zeros"):
            runs, rest = record.runs()
            named = [p for r in runs.tolist() for p in range(r[0], r[0] + r[1])]
            assert named == sorted(value)
            assert bytes(rest) == (bytes(content(value)) if what == "pages" else b"")


@given(records)
@settings(max_examples=30)
def test_exactly_what_is_wanted(script):
    """A caller that reads `wanted` bytes at a time never reads past a record."""
    data = memoryview(b"".join(pieces_of(script)))
    found = 0
    reader, at = StreamReader(), 0
    while found < len(script):
        n = reader.wanted
        reader.feed(data[at : at + n])
        at += n
        while reader.next() is not None:
            found += 1
    assert at == len(data)


def test_truncation():
    """Cut off anywhere it is not complete; cut between two records it is at a boundary, and lacks the last."""
    parts = pieces_of(SCRIPT)
    data = b"".join(parts)
    ends = np.cumsum([len(p) for p in parts]).tolist()
    for cut in sorted({c for end in ends for c in (end - 1, end, end + 1)} | {0, 3, len(MAGIC), len(MAGIC) + 5}):
        if cut <= len(data):
            found, reader = read_all(data[:cut])
            assert len(found) == sum(end <= cut for end in ends)
            assert reader.at_boundary == (cut in ends)
            assert reader.position


def test_every_flipped_byte_is_noticed():
    """Any byte of magic, headers, JSON and runs, and one in a hundred of the contents."""
    data = b"".join(pieces_of(SCRIPT))
    whole, _ = read_all(data)
    for at in [*range(600), *range(600, len(data), 101), *range(len(data) - 200, len(data))]:
        for mask in (0x01, 0x80):
            damaged = bytearray(data)
            damaged[at] ^= mask
            try:
                found, reader = read_all(bytes(damaged))
            except StreamError:
                continue
            # A length that grew is only noticed at the end of the stream: something is missing.
            assert len(found) < len(whole), f"byte {at}"
            assert not reader.at_boundary


def test_foreign_stream():
    with pytest.raises(StreamError, match="not a migration stream"):
        read_all(b"QEVM" + bytes(100))
    with pytest.raises(StreamError, match="not a migration stream"):
        read_all(b"G")


@pytest.mark.parametrize("change", ["doubled", "missing", "swapped"])
def test_records_out_of_order(change):
    parts = pieces_of(SCRIPT)
    order = {"doubled": [0, 1, 1, 2], "missing": [0, 2, 3], "swapped": [0, 2, 1]}[change]
    with pytest.raises(StreamError, match=r"record \d follows record \d") as caught:
        read_all(b"".join(parts[i] for i in order))
    assert caught.value.index is not None


@pytest.mark.parametrize("kind", Kind)
def test_length_that_would_fill_memory(kind):
    """Each kind has its own bound: before it is exceeded by a byte nothing is refused, and nothing is read after."""
    header = bytearray(pieces_of([("json", {})])[0])
    header[len(MAGIC) : len(MAGIC) + 2] = kind.to_bytes(2, "little")
    reader = StreamReader()
    header[len(MAGIC) + 8 : len(MAGIC) + 16] = (LIMITS[kind] + 1).to_bytes(8, "little")
    with pytest.raises(StreamError, match="damaged"):
        read_all(bytes(header))
    header[len(MAGIC) + 8 : len(MAGIC) + 16] = LIMITS[kind].to_bytes(8, "little")
    reader.feed(header[: len(MAGIC) + HEADER_SIZE])
    if LIMITS[kind]:
        assert reader.next() is None
        assert reader.wanted == LIMITS[kind]


def test_what_is_no_json_is_not_sent():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for value in ({"a": float("nan")}, {"a": b"x"}, {"a": deep}, {"a": "x" * LIMITS[Kind.END]}):
        with pytest.raises(UsageError, match="END record"):
            StreamWriter().json(Kind.END, value)


@pytest.mark.parametrize(("size", "left"), [(0, 5), (5, 5), (8, 0), (16, 1), (48, 5)])
def test_digests_of_pages_that_are_not_there(size, left):
    with pytest.raises(StreamError, match="DIGESTS record"):
        Record(Kind.DIGESTS, memoryview(bytes(size))).digests(left)


@pytest.mark.parametrize("kind", [Kind.PAGES, Kind.ZERO])
@pytest.mark.parametrize(
    "words",
    [
        *([], [1], [1, 1], [0, 5], [1, 2, 0, 1], [1, 1, 0, 2], [1 << 31, 1 << 31], [2, 1, 0, 1]),
        *([0, 0], [1, 0, 7, 0], [2, 1, 7, 1, 9, 0], [2, 2, 7, 1, 7, 1], [2, 2, 8, 1, 7, 1], [2, 4, 7, 3, 9, 1]),
    ],
)
def test_runs_that_do_not_fit(kind, words):
    """Nor those that overlap, go backwards, or are of no pages: one page is in one record once."""
    contents = bytes(4096 * words[1]) if kind is Kind.PAGES and len(words) > 4 else b""
    with pytest.raises(StreamError):
        Record(kind, memoryview(np.array(words, "<u4").tobytes() + contents)).runs()


def test_a_header_is_as_long_as_it_says():
    assert len(pieces_of([("json", {}), ("commit", None)])[1]) == HEADER_SIZE
