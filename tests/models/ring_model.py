"""Aids for the ring tests: a raw ring written byte by byte, and a plain model of what a queue should do."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from vring.layout import DESC, USED_ELEM, QueueLayout
from vring.memory import GuestMemory

NEXT, WRITE, INDIRECT = 1, 2, 4


class RawRing:
    """Both shared halves of a ring as plain arrays, for playing a peer that keeps no rule."""

    def __init__(self, memory: GuestMemory, layout: QueueLayout) -> None:
        size = layout.size
        self.memory, self.size = memory, size
        self.desc = memory.array(layout.desc, size, DESC)
        self.avail = memory.array(layout.avail, size + 3, np.uint16)
        self.used_flags = memory.array(layout.used, 2, np.uint16)
        self.used = memory.array(layout.used + 4, size, USED_ELEM)
        self.avail_event = memory.array(layout.used + 4 + 8 * size, 1, np.uint16)

    def put(self, i: int, addr: int, length: int, flags: int = 0, follow: int = 0) -> None:
        self.desc[i] = (addr, length, flags, follow)

    def table(self, gpa: int, *entries: tuple[int, int, int, int]) -> None:
        self.memory.array(gpa, len(entries), DESC)[:] = list(entries)

    def expose(self, *heads: int) -> None:
        """Make heads available."""
        for head in heads:
            idx = int(self.avail[1])
            self.avail[2 + idx % self.size] = head
            self.avail[1] = (idx + 1) & 0xFFFF

    def use(self, head: int, length: int = 0) -> None:
        """Write one used element."""
        idx = int(self.used_flags[1])
        self.used[idx % self.size] = (head, length)
        self.used_flags[1] = (idx + 1) & 0xFFFF

    @property
    def used_event(self) -> int:
        return int(self.avail[2 + self.size])

    @used_event.setter
    def used_event(self, value: int) -> None:
        self.avail[2 + self.size] = value & 0xFFFF


@dataclass
class Buffer:
    token: int
    segs: list[tuple[int, int, int]]
    descs: int
    written: int = 0

    @property
    def writable(self) -> int:
        return sum(length for _, length, flags in self.segs if flags)


@dataclass
class QueueModel:
    """What the two halves together should do, without indices: buffers move from list to list."""

    size: int
    added: deque[Buffer] = field(default_factory=deque)
    avail: deque[Buffer] = field(default_factory=deque)
    held: dict[int, Buffer] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    used: deque[Buffer] = field(default_factory=deque)
    free: int = 0

    def __post_init__(self) -> None:
        self.free = self.size

    def add(self, buffers: list[Buffer]) -> int:
        n = 0
        for buffer in buffers:
            if buffer.descs > self.free:
                break
            self.free -= buffer.descs
            self.added.append(buffer)
            n += 1
        return n

    def publish(self) -> int:
        n = len(self.added)
        self.avail.extend(self.added)
        self.added.clear()
        return n

    def collect(self, n: int) -> list[Buffer]:
        got = [self.used.popleft() for _ in range(min(n, len(self.used)))]
        self.free += sum(buffer.descs for buffer in got)
        return got

    @property
    def outstanding(self) -> list[Buffer]:
        return [*self.added, *self.avail, *self.held.values(), *self.used]
