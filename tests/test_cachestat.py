"""The cachestat log: nothing written by another process is missed, and where it may have been, it says so."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vring._vring import lib
from vring.bitmap import words
from vring.dirty import DirtyLogVoid
from vring.dirty.cachestat import CachestatLog
from vring.errors import MissingFacility, UsageError
from vring.memory import PAGE_SIZE, GuestMemory, Region
from vring.pages import PageLayout, PageSet

PAGES = 2048
GPA = 0xAA8000  # as for the Linux guest: the first addresses are no RAM
FIRST = GPA // PAGE_SIZE

WRITER = """
import mmap, sys
file = open(sys.argv[1], "r+b")
ram = mmap.mmap(file.fileno(), 0)
for line in sys.stdin:
    for page in map(int, line.split()):
        at = abs(page) * 4096 + 8
        ram[at] = ram[at] if page < 0 else (ram[at] + 1) % 256
    print("done", flush=True)
"""


class Writer:
    """Another process with its own mapping. Page p: change a byte; page -p: store the same byte again."""

    def __init__(self, path: Path) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", WRITER, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *pages: int) -> None:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(" ".join(map(str, pages)) + "\n")
        self._child.stdin.flush()
        assert self._child.stdout.readline() == "done\n"

    def close(self) -> None:
        self._child.communicate()


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[tuple[GuestMemory, Writer]]:
    path = tmp_path / "ram"
    generator = np.random.default_rng(1)
    with open(path, "w+b", buffering=0) as file:
        # In single pages: written at once, the page cache would keep it in large folios.
        for _ in range(PAGES):
            file.write(generator.bytes(PAGE_SIZE))
        with GuestMemory.from_fds([Region(GPA, PAGES * PAGE_SIZE, file.fileno())]) as memory:
            writer = Writer(path)
            yield memory, writer
            writer.close()


@pytest.fixture
def log(ram: tuple[GuestMemory, Writer]) -> Iterator[CachestatLog]:
    log = CachestatLog(ram[0])
    try:
        log.start()
    except MissingFacility as missing:
        pytest.skip(str(missing))
    yield log
    log.stop()


def synced(log: CachestatLog, memory: GuestMemory) -> set[int]:
    """Pages of one sync, counted from the start of the file."""
    into = bitmap(memory)
    try:
        count = log.sync(into)
    except DirtyLogVoid:
        pages = pages_of(into)
        assert log.last_round is not None
        assert log.last_round.canaries_lost
        return pages
    pages = pages_of(into)
    assert count == len(pages)
    return pages


def bitmap(memory: GuestMemory, *pages: int) -> PageSet:
    made = PageSet(memory.page_layout)
    for page in pages:
        made.set_run(FIRST + page)
    return made


def pages_of(into: PageSet) -> set[int]:
    return {page - FIRST for page in into.numbers().tolist()}


def send(log: CachestatLog, memory: GuestMemory, pages: list[int]) -> dict[int, bytes]:
    content = {page: memory.read(GPA + page * PAGE_SIZE, PAGE_SIZE) for page in pages}
    numbers = np.array(pages, dtype=np.uint64) + np.uint64(FIRST)
    log.note_sent(numbers, b"".join(content.values()))
    return content


def flush(memory: GuestMemory, first: int, count: int) -> None:
    """Writeback that is not the log's own, of some pages."""
    assert lib.dirty_file_clean(memory.regions[0].fd, first * PAGE_SIZE, count * PAGE_SIZE) == 0


def test_an_idle_guest_costs_only_the_canaries(ram: tuple[GuestMemory, Writer], log: CachestatLog) -> None:
    found = synced(log, ram[0])
    assert log.last_round is not None
    assert log.last_round.canaries == PAGES // 256
    assert len(found) <= 4 * log.last_round.canaries
    assert log.last_round.digest_only == 0


def test_nothing_written_by_another_process_is_missed(ram: tuple[GuestMemory, Writer], log: CachestatLog) -> None:
    memory, write = ram
    chance = random.Random(3)
    for count in (1, 40, 700, 0, 1500):
        changed = chance.sample(range(1, PAGES), count)
        same = chance.sample(range(1, PAGES), count // 2)
        write(*changed, *(-page for page in same))
        assert synced(log, memory) >= {*changed, *same}


def test_pages_after_a_clean_are_seen_again(ram: tuple[GuestMemory, Writer], log: CachestatLog) -> None:
    memory, write = ram
    for _ in range(5):
        write(-700)
        assert 700 in synced(log, memory)


def test_a_sync_of_the_host_voids_the_log_and_hides_no_page(ram: tuple[GuestMemory, Writer], log: CachestatLog) -> None:
    memory, write = ram
    send(log, memory, [5, 6])
    log.note_hinted(bitmap(memory, 900))
    write(7, 8, -900)
    os.fsync(memory.regions[0].fd)
    into = bitmap(memory)
    with pytest.raises(DirtyLogVoid, match="8 of 8 canary pages"):
        log.sync(into)
    # All but what the destination has with the present content: also page 900, rewritten with the same bytes.
    assert pages_of(into) == set(range(PAGES)) - {5, 6}
    write(11)
    assert synced(log, memory) >= {11}
    assert log.last_round is not None
    assert log.last_round.canaries_lost == 0


def test_a_partial_flush_hides_no_change_of_content(ram: tuple[GuestMemory, Writer], log: CachestatLog) -> None:
    memory, write = ram
    write(*range(300, 320))
    flush(memory, 300, 20)
    assert synced(log, memory) >= set(range(300, 320))
    assert log.last_round is not None
    assert log.last_round.digest_only == 20
    assert log.last_round.canaries_lost == 0


def test_a_partial_flush_hides_a_same_content_rewrite_of_a_hinted_page(
    ram: tuple[GuestMemory, Writer], log: CachestatLog
) -> None:
    """The documented limit: should this ever fail, the log got better and the docstring is to be changed."""
    memory, write = ram
    log.note_hinted(bitmap(memory, 300))
    write(-300)
    flush(memory, 300, 1)
    assert 300 not in synced(log, memory)


def test_changed_sent_and_changed_back(ram: tuple[GuestMemory, Writer], log: CachestatLog) -> None:
    memory, write = ram
    before = memory.read(GPA + 300 * PAGE_SIZE, PAGE_SIZE)
    write(300)
    send(log, memory, [300])
    memory.write(GPA + 300 * PAGE_SIZE, before)
    flush(memory, 300, 1)  # the page cache and the digest of the last sync now both say: nothing happened
    assert 300 in synced(log, memory)
    send(log, memory, [300])
    assert 300 not in synced(log, memory)


def test_what_the_destination_has_is_dropped(ram: tuple[GuestMemory, Writer], log: CachestatLog) -> None:
    memory, write = ram
    send(log, memory, list(range(PAGES)))
    write(-300, 301)
    assert synced(log, memory) == {301}
    assert log.last_round is not None
    assert log.last_round.dropped >= 1


def test_a_hinted_page_written_again_is_reported(ram: tuple[GuestMemory, Writer], log: CachestatLog) -> None:
    memory, write = ram
    log.note_hinted(bitmap(memory, 300, 301, 302))
    write(-300, 301)
    found = synced(log, memory)
    assert {300, 301} <= found
    assert 302 not in found


def test_zero_pages_and_holes(ram: tuple[GuestMemory, Writer], log: CachestatLog) -> None:
    memory, write = ram
    write(1)  # it has its mapping by now
    os.truncate(memory.regions[0].fd, PAGES // 2 * PAGE_SIZE)
    os.truncate(memory.regions[0].fd, PAGES * PAGE_SIZE)  # the second half is a hole now, as after a discard
    allocated = os.fstat(memory.regions[0].fd).st_blocks
    assert synced(log, memory) >= set(range(PAGES // 2, PAGES))
    assert os.fstat(memory.regions[0].fd).st_blocks <= allocated
    log.note_sent(np.arange(FIRST + PAGES // 2, FIRST + PAGES, dtype=np.uint64))
    assert not synced(log, memory) & set(range(PAGES // 2, PAGES))
    write(1700)
    assert 1700 in synced(log, memory)


def test_a_migration_in_small(ram: tuple[GuestMemory, Writer], log: CachestatLog) -> None:
    """Random writes, sends, hints, other people's flushes: what is not pending is on the destination, or was hinted."""
    memory, write = ram
    chance = random.Random(7)
    pending = set(range(PAGES))
    there: dict[int, bytes] = {}
    skipped: set[int] = set()  # hinted and not written since
    for _ in range(120):
        some = chance.sample(range(PAGES), 20)
        match chance.choice(["change", "change", "same", "send", "send", "hint", "flush", "sync", "sync"]):
            case "change":
                write(*(page for page in some if page))
                skipped -= set(some)
            case "same":
                # of pages no hint made us skip: see the documented limit
                write(*(-page for page in some if page and page not in skipped))
            case "send":
                batch = [page for page in sorted(pending) if chance.random() < 0.3]
                there |= send(log, memory, batch)
                pending -= set(batch)
                skipped -= set(batch)
            case "hint":
                # hints come right after a sync that started them
                pending |= synced(log, memory)
                log.note_hinted(bitmap(memory, *some))
                skipped |= set(some)
                pending -= set(some)
            case "flush":
                flush(memory, chance.randrange(PAGES - 64), 64)
            case "sync":
                pending |= synced(log, memory)
                for page in set(range(PAGES)) - pending - skipped:
                    assert there[page] == memory.read(GPA + page * PAGE_SIZE, PAGE_SIZE), page


def test_two_regions_of_one_file(tmp_path: Path) -> None:
    with open(tmp_path / "ram", "w+b") as file:
        file.write(os.urandom(64 * PAGE_SIZE))
        file.flush()
        regions = [
            Region(0, 32 * PAGE_SIZE, file.fileno(), 32 * PAGE_SIZE),
            Region(1 << 20, 32 * PAGE_SIZE, file.fileno(), 0),
        ]
        with GuestMemory.from_fds(regions) as memory, mmap.mmap(file.fileno(), 0) as theirs:
            log = CachestatLog(memory)
            try:
                log.start()
            except MissingFacility as missing:
                pytest.skip(str(missing))
            log.note_sent(
                np.r_[0:32, 256:288].astype(np.uint64),
                memory.read(0, 32 * PAGE_SIZE) + memory.read(1 << 20, 32 * PAGE_SIZE),
            )
            theirs[3 * PAGE_SIZE] ^= 1
            theirs[40 * PAGE_SIZE] ^= 1
            into = PageSet(memory.page_layout)
            assert log.sync(into) == 2
            assert into.numbers().tolist() == [8, 256 + 3]


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_prepare_leaves_start_little_to_write(ram: tuple[GuestMemory, Writer]) -> None:
    memory, write = ram
    log = CachestatLog(memory)
    write(*range(1, PAGES))
    log.prepare()
    into = bitmap(memory)
    assert lib.dirty_cachestat_scan(memory.regions[0].fd, 0, PAGES * PAGE_SIZE, 0, words(into.words)) < PAGES // 10
    with pytest.raises(UsageError, match="not started"):
        log.sync(into)


def test_tmpfs_is_refused_by_the_probe() -> None:
    with GuestMemory.create(64 * PAGE_SIZE) as memory:
        memory.write(0, b"something")
        with pytest.raises(MissingFacility, match=r"does not count dirty pages.*ext4"):
            CachestatLog(memory).start()


def test_memory_without_a_file_is_refused() -> None:
    with (
        GuestMemory.from_buffers([(0, bytearray(PAGE_SIZE))]) as memory,
        pytest.raises(MissingFacility, match="anonymous buffer"),
    ):
        CachestatLog(memory).start()


def _full(_: int) -> SimpleNamespace:
    return SimpleNamespace(f_bavail=1, f_frsize=4096, f_blocks=100)


def test_a_full_disk_is_refused_before_anything_is_written(
    ram: tuple[GuestMemory, Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fstatvfs", _full)
    with pytest.raises(MissingFacility, match="0 MiB free"):
        CachestatLog(ram[0]).start()


def test_a_disk_that_fills_up_only_costs_precision(
    ram: tuple[GuestMemory, Writer], log: CachestatLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, write = ram
    write(-300)
    monkeypatch.setattr(os, "fstatvfs", _full)
    assert 300 in synced(log, memory)
    assert log.last_round is not None
    assert not log.last_round.cleaned
    assert 300 in synced(log, memory)  # not cleaned, so reported again
    monkeypatch.undo()
    synced(log, memory)
    assert 300 not in synced(log, memory)


def misuse(log: CachestatLog, memory: GuestMemory) -> list[Callable[[], object]]:
    return [
        lambda: log.sync(PageSet(PageLayout(1))),
        lambda: log.note_sent(np.array([memory.page_span], dtype=np.uint64)),
        lambda: log.note_sent(np.array([FIRST], dtype=np.uint64), b"short"),
        lambda: CachestatLog(memory).sync(bitmap(memory)),
        lambda: CachestatLog(memory, canary_pages=0),
    ]


@pytest.mark.parametrize("which", range(5))
def test_misuse(ram: tuple[GuestMemory, Writer], log: CachestatLog, which: int) -> None:
    with pytest.raises(UsageError):
        misuse(log, ram[0])[which]()


def test_stop_may_come_at_any_time(ram: tuple[GuestMemory, Writer]) -> None:
    log = CachestatLog(ram[0])
    log.stop()
    log.stop()
    log.note_hinted(bitmap(ram[0], 1))
    log.note_sent(np.array([FIRST], dtype=np.uint64))
