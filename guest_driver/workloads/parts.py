"""What the parts of a workload do. Their whole state is in the words they are given, and in `mem_map`.

Objects here hold only what `attach` can find again, and times, which mean nothing in another process.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from guest_driver.memory_manager import Alloc, MemoryManager, Owner, Pfns
from guest_driver.workloads.spec import BuildSpec, ChurnSpec, PartSpec, WriterSpec
from guest_driver.workloads.state import Random, Words
from vring.errors import UsageError
from vring.memory import PAGE_SIZE

__all__ = ["Part", "make_part"]

_BURST = 0.1
"""Seconds of work that a late caller still gets; what is later than that is dropped."""


class Part:
    """One part of a workload.

    Parameters
    ----------
    manager
        The guest's memory.
    words
        State in guest RAM, `WORDS` words, zero at first. Words 0 to 3 are the same for all parts.
    tag
        First of two page tags for this part's pages.
    """

    WORDS: ClassVar[int] = 64

    PHASE, DONE, RANDOM = 0, 1, 2  # word 1: pages written since setup; words 2 and 3: random sequence

    def __init__(self, manager: MemoryManager, words: Words, tag: int) -> None:
        self.manager = manager
        self.words = words
        self.tag = tag
        self.random = Random(words[self.RANDOM : self.RANDOM + 2])
        self._base: float | None = None

    def get(self, word: int) -> int:
        """Return a word of the state."""
        return int(self.words[word])

    @property
    def done(self) -> int:
        """Pages written since setup."""
        return self.get(self.DONE)

    def setup_step(self) -> bool:
        """Do a bounded piece of the setup; return whether it is finished."""
        return True

    def ready(self) -> None:
        """Prepare to step, after setup or in a process that goes on."""

    def step(self, now: float) -> float:
        """Do a bounded piece of work at time `now` (seconds); return when to be called next."""
        return math.inf

    def _due(self, now: float, rate: float) -> int:
        """Return how many pages are due, at `rate` pages per second."""
        done = self.done
        if self._base is None:
            self._base = now - done / rate
        late = (now - self._base) * rate - done
        if late > rate * _BURST + 1:
            self._base = now - (done / rate + _BURST)
            late = rate * _BURST
        return max(0, int(late))

    def _when(self, rate: float, batch: int) -> float:
        """Return when a batch of pages will be due."""
        assert self._base is not None
        return self._base + (self.done + batch) / rate


class Churn(Part):
    """Fills all memory it can get, then frees all but seeded extents; from then on does nothing."""

    CURSOR, LEFT, KEEP, RUN, KEEPING = 4, 5, 6, 7, 8
    FILL, CUT, READY = 0, 1, 2
    FILL_PAGES = 128
    CUT_PAGES = 2048

    def __init__(self, manager: MemoryManager, words: Words, tag: int, spec: ChurnSpec) -> None:
        super().__init__(manager, words, tag)
        self.spec = spec
        self._room = np.empty(self.FILL_PAGES, dtype=np.uint64)

    def setup_step(self) -> bool:
        """Fill 512 KiB, or decide on 8 MiB of what was filled."""
        phase = self.get(self.PHASE)
        if phase == self.FILL:
            pfns = self.manager.alloc_pages_bulk(
                0, self.FILL_PAGES, Owner.WORKLOAD, Alloc.NORETRY, self.tag, out=self._room
            )
            self.manager.write(pfns)
            self.words[self.LEFT] = self.get(self.LEFT) + len(pfns)
            if len(pfns) < self.FILL_PAGES:
                self.words[self.KEEP] = round(self.get(self.LEFT) * self.spec.share)
                self.words[self.KEEPING] = 1  # so that the first run, of length 0, is followed by a gap
                self.words[self.PHASE] = self.CUT
        elif phase == self.CUT:
            self._cut()
        return self.get(self.PHASE) == self.READY

    def _cut(self) -> None:
        pfns, _, cursor = self.manager.owned_from(
            self.get(self.CURSOR), Owner.WORKLOAD, self.tag, limit=self.CUT_PAGES, scan=self.CUT_PAGES
        )
        at = 0
        while at < len(pfns):
            if self.get(self.RUN) == 0:
                self._next_run()
            run = min(self.get(self.RUN), len(pfns) - at)
            if self.get(self.KEEPING):
                self.words[self.KEEP] = self.get(self.KEEP) - run
            else:
                self.manager.free_bulk(pfns[at : at + run])
            self.words[self.RUN] = self.get(self.RUN) - run
            self.words[self.LEFT] = self.get(self.LEFT) - run
            at += run
        self.words[self.CURSOR] = cursor
        if cursor >= self.manager.end_pfn:
            self.words[self.PHASE] = self.READY

    def _next_run(self) -> None:
        """Draw the next gap or extent: extents of exponential size, at places uniform over what is left."""
        keep, left = self.get(self.KEEP), self.get(self.LEFT)
        mean = self.spec.extent / PAGE_SIZE
        if self.get(self.KEEPING):
            self.words[self.KEEPING] = 0
            if keep:
                # The first of the gaps around `extents` extents placed at random into the pages that go.
                extents = max(1, round(keep / mean))
                gap = int((left - keep) * (1 - self.random.uniform() ** (1 / extents)))
            else:
                gap = left
            if gap:
                self.words[self.RUN] = gap
                return
        self.words[self.KEEPING] = 1
        self.words[self.RUN] = min(keep, max(1, round(-mean * math.log(self.random.uniform()))))


class Writer(Part):
    """Rewrites random pages of a working set at a given rate, each time with the next version."""

    COUNT = 4
    BATCH = 256

    def __init__(self, manager: MemoryManager, words: Words, tag: int, spec: WriterSpec) -> None:
        super().__init__(manager, words, tag)
        self.count = (spec.size + PAGE_SIZE - 1) // PAGE_SIZE
        self.rate = spec.rate / PAGE_SIZE
        self._pages: Pfns = np.empty(0, dtype=np.uint64)

    def setup_step(self) -> bool:
        """Allocate and write 1 MiB of the set.

        Raises
        ------
        UsageError
            If memory is too small for the set.
        """
        have = self.get(self.COUNT)
        want = min(self.BATCH, self.count - have)
        pfns = self.manager.alloc_pages_bulk(0, want, Owner.WORKLOAD, tag=self.tag)
        self.manager.write(pfns)
        self.words[self.COUNT] = have + len(pfns)
        if len(pfns) < want:
            raise UsageError(
                f"workload writer: its working set has {self.count} pages, memory for {have + len(pfns)} could be had; "
                "give the guest more RAM or make the set smaller"
            )
        return have + want == self.count

    def ready(self) -> None:
        """Find the pages of the set, ascending."""
        self._pages, _ = self.manager.owned(Owner.WORKLOAD, self.tag)

    def step(self, now: float) -> float:
        """Rewrite up to 1 MiB of what is due."""
        n = min(self._due(now, self.rate), self.BATCH)
        if n:
            self.manager.write(self._pages[self.random.below(len(self._pages), n)])
            self.words[self.DONE] = self.done + n
        return self._when(self.rate, max(1, min(self.BATCH, int(self.rate * 0.002))))


class Build(Part):
    """Short-lived blocks of order 0 to 4, and a page cache that grows to half of memory and then recycles itself.

    Lives are told by a table of slots: each new block takes a random slot and ends the life of the block in it.
    """

    SLOTS, HAND, FAILED = 4, 5, 6
    TABLE = 64
    MAX_SLOTS = 2048
    WORDS = TABLE + MAX_SLOTS
    BATCH = 128
    SCAN = 4096

    def __init__(self, manager: MemoryManager, words: Words, tag: int, spec: BuildSpec) -> None:
        super().__init__(manager, words, tag)
        self.rate = spec.rate / PAGE_SIZE
        self.cache_tag = tag + 1

    def setup_step(self) -> bool:
        """Choose the number of slots: all blocks together take no more than a tenth of memory."""
        self.words[self.SLOTS] = max(1, min(self.MAX_SLOTS, self.manager.total_pages // 32))
        return True

    def ready(self) -> None:
        """Offer the page cache to reclaim."""
        self.manager.register_shrinker(self.shrink)

    def shrink(self, pages: int) -> int:
        """Drop cache pages; return how many."""
        freed = 0
        for _ in range(2 * (self.manager.total_pages // self.SCAN + 1)):
            if freed >= pages:
                break
            victims = self._victims(min(pages - freed, self.SCAN))
            self.manager.free_bulk(victims)
            freed += len(victims)
        return freed

    def _victims(self, n: int) -> Pfns:
        """Find up to `n` cache pages from the clock hand on, in a bounded look around."""
        pfns, _, cursor = self.manager.owned_from(
            self.get(self.HAND), Owner.WORKLOAD, self.cache_tag, limit=n, scan=self.SCAN
        )
        # The hand may point inside a block by now, its neighbours having been merged. The walk then goes page by page
        # until the next block begins, which is harmless.
        self.words[self.HAND] = cursor if cursor < self.manager.end_pfn else 0
        return pfns

    def step(self, now: float) -> float:
        """Write up to about 1 MiB: blocks that are due, and as much cache."""
        due = min(self._due(now, self.rate), self.BATCH)
        written = 0
        while written < due:
            written += self._turn()
        self.words[self.DONE] = self.done + written
        return self._when(self.rate, max(1, min(self.BATCH, int(self.rate * 0.002))))

    def _turn(self) -> int:
        """End one life, begin another, read a file as large. Returns pages written into the new block, at least 1."""
        manager, number = self.manager, self.random.next()
        slot = self.TABLE + (number >> 32) * self.get(self.SLOTS) // (1 << 32)
        order = ((number & 0xF) | 0x10) & -((number & 0xF) | 0x10)
        order = order.bit_length() - 1  # half of them 0, a quarter 1, an eighth 2, and so on
        old = self.get(slot)
        if old:
            manager.free(old & 0xFFFFFFFFFFFF, old >> 48)
            self.words[slot] = 0
        pfn = manager.alloc_pages(order, Owner.WORKLOAD, tag=self.tag)
        if pfn is None:
            self.words[self.FAILED] = self.get(self.FAILED) + 1
            return 1
        manager.write_block(pfn, order)
        self.words[slot] = pfn | order << 48
        self._read_file(1 << order)
        return 1 << order

    def _read_file(self, pages: int) -> None:
        """Put `pages` pages into the cache; if it has its half of memory, drop as many first."""
        manager = self.manager
        if manager.free_pages < manager.total_pages // 2:
            victims = self._victims(pages)
            manager.free_bulk(victims)
            pages = len(victims)
        if pages:
            manager.write(manager.alloc_pages_bulk(0, pages, Owner.WORKLOAD, Alloc.NORETRY, self.cache_tag))


def make_part(manager: MemoryManager, spec: PartSpec, words: Words, tag: int) -> Part:
    """Return the part that a spec describes."""
    if isinstance(spec, ChurnSpec):
        return Churn(manager, words, tag, spec)
    if isinstance(spec, WriterSpec):
        return Writer(manager, words, tag, spec)
    if isinstance(spec, BuildSpec):
        return Build(manager, words, tag, spec)
    return Part(manager, words, tag)


def words_of(spec: PartSpec) -> int:
    """Return how many words of state a part needs."""
    return Build.WORDS if isinstance(spec, BuildSpec) else Part.WORDS
