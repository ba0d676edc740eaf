"""Where the machine gives less than is asked for: memory, descriptors, room, and readers who go."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_support import BALLOON, all_gone, descendants, run

from balloon_cli import guests
from balloon_cli.__main__ import _why_not_loaded
from balloon_cli.errors import exit_code, message
from balloon_cli.machine import MemoryRoom
from vring.errors import MissingFacility, PeerVanished, UsageError

SMALL = ["migrate", "--memory", "16M", "--warm-up", "0", "--hints", "on"]
MIB = 1 << 20


def limited(which: int, value: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(which, (value, value))


# -- codes and words --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (PermissionError(13, "Permission denied", "/x"), 2, "/x: Permission denied"),
        (FileNotFoundError(2, "No such file or directory", "/x"), 2, "/x: No such file or directory"),
        (NotADirectoryError(20, "Not a directory"), 2, "Not a directory"),
        (OSError(36, "File name too long"), 2, "File name too long"),
        (OSError(24, "Too many open files"), 3, "are allowed): allow more open files with ulimit -n"),
        (OSError(12, "Cannot allocate memory"), 3, "give the guest less with --memory"),
        (OSError(28, "No space left on device"), 3, "free some space"),
        (BlockingIOError(11, "Resource temporarily unavailable"), 3, "ulimit -u"),
        (OSError(38, "Function not implemented"), 3, "newer kernel"),
        (MemoryError(), 3, "not enough memory"),
        (ConnectionResetError(104, "Connection reset by peer"), 5, "reset"),
        (BrokenPipeError(32, "Broken pipe"), 5, "Broken pipe"),
        (UsageError("a"), 2, "a"),
        (MissingFacility("b"), 3, "b"),
        (PeerVanished("c"), 5, "c"),
    ],
)
def test_every_error_has_its_code(error: BaseException, code: int, says: str) -> None:
    error.add_note("the guest\ngoes on")
    assert exit_code(error) == code
    assert says in message(error)
    assert message(error).endswith(" (the guest goes on)")
    assert "\n" not in message(error)
    assert "[Errno" not in message(error)


# -- memory and descriptors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [8, 12, 20, 63])
@pytest.mark.parametrize("command", [SMALL, ["receive", "tcp:127.0.0.1:0"], ["serve", "s"], ["drive"]])
def test_too_few_descriptors(number: int, command: list[str], tmp_path: Path) -> None:
    done = run(*command, preexec_fn=limited(resource.RLIMIT_NOFILE, number), cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("balloon: too few files may be open")
    assert "ulimit -n" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_as_many_descriptors_as_are_needed_are_enough() -> None:
    assert run(*SMALL, preexec_fn=limited(resource.RLIMIT_NOFILE, 64)).returncode == 0


@pytest.fixture(scope="module")
def loaded() -> int:
    """Bytes of address space that the program has taken once its modules are loaded, here and with this Python."""
    code = "import balloon_cli.commands; print(open('/proc/self/status').read())"
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment).stdout
    return int(text.partition("VmPeak:")[2].split()[0]) << 10


@pytest.mark.parametrize("more", [4, 70, 140, 200, 300, 400])
def test_little_address_space(more: int, loaded: int, tmp_path: Path) -> None:
    """Too little to map the guest, or just enough: never anything else than 0 and 3."""
    done = run("migrate", "--memory", "128M", "--warm-up", "0", "--hints", "on", cwd=tmp_path,
               preexec_fn=limited(resource.RLIMIT_AS, loaded + more * MIB))  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    assert "Traceback" not in done.stderr
    if done.returncode:
        assert "memory" in done.stderr or "address space" in done.stderr
        assert done.stderr.count("\n") <= 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "not enough memory even to begin"),
        (SystemError("error return without exception set"), "not enough memory even to begin"),
        (ImportError("x.so: failed to map segment from shared object"), "not enough memory even to begin"),
        (OSError(24, "Too many open files"), "too few files may be open even to begin"),
        (ModuleNotFoundError("No module named 'rich'"), "No module named 'rich'; run"),
    ],
)
def test_why_it_could_not_even_begin(error: BaseException, says: str) -> None:
    """Python's own words for it are many, and not the same in each version."""
    assert says in _why_not_loaded(error)
    assert "\n" not in _why_not_loaded(error)


@pytest.mark.parametrize(
    ("workload", "hints", "works"),
    [
        ("churn", True, True),  # measured: 672 MiB at its peak
        ("churn", False, False),  # 1115 MiB
        ("churn:90%", True, False),
        ("build:4K", False, True),  # 100 MiB
        ("idle", False, True),
        ("writer:300M@1M", False, True),
        ("writer:500M@1M", False, False),
    ],
)
def test_memory_is_estimated_from_below(
    workload: str, hints: bool, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a guest with 512 MiB, where 800 can be had: what could work is not refused."""
    monkeypatch.setattr(guests, "memory_room", lambda: MemoryRoom(800 * MIB, 4096 * MIB, "this machine"))
    monkeypatch.setattr(guests, "address_room", lambda: None)
    with contextlib.nullcontext() if works else pytest.raises(MissingFacility, match="this machine has"):
        guests.require_memory(512 * MIB, workload, hints=hints)
    guests.require_memory(512 * MIB, workload, here=False)


def test_a_limit_of_address_space_is_known_before_a_guest_boots() -> None:
    done = run("migrate", "--memory", "1G", preexec_fn=limited(resource.RLIMIT_AS, 700 * MIB))
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "the limit of address space (ulimit -v) leaves" in done.stderr


# -- standard output and standard error -------------------------------------------------------------------------------

COMMANDS = {
    "help": ["--help"],
    "version": ["--version"],
    "command's help": ["migrate", "--help"],
    "table": SMALL,
    "json": [*SMALL, "--json"],
    "reception": ["receive", "file:stream"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    assert run(*SMALL, "--to", "file:stream", cwd=folder).returncode == 0
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_a_reader_who_goes_is_no_error(name: str, folder: Path) -> None:
    process = subprocess.Popen(
        [*BALLOON, *COMMANDS[name]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert "roken pipe" not in err
    assert "Exception ignored" not in err


@pytest.mark.parametrize("name", COMMANDS)
def test_a_result_that_finds_no_room_is_code_3(name: str, folder: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*BALLOON, *COMMANDS[name]], stdout=full, stderr=subprocess.PIPE, text=True, cwd=folder)
    assert done.returncode == 3, done.stderr
    assert "No space left on device" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("how", ["full", "closed pipe", "closed"])
def test_words_on_standard_error_may_get_lost(name: str, how: str, folder: Path) -> None:
    arguments = [*BALLOON, *COMMANDS[name], *(["-v", "-v"] if name in ("table", "json", "reception") else [])]
    shell = {"full": '"$@" 2>/dev/full', "closed": '"$@" 2>&-'}
    if how == "closed pipe":
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder)
        assert process.stderr is not None
        process.stderr.close()
        process.stderr = None
        out, _ = process.communicate(timeout=60)
        code = process.returncode
    else:
        done = subprocess.run(["sh", "-c", shell[how], "sh", *arguments], stdout=subprocess.PIPE, cwd=folder)
        out, code = done.stdout, done.returncode
    assert code == 0
    assert out
    if name == "json":
        assert json.loads(out)["runs"][0]["oracle"]["pages_wrong"] == 0


def test_a_pipe_that_is_full_for_a_while_loses_nothing(folder: Path) -> None:
    """Not even one that was told not to keep anybody waiting, as other programs leave it."""
    near, far = os.pipe()
    os.set_blocking(far, False)
    filler = b"x" * 65536
    assert os.write(far, filler) == len(filler)
    process = subprocess.Popen([*BALLOON, "migrate", "--help"], stdout=far, stderr=subprocess.PIPE)
    os.close(far)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2.0)
    with open(near, "rb") as reader:
        text = reader.read().removeprefix(filler).decode()
    assert process.wait(10) == 0
    assert text == run("migrate", "--help").stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_one_although_nobody_reads(number: signal.Signals, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        process = subprocess.Popen([*BALLOON, "receive", "unix:s"], stdout=full, stderr=full, cwd=tmp_path)
        while not (tmp_path / "s").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(10) == 130


def test_a_reader_who_goes_does_not_make_wrong_pages_good() -> None:
    """The code says what was found, whoever reads it."""
    script = """
from balloon_cli import report
real = report.findings
report.findings = lambda result: ["planted"]
from balloon_cli.__main__ import main
main(["migrate", "--memory", "16M", "--warm-up", "0", "--hints", "on"])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.splitlines()[-1] == "balloon: planted"


def test_a_server_whose_log_nobody_reads_ends_as_if_it_was_told_to(tmp_path: Path) -> None:
    command = [*BALLOON, "serve", "s", "--guest", "python", "--memory", "16M", "--json-log"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None
    first = json.loads(process.stdout.readline())
    assert first["event"] == "listening"
    children = descendants(process.pid)
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert all_gone(children)
    assert list(tmp_path.iterdir()) == []
