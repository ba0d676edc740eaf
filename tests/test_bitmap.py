"""vring.bitmap against sets of page numbers."""

from __future__ import annotations

import gc

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from vring import bitmap
from vring.memory import GuestMemory

PAGES = 200
ROOM = -(-PAGES // 64) * 64
some_pages = st.sets(st.integers(0, ROOM - 1))
page = st.integers(0, ROOM)


def of(pages):
    made = bitmap.empty(PAGES)
    for p in pages:
        made[p // 64] |= np.uint64(1 << p % 64)
    return made


def pages_in(found):
    return set(bitmap.pages_of(found).tolist())


@given(some_pages)
def test_count_pages_runs_bools(pages):
    made = of(pages)
    assert bitmap.count(made) == len(pages)
    assert pages_in(made) == pages
    firsts, counts = bitmap.runs(made)
    assert {p for a, n in zip(firsts.tolist(), counts.tolist(), strict=True) for p in range(a, a + n)} == pages
    assert all(a - 1 not in pages for a in firsts.tolist())
    assert np.flatnonzero(bitmap.to_bools(made, PAGES)).tolist() == sorted(p for p in pages if p < PAGES)


@given(some_pages, page, page)
def test_runs_of_a_part(pages, a, b):
    first, end = min(a, b), max(a, b)
    firsts, counts = bitmap.runs(of(pages), first, end)
    found = {p for a, n in zip(firsts.tolist(), counts.tolist(), strict=True) for p in range(a, a + n)}
    assert found == {p for p in pages if first <= p < end}


@given(some_pages, page, page)
def test_set_and_clear_run(pages, a, b):
    first, n = min(a, b), abs(a - b)
    made = of(pages)
    assert bitmap.set_run(made, first, n) == n - len(pages & set(range(first, first + n)))
    assert pages_in(made) == pages | set(range(first, first + n))
    made = of(pages)
    assert bitmap.clear_run(made, first, n) == len(pages & set(range(first, first + n)))
    assert pages_in(made) == pages - set(range(first, first + n))


@pytest.mark.parametrize(("first", "n"), [(-1, 2), (0, ROOM + 1), (ROOM, 1), (1 << 70, 1)])
@pytest.mark.parametrize("function", [bitmap.set_run, bitmap.clear_run])
def test_runs_outside_are_refused(function, first, n):
    with pytest.raises(IndexError):
        function(bitmap.empty(PAGES), first, n)


def test_more_runs_than_fit_one_call():
    """Every other page of a large bitmap: more runs than C returns at a time."""
    made = np.full(1000, 0x5555555555555555, np.uint64)
    firsts, counts = bitmap.runs(made)
    assert firsts.tolist() == list(range(0, 64000, 2))
    assert set(counts.tolist()) == {1}


def test_empty_has_room():
    assert [bitmap.empty(n).size for n in (0, 1, 64, 65)] == [0, 1, 1, 2]
    assert bitmap.count(bitmap.empty(0)) == 0


def test_a_pointer_keeps_its_array_alive():
    """`words` of an array that nobody else holds: C must not be given freed memory."""
    pointer = bitmap.words(np.full(1 << 16, 7, np.uint64))
    gc.collect()
    others = [np.zeros(1 << 16, np.uint64) for _ in range(8)]
    assert pointer[0] == pointer[(1 << 16) - 1] == 7
    assert len(others) == 8


@given(st.sets(st.integers(0, 7)), st.sets(st.integers(0, 7)), st.integers(0, 5))
def test_digests(written, present, first):
    """0 for zero pages and for holes, which are not read; the same content has the same digest."""
    with GuestMemory.create(8 * 4096) as memory:
        for p in written:
            memory.write(p * 4096 + 17, b"x")
        held = bitmap.empty(16)
        for p in present:
            bitmap.set_run(held, p + first, 1)
        out = np.full(8, 9, np.uint64)
        bitmap.digest_pages(memory.host_address(0, 8 * 4096), 8, out, held, first)
        assert set(np.flatnonzero(out).tolist()) == written & present
        assert len({int(d) for d in out if d}) <= 1


@pytest.mark.parametrize("out", [np.zeros(3, np.uint64), np.zeros(8, np.uint32), np.zeros(16, np.uint64)[::2]])
def test_digests_need_room(out):
    with GuestMemory.create(8 * 4096) as memory, pytest.raises(ValueError):
        bitmap.digest_pages(memory.host_address(0, 8 * 4096), 8, out)
