"""Page contents, versions and the journal of writes."""

import threading

import numpy as np
import pytest
from guest_driver._page_alloc import ffi, lib

from balloon_dev import journal as journal_module
from balloon_dev.journal import Journal, JournalError
from guest_driver.content import page_content
from guest_driver.memory_manager import MemoryManager, Owner
from vring.errors import UsageError
from vring.memory import GuestMemory

MIB = 1 << 20


@pytest.fixture
def manager():
    with GuestMemory.create(16 * MIB) as memory:
        yield MemoryManager.create(memory, seed=(1 << 63) + 12345)


def words(manager, pfn):
    return manager.memory.array(int(pfn) * 4096, 512, "<u8")


def test_content_is_what_the_reference_says(manager):
    pfns = manager.alloc_pages_bulk(0, 20, Owner.WORKLOAD)
    manager.write(pfns)
    manager.write(pfns[5:])
    for i, pfn in enumerate(pfns.tolist()):
        version = 1 if i < 5 else 2
        assert manager.mem_map[pfn - manager.base_pfn]["version"] == version
        assert words(manager, pfn).tolist() == page_content(manager.content_seed, pfn, version).tolist()


def test_words_of_pages_all_differ_and_none_is_zero(manager):
    pfns = manager.alloc_pages_bulk(0, 500, Owner.WORKLOAD)
    manager.write(pfns)
    everything = np.concatenate([words(manager, pfn) for pfn in pfns.tolist()])
    assert everything.all()
    assert len(np.unique(everything)) == len(everything)
    assert len(np.unique(everything.view(np.uint8))) == 256


def test_fill_and_check_arbitrary_versions(manager):
    pfns = manager.alloc_pages_bulk(0, 100, Owner.WORKLOAD)
    versions = np.arange(100, dtype=np.uint32) * np.uint32(40_000_000)
    manager.fill(pfns, 9, versions)
    assert manager.check(pfns, 9, versions).wrong == 0
    assert manager.check(pfns, 8, versions).wrong == 100
    versions[17] += np.uint32(1)
    result = manager.check(pfns, 9, versions)
    assert (result.pages, result.wrong, result.first_wrong) == (100, 1, int(pfns[17]))
    with pytest.raises(UsageError, match="not RAM"):
        manager.fill(np.array([1 << 40], dtype=np.uint64), 1)
    with pytest.raises(UsageError, match="uint64"):
        manager.check(np.array([4000]), 1)


@pytest.mark.parametrize("order", [0, 3, 6])
def test_check_finds_one_flipped_bit_and_a_stale_version(manager, order):
    pfns = manager.alloc_pages_bulk(order, 10, Owner.WORKLOAD)
    manager.write(pfns, order)
    pages = 10 << order
    result = manager.check_owned()
    assert (result.pages, result.wrong, result.first_wrong) == (pages, 0, None)
    pfn = int(pfns[4]) + (1 << order) - 1
    manager.memory.array(pfn * 4096 + 4095, 1)[0] ^= 0x10
    assert manager.check_owned().first_wrong == pfn
    manager.memory.array(pfn * 4096 + 4095, 1)[0] ^= 0x10
    assert manager.check_owned().wrong == 0
    old = words(manager, pfn).copy()
    manager.write_block(pfn)
    assert manager.check_owned().wrong == 0
    words(manager, pfn)[:] = old  # as if the last write had been lost on the way
    assert manager.check_owned().wrong == 1
    assert manager.check_owned(Owner.BALLOON).pages == 0
    assert manager.check_owned(start=pfn + 1).wrong == 0


def test_same_content_again_keeps_the_version_but_is_in_the_journal(manager):
    with Journal.create(manager.memory.page_span) as journal:
        manager.use_journal(journal)
        pfns = manager.alloc_pages_bulk(0, 3, Owner.WORKLOAD)
        manager.write(pfns)
        before = words(manager, pfns[0]).copy()
        journal.next_epoch()
        manager.write(pfns[:1], bump=0)
        assert words(manager, pfns[0]).tolist() == before.tolist()
        assert np.flatnonzero(journal.written_since(1)).tolist() == [pfns[0]]
        manager.use_journal(None)


def test_a_large_block_is_written_whole(manager):
    pfn = manager.alloc_pages(10, Owner.WORKLOAD)
    with Journal.create(manager.memory.page_span) as journal:
        manager.use_journal(journal)
        assert manager.write_block(pfn, 10) == 1024
        assert np.flatnonzero(journal.entries).tolist() == list(range(pfn, pfn + 1024))
        manager.use_journal(None)
    assert manager.check_owned().wrong == 0


def test_journal_layout_is_the_headers():
    assert journal_module.MAGIC == lib.PA_JOURNAL_MAGIC
    assert journal_module.VERSION == lib.PA_JOURNAL_VERSION
    assert journal_module.HEADER_BYTES == lib.PA_JOURNAL_HEADER
    offsets = {name: field.offset for name, field in ffi.typeof("struct pa_journal").fields}
    assert offsets == {"magic": 0, "version": 8, "header_bytes": 12, "pages": 16, "epoch": 24, "reserved": 28}


def test_journal_counts_epochs_not_writes(manager):
    with Journal.create(manager.memory.page_span) as journal:
        manager.use_journal(journal)
        a, b = manager.alloc_pages_bulk(0, 2, Owner.WORKLOAD).tolist()
        for _ in range(3):
            manager.write_block(a)
        journal.next_epoch()
        assert journal.next_epoch() == 2
        manager.write_block(a)
        manager.stamp(np.array([b], dtype=np.uint64))
        assert (journal.last_epochs()[a], journal.write_epochs()[a]) == (2, 2)
        assert (journal.last_epochs()[b], journal.write_epochs()[b]) == (2, 1)
        with Journal.open(journal.fd) as other:
            assert other.epoch == 2
            assert other.entries.tolist() == journal.entries.tolist()
        manager.use_journal(None)
        manager.write_block(b)
        assert journal.write_epochs()[b] == 1


def test_poisoning_is_in_the_journal(manager):
    with Journal.create(manager.memory.page_span) as journal:
        manager.use_journal(journal)
        pfn = manager.alloc_pages(1)
        manager.free(pfn, 1)
        assert not journal.entries.any()
        manager.poison = 0
        manager.free(manager.alloc_pages(1), 1)
        assert np.flatnonzero(journal.entries).tolist() == [pfn, pfn + 1]
        manager.use_journal(None)


def test_wrong_journals_are_refused(manager):
    with Journal.create(100) as journal, pytest.raises(UsageError, match="less RAM"):
        manager.use_journal(journal)
    with GuestMemory.create(1 * MIB) as memory, pytest.raises(JournalError, match="magic"):
        Journal.open(memory.regions[0].fd)
    with Journal.create(100) as journal:
        np.frombuffer(journal.buffer, dtype="<u8")[2] = 1 << 60
        with pytest.raises(JournalError, match="do not fit"):
            Journal.open(journal.fd)


def test_no_write_slips_between_two_epochs(manager):
    """Each page is written once. A page read before its write, in an epoch, is stamped with it or a later one."""
    with Journal.create(manager.memory.page_span) as journal:
        manager.use_journal(journal)
        pfns = manager.alloc_pages_bulk(0, 3000, Owner.WORKLOAD)
        progress = [0]

        def write():
            for i in range(0, len(pfns), 4):
                progress[0] = i
                manager.write(pfns[i : i + 4])

        thread = threading.Thread(target=write)
        thread.start()
        seen = []
        while thread.is_alive():
            pfn = int(pfns[min(progress[0] + len(seen) % 4, len(pfns) - 1)])
            epoch = journal.next_epoch()
            seen.append((epoch, pfn, int(words(manager, pfn)[511])))
        thread.join()
        last = journal.last_epochs()
        for epoch, pfn, word in seen:
            assert word == int(words(manager, pfn)[511]) or last[pfn] >= epoch
        assert manager.check_owned().wrong == 0
        manager.use_journal(None)
