"""The oracle itself: which evidence makes a page wrong, and which excuses it."""

from __future__ import annotations

import numpy as np
import pytest

from balloon_dev.oracle import Oracle

PAGES = 16
ID = 0x80000001


def digests(**changed):
    found = np.arange(100, 100 + PAGES, dtype=np.uint64)
    for page, value in changed.items():
        found[int(page[1:])] = value
    return found


def blocks(*pairs):
    return np.array([a for a, _ in pairs], np.uint64), np.array([n for _, n in pairs], np.uint64)


def oracle_with_run(*pairs, command_id=ID, epoch=1):
    oracle = Oracle(PAGES)
    oracle.at_issue[:] = digests()
    oracle.epoch_begins(epoch, ID)
    oracle.command(command_id)
    oracle.pages(*blocks(*pairs))
    return oracle


def test_equal_images_are_right():
    verdict = Oracle(PAGES).verdict(digests(), digests())
    assert (verdict.pages_checked, verdict.pages_wrong, verdict.pages_skipped) == (PAGES, 0, 0)


def test_a_page_that_differs_and_was_never_hinted_is_wrong():
    verdict = Oracle(PAGES).verdict(digests(), digests(p3=0))
    assert (verdict.pages_wrong, verdict.wrong[0].page) == (1, 3)
    assert "never hinted" in verdict.wrong[0].why


def test_a_hinted_page_may_differ():
    verdict = oracle_with_run((0x3000, 0x1000)).verdict(digests(), digests(p3=0), last_write=np.zeros(PAGES, np.uint32))
    assert (verdict.pages_wrong, verdict.pages_skipped) == (0, 1)


@pytest.mark.parametrize(("last", "wrong"), [(0, 0), (4, 0), (5, 1), (6, 1)])
def test_written_since_the_id_by_the_journal(last, wrong):
    """A write before the epoch of the id excuses nothing and accuses nothing; one in it or later does."""
    oracle = oracle_with_run((0x3000, 0x1000), epoch=5)
    writes = np.zeros(PAGES, np.uint32)
    writes[3] = last
    assert oracle.verdict(digests(), digests(p3=0), last_write=writes).pages_wrong == wrong


def test_changed_since_the_id_by_its_digest():
    """Without a journal the content at the pause is compared with the content at the issue."""
    verdict = oracle_with_run((0x3000, 0x1000)).verdict(digests(p3=7), digests())
    assert verdict.pages_wrong == 1
    assert "changed" in verdict.wrong[0].why


@pytest.mark.parametrize(
    ("pair", "hinted"),
    [
        ((0x3000, 0x2000), [3, 4]),
        ((0x3001, 0x1FFF), [4]),
        ((0x3000, 0x1FFF), [3]),
        ((0x3001, 0xFFF), []),
        ((0x3001, 0x1000), []),
        ((0xF000, 0x10000), [15]),
        ((0x100000, 0x1000), []),
    ],
)
def test_pages_covered_in_part_are_not_hinted(pair, hinted):
    assert np.flatnonzero(oracle_with_run(pair).hinted()).tolist() == hinted


def test_pages_under_another_id_do_not_count():
    assert not oracle_with_run((0x3000, 0x1000), command_id=ID - 1).hinted().any()


def test_an_id_opens_one_run_only():
    """The id sent again ends the run; pages after it, or after any other command, do not count."""
    oracle = oracle_with_run((0x1000, 0x1000))
    oracle.command(ID)
    oracle.pages(*blocks((0x2000, 0x1000)))
    oracle.command(ID)
    oracle.pages(*blocks((0x3000, 0x1000)))
    assert np.flatnonzero(oracle.hinted()).tolist() == [1]
    assert oracle.blocks == 1


def test_the_stop_of_the_run_before_does_not_take_the_id():
    """A driver that heard of STOP and the new id at once ends its old run first; the device waits for the id."""
    oracle = Oracle(PAGES)
    oracle.epoch_begins(1, ID)
    oracle.command(0)
    oracle.pages(*blocks((0x1000, 0x1000)))
    oracle.command(ID)
    oracle.pages(*blocks((0x2000, 0x1000)))
    assert np.flatnonzero(oracle.hinted()).tolist() == [2]


def test_a_new_round_ends_the_run():
    oracle = oracle_with_run((0x1000, 0x1000))
    oracle.epoch_begins(2, None)
    oracle.pages(*blocks((0x2000, 0x1000)))
    assert np.flatnonzero(oracle.hinted()).tolist() == [1]


def test_the_last_hint_of_a_page_is_the_one_that_counts():
    """Hinted in run 1, written, hinted again in run 2 and left alone: it may be skipped."""
    oracle = oracle_with_run((0x3000, 0x1000), epoch=1)
    oracle.at_issue[3] = 7
    oracle.epoch_begins(2, ID + 1)
    oracle.command(ID + 1)
    oracle.pages(*blocks((0x3000, 0x1000)))
    writes = np.zeros(PAGES, np.uint32)
    writes[3] = 1
    assert oracle.verdict(digests(p3=7), digests(), last_write=writes).pages_wrong == 0


def test_pages_with_holes_between_them():
    """Arrays have an item for each page there is; blocks on the ring and wrong pages go by page number."""
    high = 1 << 40
    oracle = Oracle([(2, 3), (high, PAGES - 3)])
    oracle.at_issue[:] = digests()
    oracle.epoch_begins(1, ID)
    oracle.command(ID)
    oracle.pages(*blocks((4 << 12, 2 << 12), ((high - 1) << 12, 2 << 12), (0, 1 << 12)))
    assert np.flatnonzero(oracle.hinted()).tolist() == [2, 3]
    verdict = oracle.verdict(digests(), digests(p0=0, p2=0, p3=0, p5=0))
    assert (verdict.pages_checked, verdict.pages_wrong, verdict.pages_skipped) == (PAGES, 2, 2)
    assert [wrong.page for wrong in verdict.wrong] == [2, high + 2]


def test_missing_digests_are_wrong():
    """A destination that sent too few digests has proved nothing."""
    verdict = Oracle(PAGES).verdict(digests(), digests()[:-1])
    assert (verdict.pages_checked, verdict.pages_wrong) == (0, PAGES)


def test_only_the_first_wrong_pages_are_listed():
    oracle = Oracle(100)
    verdict = oracle.verdict(np.zeros(100, np.uint64), np.ones(100, np.uint64))
    assert (verdict.pages_wrong, len(verdict.wrong)) == (100, 16)
    assert verdict.as_dict()["wrong"][0].startswith("page 0x0: ")
