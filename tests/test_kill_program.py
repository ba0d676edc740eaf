"""Everything that can die in `balloon migrate`, at each named moment, in the whole program.

Whatever dies: the program ends soon, with the exit code of its kind and one line that says why; no process, no file
and no folder is left; and a guest that was not handed over goes on with its allocator whole.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("kill_program.py")
MARKER = "BALLOON_KILL_TEST"
PATIENCE = 45.0
VANISHED, INTERRUPTED = 5, 130
KILLED, INTERRUPT_KILLED = -signal.SIGKILL, -signal.SIGINT

BEFORE_COMMIT = ("setup", "round", "sync", "frozen", "handover")
IN_MIGRATION = ("hello", *BEFORE_COMMIT)
AFTER_COMMIT = ("committed", "resuming")
ALWAYS = ("boot", *IN_MIGRATION, *AFTER_COMMIT)

WHOLE = r"the source's guest goes on: \d+ allocated pages checked, 0 wrong, no page held for hints"
AWAY = "the guest (was handed over|may be running there,) and does not go on here"
NO_GUEST = "there is no guest to go on with"


@dataclass(frozen=True)
class Expected:
    """What a case must end with."""

    code: int
    says: str = ""
    """Regular expression for the last line on standard error; empty: nothing is asked of it."""
    or_success: bool = False
    """Whether the other outcome is right too: the guest died so late that the destination may have it already."""


def expected(when: str, what: str) -> Expected | None:
    """The table: what happens if `what` is done at `when`; None where there is no such thing to do."""
    receiver_is_there = when not in ("boot",)
    handed_over = when in AFTER_COMMIT
    if what == "kill-guest-there":
        says = f"the guest did not go on at the destination: .*{AWAY}"
        return Expected(VANISHED, says) if when == "resuming" else None
    if what == "kill-source":
        return Expected(KILLED)
    if what in ("ctrl-c-twice", "sigterm") and when not in ("boot", "round", "frozen", "resuming"):
        return None  # Ctrl-C once stands for the others
    if what == "ctrl-c-twice":
        return Expected(INTERRUPT_KILLED)
    if what in ("ctrl-c", "sigterm"):
        if handed_over or when == "boot":
            return Expected(INTERRUPTED, "interrupted")
        return Expected(INTERRUPTED, f"cancelled by the user.*{WHOLE}")
    if what in ("kill-receiver", "stream-closed-by-receiver", "stream-closed-by-source"):
        if not receiver_is_there:
            return None
        if what == "stream-closed-by-source" and when in ("handover", "resuming"):
            # All was sent: the receiver has what it needs, or says that it did not get it.
            return None if when == "resuming" else Expected(VANISHED, f"destination.*{WHOLE}")
        # COMMIT leaves after that step: over a connection that was closed here no byte of it does.
        never_left = when == "committed" and what.startswith("stream-closed")
        return Expected(VANISHED, f"the destination .*{AWAY if handed_over and not never_left else WHOLE}")
    if what == "stopped-receiver-then-ctrl-c":
        if when not in ("hello", "round", "frozen", "handover", "resuming"):
            return None
        return Expected(INTERRUPTED, "interrupted" if handed_over else f"cancelled by the user.*{WHOLE}")
    # what is left concerns the source's guest
    if handed_over:
        return Expected(0)
    if when == "boot":
        return Expected(VANISHED, "the guest .*is gone")
    return Expected(VANISHED, f"the guest .*is gone: .*{NO_GUEST}", or_success=when in ("frozen", "handover"))


ACTIONS = (
    "kill-guest-there",
    "kill-guest",
    "kill-receiver",
    "kill-source",
    "ctrl-c",
    "ctrl-c-twice",
    "sigterm",
    "device-closed-by-guest",
    "device-closed-by-host",
    "control-closed-by-guest",
    "control-closed-by-host",
    "stream-closed-by-receiver",
    "stream-closed-by-source",
    "stopped-receiver-then-ctrl-c",
)
CASES = [(when, what) for what in ACTIONS for when in ALWAYS if expected(when, what) is not None]


@dataclass(frozen=True)
class Ended:
    """How a run ended and what it left."""

    code: int
    err: str
    seconds: float
    processes: list[str]
    files: list[str]


def marked(mark: str) -> list[str]:
    """Return the processes that have this value of the marker in their environment and have not ended."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if f"{MARKER}={mark}".encode() in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                found.append(f"{name} {Path(f'/proc/{name}/comm').read_text().strip()}")
    return found


def run(folder: Path, when: str, what: str, *arguments: str) -> Ended:
    """Run the program with one death in it, and look at what is left."""
    temporary = folder / "tmp"
    temporary.mkdir(parents=True)
    mark = str(folder)
    environment = {**os.environ, MARKER: mark, "TMPDIR": str(temporary), "NO_COLOR": "1"}
    began = time.monotonic()
    with open(folder / "err", "wb") as err:
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), when, what, "migrate", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=err,
            start_new_session=True,
        )
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = 10000 + process.wait()  # no exit code: it hung
    seconds = time.monotonic() - began
    deadline = time.monotonic() + 5.0
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for line in left:
        with contextlib.suppress(OSError):
            os.kill(int(line.split()[0]), signal.SIGKILL)
    files = [str(path.relative_to(temporary)) for path in temporary.rglob("*")]
    return Ended(code, (folder / "err").read_text(), seconds, left, files)


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str], Future[Ended]]]:
    """All selected cases, a few at a time: most of each is start-up and waiting."""
    base = tmp_path_factory.mktemp("kill")
    wanted = [
        item.callspec.params["case"]
        for item in request.session.items
        if item.fspath == request.fspath and "case" in getattr(getattr(item, "callspec", None), "params", {})
    ]
    options = ("--memory", "64M", "--hints", "on", "--warm-up", "0")
    pool = ThreadPoolExecutor(4)
    yield {case: pool.submit(run, base / "-".join(case), *case, *options) for case in wanted}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", CASES, ids=["-".join(case) for case in CASES])
def test_whatever_dies(case: tuple[str, str], runs: dict[tuple[str, str], Future[Ended]]) -> None:
    ended, wanted = runs[case].result(), expected(*case)
    assert wanted is not None
    assert ended.processes == [], "processes left"
    assert ended.files == [], "files left"
    assert "Traceback" not in ended.err
    if wanted.or_success and ended.code == 0:
        return
    assert ended.code == wanted.code, ended.err
    lines = ended.err.splitlines()
    assert all(line.startswith("balloon: ") for line in lines), ended.err
    if wanted.says:
        assert re.search(wanted.says, lines[-1]), ended.err
    assert ended.seconds < 25.0, ended.err
