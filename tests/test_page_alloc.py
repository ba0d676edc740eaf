"""The page allocator and the kernel area: policy, limits, errors, what survives into another process."""

import os
import subprocess
import sys

import numpy as np
import pytest

from guest_driver.layout import KernelArea
from guest_driver.memory_manager import HINT_ORDER, Alloc, AllocatorError, MemoryManager, Owner
from vring.errors import UsageError, VirtioError
from vring.memory import PAGE_SIZE, GuestMemory

MIB = 1 << 20


@pytest.fixture
def manager():
    with GuestMemory.create(32 * MIB) as memory:
        yield MemoryManager.create(memory, seed=5)


def bits(words):
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))


def test_fresh_zone_is_all_free_and_small(manager):
    manager.verify()
    assert manager.free_pages == manager.total_pages
    assert manager.base_pfn + manager.total_pages == 32 * MIB // PAGE_SIZE
    assert manager.kernel.size < 32 * MIB * 0.04
    assert manager.pages_by_owner() == {0: manager.total_pages}
    assert bits(manager.allocated_bitmap()).tolist() == list(range(manager.base_pfn))


def test_fresh_zone_hands_out_ascending_addresses(manager):
    single = [manager.alloc_pages(0) for _ in range(2000)]
    assert single == sorted(single)


def test_freed_block_is_the_next_one_taken(manager):
    pfns = manager.alloc_pages_bulk(0, 100)
    manager.free(int(pfns[31]))
    assert manager.alloc_pages(0) == pfns[31]


@pytest.mark.parametrize("order", range(11))
def test_bulk_is_repeated_single(order):
    seen = []
    for bulk in (True, False):
        with GuestMemory.create(24 * MIB) as memory:
            manager = MemoryManager.create(memory)
            holes = manager.alloc_pages_bulk(0, 3000, Owner.KERNEL)
            manager.free_bulk(np.ascontiguousarray(holes[::3]))
            n = 700 >> order or 1
            if bulk:
                pfns = manager.alloc_pages_bulk(order, n, Owner.BALLOON).tolist()
            else:
                pfns = [manager.alloc_pages(order, Owner.BALLOON) for _ in range(n)]
            manager.verify()
            zone = manager.memory.read(*manager.kernel.pieces["zone"])
            seen.append((pfns, zone))
            del manager
    assert seen[0] == seen[1]


def test_bulk_stops_at_the_watermark(manager):
    manager.watermark = 1000
    pfns = manager.alloc_pages_bulk(0, 100_000)
    assert manager.free_pages == 1000
    assert len(pfns) == manager.total_pages - 1000
    assert manager.alloc_pages(0, flags=Alloc.NORETRY) is None
    assert manager.alloc_pages(0, flags=Alloc.ATOMIC) is not None
    assert manager.statistics()["failures"] == 2
    manager.verify()


def test_hint_allocation_takes_only_whole_blocks_and_respects_the_watermark(manager):
    blocks = manager.alloc_hint_blocks(100)
    assert len(blocks) == 7  # of 8, one is split by the kernel area
    assert all(pfn % 1024 == 0 for pfn in blocks.tolist())
    assert manager.pages_by_owner()[Owner.HINT] == 7 * 1024
    manager.free_bulk(blocks, HINT_ORDER)
    manager.watermark = manager.free_pages - 3 * 1024
    assert len(manager.alloc_hint_blocks(100)) == 3


def test_conservation(manager):
    before = manager.snapshot()
    blocks = manager.alloc_hint_blocks(5)
    inside = manager.snapshot()
    assert before != inside
    assert inside.difference(before) == ["free: 0 pages fewer, 5120 pages more", "HINT: 5120 pages fewer, 0 pages more"]
    manager.free_bulk(blocks[::-1].copy(), HINT_ORDER)
    assert manager.snapshot() == before


def test_double_free_and_bad_pages_change_nothing(manager):
    pfn = manager.alloc_pages(3)
    other = manager.alloc_pages(0)
    before = manager.memory.read(*manager.kernel.pieces["zone"])
    for bad, order, text in [
        (pfn, 2, "another order"),
        (pfn + 1, 0, "does not start"),
        (other + 1, 0, "does not start"),
        (other, 11, "out of range"),
        (0, 0, "not in the zone"),
        (manager.end_pfn, 0, "not in the zone"),
        ((1 << 64) - 1, 0, "not in the zone"),
        (pfn + 1, 1, "not in the zone"),
    ]:
        with pytest.raises(UsageError, match=text):
            manager.free(bad, order)
        assert manager.memory.read(*manager.kernel.pieces["zone"]) == before
    manager.free(pfn, 3)
    with pytest.raises(UsageError, match="does not start an allocated block"):
        manager.free(pfn, 3)
    manager.verify()


def test_bulk_free_stops_at_the_first_bad_one(manager):
    pfns = manager.alloc_pages_bulk(0, 10)
    with pytest.raises(UsageError, match="number 10 of 12"):
        manager.free_bulk(np.concatenate([pfns, pfns[:2]]))
    assert manager.free_pages == manager.total_pages
    manager.verify()


@pytest.mark.parametrize("arguments", [(11, 1), (0, 0), (0, 255), (0, 1, Alloc.NORMAL, 255)])
def test_nonsense_allocations_are_usage_errors(manager, arguments):
    with pytest.raises(UsageError, match="out of range"):
        manager.alloc_pages(*arguments)


def test_injected_failures(manager):
    manager.register_shrinker(lambda pages: pytest.fail("an injected failure does not reclaim"))
    manager.inject_failures(next=2)
    assert [manager.alloc_pages(0) is None for _ in range(4)] == [True, True, False, False]
    manager.inject_failures(every=3)
    assert [manager.alloc_pages(0) is None for _ in range(7)] == [False, False, True, False, False, True, False]
    manager.inject_failures(every=5)
    assert len(manager.alloc_pages_bulk(0, 20)) == 4
    assert len(manager.alloc_pages_bulk(0, 20)) == 4
    manager.inject_failures(next=1, min_order=HINT_ORDER)
    assert manager.alloc_pages(9) is not None
    assert len(manager.alloc_hint_blocks(1)) == 0
    assert len(manager.alloc_hint_blocks(1)) == 1


def test_injection_survives_in_guest_ram(manager):
    manager.inject_failures(next=1)
    assert MemoryManager.attach(manager.memory).alloc_pages(0) is None


def test_free_pages_keep_their_bytes_unless_poisoned(manager):
    pfns = manager.alloc_pages_bulk(0, 4)
    manager.write(pfns)
    before = [manager.memory.read(pfn * PAGE_SIZE, PAGE_SIZE) for pfn in pfns.tolist()]
    manager.free_bulk(pfns)
    assert [manager.memory.read(pfn * PAGE_SIZE, PAGE_SIZE) for pfn in pfns.tolist()] == before
    assert manager.poison is None
    manager.poison = 0xAAAA5555
    block = manager.alloc_pages(2)
    manager.free(block, 2)
    assert set(manager.memory.array(block * PAGE_SIZE, 4096, "<u4").tolist()) == {0xAAAA5555}


def test_holes_are_never_handed_out():
    with GuestMemory.create([(0, 8 * MIB), (20 * MIB + 4096, 8 * MIB)]) as memory:
        manager = MemoryManager.create(memory, watermark=0)
        manager.verify()
        manager.alloc_pages_bulk(0, 100_000)
        manager.verify()
        taken = bits(manager.allocated_bitmap())
        assert len(taken) == memory.size // PAGE_SIZE
        assert not ((taken >= 2048) & (taken <= 5120)).any()
        assert manager.free_pages == 0


def test_buddies_do_not_merge_across_regions_that_touch():
    with GuestMemory.create([(0, 9 * MIB), (9 * MIB, 7 * MIB)]) as memory:
        manager = MemoryManager.create(memory, watermark=0)
        manager.free_bulk(manager.alloc_pages_bulk(0, 100_000))
        manager.verify()
        for order in range(11):
            for pfn in manager.alloc_pages_bulk(order, 1000).tolist():
                memory.region_index(pfn * PAGE_SIZE, PAGE_SIZE << order)


def test_reclaim_calls_shrinkers_then_notifiers_then_gives_up(manager):
    manager.watermark = 0
    cache = manager.alloc_pages_bulk(0, 100_000).tolist()
    balloon, calls = cache[:3], []
    cache = cache[-4:]

    def shrink(pages):
        calls.append(("shrink", pages))
        assert manager.alloc_pages_bulk(0, 1).tolist() == []  # does not reclaim in turn
        n = min(2, len(cache))
        for _ in range(n):
            manager.free(cache.pop())
        return n

    def notify():
        calls.append("oom")
        if not balloon:
            return 0
        manager.free(balloon.pop())
        return 1

    manager.register_shrinker(shrink)
    manager.register_oom_notifier(notify)
    assert manager.alloc_pages(0, flags=Alloc.NORETRY) is None
    assert manager.alloc_pages(0, flags=Alloc.ATOMIC) is None
    assert len(manager.alloc_hint_blocks(1)) == 0
    assert calls == []
    assert manager.alloc_pages(0) is not None
    assert calls == [("shrink", 1)]
    calls.clear()
    assert len(manager.alloc_pages_bulk(0, 8)) == 6  # one left, two from the cache, three from the balloon
    assert calls == [("shrink", 7)] * 2 + ["oom"] + [("shrink", 7), "oom"] * 3
    calls.clear()
    assert manager.alloc_pages(0) is None
    assert calls == [("shrink", 1), "oom"]
    manager.unregister_shrinker(shrink)
    manager.unregister_oom_notifier(notify)
    assert manager.alloc_pages(0) is None
    assert calls == [("shrink", 1), "oom"]
    manager.verify()


def test_owned_lists_blocks_by_owner_and_tag_in_steps(manager):
    manager.alloc_pages_bulk(0, 50, Owner.KERNEL)
    mine = manager.alloc_pages_bulk(2, 30, Owner.DRIVER, tag=7)
    manager.alloc_pages_bulk(2, 30, Owner.DRIVER, tag=8)
    pfns, orders = manager.owned(Owner.DRIVER, 7)
    assert pfns.tolist() == sorted(mine.tolist())
    assert set(orders.tolist()) == {2}
    stepped, at = [], 0
    while at < manager.end_pfn:
        some, _, at = manager.owned_from(at, Owner.DRIVER, 7, limit=7, scan=20)
        stepped += some.tolist()
    assert stepped == pfns.tolist()
    assert manager.free_owned(0, manager.end_pfn, Owner.DRIVER, 7) == 120
    assert manager.pages_by_owner()[Owner.DRIVER] == 120
    manager.verify()


ATTACHED = """
import sys
from vring.memory import GuestMemory, Region
from guest_driver.memory_manager import MemoryManager, Owner
fd, size = int(sys.argv[1]), int(sys.argv[2])
memory = GuestMemory.from_fds([Region(0, size, fd)])
manager = MemoryManager.attach(memory)
manager.verify()
assert manager.check_owned().wrong == 0
print(*manager.alloc_pages_bulk(0, 10, Owner.DRIVER, tag=3).tolist())
"""


def test_attach_in_another_process(manager):
    pfns = manager.alloc_pages_bulk(1, 100, Owner.WORKLOAD)
    manager.write(pfns, 1)
    region = manager.memory.regions[0]
    os.set_inheritable(region.fd, True)
    run = subprocess.run(
        [sys.executable, "-c", ATTACHED, str(region.fd), str(region.size)],
        pass_fds=[region.fd], capture_output=True, text=True, check=True,
    )  # fmt: skip
    theirs = [int(word) for word in run.stdout.split()]
    assert manager.owned(Owner.DRIVER, 3)[0].tolist() == theirs
    manager.verify()


def test_attach_to_anything_else_fails():
    with GuestMemory.create(8 * MIB) as memory:
        with pytest.raises(VirtioError, match="holds no guest"):
            MemoryManager.attach(memory)
        manager = MemoryManager.create(memory)
        manager._zone.end_pfn += 1
        with pytest.raises(AllocatorError):
            MemoryManager.attach(memory)
    with GuestMemory.create([(4096, 8 * MIB)]) as memory, pytest.raises(UsageError, match="address 0"):
        MemoryManager.create(memory)
    with GuestMemory.create(64 << 10) as memory, pytest.raises(UsageError, match="more RAM"):
        MemoryManager.create(memory)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [("order", 3, "marked free|aligned|counters"), ("next", 12345678, "links"), ("prev", 1, "links"),
     ("flags", 2, "marked free"), ("owner", 4, "no owner")],
)  # fmt: skip
def test_verify_names_the_damage(manager, field, value, text):
    manager.verify()
    at = int(manager._zone.free_area[10].head)
    manager.mem_map[at][field] = value
    with pytest.raises(AllocatorError, match=text) as caught:
        manager.verify()
    assert caught.value.pfn is not None
    assert f"page {caught.value.pfn}" in str(caught.value)


def test_verify_sees_counts_overlaps_and_unmerged_buddies(manager):
    manager._zone.free_pages -= 1
    with pytest.raises(AllocatorError, match="counters"):
        manager.verify()
    manager._zone.free_pages += 1
    block = manager.alloc_pages(4) - manager.base_pfn
    manager.mem_map[block + 3]["flags"] = 2
    with pytest.raises(AllocatorError, match="inside another"):
        manager.verify()
    manager.mem_map[block + 3]["flags"] = 0
    manager.verify()


def test_damaged_list_is_an_error_not_a_crash(manager):
    manager.mem_map[int(manager._zone.free_area[10].head)]["next"] = 0x7FFFFFFF
    with pytest.raises(AllocatorError, match="damaged"):
        manager.alloc_hint_blocks(1)


def test_kernel_area_keeps_pieces_by_name():
    with GuestMemory.create(8 * MIB) as memory:
        area = KernelArea.format(memory, 64 << 10, seed=77)
        memory.array(8192, 100)[:] = 9
        first = area.reserve("queues", 1000)
        second = area.reserve("driver", 5000, 4096)
        assert first == 4096
        assert second == 8192
        assert not memory.array(second, 5000).any()
        again = KernelArea.attach(memory)
        assert again.seed == 77
        assert again.pieces == {"queues": (4096, 1000), "driver": (8192, 5000)}
        assert again.find("driver") == 8192
        assert again.find("none") is None
        with pytest.raises(UsageError, match="already has"):
            again.reserve("queues", 1)
        with pytest.raises(UsageError, match="is full"):
            again.reserve("more", 64 << 10)
        for name, size, align in [("", 1, 1), ("x" * 33, 1, 1), ("é", 1, 1), ("y", 0, 1), ("y", 1, 3)]:
            with pytest.raises(UsageError):
                again.reserve(name, size, align)
