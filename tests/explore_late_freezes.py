"""Migrations of one guest that now and then pauses too late: no answer to one freeze may count for the next.

``python tests/explore_late_freezes.py [COUNT [SEED]]`` migrates into an image over and over. Before most migrations the
guest's process is stopped for a random time around the pause timeout, which is random too; each migration that comes
about is judged page by page, while the guest writes as fast as it can.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from typing import Any

import host_qemu_side.python_guest as python_guest
from host_qemu_side import destination
from host_qemu_side.migration import Limits
from host_qemu_side.migration.output import SocketOutput
from host_qemu_side.migration.receiver import Receiver
from host_qemu_side.python_guest import PythonGuest
from host_qemu_side.source import SourceHost
from vring.errors import PeerVanished, VirtioError

ARGUMENTS = ["--memory", "32M", "--workload", "writer:8M@400M"]


@dataclass
class Tally:
    """What came of the migrations."""

    migrated: int = 0
    timed_out: int = 0
    wrong: int = 0


def migrate(host: SourceHost, guest: PythonGuest) -> int:
    """Migrate into an image; return how many pages of it are wrong."""
    mine, theirs = socket.socketpair()
    receiver = Receiver()

    def receive() -> None:
        with contextlib.suppress(VirtioError):
            source = destination._Source(theirs, None)
            source.answer(receiver.hello())
            destination.receive(source, receiver)
        theirs.close()

    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    try:
        with contextlib.closing(SocketOutput(mine)) as output:
            log = guest.dirty_log("auto", host.track_device_writes())
            limits: dict[str, Any] = {"limits": Limits(bandwidth=0), "hand_over": False, "hints": False}
            outcome = host.migrate(guest, log, output, journal=guest.journal, header={"guest": "python"}, **limits)
    finally:
        thread.join(10.0)
        if receiver.memory is not None:
            receiver.memory.close()
    assert outcome.verdict is not None
    return outcome.verdict.pages_wrong


def explore(count: int, choose: random.Random, timeouts: tuple[float, ...]) -> Tally:
    """Migrate `count` times."""
    tally = Tally()
    normal = python_guest.PAUSE_TIMEOUT
    with SourceHost() as host:
        guest = PythonGuest(host.loop, host.backend, None, ARGUMENTS)
        try:
            guest.wait_ready()
            for _ in range(count):
                timeout = python_guest.PAUSE_TIMEOUT = choose.choice(timeouts)
                late = choose.random() < 0.8
                if late:
                    os.kill(guest.pid, signal.SIGSTOP)
                    after = timeout * choose.uniform(0.2, 1.6) + choose.uniform(0.0, 0.1)
                    threading.Timer(after, os.kill, (guest.pid, signal.SIGCONT)).start()
                try:
                    tally.wrong += migrate(host, guest) > 0
                    tally.migrated += 1
                except PeerVanished:
                    tally.timed_out += 1
                if choose.random() < 0.5:
                    guest.run_for(choose.uniform(0.0, 0.1))
            python_guest.PAUSE_TIMEOUT = normal
            os.kill(guest.pid, signal.SIGCONT)
            assert guest.check()["wrong"] == 0
        finally:
            python_guest.PAUSE_TIMEOUT = normal
            guest.close()
    return tally


def main(count: int = 200, seed: int | None = None) -> int:
    """Migrate often; return the exit code."""
    seed = random.SystemRandom().getrandbits(32) if seed is None else seed
    print(f"explore_late_freezes: {count} migrations, seed {seed}", flush=True)
    choose = random.Random(seed)
    tally = explore(count, choose, (0.05, 0.05, 0.1, 0.1, 0.3, 0.3, 1.0, 1.0, 3.0, 10.0))
    print(f"explore_late_freezes: {tally}")
    return 1 if tally.wrong or not tally.migrated or not tally.timed_out else 0


if __name__ == "__main__":
    sys.exit(main(*(int(text) for text in sys.argv[1:3])))
