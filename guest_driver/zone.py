"""The zone: Python calls around the C page allocator, one thin method for each thing it can do.

All state is in guest RAM; this knows where. What to do when memory is short is the business of `MemoryManager`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any

import numpy as np
import numpy.typing as npt

from balloon_dev.journal import Journal
from guest_driver._page_alloc import ffi, lib
from guest_driver.layout import KernelArea
from vring.errors import UsageError, VirtioError
from vring.memory import PAGE_SIZE, GuestMemory

MAX_ORDER: int = lib.PA_MAX_ORDER
"""Number of orders: blocks have 2^0 to 2^(MAX_ORDER - 1) pages."""
HINT_ORDER = MAX_ORDER - 1
"""Order of the blocks that free page hinting reports: 1024 pages, 4 MiB."""

Pfns = npt.NDArray[np.uint64]
"""Page numbers, guest address divided by 4096."""

_ANY: int = lib.PA_ANY
_PIECE = 1 << 16
_HEADER: int = lib.pa_zone_bytes(0)
"""Bytes of the zone before `Zone.mem_map`."""
_TEXT = {
    lib.PA_ENOMEM: "no free block of this order",
    lib.PA_EWATERMARK: "only memory below the watermark is left",
    lib.PA_EINJECTED: "fault injection made the allocation fail",
    lib.PA_EINVAL: "an argument is out of range",
    lib.PA_EPFN: "the page is not in the zone, not RAM, or not aligned to its order",
    lib.PA_ENOTALLOC: "the page does not start an allocated block; was it freed before?",
    lib.PA_EORDER: "the block was allocated with another order",
    lib.PA_ECORRUPT: "the allocator's state in guest RAM is damaged",
    lib.PA_EJOURNAL: "this is no journal, or one for less RAM",
    lib.PA_VHEADER: "the zone header is damaged or does not fit this RAM",
    lib.PA_VLINK: "the links of a free list do not match",
    lib.PA_VENTRY: "a page on a free list is not marked free at that order",
    lib.PA_VALIGN: "a block is misaligned or reaches past the zone",
    lib.PA_VBUDDY: "two free buddies were not merged",
    lib.PA_VOVERLAP: "a block starts inside another",
    lib.PA_VCOUNT: "counters differ from the lists",
    lib.PA_VOWNER: "an allocated block has no owner, or a free one has",
}
_CALLERS_FAULT = {lib.PA_EINVAL, lib.PA_EPFN, lib.PA_ENOTALLOC, lib.PA_EORDER, lib.PA_EJOURNAL}


class Owner(IntEnum):
    """Whom an allocated block belongs to."""

    KERNEL = lib.PA_OWNER_KERNEL
    WORKLOAD = lib.PA_OWNER_WORKLOAD
    BALLOON = lib.PA_OWNER_BALLOON
    HINT = lib.PA_OWNER_HINT
    REPORT = lib.PA_OWNER_REPORT
    DRIVER = lib.PA_OWNER_DRIVER


class Alloc(IntFlag):
    """How hard an allocation may try."""

    NORMAL = 0
    """Respect the watermark, reclaim when short."""
    ATOMIC = lib.PA_ATOMIC
    """May go below the watermark; never reclaims."""
    NORETRY = 2
    """Respect the watermark; fail rather than reclaim."""


class AllocatorError(VirtioError):
    """The allocator's state in guest RAM is damaged.

    `pa_code` is the value of ``enum pa_error``, `pfn` the page where it showed, or None.
    """

    def __init__(self, message: str, *, code: int, pfn: int | None = None) -> None:
        super().__init__(message)
        self.pa_code = code
        self.pfn = pfn


def alloc_error(code: int, what: str, pfn: int | None = None) -> VirtioError:
    """Return the exception for a code of ``enum pa_error``; `what` says what was being done."""
    text = f"{what}: {_TEXT.get(code, f'error {code}')}"
    if code in _CALLERS_FAULT:
        return UsageError(text)
    return AllocatorError(text, code=code, pfn=pfn)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """Outcome of a check of page contents."""

    pages: int
    """Pages looked at."""
    wrong: int
    """Pages that do not hold what they should."""
    first_wrong: int | None
    """Page number of the first of those."""


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Which pages were free, and which belonged to whom, for comparing before and after."""

    free: npt.NDArray[np.uint64]
    """Bitmap of the free pages, bit = page number."""
    owners: dict[int, npt.NDArray[np.uint64]]
    """Bitmap of the pages of each owner that has any."""

    def difference(self, later: Snapshot) -> list[str]:
        """Return in words what changed from this snapshot to a later one; empty if nothing did."""
        changes = []
        empty = np.zeros_like(self.free)
        sides = [("free", self.free, later.free)]
        for owner in sorted(self.owners.keys() | later.owners.keys()):
            name = next((known.name for known in Owner if known == owner), f"owner {owner}")
            sides.append((name, self.owners.get(owner, empty), later.owners.get(owner, empty)))
        for name, before, after in sides:
            gone, come = _count_bits(before & ~after), _count_bits(after & ~before)
            if gone or come:
                changes.append(f"{name}: {gone} pages fewer, {come} pages more")
        return changes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Snapshot) and not self.difference(other)

    __hash__ = None  # type: ignore[assignment]


def _dtype(struct: str) -> np.dtype[Any]:
    """Return the numpy dtype of a C struct of unsigned integers, from the header's own layout."""
    kind = ffi.typeof(struct)
    fields = [(name, f"<u{ffi.sizeof(field.type)}") for name, field in kind.fields]
    dtype = np.dtype(fields)
    if dtype.itemsize != ffi.sizeof(kind):
        raise AssertionError(f"{struct} has padding")
    return dtype


PAGE_DTYPE = _dtype("struct pa_page")
"""One entry of `Zone.mem_map`."""


class Zone:
    """The zone of a guest: everything but allocating, which is `MemoryManager`'s.

    Parameters
    ----------
    memory
        Guest RAM; must outlive this object.
    kernel
        The kernel area with a piece named ``zone``.
    """

    def __init__(self, memory: GuestMemory, kernel: KernelArea) -> None:
        self.memory = memory
        self.kernel = kernel
        """The area at the start of RAM; `KernelArea.reserve` gives out pieces of it."""
        piece = kernel.pieces.get("zone")
        if piece is None or piece[1] < _HEADER:
            raise VirtioError("the kernel area of this RAM has no zone")
        if len(memory.regions) > lib.PA_MAX_REGIONS:
            raise UsageError(f"{len(memory.regions)} regions of guest memory, the allocator takes {lib.PA_MAX_REGIONS}")
        self._view = ffi.new("struct pa_view *")
        self._view.zone = ffi.cast("uint8_t *", memory.host_address(*piece))
        self._view.zone_bytes = piece[1]
        self._mapped = memory.arrays  # nobody unmaps under C what arrays refer to
        self._view.region_count = len(memory.regions)
        for i, region in enumerate(memory.regions):
            entry = self._view.region[i]
            entry.start_pfn, entry.end_pfn = region.gpa // PAGE_SIZE, region.end // PAGE_SIZE
            entry.host = ffi.cast("uint8_t *", memory.host_address(region.gpa, region.size))
        self._zone = ffi.cast("struct pa_zone *", self._view.zone)
        self._one = np.zeros(1, dtype=np.uint64)
        self._error = ffi.new("int *")
        self._cursor = ffi.new("uint64_t *")
        self._result = ffi.new("struct pa_check_result *")
        self._journal: tuple[Journal, Any] | None = None

    @staticmethod
    def _check(code: int, what: str) -> int:
        if code < 0:
            raise alloc_error(code, what)
        return code

    # -- figures ------------------------------------------------------------------------------------------------------

    def _figure(self, name: str, value: int, pages: int = 1) -> int:
        """Return a count of blocks of so many pages that stands in guest RAM, if there can be as many."""
        if value > (self.end_pfn - self.base_pfn) // pages:
            raise alloc_error(lib.PA_ECORRUPT, f"{name} reads {value}")
        return value

    @property
    def free_pages(self) -> int:
        """Pages free now."""
        return self._figure("free_pages", int(self._zone.free_pages))

    @property
    def total_pages(self) -> int:
        """Pages that the zone manages, free or not."""
        return self._figure("managed_pages", int(self._zone.managed_pages))

    @property
    def base_pfn(self) -> int:
        """First page of the zone."""
        return int(self._view.base_pfn)

    @property
    def end_pfn(self) -> int:
        """First page after the zone."""
        return int(self._view.end_pfn)

    @property
    def content_seed(self) -> int:
        """Seed of page contents."""
        return int(self._zone.content_seed)

    @property
    def watermark(self) -> int:
        """Pages that only `Alloc.ATOMIC` allocations may use. Can be set."""
        return int(self._zone.watermark_min)

    @watermark.setter
    def watermark(self, pages: int) -> None:
        self._zone.watermark_min = pages

    @property
    def poison(self) -> int | None:
        """The 32-bit value that freed pages are filled with, or None. Can be set; applies to later frees."""
        return int(self._zone.poison_val) if self._zone.poison_on else None

    @poison.setter
    def poison(self, value: int | None) -> None:
        self._zone.poison_on = value is not None
        self._zone.poison_val = value or 0

    def free_blocks(self, order: int) -> int:
        """Return the number of free blocks of exactly that order."""
        if not 0 <= order < MAX_ORDER:
            raise UsageError(f"order {order} is not one of 0 to {MAX_ORDER - 1}")
        return self._figure(f"free_area[{order}]", int(self._zone.free_area[order].count), 1 << order)

    def statistics(self) -> dict[str, int]:
        """Return counters since the guest booted: ``allocations`` and ``frees`` in blocks, ``failures`` in calls."""
        zone = self._zone
        return {"allocations": zone.allocations, "frees": zone.frees, "failures": zone.failures}

    # -- freeing ------------------------------------------------------------------------------------------------------

    def free(self, pfn: int, order: int = 0) -> None:
        """Free a block.

        Raises
        ------
        UsageError
            If it is no allocated block of that order (a double free, for one); nothing has changed then.
        AllocatorError
            If the state in RAM is damaged.
        """
        code = lib.pa_free(self._view, pfn, order)
        if code < 0:
            raise alloc_error(code, f"freeing page {pfn} at order {order}", pfn)

    def free_bulk(self, pfns: Pfns, order: int = 0) -> None:
        """Free blocks of one order in one call, in the order given.

        Raises
        ------
        UsageError, AllocatorError
            As `free`, for the first one that cannot be freed; those before it are free, those behind it are not.
        """
        done = lib.pa_free_bulk(self._view, order, len(pfns), pfn_pointer(pfns), self._error)
        if done < len(pfns):
            done = max(done, 0)
            pfn = int(pfns[done])
            what = f"freeing page {pfn} at order {order} (number {done} of {len(pfns)})"
            raise alloc_error(self._error[0], what, pfn)

    def free_owned(self, start: int, end: int, owner: int, tag: int | None = None) -> int:
        """Free all blocks of an owner (and tag) that start in pages [start, end); return how many pages that were."""
        freed: int = lib.pa_free_owned(self._view, start, end, owner, _ANY if tag is None else tag)
        return self._check(freed, f"freeing the blocks of owner {owner}")

    # -- free page reporting --------------------------------------------------------------------------------------

    def report_take(self, n: int) -> Pfns:
        """Take up to `n` free blocks of `HINT_ORDER` that the host was not told of out of the free list.

        They belong to `Owner.REPORT` until `report_return`. The watermark is respected, no page is touched and no
        statistics change.
        """
        out = np.empty(n, dtype=np.uint64)
        got: int = lib.pa_report_take(self._view, n, pfn_pointer(out)) if n else 0
        return out[: self._check(got, "taking blocks to report")]

    def report_return(self, pfns: Pfns, *, reported: bool) -> None:
        """Put blocks of `Owner.REPORT` back, to be used after all others.

        Parameters
        ----------
        pfns
            First pages, as `report_take` gave them.
        reported
            Whether the host has acknowledged them: then they are not reported again before they were allocated.

        Raises
        ------
        UsageError
            If one is no such block; those before it are back.
        """
        if len(pfns):
            code = lib.pa_report_return(self._view, len(pfns), pfn_pointer(pfns), reported)
            self._check(code, "putting reported blocks back")

    @property
    def reported_blocks(self) -> int:
        """Free blocks of `HINT_ORDER` that the host knows to be free."""
        return self._check(lib.pa_report_marked(self._view), "counting reported blocks")

    # -- walks --------------------------------------------------------------------------------------------------------

    def owned(self, owner: int | None = None, tag: int | None = None) -> tuple[Pfns, npt.NDArray[np.uint8]]:
        """Return page number and order of every allocated block of an owner (and tag), ascending."""
        pieces, at = [], 0
        while at < self.end_pfn:
            pfns, orders, at = self.owned_from(at, owner, tag, limit=_PIECE, scan=_PIECE)
            pieces.append((pfns, orders))
        return np.concatenate([piece[0] for piece in pieces]), np.concatenate([piece[1] for piece in pieces])

    def owned_from(
        self, start: int, owner: int | None = None, tag: int | None = None, *, limit: int = 1024, scan: int = 4096
    ) -> tuple[Pfns, npt.NDArray[np.uint8], int]:
        """List allocated blocks from page `start` on in bounded steps.

        Parameters
        ----------
        start
            Page number, 0 for the beginning. Must start a block, as what the last call returned does.
        owner, tag
            None for any.
        limit, scan
            List, and look at, no more than so many blocks.

        Returns
        -------
        pfns, orders, next
            The blocks, ascending, and where to go on; `end_pfn` when all was seen.
        """
        limit = min(limit, scan)
        pfns = np.empty(limit, dtype=np.uint64)
        orders = np.empty(limit, dtype=np.uint8)
        self._cursor[0] = start
        n = lib.pa_owned(
            self._view,
            self._cursor,
            scan,
            _ANY if owner is None else owner,
            _ANY if tag is None else tag,
            limit,
            pfn_pointer(pfns),
            ffi.from_buffer("uint8_t[]", orders),
        )
        self._check(n, "listing blocks")
        return pfns[:n], orders[:n], int(self._cursor[0])

    @property
    def mem_map(self) -> npt.NDArray[Any]:
        """``struct pa_page`` of every page of the zone, over guest RAM itself; index = pfn - base_pfn."""
        gpa = self.kernel.pieces["zone"][0] + _HEADER
        return self.memory.array(gpa, self.end_pfn - self.base_pfn, PAGE_DTYPE)

    def bitmap(self, owner: int | None = None, *, free: bool = False) -> npt.NDArray[np.uint64]:
        """Return the bitmap (bit = page number) of an owner's pages, of all allocated ones, or of the free ones."""
        words = np.zeros((self.memory.page_span + 63) // 64, dtype=np.uint64)
        who = lib.PA_OWNER_FREE if free else (owner or lib.PA_OWNER_NONE)
        self._check(lib.pa_bitmap(self._view, who, pfn_pointer(words), len(words)), "walking the zone")
        return words

    def allocated_bitmap(self) -> npt.NDArray[np.uint64]:
        """Return the bitmap of all pages in use: allocated blocks and the kernel area. Free pages and holes are 0."""
        words = self.bitmap()
        kernel = self.kernel.size // PAGE_SIZE
        words[: kernel // 64] = np.uint64(0xFFFFFFFFFFFFFFFF)
        if kernel % 64:
            words[kernel // 64] |= np.uint64((1 << kernel % 64) - 1)
        return words

    def pages_by_owner(self) -> dict[int, int]:
        """Return the number of pages of each owner that has any; key 0 is for the free ones."""
        counts = ffi.new("uint64_t[256]")
        self._check(lib.pa_count_owners(self._view, counts), "counting pages")
        return {owner: int(counts[owner]) for owner in range(256) if counts[owner] or owner == 0}

    def snapshot(self) -> Snapshot:
        """Return who owns which pages now."""
        owners = {owner: self.bitmap(owner) for owner in self.pages_by_owner() if owner}
        return Snapshot(self.bitmap(free=True), owners)

    def verify(self) -> None:
        """Check every invariant of the allocator.

        Raises
        ------
        AllocatorError
            With what is wrong and where.
        """
        self._cursor[0] = 0
        code = lib.pa_verify(self._view, self._cursor)
        if code < 0:
            pfn = int(self._cursor[0])
            raise AllocatorError(f"at page {pfn}: {_TEXT.get(code, f'error {code}')}", code=code, pfn=pfn)

    # -- content ------------------------------------------------------------------------------------------------------

    def use_journal(self, journal: Journal | None) -> None:
        """Record every write of this process to pages of the zone in a journal; None to stop.

        Raises
        ------
        UsageError
            If it has fewer entries than RAM has pages (holes counted).
        """
        buffer = ffi.from_buffer("uint8_t[]", journal.buffer, require_writable=True) if journal else ffi.NULL
        code = lib.pa_journal_use(self._view, buffer, len(journal.buffer) if journal else 0)
        self._journal = (journal, buffer) if journal and code == 0 else None
        self._check(code, "using a journal")

    def use_dirty_log(self, words: npt.NDArray[np.uint64] | None) -> None:
        """Mark every write of this process to pages of the zone in a shared bitmap; None to stop.

        What lies in the kernel area (mem_map, queues, driver state) is not marked: whoever reads the log counts that
        area as always written.

        Raises
        ------
        UsageError
            If it has fewer bits than RAM has pages (holes counted).
        """
        pointer = ffi.NULL if words is None else ffi.from_buffer("uint64_t[]", words, require_writable=True)
        code = lib.pa_dirty_log_use(self._view, pointer, 0 if words is None else len(words) * 64)
        self._dirty_log = None if words is None or code else (words, pointer)
        self._check(code, "using a dirty log")

    def stamp(self, pfns: Pfns) -> None:
        """Stamp pages in the journal, for a writer that stores by other means: call it before and after."""
        if self._journal is not None:
            self._check(lib.pa_journal_stamp(self._view, len(pfns), pfn_pointer(pfns)), "stamping the journal")

    def write(self, pfns: Pfns, order: int = 0, *, bump: int = 1) -> int:
        """Write every page of the given blocks: version + `bump` in mem_map, content made from it, journal.

        With `bump` 0 the same content is written again. Returns the number of pages written.
        """
        written: int = lib.pa_write(self._view, order, len(pfns), pfn_pointer(pfns), bump)
        return self._check(written, f"writing {len(pfns)} blocks of order {order}")

    def write_block(self, pfn: int, order: int = 0, *, bump: int = 1) -> int:
        """Write every page of one block, as `write`."""
        self._one[0] = pfn
        return self.write(self._one, order, bump=bump)

    def check_owned(
        self, owner: int | None = Owner.WORKLOAD, tag: int | None = None, *, start: int = 0, end: int | None = None
    ) -> CheckResult:
        """Compare the pages of an owner (and tag) that lie in blocks starting in [start, end) with their versions."""
        code = lib.pa_check_owned(
            self._view,
            start,
            self.end_pfn if end is None else end,
            _ANY if owner is None else owner,
            _ANY if tag is None else tag,
            self._result,
        )
        self._check(code, "checking pages")
        return _check_result(self._result)

    def fill(self, pfns: Pfns, seed: int, versions: npt.NDArray[np.uint32] | None = None) -> None:
        """Write the content of (seed, pfn, version) into any pages of RAM, and mark them in the dirty log.

        Neither mem_map nor journal know of it.
        """
        self._check(
            lib.pa_fill(self._view, len(pfns), pfn_pointer(pfns), seed, _versions(pfns, versions)), "filling pages"
        )

    def check(self, pfns: Pfns, seed: int, versions: npt.NDArray[np.uint32] | None = None) -> CheckResult:
        """Compare pages with the content of (seed, pfn, version)."""
        code = lib.pa_check(self._view, len(pfns), pfn_pointer(pfns), seed, _versions(pfns, versions), self._result)
        self._check(code, "checking pages")
        return _check_result(self._result)

    # -- for tests ----------------------------------------------------------------------------------------------------

    def inject_failures(self, *, next: int = 0, every: int = 0, min_order: int = 0) -> None:
        """Make allocations of at least `min_order` fail: the `next` ones from now, then each `every`-th. 0, 0: none.

        Kept in guest RAM, so it survives a migration.
        """
        self._zone.fail_next, self._zone.fail_every, self._zone.fail_count = next, every, 0
        self._zone.fail_min_order = min_order


def _count_bits(words: npt.NDArray[np.uint64]) -> int:
    return int.from_bytes(words.tobytes(), "little").bit_count()


def pfn_pointer(array: Pfns, *, writable: bool = False) -> Any:
    """Return a C pointer to a contiguous uint64 array, which stays alive with it."""
    if array.dtype != np.uint64 or not array.flags.c_contiguous or (writable and not array.flags.writeable):
        raise UsageError(f"a contiguous array of uint64 is needed, not {array.dtype} with strides {array.strides}")
    return ffi.from_buffer("uint64_t[]", array)


def _versions(pfns: Pfns, versions: npt.NDArray[np.uint32] | None) -> Any:
    if versions is None:
        return ffi.NULL
    if versions.dtype != np.uint32 or len(versions) != len(pfns):
        raise UsageError("versions must be a uint32 array with one item for each page")
    return ffi.from_buffer("uint32_t[]", versions)


def _check_result(result: Any) -> CheckResult:
    return CheckResult(result.pages, result.wrong, result.first_wrong if result.wrong else None)
