"""Workloads: what they leave in memory, and that another process goes on exactly where one was."""

import math

import numpy as np
import pytest

from balloon_dev.journal import Journal
from guest_driver.memory_manager import MemoryManager, Owner
from guest_driver.workloads import (
    BuildSpec,
    ChurnSpec,
    IdleSpec,
    Workload,
    WriterSpec,
    parse_workload,
)
from guest_driver.workloads.state import Random
from vring.errors import UsageError, VirtioError
from vring.memory import GuestMemory

MIB = 1 << 20


def boot(size, text, seed=3):
    manager = MemoryManager.create(GuestMemory.create(size), seed=seed)
    return manager, Workload.create(manager, text, seed=seed)


def image(manager):
    return [manager.memory.read(0, manager.memory.size)]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("idle", (IdleSpec(),)),
        ("churn", (ChurnSpec(0.10, 16 * MIB),)),
        ("churn:25%", (ChurnSpec(0.25, 16 * MIB),)),
        ("churn:2.5%@64K", (ChurnSpec(0.025, 64 << 10),)),
        ("writer:256M@50M", (WriterSpec(256 * MIB, 50 * MIB),)),
        ("writer:1G@1.5M/s", (WriterSpec(1 << 30, 3 * MIB // 2),)),
        ("build", (BuildSpec(64 * MIB),)),
        ("build:8MiB/s", (BuildSpec(8 * MIB),)),
        ("churn + writer:64m@20M", (ChurnSpec(), WriterSpec(64 * MIB, 20 * MIB))),
    ],
)
def test_parse(text, parts):
    assert parse_workload(text) == parts


@pytest.mark.parametrize(
    "text",
    ["", "churn:", "churn:110%", "churn:ten%", "churn:10", "churn:10%@0", "churn:10%@", "writer", "writer:1M",
     "writer:@1M", "writer:1X@1M", "writer:1M@0", "build:-1", "idle:1", "dance", "churn++idle",
     "idle+idle+idle+idle+idle", "idle+" * 60],
)  # fmt: skip
def test_nonsense_is_a_usage_error_that_shows_what_is_valid(text):
    with pytest.raises(UsageError, match=r"valid|such as|as in|at most") as caught:
        parse_workload(text)
    assert "workload" in str(caught.value)


def test_random_single_and_bulk_agree():
    words = np.zeros(4, dtype=np.uint64)
    one, many = Random(words[:2]), Random(words[2:])
    one.seed(9)
    many.seed(9)
    assert [(one.next() >> 32) * 1000 >> 32 for _ in range(100)] == many.below(1000, 100).tolist()
    assert words[0] == words[2]
    assert words[1] == words[3]
    assert all(0 < one.uniform() <= 1 for _ in range(100))


@pytest.mark.parametrize(
    ("text", "share"),
    [("churn", 0.1), ("churn:30%@64K", 0.3), ("churn:0%", 0), ("churn:100%", 1), ("churn:50%@4K", 0.5)],
)
def test_churn_meets_its_share(text, share):
    manager, workload = boot(96 * MIB, text)
    workload.setup()
    manager.verify()
    filled = manager.total_pages - manager.watermark
    mine = manager.pages_by_owner().get(Owner.WORKLOAD, 0)
    assert abs(mine - filled * share) <= 1
    assert workload.check() == type(workload.check())(mine, 0, None)
    assert workload.step(0.0) == math.inf
    used = np.frombuffer(manager.memory.read(0, manager.memory.size), dtype="<u8").reshape(-1, 512)
    assert used.any(axis=1).mean() >= 0.95  # free pages hold junk


def test_churn_extents_have_about_the_mean_size():
    manager, workload = boot(128 * MIB, "churn:30%@256K")
    workload.setup()
    pfns = workload.pages().astype(np.int64)
    extents = 1 + np.count_nonzero(np.diff(pfns) != 1)
    assert 32 < len(pfns) / extents < 128  # pages, 64 on average
    assert manager.free_blocks(10) < manager.free_pages // 1024  # not all of it is whole blocks


def test_seeds_make_the_difference():
    survivors = []
    for seed in (1, 1, 2):
        manager, workload = boot(64 * MIB, "churn:30%@1M", seed)
        workload.setup()
        survivors.append(workload.pages().tolist())
        del manager
    assert survivors[0] == survivors[1] != survivors[2]


def test_writer_keeps_its_rate_and_its_set():
    manager, workload = boot(64 * MIB, "writer:8M@40M")
    workload.setup()
    assert manager.pages_by_owner()[Owner.WORKLOAD] == 2048
    with Journal.create(manager.memory.page_span) as journal:
        manager.use_journal(journal)
        journal.next_epoch()
        start = now = 1000.0
        while now < start + 1:
            later = workload.step(now)
            assert later > now
            assert later - now < 0.1
            now = later
        assert abs(workload.pages_written - 10240) <= 64
        written = np.flatnonzero(journal.written_since(1))
        assert set(written.tolist()) <= set(workload.pages().tolist())
        assert len(written) > 2000
        manager.use_journal(None)
    assert workload.check().wrong == 0
    before = workload.pages_written
    assert workload.step(now + 3600) <= now + 3600.1  # an hour late: no burst
    assert workload.pages_written - before <= 1100


def test_writer_without_room_says_so():
    _, workload = boot(16 * MIB, "writer:64M@1M")
    with pytest.raises(UsageError, match="16384 pages"):
        workload.setup()


def test_build_churns_and_fills_half_of_memory():
    manager, workload = boot(48 * MIB, "build:64M/s")
    workload.setup()
    now = 0.0
    while now < 2:
        now = workload.step(now)
    manager.verify()
    assert workload.check().wrong == 0
    orders = np.bincount(manager.owned(Owner.WORKLOAD)[1], minlength=5)
    assert all(orders[:5])
    assert not orders[5:].any()
    assert 0.4 < manager.free_pages / manager.total_pages < 0.52
    frees = manager.statistics()["frees"]
    while now < 3:
        now = workload.step(now)
    assert manager.statistics()["frees"] > frees + 4000
    # its cache gives way to others
    got = manager.alloc_pages_bulk(0, manager.free_pages, Owner.DRIVER)
    assert manager.alloc_pages(0, Owner.DRIVER) is not None
    assert manager.reclaims >= 1
    assert len(got) > 0
    manager.verify()
    assert workload.check().wrong == 0


def test_build_survives_failing_allocations():
    manager, workload = boot(32 * MIB, "build")
    workload.setup()
    manager.inject_failures(every=3)
    now = 0.0
    while now < 1:
        now = workload.step(now)
    manager.verify()
    assert workload.check().wrong == 0
    assert workload.pages_written > 1000


@pytest.mark.parametrize("text", ["churn:20%@256K+writer:4M@40M", "build:64M/s", "build:16M+writer:2M@8M+idle"])
@pytest.mark.parametrize("cut", [0, 7, 40, 200])
def test_attached_workload_goes_on_with_the_very_same_sequence(text, cut):
    """One runs on; the other is attached anew, from a copy of its RAM, after `cut` steps of setup and work."""
    size = 24 * MIB
    _, one = boot(size, text)
    _, two = boot(size, text)
    steps, now = 0, 0.0
    while steps < 300:
        if steps == cut:
            copy = GuestMemory.create(size)
            copy.write(0, two.manager.memory.read(0, size))
            two = Workload.attach(MemoryManager.attach(copy))
            assert two.text == text
            assert two.seed == 3
            two.manager.verify()
        if not one.is_set_up:
            assert one.setup_step() == two.setup_step()
        else:
            one.step(now)
            two.step(now)
            now += 0.003
        steps += 1
    # Times do not carry over, amounts do: let both finish what the other has done already.
    for _ in range(3000):
        ahead, behind = (one, two) if one.pages_written > two.pages_written else (two, one)
        if [part.done for part in one.parts] == [part.done for part in two.parts]:
            break
        for mine, theirs in zip(behind.parts, ahead.parts, strict=True):
            if mine.done < theirs.done:
                mine._base = 0.0
                mine.step((theirs.done + 0.5) / mine.rate)
    assert one.pages_written > 0
    assert [part.done for part in one.parts] == [part.done for part in two.parts]
    assert image(one.manager) == image(two.manager)
    assert two.check().wrong == 0
    two.manager.verify()


def test_rewriting_the_same_changes_no_byte():
    manager, workload = boot(16 * MIB, "writer:1M@1M")
    workload.setup()
    before = image(manager)
    assert workload.rewrite_same(workload.pages()[:10]) == 10
    assert image(manager) == before


def test_misuse():
    manager, workload = boot(16 * MIB, "writer:1M@1M")
    with pytest.raises(UsageError, match="setup"):
        workload.step(0.0)
    with pytest.raises(UsageError, match="already"):
        Workload.create(manager, "idle")
    other = MemoryManager.create(GuestMemory.create(16 * MIB))
    with pytest.raises(VirtioError, match="no workload"):
        Workload.attach(other)
    with pytest.raises(UsageError, match="bytes of state"):
        Workload.create(other, "build+build+build+build")
    manager.kernel.find("workload")
    manager.memory.array(manager.kernel.find("workload"), 8)[:] = 0
    with pytest.raises(VirtioError, match="damaged"):
        Workload.attach(manager)
