"""Host pages larger than 4096 bytes: exactly those that the guest gave up whole are dropped."""

from __future__ import annotations

import numpy as np
import pytest
from discard_support import HUGE, fake_huge, fill, huge_pages, ranges, wrong_pages, zero_pages
from hypothesis import given, settings
from hypothesis import strategies as st

from host_qemu_side.discard import Discarder, DiscardFailed, OnDeflate, PartialPages, Refusal, residency
from vring.errors import GuestAddressError, MissingFacility, UsageError
from vring.memory import PAGE_SIZE, GuestMemory

PER = HUGE // PAGE_SIZE


def one(page, count=1):
    return ranges((page * PAGE_SIZE, count * PAGE_SIZE))


def test_without_a_tracker_one_request_must_have_it_all():
    with fake_huge(4 * HUGE) as memory:
        fill(memory)
        discard = Discarder(memory, verify=True)
        for page in range(PER):
            discard(*one(page))
        assert discard.bytes_discarded == 0
        discard(*one(PER - 1, PER + 2))
        assert zero_pages(memory) == set(range(PER, 2 * PER))


def test_a_host_page_goes_with_its_last_part():
    with fake_huge(2 * HUGE, gpa=0x700000) as memory:  # a guest address that is no multiple of the host page
        fill(memory)
        first = 0x700000 // PAGE_SIZE
        discard = Discarder(memory, partial=PartialPages(memory), verify=True)
        for page in range(PER - 1):
            discard(*one(first + page))
        assert discard.bytes_discarded == 0
        assert discard.partial.waiting == discard.partial.pages == PER - 1
        discard(*one(first + PER - 1))
        assert discard.bytes_discarded == HUGE
        assert discard.partial.waiting == 0
        assert zero_pages(memory) == set(range(first, first + PER))


def test_deflate_and_reset_clear_the_state():
    with fake_huge(2 * HUGE) as memory:
        fill(memory)
        discard = Discarder(memory, partial=PartialPages(memory))
        discard(*one(0, PER - 1))
        discard.deflate(*one(5))
        discard(*one(PER - 1))
        assert discard.bytes_discarded == 0
        discard.reset()
        discard(*one(5))
        assert discard.bytes_discarded == 0
        assert discard.partial.pages == 1
        assert not zero_pages(memory)
        discard.deflate(*one(5))
        discard.deflate(*one(5))  # twice, or never inflated: nothing happens
        assert discard.partial.pages == 0


def test_two_ranges_that_complete_one_host_page_drop_it_once():
    with fake_huge(2 * HUGE) as memory:
        discard = Discarder(memory, partial=PartialPages(memory))
        discard(*ranges((0, 5 * PAGE_SIZE), (6 * PAGE_SIZE, 94 * PAGE_SIZE), (101 * PAGE_SIZE, HUGE)))
        assert discard.bytes_discarded == 0
        discard(*ranges((5 * PAGE_SIZE, PAGE_SIZE), (100 * PAGE_SIZE, PAGE_SIZE)))
        assert (discard.bytes_discarded, discard.stats.ranges_discarded) == (HUGE, 1)


def test_bad_ranges_change_nothing():
    with fake_huge(2 * HUGE) as memory:
        partial = PartialPages(memory)
        with pytest.raises(GuestAddressError):
            partial.inflate(*ranges((0, 4096), (2 * HUGE, 4096)))
        with pytest.raises(UsageError):
            partial.deflate(*ranges((0, 100)))
        assert partial.pages == 0
        with fake_huge(HUGE) as other, pytest.raises(UsageError, match="another guest memory"):
            Discarder(other, partial=partial)


def test_refused_pages_still_count_as_given_up():
    with fake_huge(HUGE) as memory:
        fill(memory)
        discard = Discarder(memory, partial=PartialPages(memory))
        with discard.inhibit("busy"):
            discard(*one(0, PER - 1))
        assert discard.stats.bytes_refused[Refusal.INHIBITED] == HUGE - PAGE_SIZE
        discard(*one(PER - 1))
        assert discard.bytes_discarded == HUGE


def test_pin_in_a_host_page_keeps_all_of_it():
    with fake_huge(3 * HUGE) as memory:
        fill(memory)
        discard = Discarder(memory)
        discard.pin(HUGE + 12288, 100, "device 0000:01:00.0")
        discard(*one(0, 3 * PER))
        assert zero_pages(memory) == {*range(PER), *range(2 * PER, 3 * PER)}
        assert discard.stats.bytes_refused[Refusal.PINNED] == HUGE


def test_untracked_memory_passes_through():
    with GuestMemory.create(1 << 20) as memory:
        fill(memory)
        discard = Discarder(memory, partial=PartialPages(memory))
        discard(*one(3))
        assert zero_pages(memory) == {3}
        assert discard.partial.pages == discard.partial.waiting == 0


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["inflate", "inflate", "inflate", "deflate", "reset"]),
        st.lists(st.tuples(st.sampled_from([0, 1, 2]), st.integers(0, 31), st.integers(1, 40)), min_size=1, max_size=4),
    ),
    max_size=12,
)


def check_against_model(memory, steps, per, base):
    """Sets of page numbers are the model; each step the dropped pages must be exactly what it says."""
    total = memory.size // PAGE_SIZE
    discard = Discarder(memory, partial=PartialPages(memory))
    given_up: set[int] = set()
    grain = per // 16  # parts of a host page in which the steps move, with odd edges
    fill(memory)
    for what, parts in steps:
        pages: set[int] = set()
        for host_page, part, length in parts:
            start = host_page * per + part * grain // 2
            pages |= set(range(start, min(start + max(length * grain // 2, 1), total)))
        if not pages:
            continue
        order = np.array(sorted(pages), dtype=np.uint64)
        addr = (order << np.uint64(12)) + np.uint64(base)
        length = np.full(len(order), PAGE_SIZE, dtype=np.uint64)
        if what == "inflate":
            given_up |= pages
            discard(addr, length)
            whole = {p // per for p in pages if given_up >= set(range(p // per * per, (p // per + 1) * per))}
            gone = {n * per + i for n in whole for i in range(per)}
        else:
            given_up -= pages if what == "deflate" else given_up
            discard.deflate(addr, length) if what == "deflate" else discard.reset()
            gone = set()
        assert {p - base // PAGE_SIZE for p in zero_pages(memory)} == gone
        assert not wrong_pages(memory)
        assert discard.partial.pages == len(given_up)
        fill(memory)


@settings(max_examples=25, deadline=None)
@given(STEPS)
def test_model_with_2_mib_pages(steps):
    with fake_huge(3 * HUGE, gpa=0x100000) as memory:
        check_against_model(memory, steps, PER, 0x100000)


@settings(max_examples=100, deadline=None)
@given(STEPS)
def test_model_with_64_kib_pages(steps):
    """As on an arm64 host."""
    with fake_huge(3 << 16, page_size=1 << 16) as memory:
        check_against_model(memory, steps, 16, 0)


def test_model_on_real_huge_pages():
    """The same rules on huge pages of the machine, random steps from a fixed seed."""
    with huge_pages(3) as there:
        if not there:
            with pytest.raises(MissingFacility, match="nr_hugepages"):
                GuestMemory.create(3 * HUGE, page_size=HUGE)
            return
        rng = np.random.default_rng(7)
        dropped = 0
        with GuestMemory.create(3 * HUGE, page_size=HUGE) as memory:
            discard = Discarder(memory, partial=PartialPages(memory), verify=True)
            given_up: set[int] = set()
            fill(memory)
            for _ in range(60):
                start, count = int(rng.integers(0, 3 * PER)), int(rng.integers(1, PER))
                count = min(count, 3 * PER - start)
                pages = set(range(start, start + count))
                before = discard.bytes_discarded
                if rng.random() < 0.75:
                    given_up |= pages
                    discard(*one(start, count))
                    touched = range(start // PER, (start + count - 1) // PER + 1)
                    whole = [n for n in touched if given_up >= set(range(n * PER, (n + 1) * PER))]
                    assert discard.bytes_discarded - before == len(whole) * HUGE
                    for n in range(3):
                        assert residency(memory, n * HUGE, HUGE).gone == (n in whole)
                    dropped += len(whole)
                    assert zero_pages(memory) == {n * PER + i for n in whole for i in range(PER)}
                else:
                    given_up -= pages
                    discard.deflate(*one(start, count))
                assert not wrong_pages(memory)
                fill(memory)
        assert dropped > 5


def test_populate_on_deflate_fails_before_the_guest_does():
    """Another process took the last huge pages: the deflate is not acknowledged, the guest does not get SIGBUS."""
    with huge_pages(2) as there:
        if not there:
            with pytest.raises(MissingFacility, match="nr_hugepages"):
                GuestMemory.create(2 * HUGE, page_size=HUGE)
            return
        with GuestMemory.create(2 * HUGE, page_size=HUGE) as memory:
            fill(memory)
            discard = Discarder(memory, partial=PartialPages(memory), on_deflate=OnDeflate.POPULATE, verify=True)
            discard(*one(0, 2 * PER))
            assert residency(memory, 0, 2 * HUGE).object_bytes == 0
            discard.deflate(*one(PER + 3))
            assert residency(memory, 0, 2 * HUGE).resident == HUGE  # all of the host page, and only that
            assert discard.stats.bytes_populated == HUGE
            with GuestMemory.create(HUGE, page_size=HUGE) as other:
                fill(other)
                with pytest.raises(DiscardFailed, match=r"getting the memory back failed.*nr_hugepages"):
                    discard.deflate(*one(0))
            discard.deflate(*one(0))
            assert residency(memory, 0, 2 * HUGE).resident == 2 * HUGE
