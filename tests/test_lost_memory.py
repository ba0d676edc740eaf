"""Memory that its owner cuts off while it is used: the process lives on, the memory is marked, what needed it ends.

A process that takes SIGBUS over does so for good: each test has one of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vring.memory import GuestMemory

TESTS = Path(__file__).parent
PRELUDE = f"""
import faulthandler, mmap, os, sys
import numpy as np
sys.path.insert(0, {str(TESTS)!r})
from vring.errors import PeerVanished
from vring.memory import PAGE_SIZE, GuestMemory, Region
from vring.peer import survive_lost_memory

def made(pages=64):
    fd = os.memfd_create("theirs")
    os.ftruncate(fd, pages * PAGE_SIZE)
    memory = GuestMemory.from_fds([Region(0, pages * PAGE_SIZE, fd)])
    memory.array(0, pages * PAGE_SIZE)[:] = 0x5A
    return fd, memory
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + program], capture_output=True, text=True, timeout=60, check=False
    )


def works(program: str) -> None:
    done = run(program)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


ACCESSES = {
    "numpy reads": "assert memory.array(0, 64 * PAGE_SIZE).sum() >= 0",
    "numpy writes": "memory.array(0, 64 * PAGE_SIZE)[:] = 1",
    "memoryview": "memory.read(40 * PAGE_SIZE, 8)",
    "ring in C": """
from vring.split import DeviceQueue, QueueLayout
queue = DeviceQueue(memory, QueueLayout(64, 40 * PAGE_SIZE, 42 * PAGE_SIZE, 44 * PAGE_SIZE), base=0, index=0)
queue.pop()""",
    "pages taken in C": """
from host_qemu_side.migration.ram import RamState
os.ftruncate(fd, 64 * PAGE_SIZE)
memory.array(0, 64 * PAGE_SIZE)[:] = 0x5A
state = RamState(memory)
os.ftruncate(fd, 8 * PAGE_SIZE)
try:
    state.take()
    raise SystemExit("zeros were taken for the guest's")
except PeerVanished:
    pass""",
    "another thread": """
import threading
thread = threading.Thread(target=lambda: memory.array(0, 64 * PAGE_SIZE).sum())
thread.start()
thread.join()""",
}


@pytest.mark.parametrize("access", ACCESSES.values(), ids=ACCESSES)
def test_whoever_touches_it_lives_on(access: str) -> None:
    works(f"""
survive_lost_memory()
other = made()[1]
fd, memory = made()
os.ftruncate(fd, 8 * PAGE_SIZE)
assert not memory.lost  # nobody has met it yet
{access}
assert memory.lost and not other.lost
assert int(memory.array(9 * PAGE_SIZE, 1)[0]) in (0, 1), "writable, and nobody else's"
try:
    memory.check_lost()
    raise SystemExit("not told")
except PeerVanished as error:
    assert "lost" in str(error)
memory.close()
assert (other.array(0, 64 * PAGE_SIZE) == 0x5A).all()
""")


def test_without_the_handler_it_kills() -> None:
    done = run("fd, memory = made(); os.ftruncate(fd, 0); memory.read(0, 8)")
    assert done.returncode == -signal.SIGBUS


@pytest.mark.parametrize("close", ["", "memory.close(); memory = mmap.mmap(fd, 64 * PAGE_SIZE)"])
def test_a_fault_elsewhere_goes_on_to_who_had_it_before(close: str) -> None:
    """Of memory that is not a guest's, or is so no longer, nothing is put right: that is a fault of the program."""
    done = run(f"""
faulthandler.enable()
survive_lost_memory()
fd, memory = made()
array = mmap.mmap(fd, 64 * PAGE_SIZE)
{close}
os.ftruncate(fd, 0)
array[0]
""")
    assert done.returncode == -signal.SIGBUS
    assert "Bus error" in done.stderr, "faulthandler was asked"


def test_mappings_come_and_go() -> None:
    """A range is guarded for as long as it is mapped: no longer, and its place in the table serves the next one."""
    works("""
survive_lost_memory()
for n in range(2000):
    fd, memory = made(2)
    if n % 3 == 0:
        os.ftruncate(fd, 0)
        memory.read(0, 8)
    assert memory.lost == (n % 3 == 0)
    if n % 2:
        memory.close()
        assert not memory.lost
    os.close(fd)
""")


def test_a_migration_of_it_fails() -> None:
    """Zeros in place of the guest's pages never reach a destination that could go on with them."""
    works("""
import vring.memory
vring.memory.keep_size = lambda fd: None  # as of a guest whose memory is its own
from harness import World
survive_lost_memory()
world = World()
migration = world.migrate(bandwidth=float(1 << 20))
world.to_round(0)
os.ftruncate(world.memory.regions[0].fd, 1 << 20)
arrived = world.finish(1e7)
assert isinstance(arrived.error, PeerVanished), arrived.error
assert "memory is lost" in str(arrived.error)
assert not migration.committed
""")


def test_a_hole_where_there_was_memory_is_noticed() -> None:
    """What is past the end of the file looks like a page that was never written: no fault says otherwise."""
    works("""
from host_qemu_side.migration.ram import RamState
fd, memory = made()
state = RamState(memory)
os.ftruncate(fd, 0)
state.refresh_holes(None)
try:
    state.take()
    raise SystemExit("zeros were taken for the guest's")
except PeerVanished:
    pass
""")


def test_our_own_memory_cannot_be_cut_off() -> None:
    with GuestMemory.create([(0, 1 << 20), (1 << 30, 1 << 20)]) as memory, pytest.raises(PermissionError):
        os.ftruncate(memory.regions[0].fd, 4096)
