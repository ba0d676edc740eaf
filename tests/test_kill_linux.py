"""Everything that can die while the unmodified Linux guest is migrated: no helper process, no memory file survives."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from linux_pair import BUILT
from test_kill_program import MARKER, PROGRAM, marked

from host_qemu_side.linux_guest import initramfs
from vring.errors import MissingFacility

pytestmark = [pytest.mark.uml, pytest.mark.slow]

WHOLE = r"the source's guest goes on: \d+ MiB free, as before"
NO_GUEST = "there is no guest to go on with"
KILLED, INTERRUPT_KILLED = -signal.SIGKILL, -signal.SIGINT

CASES: dict[tuple[str, str], tuple[int, str]] = {
    ("boot", "kill-keeper"): (5, "Linux guest is gone"),
    ("boot", "ctrl-c"): (130, "interrupted"),
    ("boot", "kill-source"): (KILLED, ""),
    ("boot", "ctrl-c-twice"): (INTERRUPT_KILLED, ""),
    ("hello", "ctrl-c"): (130, f"cancelled by the user.*{WHOLE}"),
    ("setup", "kill-guest"): (5, f"Linux guest is gone.*{NO_GUEST}"),
    ("round", "kill-guest"): (5, f"Linux guest is gone.*{NO_GUEST}"),
    ("round", "kill-keeper"): (5, f"Linux guest is gone.*{NO_GUEST}"),
    ("round", "kill-receiver"): (5, f"the destination .*{WHOLE}"),
    ("round", "kill-source"): (KILLED, ""),
    ("round", "ctrl-c"): (130, f"cancelled by the user.*{WHOLE}"),
    ("round", "ctrl-c-twice"): (INTERRUPT_KILLED, ""),
    ("round", "device-closed-by-guest"): (5, f"Linux guest is gone.*{NO_GUEST}"),
    ("round", "device-closed-by-host"): (5, f"Linux guest is gone.*{NO_GUEST}"),
    ("sync", "ctrl-c"): (130, f"cancelled by the user.*{WHOLE}"),
    ("frozen", "kill-guest"): (5, f"Linux guest is gone.*{NO_GUEST}"),
    ("frozen", "kill-keeper"): (5, f"Linux guest is gone.*{NO_GUEST}"),
    ("frozen", "kill-receiver"): (5, f"the destination .*{WHOLE}"),
    ("frozen", "kill-source"): (KILLED, ""),
    ("frozen", "ctrl-c"): (130, f"cancelled by the user.*{WHOLE}"),
    ("frozen", "stopped-receiver-then-ctrl-c"): (130, f"cancelled by the user.*{WHOLE}"),
    ("handover", "kill-receiver"): (5, f"the destination .*{WHOLE}"),
    ("handover", "ctrl-c"): (130, f"cancelled by the user.*{WHOLE}"),
}


@dataclass(frozen=True)
class Ended:
    """How a run ended and what it left."""

    code: int
    err: str
    processes: list[str]
    files: list[str]


def users_of(folder: str) -> list[str]:
    """Processes with a file below the folder mapped or open: the guest's helpers share no environment."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            inside = f"{folder}/" in Path(f"/proc/{name}/maps").read_text(errors="replace")
            for fd in os.listdir(f"/proc/{name}/fd"):
                with contextlib.suppress(OSError):
                    inside = inside or os.readlink(f"/proc/{name}/fd/{fd}").startswith(f"{folder}/uml-")
            if inside:
                found.append(f"{name} {Path(f'/proc/{name}/comm').read_text().strip()}")
    return found


def run(folder: Path, when: str, what: str) -> Ended:
    work, temporary = folder / "work", folder / "tmp"
    work.mkdir(parents=True)
    temporary.mkdir()
    for built in folder.parent.glob("cache/*"):
        os.link(built, work / built.name)
    command = [sys.executable, str(PROGRAM), when, what, "migrate", "--guest", "linux", "--memory", "64M"]
    command += ["--hints", "on", "--workload", "idle", "--work-dir", str(work)]
    environment = {**os.environ, MARKER: str(folder), "TMPDIR": str(temporary), "NO_COLOR": "1"}
    with open(folder / "err", "wb") as err:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=err,
            start_new_session=True,
        )
        try:
            code = process.wait(60.0)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = 10000 + process.wait()
    deadline = time.monotonic() + 10.0  # a keeper that outlives its host has this time to end the guest
    while (left := [*marked(str(folder)), *users_of(str(work))]) and time.monotonic() < deadline:
        time.sleep(0.05)
    files = [p.name for p in (*work.iterdir(), *temporary.iterdir())]
    for line in left:
        with contextlib.suppress(OSError):
            os.kill(int(line.split()[0]), signal.SIGKILL)
    return Ended(code, (folder / "err").read_text(), left, files)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], Future[Ended]]]:
    """All selected cases, three at a time, on a disk: temporary folders may be in memory."""
    wanted = [
        item.callspec.params["case"]
        for item in request.session.items
        if item.fspath == request.fspath and "case" in getattr(getattr(item, "callspec", None), "params", {})
    ]
    with tempfile.TemporaryDirectory(prefix="kill-", dir="/var/tmp") as base, ThreadPoolExecutor(3) as pool:
        try:
            initramfs.build(Path(base) / "cache")
        except MissingFacility as missing:
            pytest.skip(str(missing))
        yield {case: pool.submit(run, Path(base) / "-".join(case), *case) for case in wanted}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", CASES, ids=["-".join(case) for case in CASES])
def test_whatever_dies_around_linux(case: tuple[str, str], runs: dict[tuple[str, str], Future[Ended]]) -> None:
    ended, (code, says) = runs[case].result(), CASES[case]
    assert ended.processes == [], "processes left"
    assert [name for name in ended.files if not name.startswith(BUILT)] == [], "files left"
    assert "Traceback" not in ended.err
    assert ended.code == code, ended.err
    if says:
        assert re.search(says, ended.err.splitlines()[-1]), ended.err
