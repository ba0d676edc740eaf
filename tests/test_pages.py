"""vring.pages against sets of page numbers: any layout, high addresses, nothing sized by a number that is named."""

from __future__ import annotations

import itertools
import tracemalloc

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from vring.errors import UsageError
from vring.memory import GuestMemory
from vring.pages import MAX_PAGE, PageLayout, PageSet

HIGH = 1 << 40
"""Page number of a region at the end of what 52 bits of address can name."""


@st.composite
def layouts(draw):
    """Up to five runs, apart or touching, low or high."""
    at, runs = draw(st.sampled_from([0, 3, HIGH])), []
    for _ in range(draw(st.integers(0, 5))):
        at += draw(st.sampled_from([0, 1, 70, 1 << 30]))
        pages = draw(st.integers(1, 100))
        runs.append((at, pages))
        at += pages
    return PageLayout(draw(st.permutations(runs)))


def pages_in(layout):
    return [page for first, pages in layout.runs for page in range(first, first + pages)]


@st.composite
def sets(draw, layout=None):
    """A layout, a `PageSet` of it and the same as a set of numbers."""
    layout = layout or draw(layouts())
    exist = pages_in(layout)
    numbers = draw(st.sets(st.sampled_from(exist))) if exist else set()
    made = PageSet(layout)
    for page in numbers:
        made.set_run(page)
    return made, numbers


def arrays(ranges):
    return np.array([a for a, _ in ranges], np.uint64), np.array([n for _, n in ranges], np.uint64)


@st.composite
def byte_ranges(draw, layout):
    """Ranges near what exists, at any alignment, of any length."""
    edges = [0, *(edge << 12 for first, pages in layout.runs for edge in (first, first + pages))]
    start = st.builds(lambda edge, by: max(edge + by, 0), st.sampled_from(edges), st.integers(-9000, 9000))
    length = st.one_of(st.integers(0, 100 * 4096), st.just(1 << 60), st.just((1 << 64) - 1))
    return draw(st.lists(st.tuples(start, length), max_size=6))


@given(layouts())
def test_slots_are_the_pages_in_order(layout):
    exist = pages_in(layout)
    assert layout.count == len(exist)
    numbers = np.array(exist, np.uint64)
    assert layout.slots(numbers).tolist() == list(range(len(exist)))
    assert layout.numbers(np.arange(len(exist))).tolist() == exist
    for first, pages in layout.runs:
        assert layout.slot(first, pages) == exist.index(first)
        assert layout.has(first, pages)
        assert not layout.has(first, pages + 1)
        assert not layout.has(first - 1)
    assert all(a + n < b for (a, n), (b, _) in zip(layout.runs, layout.runs[1:], strict=False))


@pytest.mark.parametrize(
    "runs", [[(0, 10), (9, 1)], [(-1, 3)], [(0, -1)], [(MAX_PAGE, 1)], [(MAX_PAGE - 1, 2)], 1 << 60]
)
def test_layouts_that_cannot_be(runs):
    with pytest.raises(UsageError):
        PageLayout(runs)


@pytest.mark.parametrize("page", [-1, 4, 9, 15, HIGH, 1 << 63, 1 << 64, 1 << 200])
def test_pages_that_do_not_exist(page):
    layout = PageLayout([(5, 4), (10, 5)])
    some = PageSet(layout)
    assert page not in some
    for call in (layout.slot, some.set_run, some.clear_run):
        with pytest.raises(UsageError, match="not all among those that exist"):
            call(page)
    if 0 <= page < 1 << 64:
        with pytest.raises(UsageError, match="not all among those that exist"):
            layout.slots(np.array([6, page], np.uint64))
    with pytest.raises(UsageError):
        some.set_run(5, 6)  # page 9 is a hole
    assert not some


@given(sets())
def test_what_is_in_a_set(pair):
    found, numbers = pair
    assert found.numbers().tolist() == sorted(numbers)
    assert len(found) == len(numbers)
    assert bool(found) == bool(numbers)
    assert all((page in found) == (page in numbers) for page in pages_in(found.layout))
    firsts, counts = found.runs()
    runs = list(zip(firsts.tolist(), counts.tolist(), strict=True))
    assert [page for first, pages in runs for page in range(first, first + pages)] == sorted(numbers)
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(runs))
    again = PageSet(found.layout)
    again.set_bools(found.to_bools())
    assert again == found


@given(st.data())
def test_two_sets(data):
    a, of_a = data.draw(sets())
    b, of_b = data.draw(sets(a.layout))
    assert set((a - b).numbers().tolist()) == of_a - of_b
    assert set((a ^ b).numbers().tolist()) == of_a ^ of_b
    union, both, rest = a.copy(), a.copy(), a.copy()
    union |= b
    both &= b
    rest -= b
    assert set(union.numbers().tolist()) == of_a | of_b
    assert set(both.numbers().tolist()) == of_a & of_b
    assert rest == a - b
    assert (a == b) == (of_a == of_b)


@given(st.data())
def test_ranges_take_whole_pages_only(data):
    """Of what exists; a range may begin and end anywhere, and past the end of the address space."""
    found, numbers = data.draw(sets())
    ranges = data.draw(byte_ranges(found.layout))
    inside = {p for p in pages_in(found.layout) if any(a <= p << 12 and (p + 1) << 12 <= a + n for a, n in ranges)}
    more, less = found.copy(), found.copy()
    assert more.set_ranges(*arrays(ranges)) == len(inside - numbers)
    assert set(more.numbers().tolist()) == numbers | inside
    assert less.clear_ranges(*arrays(ranges)) == len(inside & numbers)
    assert set(less.numbers().tolist()) == numbers - inside


@given(st.data())
def test_pages_of_another_layout(data):
    """After hot-plug: pages that still exist stay."""
    found, numbers = data.draw(sets())
    other = data.draw(layouts())
    moved = found.within(other)
    assert moved.layout == other
    assert set(moved.numbers().tolist()) == numbers & set(pages_in(other))


def test_arrays_that_do_not_fit():
    some, other = PageSet(PageLayout(10)), PageSet(PageLayout(11))
    with pytest.raises(UsageError, match="2 addresses and 1 lengths"):
        some.set_ranges(np.zeros(2, np.uint64), np.zeros(1, np.uint64))
    with pytest.raises(UsageError, match="1 addresses and 2 lengths"):
        some.clear_ranges(np.zeros(1, np.uint64), np.zeros(2, np.uint64))
    for use in (some.__ior__, some.__iand__, some.__isub__, some.__sub__, some.__xor__):
        with pytest.raises(UsageError, match="two memories"):
            use(other)
    with pytest.raises(UsageError, match="a bitmap of 64 bits"):
        PageSet(PageLayout(65), np.zeros(1, np.uint64))
    with pytest.raises(UsageError, match="5 items"):
        PageLayout([(4, 2)]).pick(np.zeros(5))


@given(layouts())
def test_pick(layout):
    exist = [page for page in pages_in(layout) if page < 10000]
    low = PageLayout((page, 1) for page in exist)
    assert low.pick(np.arange(10000)).tolist() == exist


@pytest.mark.parametrize("gpa", [0, 1 << 45, (1 << 52) - (1 << 20)])
def test_bookkeeping_is_as_large_as_what_is_there(gpa):
    """The same number of bytes wherever the memory lies."""
    memory = GuestMemory.create([(gpa, 1 << 20)])
    tracemalloc.start()
    pages = PageSet(memory.page_layout)
    pages.set_run(gpa >> 12, 256)
    assert pages.words.nbytes == 32
    assert pages.numbers().tolist() == list(range(gpa >> 12, (gpa >> 12) + 256))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    memory.close()
    assert peak < 1 << 16
