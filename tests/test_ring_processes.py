"""The ring between real processes: contents, lost wake-ups, and a driver that goes on in another process."""

from __future__ import annotations

import os
import selectors
import signal
import time
import traceback

import numpy as np
import pytest

from vring.memory import GuestMemory, Region
from vring.split import SEG_WRITE, DeviceQueue, DriverQueue, QueueLayout

RAM = 1 << 20
RING, STATE, TABLES, DATA = 0x0, 0x10000, 0x20000, 0x80000
SLOT = 64
LIMIT = 60.0


def fork(child):
    """Run `child` in a forked process that exits 0, or 1 with a traceback, and never outlives LIMIT."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.alarm(int(LIMIT))
        child()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def reap(pid, timeout=LIMIT):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail("the other process did not end")


def wait(eventfd):
    """Sleep until the peer rings; a lost wake-up ends here."""
    with selectors.DefaultSelector() as selector:
        selector.register(eventfd, selectors.EVENT_READ)
        assert selector.select(20), "lost wake-up"
    os.eventfd_read(eventfd)


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("sleepy", [False, True], ids=["spinning", "sleeping"])
def test_two_processes(event_idx, indirect, sleepy):
    """split.supply.driver-1, split.kick.driver-1, split.used.device-1: every buffer arrives whole and is answered.

    With `sleepy` each side enables its doorbell and sleeps whenever there is nothing to do: a lost wake-up hangs.
    """
    size, total = 64, 20000 if sleepy else 30000
    memory = GuestMemory.create(RAM)
    layout = QueueLayout.place(RING, size)
    tables = {"indirect": TABLES, "indirect_len": 2} if indirect else {}
    driver = DriverQueue(memory, layout, state=STATE, event_idx=event_idx, base=65000, **tables)
    kick, call = os.eventfd(0), os.eventfd(0)
    region = memory.regions[0]
    fd = os.dup(memory.regions[0].fd)

    def device_process():
        mine = GuestMemory.from_fds([Region(0, region.size, fd)])
        device = DeviceQueue(mine, layout, base=65000, event_idx=event_idx, indirect=indirect)
        words = mine.array(0, RAM // 8, np.uint64)
        rng = np.random.default_rng(1)
        done = 0
        device.disable_notify()
        while done < total:
            batch = device.pop(int(rng.integers(1, size)), spins=0 if sleepy else 1000)
            if len(batch):
                assert batch.chains["n_segs"].tolist() == [2] * len(batch)
                question = batch.segs["addr"][0::2] // 8
                answer = batch.segs["addr"][1::2] // 8
                words[answer] = ~words[question]
                order = rng.permutation(len(batch))
                if device.push(batch.heads[order], batch.chains["writable"][order]):
                    os.eventfd_write(call, 1)
                done += len(batch)
            elif sleepy and not device.enable_notify():
                wait(kick)
                device.disable_notify()

    pid = fork(device_process)
    try:
        words = memory.array(0, RAM // 8, np.uint64)
        rng = np.random.default_rng(2)
        added = collected = 0
        free_slots = list(range(size))
        slot_of: dict[int, int] = {}
        driver.disable_callbacks()
        deadline = time.monotonic() + LIMIT
        while collected < total:
            n = min(int(rng.integers(1, size // 2)), total - added, len(free_slots))
            slots = free_slots[:n]
            tokens = np.arange(added, added + n, dtype=np.uint64)
            segs = []
            for token, slot in zip(tokens.tolist(), slots, strict=True):
                at = DATA + slot * SLOT
                words[at // 8] = token ^ 0x5555
                segs += [(at, 8, 0), (at + 32, 8, SEG_WRITE)]
            fitted = driver.add(segs, tokens, [2] * n) if n else 0
            slot_of.update(zip(tokens[:fitted].tolist(), slots[:fitted], strict=True))
            del free_slots[:fitted]
            added += fitted
            if driver.publish():
                os.eventfd_write(kick, 1)
            back, lens = driver.collect()
            for token, length in zip(back.tolist(), lens.tolist(), strict=True):
                slot = slot_of.pop(token)
                assert length == 8
                assert int(words[(DATA + slot * SLOT + 32) // 8]) == ~(token ^ 0x5555) & (1 << 64) - 1
                free_slots.append(slot)
            collected += len(back)
            assert time.monotonic() < deadline
            if not len(back) and not fitted and sleepy and not driver.enable_callbacks(int(rng.integers(0, 4))):
                wait(call)
                driver.disable_callbacks()
        assert driver.outstanding == 0
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        reap(pid)
        for descriptor in (kick, call, fd):
            os.close(descriptor)


def test_driver_goes_on_in_another_process():
    """A guest is saved with its driver's state in RAM; the copy of that RAM, elsewhere, holds a driver that goes on."""
    layout = QueueLayout.place(RING, 32)
    memory = GuestMemory.create([(0, RAM)])
    driver = DriverQueue(memory, layout, state=STATE, event_idx=True, indirect=TABLES, indirect_len=4)
    device = DeviceQueue(memory, layout, event_idx=True, indirect=True)
    for turn in range(7):
        driver.add([(DATA, 8, 0), (DATA + 8, 8, SEG_WRITE)] * 3, [turn * 3 + i for i in range(3)], [2] * 3)
        driver.publish()
    heads = device.pop(9).heads.copy()  # the views hold until the next pop
    device.push(heads[2:5], 8)
    driver.collect(1)
    held = device.pop(2)
    device.unpop(2)
    assert len(held) == 2
    assert device.in_flight == 6

    copy = GuestMemory.create([(0, RAM)], name="destination")
    copy.write(0, memory.read(0, RAM))
    # The device cannot save what is in flight: it finishes, into the destination's ring, before the base is taken.
    device.rebind(copy)
    device.push(np.concatenate([heads[:2], heads[5:]]))
    base = device.next_avail
    fd = os.dup(copy.regions[0].fd)
    out, back = os.pipe()

    def destination():
        mine = GuestMemory.from_fds([Region(0, RAM, fd)])
        again = DriverQueue.attach(mine, STATE, index=3)
        other = DeviceQueue(mine, layout, base=base, event_idx=True, indirect=True)
        tokens = again.collect()[0].tolist()
        while again.outstanding:
            rest = other.pop(4)
            other.push(rest.heads, 0)
            tokens += again.collect()[0].tolist()
        assert again.num_free == 32
        os.write(back, np.array(tokens, dtype=np.uint64).tobytes())

    reap(fork(destination))
    tokens = np.frombuffer(os.read(out, 4096), dtype=np.uint64).tolist()
    assert sorted([*tokens, 2]) == list(range(21))
    for descriptor in (fd, out, back):
        os.close(descriptor)
