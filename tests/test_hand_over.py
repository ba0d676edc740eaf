"""The hand-over: what counts as an answer, who owns the guest whatever is said or cut, and how a guest arrives."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from explore_handover import Plot, play
from explore_late_freezes import explore
from harness import World
from serve_process import Process, receiver, wait_for
from shape import Shape

from guest_driver.process import _Command
from host_qemu_side.migration.stream import MAGIC, Kind, StreamError, StreamReader, StreamWriter
from host_qemu_side.python_guest import PythonGuest
from host_qemu_side.source import SourceHost
from vring.backing import keep_size
from vring.errors import DeviceError, DriverError, PeerVanished, VirtioError

# -- the guest's control channel --------------------------------------------------------------------------------------


def test_late_freezes() -> None:
    """The short version of `explore_late_freezes`."""
    tally = explore(6, random.Random(1), (0.05, 0.1, 0.5, 1.0))
    assert tally.wrong == 0
    assert tally.migrated > 0
    assert tally.timed_out > 0


@pytest.fixture(scope="module")
def guest() -> Iterator[PythonGuest]:
    with SourceHost() as host:
        made = PythonGuest(host.loop, host.backend, None, ["--memory", "16M", "--workload", "idle"])
        try:
            made.wait_ready()
            yield made
        finally:
            made.close()


STATUS = dict.fromkeys(("allocated_pages", "hinted_pages", "ballooned_pages", "free_pages", "total_pages"), 1)
GARBAGE: list[Any] = [
    b"",
    b"\xff\xfe",
    b"[]",
    b"null",
    b'{"event":' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"event":"paused"}',
    b'{"event":"paused","answers":1e999}',
    b'{"event":"paused","answers":1' + b"0" * 400 + b"}",
    {"event": "paused", "answers": 99, **STATUS},
    {"event": "paused", "answers": -1},
    {"event": "paused", "answers": True},
    {"event": {}},
    {"event": "hello"},
    {"event": "ready"},
    {"event": "waiting"},
    {"event": "\udc80"},
    {"event": "unheard of"},
    {"event": "failed", "answers": 1, "why": "\x1b[2J"},
]


@pytest.mark.parametrize("said", GARBAGE, ids=lambda said: str(said)[:30])
def test_garbage_of_a_guest_is_one_error(guest: PythonGuest, said: Any) -> None:
    before = guest.status, guest._answered, guest.ready
    with pytest.raises(VirtioError):
        guest._heard(said if isinstance(said, bytes) else json.dumps(said).encode(), [])
    assert (guest.status, guest._answered, guest.ready) == before


def test_an_answer_counts_for_its_own_command_alone(guest: PythonGuest) -> None:
    """Whatever was asked before, and however late it is answered."""
    first, second = guest.tell("pause"), guest.tell("resume")
    third = guest.tell("pause")
    assert not guest.has_answered(third)
    guest.wait_answer(first, 10.0)
    guest.wait_answer(second, 10.0)
    guest.wait_answer(third, 10.0)
    guest.ask("resume")
    for event in ("resumed", "checked"):  # nothing was asked, or something else
        with pytest.raises(VirtioError):
            guest._heard(json.dumps({"event": event, "answers": guest._answered + 1}).encode(), [])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b'{"command":"pause"}',
        b'{"command":"pause","number":0}',
        b'{"command":"pause","number":7}',
        b'{"command":"pause","number":1e3}',
        b'{"command":"explode","number":8}',
        b'{"command":["pause"],"number":8}',
        b'{"command":"attach","number":8,"bases":[[0,65536]]}',
        b'{"command":"attach","number":8,"bases":{"0":1}}',
        b'{"command":"pause","number":8,"x":"' + b"y" * 70000 + b'"}',
    ],
)
def test_garbage_of_a_host_is_one_error(data: bytes) -> None:
    with pytest.raises(DeviceError):
        _Command.decode(data, 7)
    assert _Command.decode(b'{"command":"pause","number":8}', 7).number == 8


# -- the source -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def answering(*answers: tuple[Kind, Any]) -> Iterator[World]:
    """A world whose destination says just that when all was sent, and then the last of it over and over."""
    world = World(Shape())
    world.migrate(bandwidth=0.0)
    assert world.destination is not None
    writer, reader, destination = StreamWriter(), StreamReader(), world.destination
    queue = list(answers)

    def answer() -> Any:
        if Kind.END not in destination.kinds:
            return None
        kind, payload = queue.pop(0) if len(queue) > 1 else queue[0]
        for part in writer._record(kind, payload):
            reader.feed(part)
        return reader.next()

    destination.answer = answer  # type: ignore[method-assign]
    try:
        yield world
    finally:
        world.close()


@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.REPORT, Kind.HEADER, Kind.COMMIT, Kind.LAUNCHED])
def test_only_what_is_due_may_be_said_before_ready(kind: Kind) -> None:
    with answering((kind, b'{"version":2}' if kind not in (Kind.COMMIT, Kind.LAUNCHED) else b"")) as world:
        arrived = world.finish()
        assert isinstance(arrived.error, StreamError)
        assert world.events[-1] == "thaw"


def test_the_time_for_an_answer_ends_whatever_is_said() -> None:
    """A digest at a time, each with a time of its own: the guest goes on when the time is over."""
    with answering((Kind.DIGESTS, bytes(8))) as world:
        arrived = world.finish(50.0)
        assert isinstance(arrived.error, PeerVanished)
        assert "did not confirm within 120 s" in str(arrived.error)
        assert world.events[-1] == "thaw"


def test_the_guest_is_not_frozen_for_ever() -> None:
    """A destination that takes a little at a time, and would for hours."""
    world = World(Shape())
    world.migrate(frozen=300.0, max_rounds=1, bandwidth=0.0)
    assert world.destination is not None
    error = None
    for _ in range(5000):
        world.destination.room = 1 if world.frozen else None
        if (arrived := world.advance(1.0)) is not None:
            error = arrived.error
            break
    world.close()
    assert isinstance(error, PeerVanished)
    assert "frozen for 300 s" in str(error)
    assert world.events == ["freeze", "thaw"]


# -- whole programs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plot", "running"),
    [
        (Plot("connection", "cut to the destination", Kind.COMMIT), {"source"}),
        (Plot("connection", "cut both", Kind.READY), {"source"}),
        (Plot("destination guest", "kill", Kind.STATE), {"source"}),
        (Plot("destination", "kill", Kind.END), {"source"}),
        (Plot("destination guest", "stop", Kind.END, 0.7), {"destination"}),
        (Plot("source", "kill", Kind.REPORT), {"destination"}),
        (Plot("source guest", "kill", Kind.REPORT), {"destination"}),
    ],
    ids=lambda value: f"{value.actor} {value.deed} {value.moment!r}" if isinstance(value, Plot) else "",
)
def test_the_guest_runs_once_and_is_not_lost(plot: Plot, running: set[str]) -> None:
    """The short version of `explore_handover`."""
    ending = play(plot)
    assert not ending.wrong, ending
    assert ending.running == running, ending


@pytest.mark.parametrize("start", [False, True])
def test_a_stopped_guest_arrives_stopped(tmp_path: Path, start: bool) -> None:
    serve = Process(tmp_path)
    try:
        serve.ask("stop")
        with receiver(f"unix:{tmp_path}/d.sock", *(["--start"] if start else [])) as there:
            serve.ask("migrate", uri=f"unix:{tmp_path}/d.sock")
            out, _ = there.communicate(timeout=60)
        resumed = json.loads(out)["resumed"]
        assert resumed["running"] is start
        assert resumed["pages_checked"] > 0
        assert resumed["pages_wrong"] == 0
        assert ("hint_run" in resumed) is start
    finally:
        serve.end()


def test_ready_is_the_last_word_before_commit(tmp_path: Path) -> None:
    """All of a guest is there before its process is up: READY says that it is, nothing after it."""
    serve = Process(tmp_path, memory="16M")
    try:
        serve.ask("migrate", uri=f"file:{tmp_path}/image")
        wait_for(lambda: serve.ask("query-migrate")["status"] == "completed")
    finally:
        serve.end()
    stream = (tmp_path / "image").read_bytes()[: -len(b"".join(StreamWriter().commit())) + len(MAGIC)]
    with receiver(f"unix:{tmp_path}/d.sock") as there, socket.socket(socket.AF_UNIX) as source:
        source.connect(f"{tmp_path}/d.sock")
        source.sendall(stream)
        reader, kinds = StreamReader(), list[Kind]()
        source.settimeout(30.0)
        with contextlib.suppress(TimeoutError):
            while data := source.recv(1 << 16):
                reader.feed(data)
                while (record := reader.next()) is not None:
                    kinds.append(record.kind)
                    source.settimeout(1.0 if record.kind is Kind.READY else 30.0)
        there.kill()
    assert kinds[-1] is Kind.READY


UNKNOWN_FEATURE = """
import balloon_dev.device as device
device.SUPPORTED_FEATURES &= ~(1 << 2)
from balloon_cli.__main__ import main
main()
"""
NO_PROCESS = """
import host_qemu_side.destination as destination
class Failing:
    def __init__(self, *arguments, **options):
        raise OSError(24, "Too many open files")
destination.PythonGuest = Failing
from balloon_cli.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("program", "why"),
    [(UNKNOWN_FEATURE, "features 0x4 are not served"), (NO_PROCESS, "the guest cannot be launched here")],
    ids=["state", "launch"],
)
def test_a_destination_that_cannot_go_on_says_so_before_it_has_the_guest(
    tmp_path: Path, program: str, why: str
) -> None:
    serve = Process(tmp_path)
    try:
        command = [sys.executable, "-c", program, "receive", f"unix:{tmp_path}/d.sock"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as there:
            wait_for((tmp_path / "d.sock").exists)
            serve.ask("migrate", uri=f"unix:{tmp_path}/d.sock")
            wait_for(lambda: serve.ask("query-migrate")["status"] == "failed", 60.0)
            said = there.communicate(timeout=20)[1]
        assert there.returncode in (3, 4)
        assert "Traceback" not in said
        assert why in serve.ask("query-migrate")["error-desc"]
        assert serve.ask("query-status")["running"] is True
    finally:
        serve.end()


@pytest.mark.parametrize(
    "uri",
    ["file:{}/a\0b", "file:{}/\ud800", "unix:{}/\ud800", "unix:a\0b", "tcp:\ud800:1", "file:{}/" + "n" * 300],
    ids=ascii,
)
def test_names_that_cannot_be_are_refused_at_once(tmp_path: Path, uri: str) -> None:
    serve = Process(tmp_path, memory="16M")
    try:
        began = time.monotonic()
        with pytest.raises(VirtioError):
            serve.ask("migrate", uri=uri.format(tmp_path))
        assert time.monotonic() - began < 5.0
        assert serve.ask("query-status")["running"] is True
    finally:
        serve.end()


NEVER_CHECKED = """
import host_qemu_side.deadlines as deadlines
deadlines.CHECK = 0.0
from balloon_cli.__main__ import main
main()
"""


def test_a_guest_that_is_too_slow_to_be_checked_is_kept(tmp_path: Path) -> None:
    """It was handed over: to end it here because it takes long would leave it nowhere."""
    serve = Process(tmp_path)
    try:
        command = [sys.executable, "-c", NEVER_CHECKED, "receive", f"unix:{tmp_path}/d.sock", "--keep"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as there:
            assert there.stderr is not None
            wait_for((tmp_path / "d.sock").exists)
            serve.ask("migrate", uri=f"unix:{tmp_path}/d.sock")
            for line in there.stderr:
                if "Ctrl-C ends it" in line:
                    break
            assert "could not be checked" in line
            assert "runs on" in line
            wait_for(lambda: serve.ask("query-migrate").get("destination") == {"running": True})
            there.send_signal(signal.SIGINT)
            there.communicate(timeout=20)
        assert there.returncode == 5
        assert serve.ask("query-status")["running"] is False
    finally:
        serve.end()


@pytest.mark.parametrize("sealed", [0, 1])
def test_what_a_guest_shares_and_could_cut_off_is_not_taken(sealed: int) -> None:
    """Its journal, its dirty log: an access past the end of either would end this process."""
    with SourceHost() as host, contextlib.ExitStack() as stack:
        made = PythonGuest(host.loop, host.backend, None, ["--memory", "16M", "--dirty-log", "software"])
        stack.callback(made.close)
        made.wait_ready()
        assert made.hello is not None
        hello = {"event": "hello", "pid": made.pid, "memory": 16 << 20, "dirty_log": "software", "ranges": []}
        made.hello = None
        fds = [os.memfd_create("cut", os.MFD_ALLOW_SEALING) for _ in range(2)]
        for fd in fds:
            os.ftruncate(fd, 1 << 20)
            stack.callback(os.close, fd)
        for fd in fds[:sealed]:
            keep_size(fd)
        with pytest.raises(DriverError, match="F_SEAL_SHRINK"):
            made._heard(json.dumps({**hello, "kernel_bytes": 1 << 20}).encode(), fds)
