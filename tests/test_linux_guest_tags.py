"""The scanner of tagged pages, on images made here; `test_linux_guest` runs it on a real guest's memory."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from host_qemu_side.linux_guest import tags
from vring.errors import UsageError

COUNT, NONCE = 50, 7
MASK = (1 << 64) - 1
Words = npt.NDArray[np.uint64]


def mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def key(nonce: int, page: int, version: int) -> int:
    return mix(nonce ^ mix(page ^ mix(version)))


def tag(nonce: int, page: int, version: int) -> list[int]:
    start = key(nonce, page, version)
    pattern = [mix((start + i) & MASK) for i in range(4, 511)]
    return [0x7461676765642D70, nonce, page, version, *pattern, version]


def place(page: int) -> int:
    return 100 + (page * 37) % 211  # scattered, as a kernel would


def image(updates: int, *, begun: int | None = None, nonce: int = NONCE) -> Words:
    """A guest's memory after so many updates."""
    words = np.random.default_rng(1).integers(1, 2**63, size=(400, 512), dtype=np.uint64)
    for page in range(COUNT):
        version = 1 + updates // COUNT + (page < updates % COUNT)
        words[place(page)] = tag(nonce, page, version)
    ledger = [0x6C65646765722D70, nonce, COUNT, updates if begun is None else begun, updates]
    words[50, :6] = [*ledger, key(nonce, COUNT, 0x6C65646765722D70)]
    return words


def scan(words: Words, nonce: int | None = None) -> tags.TagReport:
    return tags.scan(words.reshape(-1).view(np.uint8), nonce)


@pytest.mark.parametrize("updates", [0, 1, COUNT - 1, COUNT, COUNT + 1, 7 * COUNT + 13])
def test_a_sound_image(updates: int) -> None:
    report = scan(image(updates))
    assert report.ok, report.summary()
    assert (report.found, report.count, report.updates, report.in_flight) == (COUNT, COUNT, updates, None)
    assert report.pages.tolist() == [*(place(page) for page in range(COUNT)), 50]


@pytest.mark.parametrize("state", ["old", "begun", "half", "new"])
def test_the_page_in_flight_may_be_anything_between(state: str) -> None:
    words = image(COUNT + 3, begun=COUNT + 4)
    old, new = tag(NONCE, 3, 2), tag(NONCE, 3, 3)
    words[place(3)] = {
        "old": old,
        "begun": [*old[:3], 3, *old[4:]],
        "half": [*new[:200], *old[200:]],
        "new": new,
    }[state]
    report = scan(words)
    assert report.ok, report.summary()
    assert (report.in_flight, report.found) == (3, COUNT)


def test_any_other_torn_page_is_seen() -> None:
    words = image(COUNT + 3, begun=COUNT + 4)
    words[place(9), 300] ^= np.uint64(1)
    words[place(10), 511] += np.uint64(1)
    words[place(11), 510] += np.uint64(1)
    report = scan(words)
    assert not report.ok
    assert report.torn.tolist() == [9, 10, 11]


def test_one_lost_update_is_seen() -> None:
    words = image(3 * COUNT + 20)
    words[place(19)] = tag(NONCE, 19, 4)  # the very last update
    words[place(40)] = tag(NONCE, 40, 3)
    report = scan(words)
    assert report.stale.tolist() == [19, 40]
    assert not report.ok


def test_missing_pages_are_seen() -> None:
    words = image(5)
    words[place(4)] = 0
    words[place(30)] = words[0]
    assert scan(words).missing.tolist() == [4, 30]


def test_an_old_ledger_gives_itself_away() -> None:
    words, old = image(4 * COUNT), image(4 * COUNT - 10)
    words[50] = old[50]
    report = scan(words)
    assert report.ledger_stale
    assert not report.ok
    assert report.updates == 4 * COUNT


def test_old_copies_in_freed_pages_do_no_harm() -> None:
    words = image(5 * COUNT)
    words[10] = tag(NONCE, 8, 3)
    words[390] = tag(NONCE, 8, 5)
    words[391] = tag(NONCE, 9, 5)
    words[391, 77] = 0
    report = scan(words)
    assert report.ok, report.summary()
    assert report.duplicates == 3


def test_two_taggers_are_told_apart() -> None:
    words, other = image(10), image(20, nonce=8)
    words[51] = other[50]
    with pytest.raises(UsageError, match="2 taggers"):
        scan(words)
    assert scan(words, NONCE).ok
    assert scan(words, 8).missing.size == COUNT


def test_no_ledger() -> None:
    words = image(10)
    words[50, 5] += np.uint64(1)
    with pytest.raises(UsageError, match="no ledger"):
        scan(words)
    assert not tags.compare(image(10).reshape(-1), words.reshape(-1)).ok


def test_compare_finds_pages_that_are_whole_but_not_the_same() -> None:
    source, destination = image(COUNT + 5), image(COUNT + 5)
    assert tags.compare(source, destination).ok
    destination[place(20), 100] ^= np.uint64(4)
    destination[place(49)] = tag(NONCE, 49, 1)
    destination[50, 400] ^= np.uint64(1)  # in the ledger's page, outside of what it counts
    found = tags.compare(source, destination)
    assert found.different.tolist() == [20, 49, COUNT]
    assert not found.ok
    with pytest.raises(UsageError, match="cannot be compared"):
        tags.compare(source, destination[:-1])


def test_a_sparse_file_is_scanned_without_filling_its_holes(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    with open(path, "w+b") as file:
        file.seek(64 << 20)
        file.write(image(12).tobytes())
        file.truncate(256 << 20)
        file.flush()
        before = os.fstat(file.fileno()).st_blocks
        assert tags.scan(path).ok
        assert tags.scan(file.fileno()).ok
        assert os.fstat(file.fileno()).st_blocks <= max(before, 8 << 11)
