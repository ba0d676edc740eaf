"""A guest is handed over while something dies, stops or is cut: it must never run twice, and never be lost.

``python tests/explore_handover.py [COUNT [SEED]]`` plays random scenes with whole programs: `balloon serve` with its
guest, `balloon receive`, and a proxy between them that sees each record pass. Who runs is not asked of anybody: a
guest runs if its RAM changes.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from balloon_cli.monitor_client import CommandFailed, MonitorClient
from host_qemu_side.migration.stream import Kind, StreamReader
from vring.errors import VirtioError

BALLOON = [sys.executable, "-m", "balloon_cli"]
MEMORY = 32 << 20
WORKLOAD = "writer:2M@16M"
PATIENCE = 60.0
ACTORS = ("source", "source guest", "destination", "destination guest", "connection")
DEEDS = ("kill", "stop")
CUTS = ("cut both", "cut to the destination", "cut to the source")
MOMENTS = (Kind.HEADER, Kind.PAGES, Kind.ROUND, Kind.STATE, Kind.END, Kind.READY, Kind.COMMIT, Kind.REPORT)


@dataclass(frozen=True)
class Plot:
    """What happens to whom, and when."""

    actor: str
    deed: str
    moment: Kind | float
    """Before the first record of this kind passes, or so many seconds after the migration has begun."""
    length: float = 0.5
    """Seconds that a stop lasts."""
    bandwidth: int = 0

    @classmethod
    def at_random(cls, choose: random.Random) -> Plot:
        """Return one; half of them happen at a record, most of those near the end."""
        actor = choose.choice(ACTORS)
        deed = choose.choice(CUTS if actor == "connection" else DEEDS)
        late = choose.choices(MOMENTS, (1, 1, 1, 2, 3, 4, 5, 2))[0]
        moment = choose.choice((late, choose.uniform(0.0, 1.5)))
        return cls(actor, deed, moment, choose.uniform(0.1, 2.0), choose.choice((0, 16 << 20)))


@dataclass
class Ending:
    """What came of it."""

    plot: Plot
    running: frozenset[str] = frozenset()
    """Whose guest runs at the end."""
    committed: bool = False
    """Whether COMMIT was let through to the destination."""
    wrong: str = ""
    how: str = ""
    said: list[str] = field(default_factory=list)


def guests_of(pid: int) -> list[int]:
    """Return the guest processes that a program has launched."""
    found = []
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                if "guest_driver" in Path(f"/proc/{child}/cmdline").read_text():
                    found.append(int(child))
    return found


def digest_of_ram(pid: int) -> int | None:
    """Return a digest of a guest's RAM, None if there is no such guest any more."""
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            path = f"/proc/{pid}/fd/{name}"
            with contextlib.suppress(OSError):
                if "/memfd:" in os.readlink(path) and os.stat(path).st_size == MEMORY:
                    with open(path, "rb") as ram:
                        return int(xxhash.xxh3_64(ram.read()).intdigest())
    return None


class Proxy:
    """Passes records on, and does the deed before the first one of a kind."""

    def __init__(self, listens: str, leads_to: str, moment: Kind | float, act: Callable[[], None]) -> None:
        self._moment, self._act, self._leads_to = moment, act, leads_to
        self.committed = False
        self.complete = False
        """Whether all of the guest was sent: from then on nobody but the guest itself writes to its RAM there."""
        self.near: socket.socket | None = None
        self.far: socket.socket | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(listens)
        self._listener.listen(1)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            self.near, _ = self._listener.accept()
            self.far = socket.socket(socket.AF_UNIX)
            self.far.connect(self._leads_to)
            threading.Thread(target=self._pass, args=(self.far, self.near), daemon=True).start()
            self._pass(self.near, self.far)

    def _pass(self, come: socket.socket, go: socket.socket) -> None:
        reader, held = StreamReader(), bytearray()
        with contextlib.suppress(OSError, VirtioError):
            while data := come.recv(1 << 20):
                held += data
                reader.feed(data)
                while (record := reader.next()) is not None:
                    size = 24 + len(record.payload) + (8 if record.kind in (Kind.HEADER, Kind.HELLO) else 0)
                    if record.kind is self._moment:
                        self._act()
                    go.sendall(held[:size])
                    self.committed = self.committed or record.kind is Kind.COMMIT
                    self.complete = self.complete or record.kind is Kind.END
                    del held[:size]
        with contextlib.suppress(OSError):
            go.shutdown(socket.SHUT_WR)

    def cut(self, how: str) -> None:
        """End the connection, or one of its ways."""
        for end, way in ((self.near, "to the destination"), (self.far, "to the source")):
            if end is not None and how in ("cut both", f"cut {way}"):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RD)
                other = self.far if end is self.near else self.near
                if other is not None:
                    with contextlib.suppress(OSError):
                        other.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close everything."""
        for sock in (self._listener, self.near, self.far):
            if sock is not None:
                sock.close()


class Scene:
    """The programs of one plot."""

    def __init__(self, plot: Plot, folder: Path) -> None:
        self.plot, self.folder = plot, folder
        self.acted = threading.Event()
        self._once = threading.Lock()
        self.programs: dict[str, subprocess.Popen[bytes]] = {}
        self._start("source", "serve", "s", "--monitor", "m", "--guest", "python", "--memory", str(MEMORY),
                    "--workload", WORKLOAD)  # fmt: skip
        self._start("destination", "receive", "unix:d", "--keep")
        self._wait(lambda: self.query("query-status").get("running") is True and "waiting" in self.said("destination"))
        self.proxy = Proxy(f"{folder}/p", f"{folder}/d", plot.moment, self.act)
        self.guests = {"source": guests_of(self.programs["source"].pid)[0]}

    def _start(self, name: str, *arguments: str) -> None:
        with open(self.folder / name, "wb") as log:
            self.programs[name] = subprocess.Popen(
                [*BALLOON, *arguments], cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def said(self, name: str) -> str:
        """Return what a program has written."""
        return (self.folder / name).read_text(errors="replace")

    def query(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Ask the source; nothing if it does not answer."""
        with contextlib.suppress(VirtioError, OSError):
            client = MonitorClient(f"{self.folder}/m")
            try:
                return client.execute(command, arguments) or {}
            finally:
                client.close()
        return {}

    def _wait(self, what: Callable[[], bool], patience: float = PATIENCE) -> bool:
        end = time.monotonic() + patience
        while not what():
            if time.monotonic() > end:
                return False
            time.sleep(0.03)
        return True

    def _guest_there(self) -> int | None:
        if "destination" not in self.guests:
            found = guests_of(self.programs["destination"].pid)
            if not found:
                return None
            self.guests["destination"] = found[0]
        return self.guests["destination"]

    def act(self) -> None:
        """Do the deed, once."""
        if not self._once.acquire(blocking=False):
            return
        self._guest_there()
        if self.plot.actor == "connection":
            self.proxy.cut(self.plot.deed)
        else:
            name, _, guest = self.plot.actor.partition(" ")
            pid = self.guests.get(name) if guest else self.programs[name].pid
            if pid is not None:
                self._signal(pid, signal.SIGKILL if self.plot.deed == "kill" else signal.SIGSTOP)
                if self.plot.deed == "stop":
                    threading.Timer(self.plot.length, self._signal, (pid, signal.SIGCONT)).start()
        self.acted.set()

    @staticmethod
    def _signal(pid: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def running(self) -> frozenset[str]:
        """Whose guest's RAM changes."""
        self._guest_there()
        guests = {name: pid for name, pid in self.guests.items() if name == "source" or self.proxy.complete}
        first = {name: digest_of_ram(pid) for name, pid in guests.items()}
        time.sleep(0.25)
        second = {name: digest_of_ram(pid) for name, pid in guests.items()}
        return frozenset(name for name, seen in first.items() if seen is not None and second[name] not in (None, seen))

    def _twice(self) -> bool:
        """Whether both run. Once is no proof: it may have gone over just then."""
        return len(self.running()) > 1 and len(self.running()) > 1

    def settled(self) -> bool:
        """Whether nothing more will happen at either end."""
        said = self.said("destination")
        there = self.programs["destination"].poll() is not None or "was checked" in said or "still waiting" in said
        if self.programs["source"].poll() is not None:
            return there or "receiving" not in said
        now = self.query("query-migrate")
        ended = now.get("status") in ("failed", "cancelled") or (
            now.get("status") == "completed" and ("destination" in now or "error-desc" in now)
        )
        return ended and there

    def play(self) -> Ending:
        """Migrate, with the deed in it; judge."""
        self.query("migrate-set-parameters", **{"max-bandwidth": self.plot.bandwidth})
        self.query("migrate", uri=f"unix:{self.folder}/p")
        if isinstance(self.plot.moment, float):
            time.sleep(self.plot.moment)
            self.act()
        twice, end = False, time.monotonic() + PATIENCE
        while not self.settled() and time.monotonic() < end:
            twice = twice or self._twice()
        ending = Ending(self.plot, committed=self.proxy.committed)
        if not self._wait(self.acted.is_set, 1.0):
            ending.how = "nothing was done; "
        elif self.plot.deed == "stop":
            time.sleep(self.plot.length)
        if time.monotonic() > end:
            ending.wrong = "it never ends"
        self._wait(lambda: bool(self.running()), 2.0)
        ending.running = self.running()
        if twice or self._twice():
            ending.wrong = "the guest runs twice"
        elif not ending.running and not ending.wrong:
            self._nowhere(ending)
        ending.said = [self.said(name)[-600:] for name in self.programs]
        if "Traceback" in "".join(self.said(name) for name in self.programs):
            ending.wrong = ending.wrong or "a traceback"
        return ending

    def _nowhere(self, ending: Ending) -> None:
        """No guest runs: only right if who had it was killed, or COMMIT was lost; and then it is held, not lost."""
        holder = "destination" if ending.committed else "source"
        if self.plot.deed == "kill" and self.plot.actor.startswith(holder):
            ending.how += f"gone with the {self.plot.actor}"
            return
        now = self.query("query-migrate")
        if self.programs["destination"].poll() is None or "COMMIT may have reached" not in now.get("error-desc", ""):
            ending.wrong = f"the guest runs nowhere: {now}, {self.query('query-status')}"
            return
        ending.how += "COMMIT was lost: held at the source; "
        with contextlib.suppress(CommandFailed):
            self.query("cont", force=True)
        if not self._wait(lambda: self.running() == {"source"}, 3.0):
            ending.wrong = "the guest that was held cannot go on"

    def close(self) -> None:
        """End whatever is left."""
        for process in self.programs.values():
            process.kill()
            process.wait()
        self.proxy.close()


def play(plot: Plot) -> Ending:
    """Play one scene from beginning to end."""
    with (
        tempfile.TemporaryDirectory(prefix="handover-") as folder,
        contextlib.closing(Scene(plot, Path(folder))) as scene,
    ):
        return scene.play()


def main(count: int = 300, seed: int | None = None) -> int:
    """Play many; return the exit code."""
    seed = random.SystemRandom().getrandbits(32) if seed is None else seed
    choose = random.Random(seed)
    print(f"explore_handover: {count} scenes, seed {seed}", flush=True)
    plots = [Plot.at_random(choose) for _ in range(count)]
    counts: dict[str, int] = {}
    wrong = 0
    with ThreadPoolExecutor(4) as pool:
        for at, done in enumerate(as_completed([pool.submit(play, plot) for plot in plots])):
            ending = done.result()
            where = "+".join(sorted(ending.running)) or "nowhere"
            counts[f"{where}: {ending.how}"] = counts.get(f"{where}: {ending.how}", 0) + 1
            if ending.wrong:
                wrong += 1
                print(f"WRONG: {ending.wrong}: {ending}", flush=True)
            if at % 25 == 24:
                print(f"{at + 1} scenes, {wrong} wrong", flush=True)
    for text, number in sorted(counts.items()):
        print(f"{number:5} {text}")
    print(f"explore_handover: {wrong} of {count} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*(int(text) for text in sys.argv[1:3])))
