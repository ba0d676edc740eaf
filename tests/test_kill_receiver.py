"""Both ends of a migration over a socket or into a file, each killed while the other one looks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from test_kill_program import MARKER, PROGRAM, marked

BALLOON = [sys.executable, "-m", "balloon_cli"]
MIGRATE = ["migrate", "--memory", "64M", "--hints", "on", "--warm-up", "0"]
SLOW = ["--bandwidth", "4M"]


@dataclass
class Stage:
    """A folder, and the programs that run in it."""

    folder: Path
    programs: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"unix:{self.folder}/migration.sock"

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        temporary = self.folder / "tmp"
        temporary.mkdir(exist_ok=True)
        environment = {**os.environ, MARKER: str(self.folder), "TMPDIR": str(temporary), "NO_COLOR": "1"}
        with open(self.folder / f"{name}.err", "wb") as err:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=err,
                start_new_session=True,
            )
        self.programs.append(process)
        return process

    def receiver(self) -> subprocess.Popen[bytes]:
        process = self.start("receiver", *BALLOON, "receive", self.address)
        self.says("receiver", "waiting for a migration")
        return process

    def says(self, name: str, text: str, patience: float = 20.0) -> None:
        """Wait until a program has said something."""
        deadline = time.monotonic() + patience
        while text not in self.err(name):
            assert time.monotonic() < deadline, self.err(name)
            time.sleep(0.02)

    def err(self, name: str) -> str:
        return (self.folder / f"{name}.err").read_text()

    def last(self, name: str) -> str:
        return self.err(name).splitlines()[-1]

    def assert_clean(self, *files: str) -> None:
        """No process, no traceback, and no file but these."""
        deadline = time.monotonic() + 5.0
        while marked(str(self.folder)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert marked(str(self.folder)) == []
        found = [p for p in self.folder.rglob("*") if p.suffix != ".err" and p.name != "tmp"]
        assert sorted(p.name for p in found) == sorted(files)
        for err in self.folder.glob("*.err"):
            assert "Traceback" not in err.read_text()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    yield made
    for process in made.programs:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_waiting_receiver_interrupted(stage: Stage, number: signal.Signals) -> None:
    process = stage.receiver()
    process.send_signal(number)
    assert process.wait(10.0) == 130
    assert stage.last("receiver") == "balloon: interrupted"
    stage.assert_clean()


def test_the_socket_of_a_killed_receiver_is_taken_over(stage: Stage) -> None:
    first = stage.receiver()
    first.kill()
    first.wait()
    second = stage.receiver()
    second.send_signal(signal.SIGINT)
    assert second.wait(10.0) == 130
    stage.assert_clean()


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (signal.SIGKILL, 5, "is gone|closed the connection"),
        (signal.SIGINT, 4, "refused: interrupted at the destination"),
    ],
)
def test_a_receiver_killed_in_a_round(stage: Stage, number: signal.Signals, code: int, says: str) -> None:
    receiver = stage.receiver()
    source = stage.start("source", *BALLOON, *MIGRATE, "--to", stage.address, *SLOW)
    stage.says("source", "hint run")
    receiver.send_signal(number)
    assert source.wait(15.0) in (code, 5)
    assert receiver.wait(10.0) == (-number if number == signal.SIGKILL else 130)
    assert "the source's guest goes on" in stage.last("source")
    assert "0 wrong, no page held for hints" in stage.last("source")
    stage.assert_clean()


@pytest.mark.parametrize("when", ["round", "frozen", "handover"])
def test_a_source_killed_before_commit(stage: Stage, when: str) -> None:
    receiver = stage.receiver()
    source = stage.start("source", sys.executable, str(PROGRAM), when, "kill-source", *MIGRATE, "--to", stage.address)
    assert source.wait(20.0) == -signal.SIGKILL
    assert receiver.wait(10.0) == 5
    assert "cut off after record" in stage.last("receiver")
    stage.assert_clean()


def test_a_source_killed_after_commit(stage: Stage) -> None:
    """The guest is the destination's: it goes on there, whatever became of the source."""
    receiver = stage.receiver()
    source = stage.start(
        "source", sys.executable, str(PROGRAM), "resuming", "kill-source", *MIGRATE, "--to", stage.address
    )
    assert source.wait(20.0) == -signal.SIGKILL
    assert receiver.wait(20.0) == 0, stage.err("receiver")
    stage.assert_clean()


def test_ctrl_c_at_the_source_is_told_the_receiver(stage: Stage) -> None:
    receiver = stage.receiver()
    source = stage.start("source", *BALLOON, *MIGRATE, "--to", stage.address, *SLOW)
    stage.says("source", "hint run")
    began = time.monotonic()
    source.send_signal(signal.SIGINT)
    assert source.wait(10.0) == 130
    assert time.monotonic() - began < 5.0
    assert receiver.wait(10.0) == 5
    assert "gave up: cancelled by the user" in stage.last("receiver")
    stage.assert_clean()


def test_ctrl_c_is_noticed_at_any_bandwidth(stage: Stage) -> None:
    """At 16 KiB/s a piece of 1 MiB is 64 s of waiting."""
    source = stage.start("source", *BALLOON, *MIGRATE, "--bandwidth", "16K")
    stage.says("source", "hint run")
    began = time.monotonic()
    source.send_signal(signal.SIGINT)
    assert source.wait(10.0) == 130
    assert time.monotonic() - began < 5.0
    assert "the source's guest goes on" in stage.last("source")
    stage.assert_clean()


def test_nobody_there(stage: Stage) -> None:
    source = stage.start("source", *BALLOON, *MIGRATE, "--to", stage.address)
    assert source.wait(20.0) == 5
    assert "no destination at unix:" in stage.last("source")
    assert "balloon receive" in stage.last("source")
    stage.assert_clean()


@pytest.mark.parametrize(
    ("when", "what", "code"), [("round", "kill-source", -9), ("round", "ctrl-c", 130), ("frozen", "kill-guest", None)]
)
def test_a_file_that_is_not_finished_is_not_there(stage: Stage, when: str, what: str, code: int | None) -> None:
    target = f"file:{stage.folder}/guest.vbm"
    source = stage.start("source", sys.executable, str(PROGRAM), when, what, *MIGRATE, "--to", target)
    ended = source.wait(20.0)
    if code is None and ended == 0:  # the guest died when everything was written already
        assert (stage.folder / "guest.vbm").exists()
        return
    assert ended == (5 if code is None else code)
    stage.assert_clean()


def test_a_disk_that_is_full(stage: Stage) -> None:
    target = f"file:{stage.folder}/guest.vbm"
    source = stage.start("source", sys.executable, str(PROGRAM), "setup", "disk-full", *MIGRATE, "--to", target)
    assert source.wait(20.0) == 3
    assert "cannot write" in stage.last("source")
    assert "the source's guest goes on" in stage.last("source")
    stage.assert_clean()


def test_a_file_does_not_replace_what_is_no_file(stage: Stage) -> None:
    source = stage.start("source", *BALLOON, *MIGRATE, "--to", "file:/dev/full")
    assert source.wait(20.0) == 2
    assert "no regular file" in stage.last("source")
    assert not Path("/dev/full").is_file()
    stage.assert_clean()
