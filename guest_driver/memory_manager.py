"""The guest's memory manager: guest RAM formatted, blocks allocated, memory reclaimed when it is short.

The allocator itself is C, all of its state is in guest RAM, and `Zone` has the calls around it. Here is what only makes
sense while a process runs: shrinkers and out-of-memory notifiers. They are registered again after a migration.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

import numpy as np

from guest_driver._page_alloc import lib
from guest_driver.compaction import plan
from guest_driver.layout import KernelArea
from guest_driver.zone import (
    HINT_ORDER,
    MAX_ORDER,
    Alloc,
    AllocatorError,
    CheckResult,
    Owner,
    Pfns,
    Snapshot,
    Zone,
    alloc_error,
    pfn_pointer,
)
from vring.errors import UsageError
from vring.memory import PAGE_SIZE, GuestMemory

__all__ = [
    "HINT_ORDER",
    "MAX_ORDER",
    "Alloc",
    "AllocatorError",
    "CheckResult",
    "MemoryManager",
    "Mover",
    "OomNotifier",
    "Owner",
    "Pfns",
    "Shrinker",
    "Snapshot",
    "area_and_watermark",
]

Shrinker = Callable[[int], int]
"""``shrinker(pages wanted) -> pages freed``."""
OomNotifier = Callable[[], int]
"""``notifier() -> pages freed``."""
Mover = Callable[[Pfns, Pfns], bool]
"""``mover(old pages, new pages) -> accepted``: whoever owns the old pages uses the new ones instead and frees the old
ones, sooner or later. The new ones already belong to it."""

_ATOMIC: int = lib.PA_ATOMIC
_RECLAIM_ROUNDS = 16


def area_and_watermark(
    page_span: int, first_size: int, size: int, *, low: int = PAGE_SIZE, spare: int | None = None
) -> tuple[int, int]:
    """Return what a guest keeps back of its RAM: bytes of the kernel area, and the usual watermark in pages.

    Parameters
    ----------
    page_span
        Pages from address 0 to the end of RAM.
    first_size, size
        Bytes of the region at address 0, and of all regions.
    low, spare
        As for `MemoryManager.create`.
    """
    if spare is None:
        spare = min(max(first_size // 64, 256 << 10), 2 << 20)
    area = (low + PAGE_SIZE + lib.pa_zone_bytes(page_span) + spare + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE
    return area, min(4 * isqrt(size >> 10) * 1024, size // 100) // PAGE_SIZE


class MemoryManager(Zone):
    """Allocates the pages of a guest.

    Make one with `create` (a guest that boots) or `attach` (one that goes on in another process). One thread at a time.

    Parameters
    ----------
    memory
        Guest RAM; must outlive this object.
    kernel
        The kernel area with a piece named ``zone``.
    """

    def __init__(self, memory: GuestMemory, kernel: KernelArea) -> None:
        super().__init__(memory, kernel)
        self._shrinkers: list[Shrinker] = []
        self._notifiers: list[OomNotifier] = []
        self._movers: dict[int, Mover] = {}
        self._reclaiming = False
        self.reclaims = 0
        """How often an allocation of this process had to reclaim."""

    @classmethod
    def create(
        cls,
        memory: GuestMemory,
        *,
        seed: int = 0,
        watermark: int | None = None,
        spare: int | None = None,
        low: int = PAGE_SIZE,
    ) -> MemoryManager:
        """Format guest RAM: kernel area, zone, all the rest free.

        Parameters
        ----------
        memory
            One or more regions, the first at address 0. Holes between regions are never handed out.
        seed
            Of page contents, 64 bits.
        watermark
            Pages that ordinary allocations leave alone; by default 4 * sqrt(KiB of RAM) KiB, at most 1 %.
        spare
            Bytes of the kernel area for pieces reserved later; by default 1/64 of the first region, 256 KiB to 2 MiB.
        low
            Use nothing below this address, whole pages, but the first page: a PC has ROM under its first MiB.

        Raises
        ------
        UsageError
            If the memory is too small or has no RAM at address 0.
        """
        area, usual = area_and_watermark(memory.page_span, memory.regions[0].size, memory.size, low=low, spare=spare)
        kernel = KernelArea.format(memory, area, seed=seed)
        if low > PAGE_SIZE:
            kernel.reserve("low", low - PAGE_SIZE, PAGE_SIZE)
        kernel.reserve("zone", lib.pa_zone_bytes(memory.page_span), PAGE_SIZE)
        manager = cls(memory, kernel)
        if watermark is None:
            watermark = usual
        base = kernel.size // PAGE_SIZE
        manager._check(
            lib.pa_init(manager._view, base, memory.page_span, watermark, kernel.seed),
            f"making a zone from page {base}",
        )
        ranges = []
        before = 0
        for region in memory.regions:
            start, end = max(base, region.gpa // PAGE_SIZE), region.end // PAGE_SIZE
            if start == before and start % (1 << HINT_ORDER):
                start += 1  # one page left out keeps buddies from merging across two mappings
            if start < end:
                ranges.append((start, end))
            before = region.end // PAGE_SIZE
        for start, end in reversed(ranges):  # low addresses come out first
            manager._check(lib.pa_add_range(manager._view, start, end), f"adding pages {start} to {end}")
        return manager

    @classmethod
    def attach(cls, memory: GuestMemory) -> MemoryManager:
        """Go on with the guest in this RAM. Shrinkers, notifiers and the journal have to be registered again.

        Raises
        ------
        VirtioError
            If the RAM holds no guest, or a damaged one.
        """
        manager = cls(memory, KernelArea.attach(memory))
        manager._check(lib.pa_attach(manager._view), "attaching to the zone")
        if manager.base_pfn * PAGE_SIZE < manager.kernel.size:
            raise AllocatorError("the zone does not fit this RAM", code=lib.PA_VHEADER)
        return manager

    # -- allocating ---------------------------------------------------------------------------------------------------

    def alloc_pages(
        self, order: int, owner: int = Owner.KERNEL, flags: Alloc = Alloc.NORMAL, tag: int = 0
    ) -> int | None:
        """Allocate a block of 2^order pages.

        Parameters
        ----------
        order
            0 to 10.
        owner
            An `Owner`, or another number up to 254.
        flags
            `Alloc.NORMAL` calls shrinkers, then out-of-memory notifiers, before it gives up.
        tag
            The owner's own, 0 to 254; found again by `owned`.

        Returns
        -------
        int or None
            Page number of the block, or None if there is no memory.

        Raises
        ------
        UsageError
            If an argument is out of range.
        AllocatorError
            If the state in RAM is damaged.
        """
        got: int = lib.pa_alloc(self._view, order, int(flags) & _ATOMIC, owner, tag)  # int: an IntFlag costs 0.8 us
        if got >= 0:
            return got
        if not self._is_short(got, order, owner, tag) or flags:
            return None

        def again() -> int:
            return self._take(order, self._one, 0, owner, tag)[0]

        return int(self._one[0]) if self._reclaim(again, 1 << order, 1) else None

    def alloc_pages_bulk(
        self,
        order: int,
        n: int,
        owner: int = Owner.KERNEL,
        flags: Alloc = Alloc.NORMAL,
        tag: int = 0,
        out: Pfns | None = None,
    ) -> Pfns:
        """Allocate up to `n` blocks of 2^order pages in one call: the same ones that `n` single calls would give.

        Parameters
        ----------
        order, owner, flags, tag
            As for `alloc_pages`.
        n
            Blocks.
        out
            uint64 array of at least `n` items to use; by default a new one.

        Returns
        -------
        ndarray of uint64
            Page numbers, a view of `out`; shorter than `n` if memory ran out.
        """
        if out is None:
            out = np.empty(n, dtype=np.uint64)
        elif len(out) < n:
            raise UsageError(f"room for {len(out)} blocks, {n} are wanted")
        target = out[:n]
        got, short = self._take(order, target, flags, owner, tag)
        if short and not flags:

            def again() -> int:
                nonlocal got
                got += self._take(order, target[got:], 0, owner, tag)[0]
                return got

            self._reclaim(again, (n - got) << order, n)
        return target[:got]

    def alloc_hint_blocks(self, n: int, out: Pfns | None = None) -> Pfns:
        """Allocate up to `n` blocks of `HINT_ORDER` for free page hints; fails rather than reclaim."""
        return self.alloc_pages_bulk(HINT_ORDER, n, Owner.HINT, Alloc.NORETRY, out=out)

    def _take(self, order: int, out: Pfns, flags: int, owner: int, tag: int) -> tuple[int, bool]:
        """Allocate without reclaim; return how many blocks there are, and whether memory is short of more."""
        if not len(out):
            return 0, False
        n, pointer = len(out), pfn_pointer(out, writable=True)
        got: int = lib.pa_alloc_bulk(self._view, order, n, int(flags) & _ATOMIC, owner, tag, pointer, self._error)
        if got == n:
            return got, False
        return max(got, 0), self._is_short(got if got < 0 else self._error[0], order, owner, tag)

    @staticmethod
    def _is_short(code: int, order: int, owner: int, tag: int) -> bool:
        """Whether memory is short, rather than an injected failure; raise if it is neither."""
        if code not in (lib.PA_ENOMEM, lib.PA_EWATERMARK, lib.PA_EINJECTED):
            raise alloc_error(code, f"allocating order {order} for owner {owner}, tag {tag}")
        return bool(code != lib.PA_EINJECTED)

    # -- reclaim ------------------------------------------------------------------------------------------------------

    def register_shrinker(self, shrinker: Shrinker) -> None:
        """Have a shrinker called, in order of registration, when an ordinary allocation fails."""
        self._shrinkers.append(shrinker)

    def unregister_shrinker(self, shrinker: Shrinker) -> None:
        """Undo `register_shrinker`; unknown ones are ignored."""
        if shrinker in self._shrinkers:
            self._shrinkers.remove(shrinker)

    def register_oom_notifier(self, notifier: OomNotifier) -> None:
        """Have a notifier called when shrinkers freed nothing either."""
        self._notifiers.append(notifier)

    def unregister_oom_notifier(self, notifier: OomNotifier) -> None:
        """Undo `register_oom_notifier`; unknown ones are ignored."""
        if notifier in self._notifiers:
            self._notifiers.remove(notifier)

    def _reclaim(self, attempt: Callable[[], int], pages: int, enough: int) -> int:
        """Free memory and try again: shrinkers as long as they free something, then notifiers likewise.

        An allocation made by a shrinker or notifier does not reclaim in turn.
        """
        if self._reclaiming:
            return 0
        self._reclaiming = True
        self.reclaims += 1
        got = 0
        try:
            for _ in range(_RECLAIM_ROUNDS):
                freed = sum(shrinker(pages) for shrinker in tuple(self._shrinkers))
                if not freed:
                    freed = sum(notifier() for notifier in tuple(self._notifiers))
                if not freed:
                    break
                got = attempt()
                if got >= enough:
                    break
        finally:
            self._reclaiming = False
        return got

    # -- compaction ---------------------------------------------------------------------------------------------------

    def register_mover(self, owner: int, mover: Mover) -> None:
        """Let pages of an owner, all of order 0, be moved by `compact`."""
        self._movers[owner] = mover

    def unregister_mover(self, owner: int) -> None:
        """Undo `register_mover`; an unknown owner is ignored."""
        self._movers.pop(owner, None)

    def compact(self, order: int = HINT_ORDER, limit: int = 256) -> int:
        """Begin to move pages so that one more block of 2^order pages becomes free.

        The pages are replaced by others outside the block, none of which is cut from a block that large. When the move
        is over depends on the owner: the balloon needs two requests to its device, which its driver's steps see to.

        Parameters
        ----------
        order
            Of the block wanted.
        limit
            Pages to move at most.

        Returns
        -------
        int
            Pages that are being moved; 0 if there is nothing to gain, or an owner is busy.
        """
        for owner, mover in tuple(self._movers.items()):
            chosen = plan(self, order, owner, limit)
            if chosen is None:
                continue
            new = self._pages_outside(chosen.start, chosen.end, len(chosen.pages), owner)
            if len(new) == len(chosen.pages) and mover(chosen.pages, new):
                return len(new)
            self.free_bulk(new)
        return 0

    def _pages_outside(self, start: int, end: int, n: int, owner: int) -> Pfns:
        """Allocate up to `n` pages that are not in ``[start, end)``."""
        outside: list[Pfns] = []
        aside: list[Pfns] = []  # kept while we look, or we would get them again
        while n:
            pages = self.alloc_pages_bulk(0, n, owner, Alloc.NORETRY)
            if not len(pages):
                break
            within = (pages >= start) & (pages < end)
            outside.append(pages[~within])
            aside.append(pages[within])
            n -= len(outside[-1])
        for pages in aside:
            self.free_bulk(pages)
        return np.concatenate(outside) if outside else np.empty(0, dtype=np.uint64)

    def poison_free_pages(self) -> None:
        """Fill all pages that are free now with the poison value, as if each had been allocated and freed.

        For a guest that turns poisoning on after boot, before its balloon driver is probed (balloon.report.driver-2).
        """
        taken = []
        for order in reversed(range(MAX_ORDER)):
            pages = self.alloc_pages_bulk(order, self.free_blocks(order), Owner.KERNEL, Alloc.ATOMIC)
            taken.append((pages, order))
        for pages, order in reversed(taken):
            self.free_bulk(np.ascontiguousarray(pages[::-1]), order)
