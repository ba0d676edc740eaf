"""I/O whose data lands after its pages counted as written: the mark at its completion makes the log right."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from vring.dirty.combined import CombinedLog
from vring.dirty.software import SoftwareDirtyLog
from vring.dirty.wp_async import WpAsyncDirtyLog, WriteProtection
from vring.errors import MissingFacility
from vring.memory import GuestMemory
from vring.pages import PageSet

PAGE = 4096
PAGES = 1024
CHUNK = 64


class Embedder:
    """RAM that the kernel tracks, and a log beside it for I/O that has completed."""

    def __init__(self) -> None:
        self.memory = GuestMemory.create(PAGES * PAGE)
        try:
            self.protection = WriteProtection(self.memory)
        except MissingFacility as missing:
            pytest.skip(str(missing))
        self.completed = SoftwareDirtyLog.for_memory(self.memory)
        tracker = WpAsyncDirtyLog(os.getpid(), self.protection.ranges, self.memory.page_layout)
        self.log = CombinedLog("wp-async", [tracker, self.completed])
        self.memory.write(0, b"\1" * self.memory.size)
        self.log.start()

    def sync(self) -> list[int]:
        found = PageSet(self.memory.page_layout)
        self.log.sync(found)
        return found.numbers().tolist()


@pytest.fixture
def embedder() -> Iterator[Embedder]:
    made = Embedder()
    yield made
    made.log.stop()
    made.protection.close()
    made.memory.close()


def test_data_that_lands_after_the_sync(embedder: Embedder) -> None:
    """A second mapping stands for the pages that the kernel has pinned: both bypass the tracked mapping."""
    with GuestMemory.from_fds(embedder.memory.regions) as pinned:
        embedder.memory.write(5 * PAGE, b"\1")  # pinning counts as a store
        assert embedder.sync() == [5]
        pinned.write(5 * PAGE, b"data")
        assert embedder.sync() == [], "if the kernel sees this, the mark and what the docs say of it can go"
        embedder.completed.mark_range(5 * PAGE, PAGE)
        assert embedder.sync() == [5]
        assert embedder.sync() == []


def test_direct_reads_race_with_syncs(embedder: Embedder, tmp_path: Path) -> None:
    """O_DIRECT reads into RAM while this thread syncs and copies: at the end the copy is the RAM itself."""
    size = PAGES * PAGE
    content = np.random.default_rng(1).integers(0, 256, size, np.uint8)
    disk = tmp_path / "disk"
    disk.write_bytes(content.tobytes())
    try:
        fd = os.open(disk, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        pytest.skip(f"O_DIRECT in {tmp_path}: {error.strerror}")
    ram = embedder.memory.view(0, size)
    ended = threading.Event()

    def read_all() -> None:
        try:
            for passes in range(4):
                for at in range(0, size, CHUNK * PAGE):
                    offset = (at + (passes + 1) * CHUNK * PAGE) % size  # other content in each pass
                    assert os.preadv(fd, [ram[at : at + CHUNK * PAGE]], offset) == CHUNK * PAGE
                    embedder.completed.mark_range(at, CHUNK * PAGE)
        finally:
            ended.set()

    copy = np.ones(size, np.uint8).reshape(PAGES, PAGE)
    now = np.frombuffer(ram, np.uint8).reshape(PAGES, PAGE)
    reader = threading.Thread(target=read_all)
    reader.start()
    last = False
    while not last:
        last = ended.is_set()  # asked before the sync, so that the last one sees everything
        pages = embedder.sync()
        copy[pages] = now[pages]
    reader.join()
    os.close(fd)
    assert np.array_equal(now, np.roll(content, -4 * CHUNK * PAGE).reshape(PAGES, PAGE))
    assert np.flatnonzero((copy != now).any(axis=1)).tolist() == []
    del now
    ram.release()
