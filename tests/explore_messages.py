"""Random vhost-user messages to a real `balloon serve`: it lives on, answers its monitor, keeps no descriptor.

Usage: python tests/explore_messages.py [MESSAGES [SEED]]
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import random
import select
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from serve_process import Process

from balloon_cli.monitor_client import MonitorClient
from vring import vhost_user as vu
from vring.vhost_user import Request

RAM = 4 << 20
USER = 0x7F00_0000_0000
RING = 0x8000
"""Bytes between two rings."""
ODD = [0, 1, 2, 3, 4, 5, 63, 64, 127, 128, 255, 256, 1024, 0x7FFF, 0x8000, 0xFFFF, 1 << 31, (1 << 32) - 1]
WIDE = [*ODD, 1 << 32, 1 << 45, 1 << 52, 1 << 62, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1, USER, USER + RAM]
SILENT = 1.0
"""Seconds within which the monitor answers, whatever front ends do."""


@dataclass
class Findings:
    """What came of it."""

    messages: int = 0
    connections: int = 0
    descriptors: tuple[int, int] = (0, 0)
    rss_kib: tuple[int, int] = (0, 0)
    slowest: float = 0.0
    """Seconds of the monitor's slowest answer."""
    asked: int = 0
    wrong: list[str] = field(default_factory=list)


class Watch(threading.Thread):
    """Asks the monitor over and over; notes the slowest answer."""

    def __init__(self, path: Path, period: float = 0.02) -> None:
        super().__init__(daemon=True)
        self.slowest, self.asked, self.failed = 0.0, 0, ""
        self._path, self._period, self._ended = str(path), period, threading.Event()

    def run(self) -> None:
        try:
            client = MonitorClient(self._path, 20.0)
            while not self._ended.wait(self._period):
                began = time.monotonic()
                client.execute("query-device")
                self.slowest, self.asked = max(self.slowest, time.monotonic() - began), self.asked + 1
            client.close()
        except Exception as error:
            self.failed = repr(error)

    def end(self) -> None:
        self._ended.set()
        self.join(30)


class FrontEnd:
    """One connection of a front end that knows the protocol and follows it as it likes."""

    def __init__(self, path: Path, rng: random.Random) -> None:
        self.rng = rng
        self.sent = 0
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(2.0)
        try:
            self.socket.connect(str(path))
        except OSError:
            self.socket.close()
            raise
        self.ram = os.memfd_create("odd-ram")
        os.ftruncate(self.ram, RAM)
        self._own: list[int] = [self.ram]
        self._kicks: list[int] = []
        self._calls: list[int] = []

    def say(self, request: int, payload: bytes = b"", fds: list[int] | None = None, *, flags: int = 1) -> None:
        """Send one message; what the other end answered is thrown away."""
        self.sent += 1
        data = vu.HEADER.pack(request, flags, len(payload)) + payload
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([data], ancillary)
        # A socket with a timeout waits for it even where the call says not to.
        while select.select([self.socket], [], [], 0)[0] and self.socket.recv(1 << 16):
            pass

    def close(self) -> None:
        self.socket.close()
        for fd in self._own:
            os.close(fd)

    def descriptor(self) -> int:
        """Return one of any kind."""
        kind = self.rng.randrange(12)
        if kind < 5:
            fd = os.eventfd(self.rng.choice([0, 1, (1 << 32) - 1]), self.rng.choice([0, os.EFD_NONBLOCK]))
        elif kind < 7:
            ends = socket.socketpair()
            self._own.append(ends[1].detach())
            fd = ends[0].detach()
        elif kind < 8:
            fd, other = os.pipe()
            self._own.append(other)
        elif kind < 9:
            fd = os.memfd_create("small")
            os.ftruncate(fd, self.rng.choice([0, 4096, 1 << 20]))
        else:
            fd = os.open(self.rng.choice(["/dev/null", "/dev/zero", "/", "/proc/self/mem"]), os.O_RDONLY)
        self._own.append(fd)
        return fd

    def event(self, into: list[int]) -> int:
        fd = os.eventfd(0, self.rng.choice([0, os.EFD_NONBLOCK]))
        self._own.append(fd)
        into.append(fd)
        return fd

    # -- what a good front end says ------------------------------------------------------------------------------

    def hello(self) -> None:
        self.say(Request.GET_FEATURES)
        self.say(Request.SET_PROTOCOL_FEATURES, vu.pack_u64(self.rng.choice([0, (1 << 64) - 1, 0x229, 0x2229])))
        self.say(Request.SET_OWNER)
        self.features()

    def features(self) -> None:
        self.say(Request.SET_FEATURES, vu.pack_u64(self.rng.choice([0, 0x1_4000_0000, 0x1_7000_003F, 0x40000000])))

    def table(self) -> None:
        regions = [vu.MemoryRegion(0, RAM, USER, 0)]
        if self.rng.random() < 0.2:
            half = RAM // 2
            regions = [vu.MemoryRegion(0, half, USER, 0), vu.MemoryRegion(1 << 32, half, USER + half, half)]
        self.say(Request.SET_MEM_TABLE, vu.MemoryRegion.pack_table(regions), [self.ram] * len(regions))

    def ring(self, index: int) -> None:
        at = USER + 0x10000 + index * RING
        steps = [
            lambda: self.say(Request.SET_VRING_NUM, vu.VringState(index, self.rng.choice([32, 128, 256])).pack()),
            lambda: self.say(Request.SET_VRING_BASE, vu.VringState(index, self.rng.choice([0, 0, 5])).pack()),
            lambda: self.say(Request.SET_VRING_ADDR, vu.VringAddr(index, 0, at, at + 0x4000, at + 0x2000, 0).pack()),
            lambda: self.say(Request.SET_VRING_KICK, vu.VringFd(index, True).pack(), [self.event(self._kicks)]),
            lambda: self.say(Request.SET_VRING_CALL, vu.VringFd(index, True).pack(), [self.event(self._calls)]),
            lambda: self.say(Request.SET_VRING_ENABLE, vu.VringState(index, 1).pack()),
        ]
        if self.rng.random() < 0.3:
            self.rng.shuffle(steps)
        for step in steps:
            step()

    # -- and what not ---------------------------------------------------------------------------------------------

    def scribble(self) -> None:
        """Write anything into a ring, sometimes what makes sense, and kick."""
        index = self.rng.randrange(5)
        base = 0x10000 + index * RING
        for i in range(self.rng.randrange(1, 40)):
            sane = self.rng.random() < 0.8
            addr = self.rng.randrange(0, RAM, 4096) if sane else self.rng.choice(WIDE)
            length = self.rng.choice([4, 1024, 4096, 4 << 20]) if sane else self.rng.choice(ODD)
            flags = self.rng.choice([0, 2]) if sane else self.rng.randrange(8)
            entry = struct.pack("<QIHH", addr, length & 0xFFFFFFFF, flags, self.rng.randrange(300))
            os.pwrite(self.ram, entry, base + 16 * i)
            os.pwrite(self.ram, struct.pack("<H", i if sane else self.rng.randrange(300)), base + 0x2004 + 2 * i)
        index_now = self.rng.choice([1, 20, 40]) if self.rng.random() < 0.8 else self.rng.randrange(1 << 16)
        os.pwrite(self.ram, struct.pack("<H", index_now), base + 0x2002)
        for kick in self._kicks[-5:]:
            with contextlib.suppress(BlockingIOError):
                os.set_blocking(kick, False)
                os.eventfd_write(kick, 1)

    def flags(self) -> None:
        """Turn the flags of what the other end holds, fill a counter."""
        for fd in self.rng.sample(self._kicks + self._calls, min(2, len(self._kicks + self._calls))):
            held = fcntl.fcntl(fd, fcntl.F_GETFL)
            fcntl.fcntl(fd, fcntl.F_SETFL, held ^ os.O_NONBLOCK)

    def shrink(self) -> None:
        """Take memory away from under the device."""
        os.ftruncate(self.ram, self.rng.choice([0, 4096, RAM // 2]))
        for kick in self._kicks[-5:]:
            with contextlib.suppress(BlockingIOError):
                os.set_blocking(kick, False)
                os.eventfd_write(kick, 1)

    def numbers(self, request: int) -> bytes:
        """Return a payload of the right shape, and of odd numbers."""
        pick, index = self.rng.choice, self.rng.choice([0, 1, 2, 3, 4, 5, 255, (1 << 32) - 1])
        if request in (Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.SET_VRING_ENABLE, Request.GET_VRING_BASE):
            return struct.pack("=II", index, pick(ODD))
        if request == Request.SET_VRING_ADDR:
            return struct.pack("=IIQQQQ", index, pick(ODD), *(pick(WIDE) for _ in range(4)))
        if request in (Request.GET_CONFIG, Request.SET_CONFIG):
            size = pick([0, 1, 4, 8, 16, 60, 256, 300])
            return struct.pack("=III", pick(ODD), pick([size, pick(ODD)]), pick(ODD)) + self.rng.randbytes(size)
        if request == Request.SET_MEM_TABLE:
            count = pick([0, 1, 1, 1, 2, 3, 8, 17])
            body = b"".join(struct.pack("=QQQQ", *(pick(WIDE) for _ in range(4))) for _ in range(count))
            return struct.pack("=II", pick([count, count, pick(ODD)]), 0) + body
        return struct.pack("=Q", pick(WIDE))

    def odd(self) -> None:
        """Say something that is not quite right."""
        request = self.rng.choice([*Request, *Request, 0, 6, 7, 36, 37, 38, 44, 99, (1 << 32) - 1])
        payload = self.numbers(request)
        if self.rng.random() < 0.1:
            payload = self.rng.randbytes(self.rng.randrange(64))
        fds = [self.descriptor() for _ in range(self.rng.choice([0, 0, 0, 1, 1, 2, 9]))]
        self.say(request, payload, fds, flags=self.rng.choice([1, 1, 1, 9, 9, 5, self.rng.randrange(16)]))

    def half(self) -> None:
        """Begin a message and say no more."""
        self.socket.send(self.rng.randbytes(self.rng.randrange(1, 12)))

    def talk(self, most: int) -> None:
        """Say up to so many messages."""
        with contextlib.suppress(OSError):
            if self.rng.random() < 0.9:
                self.hello()
                self.table()
                for index in self.rng.sample(range(5), self.rng.randrange(6)):
                    self.ring(index)
            acts = [self.odd, self.scribble, self.table, self.features, self.flags, self.shrink, self.half]
            weights = [60, 10, 3, 3, 2, 0.2, 0.1]
            while self.sent < most:
                self.rng.choices(acts, weights)[0]()
                if self.rng.random() < 0.05:
                    self.ring(self.rng.randrange(5))


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def rss_kib(pid: int) -> int:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1])


@contextlib.contextmanager
def under_watch(serve: Process, findings: Findings, within: float = SILENT) -> Iterator[None]:
    """Within the block peers do as they like; after it is noted what that did to the server."""
    pid = serve.process.pid
    before = descriptors(pid), rss_kib(pid)
    watch = Watch(serve.monitor)
    watch.start()
    try:
        yield
    finally:
        watch.end()
    findings.slowest, findings.asked = watch.slowest, watch.asked
    if serve.process.poll() is not None:
        findings.wrong.append(f"the server ended with code {serve.process.returncode}")
        return
    deadline = time.monotonic() + 10
    while descriptors(pid) > before[0] and time.monotonic() < deadline:
        time.sleep(0.1)
    findings.descriptors, findings.rss_kib = (before[0], descriptors(pid)), (before[1], rss_kib(pid))
    if findings.descriptors[1] > findings.descriptors[0]:
        held = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        findings.wrong.append(f"descriptors left: {findings.descriptors}, {sorted(held)}")
    if watch.failed:
        findings.wrong.append(f"the monitor: {watch.failed}")
    if findings.slowest > within:
        findings.wrong.append(f"the monitor's slowest answer took {findings.slowest:.2f} s")
    for text in ("Traceback", "internal error", "Exception ignored"):
        if text in serve.log.read_text(errors="replace"):
            findings.wrong.append(f"{text!r} in the log")


def explore(folder: Path, messages: int, seed: int, within: float = SILENT) -> Findings:
    """Send so many messages over many connections; return what came of it."""
    rng, findings = random.Random(seed), Findings()
    serve = Process(folder, guest=False)
    try:
        with under_watch(serve, findings, within):
            patience = time.monotonic() + 10
            while findings.messages < messages and serve.process.poll() is None:
                try:
                    front_end = FrontEnd(serve.socket, rng)
                except OSError as error:  # the one before is not quite gone
                    if time.monotonic() > patience:
                        findings.wrong.append(f"it takes no front end: {error}")
                        break
                    time.sleep(0.001)
                    continue
                try:
                    front_end.talk(rng.choice([10, 100, 300]))
                finally:
                    front_end.close()
                if front_end.sent > 1:  # else it was turned away
                    patience = time.monotonic() + 10
                findings.messages += front_end.sent
                findings.connections += 1
    finally:
        with contextlib.suppress(Exception):
            serve.end()
    if serve.process.returncode not in (0, -15):
        findings.wrong.append(f"the server ended with code {serve.process.returncode}")
    return findings


def main() -> int:
    messages = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 32)
    print(f"explore: {messages} vhost-user messages, seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        found = explore(Path(folder), messages, seed)
        if found.wrong:
            print((Path(folder) / "log").read_text(errors="replace")[-2000:])
    print(
        f"explore: {found.messages} messages over {found.connections} connections in {time.monotonic() - began:.0f} s, "
        f"descriptors {found.descriptors}, RSS {found.rss_kib} KiB, "
        f"monitor: {found.asked} answers, the slowest {found.slowest * 1000:.0f} ms"
    )
    for text in found.wrong:
        print(f"explore: WRONG: {text}")
    return bool(found.wrong)


if __name__ == "__main__":
    sys.exit(main())
