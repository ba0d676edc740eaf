"""A driver that writes descriptors by hand, right or wrong, over virtio-mmio; and the devices it is set upon."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from balloon_dev.config import ACTUAL, CMD_ID, POISON_VAL
from balloon_dev.device import SUPPORTED_FEATURES, BalloonDevice
from balloon_dev.profiles import QEMU
from guest_driver.qemu.machine import QemuMachine
from guest_driver.qemu.migration import _prepare
from vring.features import CommonFeature, Status
from vring.memory import PAGE_SIZE, GuestMemory
from vring.mmio import MmioDevice
from vring.mmio_registers import CONFIG_OFFSET, Register
from vring.split import QueueLayout

MIB = 1 << 20
MEMORY = 64 * MIB
INFLATE, DEFLATE, STATS, HINT, REPORT = range(5)
SIZES = (128, 128, 128, 1024, 32)
RINGS, DATA, BLOCK = 2 * MIB, 4 * MIB, 16 * MIB
WRITE, NEXT, INDIRECT = 2, 1, 4
JUNK = b"\x55"
FEATURES = SUPPORTED_FEATURES & ~int(CommonFeature.EVENT_IDX)


@dataclass
class Desc:
    """A descriptor to be written as it stands."""

    addr: int
    length: int
    flags: int = 0
    next: int = 0

    def pack(self) -> bytes:
        return struct.pack("<QIHH", self.addr, self.length, self.flags, self.next)


class Peer:
    """A device to be tried."""

    name: str
    memory: GuestMemory

    def read(self, offset: int, size: int) -> int:
        raise NotImplementedError

    def write(self, offset: int, size: int, value: int) -> None:
        raise NotImplementedError

    def new_run(self) -> None:
        """Ask for hints, after ending a run before."""

    def hinted(self) -> int:
        """Pages that hints have spared so far."""
        raise NotImplementedError

    def size_said(self) -> int:
        """Bytes of guest memory as the host sees them."""
        raise NotImplementedError

    def close(self) -> None:
        pass


class OurPeer(Peer):
    """Our device behind our register file, in this process."""

    name = "ours"

    def __init__(self) -> None:
        self.memory = GuestMemory.create(MEMORY)
        self.device = BalloonDevice(SUPPORTED_FEATURES, profile=QEMU, discard=self._discard)
        self.device.hint_sink = self._hint
        self.mmio = MmioDevice(self.device, self.memory, irq=lambda level: None)
        self.read, self.write = self.mmio.read, self.mmio.write  # type: ignore[method-assign]
        self._pages: set[int] = set()

    def _discard(self, addr: np.ndarray, length: np.ndarray) -> None:
        for a, n in zip(addr.tolist(), length.tolist(), strict=True):
            self.memory.write(a, bytes(n))

    def _hint(self, command_id: int, addr: np.ndarray, length: np.ndarray) -> None:
        for a, n in zip(addr.tolist(), length.tolist(), strict=True):
            self._pages |= set(range(-(-a // PAGE_SIZE), (a + n) // PAGE_SIZE))

    def new_run(self) -> None:
        self.device.finish_hinting()
        self.device.start_hinting()
        self._pages.clear()
        self.mmio.deliver()

    def hinted(self) -> int:
        return len(self._pages)

    def size_said(self) -> int:
        return MEMORY - self.device.actual * PAGE_SIZE


class QemuPeer(Peer):
    """A QEMU; its migration goes into a file, slowly, so that a hint run stays open."""

    name = "QEMU"

    def __init__(self, machine: QemuMachine) -> None:
        self.machine, self.memory = machine, machine.memory
        self._bus = machine.bus()
        self.read, self.write = self._bus.read, self._bus.write  # type: ignore[method-assign]
        self._left = 0
        self.memory.write(MIB, JUNK * (MEMORY - MIB))  # pages of zeros would be sent at once
        _prepare(machine)
        machine.qmp.execute("migrate-set-parameters", max_bandwidth=PAGE_SIZE)

    def new_run(self) -> None:
        qmp = self.machine.qmp
        self._cancel()
        sink = os.memfd_create("sink")
        try:
            qmp.execute("getfd", [sink], fdname="sink")
        finally:
            os.close(sink)
        qmp.execute("migrate", uri="fd:sink")
        # Ids and figures, not events: one of the migration before may come late.
        assert RawDriver.wait(lambda: "ram" in qmp.execute("query-migrate"), 5.0), "QEMU does not begin to migrate"
        assert RawDriver.wait(lambda: self._bus.read(CONFIG_OFFSET + CMD_ID, 4) > 1, 5.0), "QEMU asks for no hints"
        self._left = self._settled()

    def _remaining(self) -> int:
        return int(self.machine.qmp.execute("query-migrate")["ram"]["remaining"]) // PAGE_SIZE

    def _settled(self) -> int:
        """Return what is left when the first burst of pages is out, however late it comes."""
        seen = [self._remaining()]
        while len(seen) < 100 and (len(seen) < 6 or seen[-6] - seen[-1] > 2):
            time.sleep(0.02)
            seen.append(self._remaining())
        return seen[-1]

    def hinted(self) -> int:
        spared = self._left - self._remaining()
        return spared if spared > 64 else 0  # less is what the migration sent meanwhile

    def _cancel(self) -> None:
        qmp = self.machine.qmp
        if qmp.execute("query-migrate").get("status") in ("active", "setup"):
            qmp.execute("migrate_cancel")
            qmp.wait_event("MIGRATION", 5.0, status="cancelled")

    def size_said(self) -> int:
        return int(self.machine.qmp.execute("query-balloon")["actual"])

    def close(self) -> None:
        self._cancel()


class RawDriver:
    """Sets a device up and does to its rings what it is told."""

    def __init__(self, peer: Peer) -> None:
        self.peer, self.memory = peer, peer.memory
        self.layouts = [
            QueueLayout(size, at, at + 0x8000, at + 0xC000)
            for size, at in ((size, RINGS + i * 0x10000) for i, size in enumerate(SIZES))
        ]
        self.avail = [0] * len(SIZES)

    def set(self, register: Register, value: int) -> None:
        self.peer.write(int(register), 4, value & 0xFFFFFFFF)

    def get(self, register: Register) -> int:
        return self.peer.read(int(register), 4)

    @property
    def status(self) -> int:
        return self.get(Register.Status)

    @property
    def needs_reset(self) -> bool:
        return bool(self.status & Status.DEVICE_NEEDS_RESET)

    def start(self, features: int = FEATURES, *, ok: bool = True) -> int:
        """Reset, negotiate, set all queues up; return the status after FEATURES_OK."""
        self.set(Register.Status, 0)
        self.set(Register.Status, 1)
        self.set(Register.Status, 3)
        for word in (0, 1):
            self.set(Register.DriverFeaturesSel, word)
            self.set(Register.DriverFeatures, features >> 32 * word)
        self.set(Register.Status, 11)
        settled = self.status
        for i, layout in enumerate(self.layouts):
            self.memory.write(layout.desc, bytes(0x10000))
            self.set(Register.QueueSel, i)
            self.set(Register.QueueSize, layout.size)
            for name, low in (("desc", 0x80), ("avail", 0x90), ("used", 0xA0)):
                self.peer.write(low, 4, getattr(layout, name))
                self.peer.write(low + 4, 4, 0)
            self.set(Register.QueueReady, 1)
        self.avail = [0] * len(SIZES)
        if ok:
            self.set(Register.Status, 15)
        return settled

    # -- rings ----------------------------------------------------------------------------------------------------

    def put(self, queue: int, *descriptors: Desc, at: int = 0) -> None:
        """Write descriptors into a table from index `at` on."""
        self.memory.write(self.layouts[queue].desc + 16 * at, b"".join(d.pack() for d in descriptors))

    def offer(self, queue: int, *heads: int, index: int | None = None) -> None:
        """Put heads into the avail ring and set its index (`index`: to something else than it should be)."""
        layout = self.layouts[queue]
        for head in heads:
            self.memory.write(layout.avail + 4 + 2 * (self.avail[queue] % layout.size), struct.pack("<H", head))
            self.avail[queue] = (self.avail[queue] + 1) & 0xFFFF
        if index is not None:
            self.avail[queue] = index & 0xFFFF
        self.memory.write(layout.avail + 2, struct.pack("<H", self.avail[queue]))

    def used(self, queue: int) -> int:
        return int(struct.unpack("<H", self.memory.read(self.layouts[queue].used + 2, 2))[0])

    def kick(self, queue: int, timeout: float = 3.0) -> int:
        """Kick; wait until all that is available was used or the device gives up; return how many were."""
        before = self.used(queue)
        self.set(Register.QueueNotify, queue)
        self.wait(lambda: self.used(queue) == self.avail[queue] or self.needs_reset, timeout)
        return (self.used(queue) - before) & 0xFFFF

    @staticmethod
    def wait(done: Callable[[], bool], timeout: float = 1.0) -> bool:
        deadline = time.monotonic() + timeout
        while not done():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def send(self, queue: int, *descriptors: Desc, timeout: float = 3.0) -> int:
        """Write descriptors from index 0 on, offer head 0, kick; return how many buffers came back."""
        self.put(queue, *descriptors)
        self.offer(queue, 0)
        return self.kick(queue, timeout)

    # -- the balloon ----------------------------------------------------------------------------------------------

    def pfns(self, *pfns: int, at: int = DATA) -> Desc:
        """Write PFNs into RAM and return the descriptor for them."""
        self.memory.write(at, struct.pack(f"<{len(pfns)}I", *pfns))
        return Desc(at, 4 * len(pfns))

    def junk(self, gpa: int, length: int = PAGE_SIZE) -> None:
        """Fill RAM, to see whether it is dropped."""
        self.memory.write(gpa, JUNK * length)

    def dropped(self, gpa: int, length: int = PAGE_SIZE) -> int:
        """Pages of a range that hold no junk any more."""
        pages = np.frombuffer(self.memory.read(gpa, length), np.uint8).reshape(-1, PAGE_SIZE)
        return int(np.count_nonzero(~pages.any(axis=1)))

    def command(self, value: int, length: int = 4) -> int:
        """Send a command on the hint queue; return how many buffers came back."""
        self.memory.write(DATA, struct.pack("<II", value, 0))
        return self.send(HINT, Desc(DATA, length))

    def command_id(self) -> int:
        return self.peer.read(CONFIG_OFFSET + CMD_ID, 4)

    def run(self) -> int:
        """Have the host ask for hints, and open the run; return its id."""
        self.peer.new_run()
        number = self.command_id()
        assert self.command(number) == 1
        return number

    def set_actual(self, pages: int) -> None:
        self.peer.write(CONFIG_OFFSET + ACTUAL, 4, pages)

    def set_poison(self, value: int) -> None:
        self.peer.write(CONFIG_OFFSET + POISON_VAL, 4, value)
