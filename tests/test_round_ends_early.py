"""On a limited link a round ends when what is left fits the downtime limit, as QEMU's does; else all is sent."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np
import pytest

from host_qemu_side.migration import Limits, Migration, Receiver, Record, StreamReader
from vring.dirty.software import SoftwareDirtyLog
from vring.memory import PAGE_SIZE, GuestMemory

MIB = 1 << 20
RAM = 64 * MIB


class Guest:
    def freeze(self) -> None: ...

    def thaw(self) -> None: ...


class IntoReceiver:
    """An output that feeds a receiver in this process."""

    two_way = True

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self._there, self._back = StreamReader(), StreamReader()

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        for buffer in buffers:
            self._there.feed(buffer)
        while (record := self._there.next()) is not None:
            for answer in self.receiver.handle(record):
                self._back.feed(answer)

    def flush(self) -> bool:
        return True

    def answer(self) -> Record | None:
        return self._back.next()

    def finish(self) -> None: ...


@pytest.mark.parametrize(
    ("bandwidth", "downtime", "left"),
    [(64 * MIB, 0.25, 16 * MIB), (0, 0.25, 0), (64 * MIB, 0.0, 0), (64 * MIB, 0.9, 32 * MIB)],
)
def test_what_is_left_for_the_last_round(bandwidth: int, downtime: float, left: int) -> None:
    memory = GuestMemory.from_buffers([(0, mmap.mmap(-1, RAM))])
    memory.array(0, RAM // 8, np.uint64)[:] = np.arange(1, RAM // 8 + 1)
    receiver = Receiver()
    log = SoftwareDirtyLog.for_memory(memory)
    limits = Limits(bandwidth=bandwidth, downtime=downtime)
    migration = Migration(memory, log, IntoReceiver(receiver), Guest(), limits=limits)
    now = 0.0
    while not migration.finished:
        migration.step(now)
        now += 0.001
    first, last = migration.result.rounds[0], migration.result.rounds[-1]
    assert receiver.memory is not None
    assert receiver.memory.read(0, RAM) == memory.read(0, RAM)
    assert sum(r.pages_normal for r in migration.result.rounds) == RAM // PAGE_SIZE
    assert last.pages_normal * PAGE_SIZE <= left  # never more than fits, nor more than was sent before
    assert last.pages_normal * PAGE_SIZE >= left * 0.8
    assert first.pages_normal * PAGE_SIZE == RAM - last.pages_normal * PAGE_SIZE
