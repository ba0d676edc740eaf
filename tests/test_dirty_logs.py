"""Dirty logs: no write is lost, whoever writes and whenever; a rewrite with the same content is a write."""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from host_qemu_side.discard import punch_hole
from host_qemu_side.migration.ram import populated
from host_qemu_side.python_guest import CombinedLog
from vring.dirty import check_covers, wp_async
from vring.dirty.software import SoftwareDirtyLog
from vring.dirty.wp_async import TrackedRange, WpAsyncDirtyLog, WriteProtection
from vring.errors import MissingFacility, UsageError
from vring.memory import GuestMemory
from vring.pages import PageLayout, PageSet

PAGE = 4096
PAGES = 256


def page_set(pages=PAGES):
    return PageSet(PageLayout(pages))


WRITER = """
import os, sys, mmap, random
import numpy as np
from vring.memory import GuestMemory, Region
from vring.dirty.software import SoftwareDirtyLog
from vring.dirty.wp_async import WriteProtection
kind, ram, log_fd, pages = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
memory = GuestMemory.from_fds([Region(0, pages * 4096, ram)])
if kind == "software":
    log = SoftwareDirtyLog(pages, log_fd)
else:
    protection = WriteProtection(memory)
    print(protection.ranges[0].address, flush=True)
sys.stdin.readline()
order = random.Random(1)
for version in range(1, 40):
    for page in order.sample(range(pages), pages // 2):
        memory.write(page * 4096, bytes([version]))
        if kind == "software":
            log.mark(page)
print("done", flush=True)
sys.stdin.readline()
"""


def have_wp_async():
    try:
        wp_async.probe()
    except MissingFacility:
        return False
    return True


KINDS = ["software", "wp-async"]


class Tracked:
    """RAM with one log; `write` writes as the guest would."""

    def __init__(self, kind):
        if kind == "wp-async" and not have_wp_async():
            pytest.skip("this kernel has no userfaultfd WP_ASYNC")
        self.memory, self.kind = GuestMemory.create(PAGES * PAGE), kind
        self.protection = WriteProtection(self.memory) if kind == "wp-async" else None
        if self.protection:
            self.log = WpAsyncDirtyLog(os.getpid(), self.protection.ranges, self.memory.page_layout)
        else:
            self.log = SoftwareDirtyLog.for_memory(self.memory)

    def write(self, page, data=b"x"):
        self.memory.write(page * PAGE, data)
        if self.kind == "software":
            self.log.mark(page)

    def sync(self):
        found = page_set()
        n = self.log.sync(found)
        pages = found.numbers().tolist()
        assert n == len(pages)
        return pages


@pytest.fixture(params=KINDS)
def tracked(request):
    made = Tracked(request.param)
    yield made
    made.log.stop()
    if made.protection:
        made.protection.close()
    made.memory.close()


def test_each_write_is_reported_once(tracked):
    for page in range(PAGES):
        tracked.write(page)
    tracked.log.start()
    assert tracked.sync() == []
    for page in (0, 63, 64, 200, PAGES - 1):
        tracked.write(page, b"y")
    assert tracked.sync() == [0, 63, 64, 200, PAGES - 1]
    assert tracked.sync() == []


def test_same_content_is_a_write(tracked):
    """What a log that compares contents would miss."""
    tracked.write(7, b"x" * PAGE)
    tracked.log.start()
    tracked.write(7, b"x" * PAGE)
    assert tracked.sync() == [7]
    tracked.write(7, b"x")
    assert tracked.sync() == [7]


def test_sync_adds_to_the_bitmap(tracked):
    tracked.log.start()
    into = page_set()
    into.set_run(3)
    tracked.write(5)
    assert tracked.log.sync(into) == 1
    assert into.numbers().tolist() == [3, 5]


def test_stop_may_be_called_twice(tracked):
    tracked.log.start()
    tracked.log.stop()
    tracked.log.stop()


def test_scanning_allocates_nothing(tracked):
    """Holes stay holes: a scan of sparse RAM must not fill it. Pages never populated are not reported as written."""
    tracked.write(9)
    tracked.log.start()
    assert tracked.sync() == []
    assert populated(tracked.memory).numbers().tolist() == [9]


def test_written_then_discarded(tracked):
    """A write is not forgotten because its page is punched out afterwards."""
    tracked.write(9)
    tracked.log.start()
    tracked.write(9)
    punch_hole(tracked.memory.regions[0].fd, 9 * PAGE, PAGE)
    assert tracked.sync() == [9]


@pytest.mark.parametrize("how", ["read", "recv"])
def test_stores_by_the_kernel(how):
    """read() and recv() into RAM are stores of the process that the kernel makes for it: wp-async sees them."""
    tracked = Tracked("wp-async")
    tracked.write(20)
    tracked.log.start()
    view = tracked.memory.view(20 * PAGE, 2 * PAGE)
    if how == "read":
        with open("/dev/zero", "rb", buffering=0) as zero:
            assert zero.readinto(view) == 2 * PAGE
    else:
        a, b = socket.socketpair()
        with a, b:
            a.sendall(bytes(2 * PAGE))
            assert b.recv_into(view, 2 * PAGE, socket.MSG_WAITALL) == 2 * PAGE
    view.release()
    assert tracked.sync() == [20, 21]
    tracked.protection.close()


def test_second_mapping_is_not_seen():
    """Why a device logs what it writes: the guest's tracker knows the guest's mapping only."""
    tracked = Tracked("wp-async")
    for page in range(PAGES):
        tracked.write(page)
    tracked.log.start()
    with GuestMemory.from_fds(tracked.memory.regions) as device:
        device.write(5 * PAGE, b"by the device")
    assert tracked.sync() == []
    tracked.protection.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_concurrent_writer_loses_no_page(kind):
    """Another process writes while this one syncs: what each sync found, copied, is at last the RAM itself."""
    if kind == "wp-async" and not have_wp_async():
        pytest.skip("this kernel has no userfaultfd WP_ASYNC")
    log_fd = os.memfd_create("log")
    os.ftruncate(log_fd, SoftwareDirtyLog.bytes_for(PAGES))
    with GuestMemory.create(PAGES * PAGE) as memory:
        ram = memory.regions[0].fd
        command = [sys.executable, "-c", WRITER, kind, str(ram), str(log_fd), str(PAGES)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[ram, log_fd]) as writer:
            assert writer.stdin is not None
            assert writer.stdout is not None
            if kind == "software":
                log = SoftwareDirtyLog(PAGES, log_fd)
            else:
                address = int(writer.stdout.readline())
                log = WpAsyncDirtyLog(writer.pid, [TrackedRange(0, PAGES * PAGE, address)], PageLayout(PAGES))
            log.start()
            os.set_blocking(writer.stdout.fileno(), False)
            copy = np.zeros(PAGES, np.uint8)
            writer.stdin.write(b"go\n")
            writer.stdin.flush()
            syncs, done = 0, False
            while not done:
                done = bool(writer.stdout.readline())  # before the sync, so that the last one sees everything
                found = page_set()
                log.sync(found)
                for page in found.numbers().tolist():
                    copy[page] = memory.read(page * PAGE, 1)[0]
                syncs += 1
            log.stop()
            writer.stdin.write(b"end\n")
            writer.stdin.flush()
        assert writer.returncode == 0
        assert copy.tolist() == [memory.read(p * PAGE, 1)[0] for p in range(PAGES)]
        assert copy.max() == 39
        assert syncs > 1
    os.close(log_fd)


# -- each on its own --------------------------------------------------------------------------------------------------


def test_software_start_forgets_and_harms_nothing():
    """`start` clears the log into a buffer of its own; it once handed C memory that was freed."""
    log = SoftwareDirtyLog(1 << 20)
    for _ in range(50):
        log.mark(5, 1000)
        log.start()
        assert log.sync(page_set(1 << 20)) == 0


@pytest.mark.parametrize(("first", "pages"), [(-1, 1), (PAGES, 1), (0, PAGES + 1)])
def test_software_marks_outside(first, pages):
    with pytest.raises(UsageError):
        SoftwareDirtyLog(PAGES).mark(first, pages)


def test_software_marks_bytes():
    """A page touched in part is written; ranges outside the log are left out."""
    log = SoftwareDirtyLog(PAGES)
    log.mark_range(PAGE - 1, 2)
    log.mark_range(5 * PAGE, 0)
    log.mark_ranges(np.array([8 * PAGE + 5, 1 << 50], np.uint64), np.array([1, 1], np.uint64))
    found = page_set()
    assert log.sync(found) == 3
    assert found.numbers().tolist() == [0, 1, 8]


def test_software_needs_room():
    fd = os.memfd_create("small")
    with pytest.raises(UsageError, match="needs"):
        SoftwareDirtyLog(1 << 20, fd)
    os.close(fd)


def ram_at(*gpas):
    return GuestMemory.create([(gpa, 64 * PAGE) for gpa in gpas])


def test_software_costs_what_is_there():
    """However high it lies, and with its pages named by their numbers."""
    high = (1 << 52) - 64 * PAGE
    with ram_at(0x80000000, high) as memory:
        log = SoftwareDirtyLog.for_memory(memory)
        assert log.bits.nbytes == 128 // 8
        log.mark(0x80000)
        log.mark_range(high + 64 * PAGE - 1, 1)
        log.mark_ranges(np.array([0x80000000 - 1, high - 1], np.uint64), np.array([2, 2], np.uint64))
        found = PageSet(memory.page_layout)
        assert log.sync(found) == 3
        assert found.numbers().tolist() == [0x80000, high >> 12, (high >> 12) + 63]


@pytest.mark.parametrize("page", [0, 63, 0x80000 - 1, 0x80000 + 64])
def test_software_marks_that_are_no_ram(page):
    """Counted from the start of RAM, say: a mistake that must not cost pages."""
    with ram_at(0x80000000) as memory:
        log = SoftwareDirtyLog.for_memory(memory)
        with pytest.raises(UsageError, match="not all among those that exist"):
            log.mark(page)
        with pytest.raises(UsageError, match="not all among those that exist"):
            log.mark_range(page * PAGE, 1)
        assert log.sync(PageSet(memory.page_layout)) == 0


def test_software_by_number():
    """A log made for so many page numbers, holes counted: marks in holes are told, not lost."""
    with ram_at(0, 0x100000) as memory:
        log, found = SoftwareDirtyLog(memory.page_span), PageSet(memory.page_layout)
        log.check_memory(memory)
        log.mark(3)
        log.mark(0x101)
        assert log.sync(found) == 2
        assert found.numbers().tolist() == [3, 0x101]
        log.mark(64)
        log.mark(5)
        with pytest.raises(UsageError, match="1 pages were marked as written that are no RAM, the first 0x40"):
            log.sync(found)
        assert found.numbers().tolist() == [3, 5, 0x101]


@pytest.mark.parametrize("pages", [0, 10, 0x80000, 0x80000 + 63])
def test_software_that_does_not_cover_ram(pages):
    """Refused before anything is migrated, alone or as a part."""
    with ram_at(0x80000000) as memory:
        log, whole = SoftwareDirtyLog(pages), SoftwareDirtyLog.for_memory(memory)
        for each in (log, CombinedLog("both", [whole, log])):
            with pytest.raises(UsageError, match="does not cover all of memory"):
                check_covers(each, memory)
        with pytest.raises(UsageError, match="cannot be fetched"):
            log.sync(PageSet(memory.page_layout))
        check_covers(whole, memory)


def test_software_bits_behind_the_last_page():
    """A writer in another process may scribble anywhere in the shared memory."""
    log = SoftwareDirtyLog(70)
    log.bits[:] = ~np.uint64(0)
    found = page_set(70)
    assert log.sync(found) == 70
    assert found.numbers().tolist() == list(range(70))
    assert len(found) == 70


def test_shared_between_mappings():
    fd = os.memfd_create("log")
    os.ftruncate(fd, SoftwareDirtyLog.bytes_for(PAGES))
    writer, reader = SoftwareDirtyLog(PAGES, fd), SoftwareDirtyLog(PAGES, fd)
    os.close(fd)
    writer.mark(77)
    found = page_set()
    assert reader.sync(found) == 1
    assert found.numbers().tolist() == [77]
    assert writer.sync(found) == 0


def test_combined():
    """Findings of all parts, and what is always counted."""
    a, b = SoftwareDirtyLog(PAGES), SoftwareDirtyLog(PAGES)
    log = CombinedLog("both", [a, b], always=[(0, 2 * PAGE)])
    log.start()
    a.mark(10)
    b.mark(20)
    found = page_set()
    log.sync(found)
    assert found.numbers().tolist() == [0, 1, 10, 20]
    log.stop()


def test_wp_async_into_a_page_set_that_lacks_pages():
    """It is refused before anything is scanned: no word behind it is written, no page forgotten."""
    with GuestMemory.create(PAGES * PAGE) as memory:
        protection = WriteProtection(memory)
        log = WpAsyncDirtyLog(os.getpid(), protection.ranges, memory.page_layout)
        log.start()
        memory.write(0, b"x" * memory.size)
        for layout in (0, 1, PAGES - 1, [(1, PAGES)], [(0, PAGES // 2), (PAGES // 2 + 1, PAGES)]):
            short = PageSet(PageLayout(layout))
            with pytest.raises(UsageError):
                log.sync(short)
            assert not len(short)
        whole = PageSet(memory.page_layout)
        assert log.sync(whole) == PAGES == len(whole)
        log.stop()
        protection.close()


@pytest.mark.parametrize(
    ("gpa", "size", "address"),
    [(0, 64 * PAGE + 4095, 0), (0, 64 * PAGE, 100), (8, 64 * PAGE, 0), (0, -PAGE, 0), (-PAGE, 2 * PAGE, 0),
     (PAGE, 64 * PAGE, 0), (0, 64 * PAGE, 1 << 64)],
)  # fmt: skip
def test_wp_async_of_ranges_that_are_no_pages_of_this_memory(gpa, size, address):
    """What a guest says of its mappings is checked: a byte too many is a page too many in the bitmap."""
    with pytest.raises(MissingFacility, match="tracks"):
        WpAsyncDirtyLog(os.getpid(), [TrackedRange(gpa, size, address)], PageLayout(64))


def test_wp_async_of_a_process_that_is_gone():
    with pytest.raises(MissingFacility, match="pagemap"):
        WpAsyncDirtyLog(1 << 22, [TrackedRange(0, PAGE, mmap.PAGESIZE)], PageLayout(1))
    with pytest.raises(MissingFacility, match="outside guest memory"):
        WpAsyncDirtyLog(os.getpid(), [TrackedRange(0, 2 * PAGE, mmap.PAGESIZE)], PageLayout(1))


def test_wp_async_of_a_part():
    with GuestMemory.create(2 * PAGE) as memory:
        log = WpAsyncDirtyLog(os.getpid(), [TrackedRange(0, PAGE, mmap.PAGESIZE)], memory.page_layout)
        with pytest.raises(UsageError, match="does not track all of memory"):
            check_covers(log, memory)
        log.stop()


def test_two_regions():
    """Page numbers are guest addresses, holes counted."""
    with GuestMemory.create([(0, 8 * PAGE), (64 * PAGE, 8 * PAGE)]) as memory:
        if not have_wp_async():
            pytest.skip("this kernel has no userfaultfd WP_ASYNC")
        memory.write(0, b"x")
        protection = WriteProtection(memory)
        log = WpAsyncDirtyLog(os.getpid(), protection.ranges, memory.page_layout)
        log.start()
        memory.write(3 * PAGE, b"x")
        memory.write(66 * PAGE, b"x")
        found = PageSet(memory.page_layout)
        log.sync(found)
        assert found.numbers().tolist() == [3, 66]
        log.stop()
        protection.close()
