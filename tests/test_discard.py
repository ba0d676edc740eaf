"""Discard of each kind of backing, judged by content and residency, never by a return code."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from discard_support import HUGE, fill, huge_pages, ranges, wrong_pages, zero_pages

from guest_driver.waiting import wait_readable
from host_qemu_side.discard import (
    Discarder,
    DiscardFailed,
    DiscardRefused,
    Refusal,
    calls,
    discarder,
    punch_hole,
    reads_zero,
    residency,
)
from vring.errors import GuestAddressError, MissingFacility, UsageError
from vring.memory import PAGE_SIZE, Backing, GuestMemory, Region

MIB = 1 << 20


def make(kind, layout, tmp_path):
    """Memory of one kind with regions at (gpa, size) pairs."""
    if kind == "memfd":
        return GuestMemory.create(layout)
    if kind == "file":
        memory = GuestMemory.create(layout, path=tmp_path)
        if memory.regions[0].backing is Backing.MEMFD:  # temporary files are on tmpfs here
            memory.close()
            memory = GuestMemory.create(layout, path=Path(__file__).parent)
        return memory
    return GuestMemory.from_private([Region(gpa, size) for gpa, size in layout])


KINDS = {"memfd": Backing.MEMFD, "file": Backing.FILE, "private": Backing.PRIVATE_ANONYMOUS}


@pytest.mark.parametrize("remove", [False, True], ids=["punch", "remove"])
@pytest.mark.parametrize("kind", KINDS)
def test_dropped_memory_is_gone_and_its_neighbours_are_not(kind, remove, tmp_path):
    with make(kind, [(0, 4 * MIB)], tmp_path) as memory:
        assert memory.regions[0].backing is KINDS[kind]
        fill(memory)
        if kind == "file":
            os.fsync(memory.regions[0].fd)
        before = residency(memory, 0, 4 * MIB)
        assert before.resident == 4 * MIB
        assert not before.gone
        Discarder(memory, verify=True, remove=remove)(*ranges((MIB, 2 * MIB), (8 * PAGE_SIZE, PAGE_SIZE)))
        after = residency(memory, MIB, 2 * MIB)
        assert after.gone
        assert residency(memory, 0, 4 * MIB).resident == 2 * MIB - PAGE_SIZE
        if kind != "private":
            assert before.object_bytes - residency(memory, 0, 4 * MIB).object_bytes == 2 * MIB + PAGE_SIZE
            assert residency(memory, 0, MIB).allocated == MIB - PAGE_SIZE
        assert zero_pages(memory) == {8, *range(256, 768)}
        assert not wrong_pages(memory)
        memory.write(MIB, b"again")  # it can be used again
        assert memory.read(MIB, 5) == b"again"


def test_reading_through_the_descriptor_does_not_allocate():
    with GuestMemory.create(4 * MIB) as memory:
        assert reads_zero(memory, 0, 4 * MIB)
        assert residency(memory, 0, 4 * MIB).gone
        assert not memory.array(0, 4 * MIB).any()  # reading through the mapping does
        assert residency(memory, 0, 4 * MIB).resident == 4 * MIB


def test_memory_of_private_anonymous_leaves_the_process():
    def rss():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE

    with GuestMemory.from_private([Region(0, 64 * MIB)]) as memory:
        fill(memory)
        before = rss()
        Discarder(memory)(*ranges((0, 64 * MIB)))
        assert before - rss() >= 60 * MIB


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_cross_regions_that_touch_and_stop_at_holes(kind, tmp_path):
    layout = [(0, MIB), (MIB, MIB), (4 * MIB, MIB)]
    with make(kind, layout, tmp_path) as memory:
        fill(memory)
        told = []
        discard = Discarder(memory, verify=True, after=told.append)
        discard(*ranges((MIB - 2 * PAGE_SIZE, 4 * PAGE_SIZE), (5 * MIB - PAGE_SIZE, PAGE_SIZE)))
        assert zero_pages(memory) == {254, 255, 256, 257, 1279}
        assert [(p.gpa, p.length, memory.regions.index(p.region)) for p in told] == [
            (MIB - 2 * PAGE_SIZE, 2 * PAGE_SIZE, 0),
            (MIB, 2 * PAGE_SIZE, 1),
            (5 * MIB - PAGE_SIZE, PAGE_SIZE, 2),
        ]
        assert discard.stats.ranges_discarded == 3
        for gpa, size in [(2 * MIB - PAGE_SIZE, 2 * PAGE_SIZE), (2 * MIB, PAGE_SIZE), (5 * MIB, PAGE_SIZE)]:
            with pytest.raises(GuestAddressError, match="not all RAM"):
                discard(*ranges((0, PAGE_SIZE), (gpa, size)))
        assert 0 not in zero_pages(memory)  # nothing of a bad request is dropped


def test_object_offsets_are_kept_apart():
    """A region that starts inside its object drops its own bytes, not those at the same guest address."""
    fd = os.memfd_create("one object")
    os.ftruncate(fd, 2 * MIB)
    with GuestMemory.from_fds([Region(0, MIB, fd, MIB), Region(MIB, MIB, fd, 0)]) as memory:
        fill(memory)
        Discarder(memory, verify=True)(*ranges((0, 16 * PAGE_SIZE)))
        assert calls.allocated_bytes(fd, 0, MIB) == MIB
        assert calls.allocated_bytes(fd, MIB, MIB) == MIB - 16 * PAGE_SIZE
        assert zero_pages(memory) == set(range(16))
    os.close(fd)


def test_overlapping_and_repeated_ranges_are_dropped_once():
    with GuestMemory.create(MIB) as memory:
        fill(memory)
        discard = Discarder(memory)
        discard(*ranges((8192, 8192), (0, 12288), (8192, 8192), (4096, 0)))
        assert (discard.bytes_discarded, discard.stats.ranges_discarded) == (16384, 1)
        with pytest.raises(UsageError, match="whole 4096-byte pages"):
            discard(*ranges((100, 4096)))
        with pytest.raises(UsageError, match="whole 4096-byte pages"):
            discard(*ranges((0, 100)))


def test_private_mapping_of_a_file_is_refused_and_why(tmp_path):
    path = tmp_path / "template"
    path.write_bytes(b"\xaa" * MIB)
    with open(path, "rb") as file:
        memory = GuestMemory.from_private([Region(0, MIB, file.fileno())])
    with memory:
        memory.write(0, b"mine")
        assert memory.regions[0].fd == -1  # what is in the file is not what is in RAM
        discard = Discarder(memory)
        with pytest.raises(DiscardRefused, match=r"private mapping of a file, .*template.*bring back what is in the"):
            discard(*ranges((0, 4096)))
        assert len(discard.unsupported()) == 1
        assert "template" in discard.unsupported()[0]
        assert memory.read(0, 4) == b"mine"
        assert path.read_bytes() == b"\xaa" * MIB
        assert discard.stats.bytes_refused == {Refusal.PRIVATE_FILE: 4096}
        # the reason for the refusal, shown: the call succeeds, and the template's bytes appear in the guest
        calls.advise(memory.host_address(0), 4096, mmap.MADV_DONTNEED)
        assert memory.read(0, 4) == b"\xaa" * 4


def test_refusals_can_be_counted_instead():
    with GuestMemory.create(MIB) as shared:
        both = GuestMemory([shared.regions[0], Region(MIB, MIB)], [shared.arrays[0], bytearray(MIB)])
        fill(both)
        discard = Discarder(both)
        with pytest.raises(DiscardRefused, match="discard_buffer"):
            discard(*ranges((MIB - 4096, 8192)))
        assert not zero_pages(both)  # nothing of the request was done
        discard = Discarder(both, on_refusal="count")
        discard(*ranges((MIB - 4096, 8192)))
        assert zero_pages(both) == {255}
        assert discard.stats.bytes_refused[Refusal.BUFFER] == discard.bytes_discarded == 4096
    with pytest.raises(UsageError, match="on_refusal"):
        Discarder(both, on_refusal="ignore")


def test_buffer_of_the_embedder_with_its_hook():
    memory = GuestMemory.from_buffers([(0, bytearray(MIB))])
    fill(memory)

    def drop(piece):
        memory.view(piece.gpa, piece.length)[:] = bytes(piece.length)

    discard = Discarder(memory, discard_buffer=drop, verify=True)
    assert not discard.unsupported()
    discard(*ranges((4096, 8192)))
    assert zero_pages(memory) == {1, 2}
    lazy = Discarder(memory, discard_buffer=lambda piece: None, verify=True)
    with pytest.raises(DiscardFailed, match="does not read as zero"):
        lazy(*ranges((0, 4096)))


def test_memory_of_an_embedder_that_says_what_it_is():
    buffer = mmap.mmap(-1, MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = GuestMemory([Region(0, MIB, backing=Backing.PRIVATE_ANONYMOUS)], [buffer])
    fill(memory)
    Discarder(memory, verify=True)(*ranges((0, MIB)))
    assert zero_pages(memory) == set(range(256))


def test_verify_sees_a_discard_that_does_nothing(monkeypatch):
    monkeypatch.setattr(discarder, "punch_hole", lambda fd, offset, length: None)
    with GuestMemory.create(MIB) as memory:
        fill(memory)
        Discarder(memory)(*ranges((0, MIB)))  # believed
        discard = Discarder(memory, verify=True)
        with pytest.raises(DiscardFailed, match=r"1048576 bytes are still resident.*not to be acknowledged"):
            discard(*ranges((0, MIB)))
        assert (discard.stats.failures, discard.bytes_discarded) == (1, 0)


def test_verify_sees_memory_that_is_zeroed_but_kept(monkeypatch):
    monkeypatch.setattr(discarder, "punch_hole", lambda fd, offset, length: os.pwrite(fd, bytes(length), offset))
    with GuestMemory.create(MIB) as memory:
        fill(memory)
        with pytest.raises(DiscardFailed, match="still resident"):
            Discarder(memory, verify=True)(*ranges((0, MIB)))


def test_verify_sees_dontneed_on_a_shared_object(monkeypatch):
    """The classic: DONTNEED on shared memory succeeds, and frees nothing."""
    with GuestMemory.create(MIB) as memory:
        monkeypatch.setattr(
            discarder, "punch_hole", lambda fd, at, n: calls.advise(memory.host_address(at), n, mmap.MADV_DONTNEED)
        )
        fill(memory)
        with pytest.raises(DiscardFailed, match="still allocated"):
            Discarder(memory, verify=True)(*ranges((0, MIB)))


@pytest.mark.parametrize(
    ("number", "words"), [(errno.EOPNOTSUPP, "cannot punch holes"), (errno.EIO, "Input/output error")]
)
def test_a_failing_call_names_range_kind_and_reason(monkeypatch, number, words):
    def fail(fd, offset, length):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(discarder, "punch_hole", fail)
    with GuestMemory.create(MIB) as memory:
        discard = Discarder(memory)
        with pytest.raises(DiscardFailed, match=rf"0x1000\+0x1000 in region 0x0.*shared memory object.*{words}") as got:
            discard(*ranges((4096, 4096)))
        assert got.value.piece.gpa == 4096
        assert discard.stats.failures == 1


def test_sealed_read_only_and_locked_memory():
    with GuestMemory.create(MIB) as memory:
        fd = os.open(f"/proc/self/fd/{memory.regions[0].fd}", os.O_RDONLY)
        region = Region(0, MIB, fd)
        with pytest.raises(DiscardFailed, match="not open for writing"):
            Discarder(GuestMemory([region], [memory.arrays[0]]))(*ranges((0, 4096)))
        os.close(fd)
    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, MIB)
    buffer = bytearray(MIB)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    with pytest.raises(DiscardFailed, match="sealed"):
        Discarder(GuestMemory([Region(0, MIB, fd)], [buffer]))(*ranges((0, 4096)))
    os.close(fd)
    with GuestMemory.from_private([Region(0, MIB)]) as memory:
        libc = ctypes.CDLL(None)
        assert libc.mlock(ctypes.c_void_p(memory.host_address(0)), ctypes.c_size_t(4096)) == 0
        with pytest.raises(DiscardFailed, match="mlock"):
            Discarder(memory)(*ranges((0, 4096)))


def test_memory_is_seen_gone_from_another_process():
    with GuestMemory.create(MIB) as memory:
        fill(memory)
        Discarder(memory, verify=True)(*ranges((0, MIB)))
        with open(f"/proc/self/fd/{memory.regions[0].fd}", "rb") as other:
            assert other.read(MIB) == bytes(MIB)
        assert os.stat(f"/proc/{os.getpid()}/fd/{memory.regions[0].fd}").st_blocks == 0


def test_punch_hole_reports_errors():
    with pytest.raises(OSError, match="Bad file descriptor"):
        punch_hole(-1, 0, 4096)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        calls.resident_bytes(1 << 46, 4096)


def test_huge_pages_are_dropped_whole():
    layout = [(0, 2 * HUGE), (2 * HUGE, HUGE), (8 * HUGE, HUGE)]
    with huge_pages(4) as there:
        if not there:
            with pytest.raises(MissingFacility, match="nr_hugepages"):
                GuestMemory.create(layout, page_size=HUGE)
            return
        with GuestMemory.create(layout, page_size=HUGE) as memory:
            assert {(r.backing, r.page_size) for r in memory.regions} == {(Backing.HUGETLB, HUGE)}
            fill(memory)
            full = residency(memory, 0, 3 * HUGE)
            assert full.resident == 3 * HUGE
            assert full.object_bytes == 4 * HUGE
            discard = Discarder(memory, verify=True)
            discard(*ranges((4096, HUGE - 4096), (8 * HUGE, HUGE - 4096)))
            assert discard.bytes_discarded == 0  # no host page was given up whole
            discard(*ranges((HUGE - 4096, HUGE + 4096 + HUGE)))  # crosses two regions; two whole host pages
            assert discard.bytes_discarded == 2 * HUGE
            assert residency(memory, HUGE, 2 * HUGE).gone
            assert residency(memory, 0, HUGE).object_bytes == 2 * HUGE
            assert reads_zero(memory, HUGE, 2 * HUGE)
            assert not memory.array(HUGE, 4096).any()
            assert not wrong_pages(memory)
            assert (memory.array(0, HUGE // 8, np.uint64) != 0).all()
            assert (memory.array(8 * HUGE, HUGE // 8, np.uint64) != 0).all()


def test_missing_huge_pages_are_named():
    with pytest.raises(MissingFacility, match=r"pages of 2097152 bytes.*nr_hugepages"):
        GuestMemory.create(HUGE << 20, page_size=HUGE)  # 2 TiB
    with pytest.raises(MissingFacility, match="no huge pages of 4194304 bytes"):
        GuestMemory.create(1 << 22, page_size=1 << 22)
    with pytest.raises(UsageError, match="power of two"):
        GuestMemory.create(1 << 22, page_size=12288)
    with pytest.raises(UsageError, match="page_size or path"):
        GuestMemory.create(1 << 22, page_size=HUGE, path="/tmp")
    fd = os.memfd_create("odd")
    os.ftruncate(fd, 3 * MIB)
    with pytest.raises(UsageError, match="power of two"):
        GuestMemory.from_fds([Region(0, 3 * MIB, fd, page_size=3 * MIB)])
    os.close(fd)


UFFDIO_API, UFFDIO_REGISTER, EVENT_REMOVE = 0xC018AA3F, 0xC020AA00, 0x15
USERFAULTFD = {"x86_64": 323, "aarch64": 282}
"""The number of the call."""
USER_MODE_ONLY = 1
"""What is open to every user: the kernel's own accesses are no concern of such a handler, but removals are."""


@pytest.mark.parametrize("remove", [True, False], ids=["remove", "punch"])
def test_userfaultfd_is_told_by_remove_only(remove):
    """Why the option exists: a hole punched through the descriptor sends a userfaultfd handler nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(USERFAULTFD[platform.machine()], os.O_CLOEXEC | os.O_NONBLOCK | USER_MODE_ONLY)
    assert fd >= 0, f"userfaultfd: {os.strerror(ctypes.get_errno())}"
    with GuestMemory.create(MIB) as memory:
        fill(memory)
        try:
            fcntl.ioctl(fd, UFFDIO_API, bytearray(struct.pack("=QQQ", 0xAA, 1 << 3 | 1 << 5, 0)))
            where = struct.pack("=QQQQ", memory.host_address(0), MIB, 1, 0)
            fcntl.ioctl(fd, UFFDIO_REGISTER, bytearray(where))
            heard = []

            def listen():
                while not done.is_set() or wait_readable([fd], 0):
                    if wait_readable([fd], 0.02):
                        message = os.read(fd, 32)
                        heard.append((message[0], *struct.unpack_from("=QQ", message, 8)))

            done = threading.Event()
            thread = threading.Thread(target=listen, daemon=True)
            thread.start()
            Discarder(memory, remove=remove, verify=True)(*ranges((8192, 4096)))
            done.set()
            thread.join(10)
            assert not thread.is_alive()
            start = memory.host_address(8192)
            assert heard == ([(EVENT_REMOVE, start, start + 4096)] if remove else [])
        finally:
            os.close(fd)
