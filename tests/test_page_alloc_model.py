"""The page allocator against a naive model: a set of free pages and a dict of blocks."""

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from guest_driver.memory_manager import HINT_ORDER, Alloc, MemoryManager, Owner
from vring.memory import GuestMemory

MIB = 1 << 20
ORDERS = st.sampled_from([0, 0, 0, 1, 2, 3, 5, 8, 9, 10])


class AllocatorMachine(RuleBasedStateMachine):
    @initialize(hole=st.booleans(), watermark=st.sampled_from([0, 64, 1500]))
    def start(self, hole, watermark):
        layout = [(0, 9 * MIB), (17 * MIB, 7 * MIB)] if hole else [(0, 16 * MIB)]
        self.memory = GuestMemory.create(layout)
        self.manager = MemoryManager.create(self.memory, watermark=watermark)
        self.free = {
            pfn
            for region in self.memory.regions
            for pfn in range(region.gpa // 4096, region.end // 4096)
            if pfn >= self.manager.base_pfn
        }
        self.blocks: dict[int, tuple[int, int]] = {}
        self.first = self.manager.snapshot()

    def teardown(self):
        if hasattr(self, "manager"):
            for pfn, (order, _) in self.blocks.items():
                self.manager.free(pfn, order)
            self.manager.verify()
            assert self.manager.snapshot() == self.first
            del self.manager
            self.memory.close()

    def spare(self, flags):
        return len(self.free) - (0 if flags & Alloc.ATOMIC else self.manager.watermark)

    def could(self, order, flags):
        """Whether the model has an aligned run of free pages, and the watermark allows it."""
        size = 1 << order
        if self.spare(flags) < size:
            return False
        starts = {pfn & -size for pfn in self.free}
        return any(all(pfn in self.free for pfn in range(start, start + size)) for start in starts)

    def take(self, pfn, order, owner):
        pages = set(range(pfn, pfn + (1 << order)))
        assert pfn % (1 << order) == 0
        assert pages <= self.free
        self.free -= pages
        self.blocks[pfn] = (order, owner)

    @rule(order=ORDERS, owner=st.sampled_from(list(Owner)), flags=st.sampled_from(list(Alloc)))
    def alloc(self, order, owner, flags):
        could = self.could(order, flags)
        pfn = self.manager.alloc_pages(order, owner, flags)
        assert (pfn is not None) == could
        if pfn is not None:
            self.take(pfn, order, owner)

    @rule(order=ORDERS, n=st.integers(0, 300), owner=st.sampled_from(list(Owner)), flags=st.sampled_from(list(Alloc)))
    def alloc_bulk(self, order, n, owner, flags):
        pfns = self.manager.alloc_pages_bulk(order, n, owner, flags)
        assert len(pfns) <= n
        for pfn in pfns.tolist():
            self.take(pfn, order, owner)
        if len(pfns) < n:
            assert not self.could(order, flags)

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def release(self, data):
        pfn = data.draw(st.sampled_from(sorted(self.blocks)))
        order, _ = self.blocks.pop(pfn)
        self.manager.free(pfn, order)
        self.free |= set(range(pfn, pfn + (1 << order)))

    @precondition(lambda self: self.blocks)
    @rule(order=ORDERS, part=st.integers(1, 3), backwards=st.booleans())
    def release_bulk(self, order, part, backwards):
        pfns = [pfn for pfn, block in self.blocks.items() if block[0] == order][::part]
        if backwards:
            pfns.reverse()
        self.manager.free_bulk(np.array(pfns, dtype=np.uint64), order)
        for pfn in pfns:
            del self.blocks[pfn]
            self.free |= set(range(pfn, pfn + (1 << order)))

    @rule(n=st.integers(0, 4), reported=st.booleans())
    def report(self, n, reported):
        marked = self.manager.reported_blocks
        blocks = self.manager.report_take(n)
        for pfn in blocks.tolist():
            assert set(range(pfn, pfn + 1024)) <= self.free
        assert self.manager.free_pages == len(self.free) - 1024 * len(blocks)
        self.manager.verify()
        assert len(blocks) == 0 or self.spare(Alloc.NORMAL) >= 1024 * len(blocks)
        self.manager.report_return(blocks, reported=reported)
        assert self.manager.reported_blocks == marked + reported * len(blocks)

    @rule()
    def attach_anew(self):
        self.manager = MemoryManager.attach(self.memory)

    @invariant()
    def agrees(self):
        if not hasattr(self, "manager"):
            return
        self.manager.verify()
        assert self.manager.free_pages == len(self.free)
        free = np.flatnonzero(np.unpackbits(self.manager.bitmap(free=True).view(np.uint8), bitorder="little"))
        assert set(free.tolist()) == self.free
        pfns, orders = self.manager.owned()
        assert dict(zip(pfns.tolist(), orders.tolist(), strict=True)) == {p: b[0] for p, b in self.blocks.items()}
        counts = self.manager.pages_by_owner()
        for owner in Owner:
            assert counts.get(owner, 0) == sum(1 << o for o, who in self.blocks.values() if who == owner)
        whole = sum(
            all(pfn in self.free for pfn in range(start, start + 1024))
            for start in range(0, self.memory.page_span, 1 << HINT_ORDER)
        )
        assert self.manager.free_blocks(HINT_ORDER) == whole  # everything that can merge has merged


AllocatorMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAllocator = AllocatorMachine.TestCase
