"""Ctrl-C at any moment of a command: one line, the exit code, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_support import BALLOON, MIGRATE, all_gone, descendants


@pytest.mark.parametrize("moment", ["balloon: the guest boots", "round 1", "hint run"])
def test_ctrl_c_cancels_within_5_seconds_and_leaves_nothing_behind(moment: str) -> None:
    process = subprocess.Popen(
        [*MIGRATE, "--hints", "on", "--bandwidth", "2M"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    while moment not in (line := process.stderr.readline()):
        assert line, f"{moment!r} was not reached"
    time.sleep(0.3)
    children = descendants(process.pid)
    assert children
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: the whole foreground group gets it
    out, err = process.communicate(timeout=20)
    assert time.monotonic() - began < 5
    assert process.returncode == 130, err
    assert not out
    assert "Traceback" not in err
    if moment != "balloon: the guest boots":
        assert "guest goes on" in err
        assert " 0 wrong, no page held for hints" in err
    assert all_gone(children)


def test_ctrl_c_while_it_loads_is_no_traceback() -> None:
    for delay in (0.0, 0.05, 0.1, 0.15):
        process = subprocess.Popen([*BALLOON, "migrate"], stderr=subprocess.PIPE, text=True, start_new_session=True)
        while "numpy" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.001)
        time.sleep(delay)
        children = descendants(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=5)
        assert process.returncode == 130, err
        assert "Traceback" not in err
        assert all_gone(children)


def test_ctrl_c_in_a_callback_of_the_import_system_is_not_lost() -> None:
    """An exception in the callback of a weak reference is ignored; the import system has such callbacks."""
    program = """
import os, signal, sys, weakref

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "balloon_cli.commands":
            lock = Finder()
            self.reference = weakref.ref(lock, lambda _: os.kill(os.getpid(), signal.SIGINT))

sys.meta_path.insert(0, Finder())
from balloon_cli.__main__ import main
main(["--version"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 130, done.stderr
    assert done.stderr == "balloon: interrupted\n"
    assert not done.stdout


@pytest.mark.parametrize("command", ["migrate", "receive", "serve"])
def test_two_signals_at_once_are_the_first_and_the_one_that_kills(command: str, tmp_path: Path) -> None:
    """Both are there before Python looks: none of them is lost, and Python complains of none."""
    arguments = {
        "migrate": [*MIGRATE, "--bandwidth", "2M"],
        "receive": [*BALLOON, "receive", "unix:s"],
        "serve": [*BALLOON, "serve", "s", "--guest", "python", "--memory", "16M"],
    }
    process = subprocess.Popen(arguments[command], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stderr is not None
    said = {"migrate": "round 1", "receive": "waiting for", "serve": "guest-ready"}[command]
    while said not in (line := process.stderr.readline()):
        assert line
    children = descendants(process.pid)
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert process.returncode in (-signal.SIGTERM, -signal.SIGINT), err
    assert "Traceback" not in err
    assert "race condition" not in err
    assert all_gone(children)
