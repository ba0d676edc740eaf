"""Migrate the RAM of an emulator that knows its guest's stores: no vhost-user, no sockets, no guest of ours.

The emulator owns the memory, marks a dirty log after each store, and steps the migration between its own steps. What
comes out is a stream of records; here it goes straight into a receiver in the same process.
"""

from __future__ import annotations

import mmap
import random
from collections.abc import Sequence

from host_qemu_side.migration import Limits, Migration, Receiver, Record, StreamReader
from host_qemu_side.witness import Witness
from vring.dirty.software import SoftwareDirtyLog
from vring.memory import PAGE_SIZE, GuestMemory


class Emulator:
    """A machine with 8 MiB of RAM that writes to it at random."""

    def __init__(self) -> None:
        self.memory = GuestMemory.from_buffers([(0, mmap.mmap(-1, 8 << 20))])
        self.log = SoftwareDirtyLog.for_memory(self.memory)
        self.running = True

    def step(self) -> None:
        """One instruction: a store, then the mark."""
        if self.running:
            address = random.randrange(self.memory.size)
            self.memory.write(address, b"\x55")
            self.log.mark(address // PAGE_SIZE)

    def freeze(self) -> None:
        """Stop it."""
        self.running = False

    def thaw(self) -> None:
        """Let it go on."""
        self.running = True


class IntoReceiver:
    """An output that feeds a receiver and brings its answers back."""

    two_way = True

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self._there, self._back = StreamReader(), StreamReader()
        for greeting in receiver.hello():
            self._back.feed(greeting)

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Take bytes."""
        for buffer in buffers:
            self._there.feed(buffer)
        while (record := self._there.next()) is not None:
            for answer in self.receiver.handle(record):
                self._back.feed(answer)

    def flush(self) -> bool:
        """Everything is sent at once."""
        return True

    def answer(self) -> Record | None:
        """Return what the receiver said."""
        return self._back.next()

    def finish(self) -> None:
        """Nothing to make durable."""


def main() -> None:
    """Run the emulator and the migration by turns."""
    emulator, receiver = Emulator(), Receiver()
    witness = Witness(emulator.memory, None)  # compares every page in the end; leave it out where time matters
    migration = Migration(
        emulator.memory,
        emulator.log,
        IntoReceiver(receiver),
        emulator,
        limits=Limits(bandwidth=0, downtime=0.001),
        observer=witness,
    )
    now = 0.0
    while not migration.finished:
        for _ in range(20):
            emulator.step()
        migration.step(now)
        now += 0.001
    result, verdict = migration.result, witness.verdict()
    print(f"{len(result.rounds)} rounds, {result.bytes_sent >> 10} KiB, pages {result.pages()}")
    print(f"oracle: {verdict.pages_checked} pages compared, {verdict.pages_wrong} wrong")
    assert not verdict.pages_wrong


if __name__ == "__main__":
    main()
