"""One guest that lives through everything: each failure at each phase, in this process, and it is whole every time.

The guest and its host are made once; migrations of them fail in every way there is, one after another. After each the
guest has freed what it held for hints, its allocator and all its pages are checked, and in the end it migrates.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from shared import Shared

from balloon_dev.profiles import SPEC
from host_qemu_side import destination
from host_qemu_side.migration import Cancelled, Limits, Migration
from host_qemu_side.migration.output import FileOutput, SocketOutput
from host_qemu_side.migration.receiver import Receiver
from host_qemu_side.migration.stream import VERSION, Kind, StreamError, StreamReader, StreamWriter
from host_qemu_side.python_guest import PythonGuest
from host_qemu_side.source import Outcome, SourceHost
from vring.errors import MissingFacility, PeerVanished, VirtioError

PHASES = ("setup", "round", "sync", "frozen", "handover")
ARGUMENTS = ["--memory", "64M", "--workload", "churn+writer:4M@8M", "--profile", SPEC.name]


class Source:
    """A host and its guest."""

    def __init__(self) -> None:
        self.host = SourceHost()
        self.guest = PythonGuest(self.host.loop, self.host.backend, None, ARGUMENTS)
        self.guest.wait_ready()

    def close(self) -> None:
        self.guest.close()
        self.host.close()

    def migrate(self, output: SocketOutput | FileOutput, **options: Any) -> Outcome:
        """Migrate; a guest that fails here is unfrozen by the engine, not by the test."""
        log = self.guest.dirty_log("auto", self.host.track_device_writes())
        options = {"limits": Limits(bandwidth=0.0, answer=0.5), "silence": 0.5, **options}
        with contextlib.closing(output):
            return self.host.migrate(
                self.guest, log, output, journal=self.guest.journal, header={"guest": "python"}, **options
            )

    def assert_whole(self) -> None:
        """The guest runs, holds nothing for hints, and every page has its content."""
        deadline = time.monotonic() + 5.0
        while self.guest.ask("status", 5.0)["hinted_pages"]:
            assert time.monotonic() < deadline, "the guest still holds pages for hints"
        before = int(self.guest.status["pages_written"])
        self.guest.check()
        assert self.guest.checked is not None
        assert self.guest.checked["wrong"] == 0
        assert self.guest.checked["pages"] == self.guest.status["allocated_pages"]
        self.guest.run_for(0.05)
        assert int(self.guest.ask("status", 5.0)["pages_written"]) > before, "the guest stands still"


@pytest.fixture(scope="module")
def sources() -> Iterator[Shared[Source]]:
    with Shared(lambda: contextlib.closing(Source()), Source.assert_whole) as shared:
        yield shared


@pytest.fixture
def source(sources: Shared[Source]) -> Source:
    """One source for all: what fails in one migration is nothing to the next."""
    return sources.get()


@contextlib.contextmanager
def receiver(behave: Callable[[socket.socket], None]) -> Iterator[SocketOutput]:
    """A destination in a thread of this process, with the socket to it."""
    mine, theirs = socket.socketpair()
    thread = threading.Thread(target=behave, args=(theirs,), daemon=True)
    thread.start()
    try:
        yield SocketOutput(mine)
    finally:
        mine.close()
        thread.join(5.0)
        theirs.close()
        assert not thread.is_alive()


def honest(sock: socket.socket) -> None:
    """Receive everything, as `balloon receive` does."""
    source, received = destination._Source(sock, None), Receiver()
    with contextlib.suppress(VirtioError):
        source.answer(received.hello())
        destination.receive(source, received)


def say_hello(sock: socket.socket) -> StreamWriter:
    writer = StreamWriter()
    for part in writer.json(Kind.HELLO, {"version": VERSION}):
        sock.sendall(part)
    return writer


def swallow(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while sock.recv(1 << 20):
            pass


def read_until(sock: socket.socket, kind: Kind) -> None:
    """Read the stream until a record of this kind has come."""
    reader = StreamReader()
    while True:
        record = reader.next()
        if record is not None and record.kind is kind:
            return
        if record is None:
            data = sock.recv(min(max(reader.wanted, 1), 1 << 20))
            if not data:
                return
            reader.feed(data)


class Fault:
    """Does something once, in a phase."""

    def __init__(self, phase: str, act: Callable[[], object]) -> None:
        self.phase, self.act, self.done = phase, act, False

    def arm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        enter, setup = Migration._enter, Migration._setup

        def entering(migration: Migration, phase: Any) -> None:
            enter(migration, phase)
            self.look(phase.value)

        def beginning(migration: Migration) -> Any:
            self.look("setup")
            return setup(migration)

        monkeypatch.setattr(Migration, "_enter", entering)
        monkeypatch.setattr(Migration, "_setup", beginning)

    def look(self, phase: str) -> None:
        if phase == self.phase and not self.done:
            self.done = True
            self.act()


WAYS = ("cancelled", "destination gone", "destination stops reading", "dirty log fails")
FAILURES = [
    (phase, what)
    for what in WAYS
    for phase in PHASES
    if what != "dirty log fails" or phase not in ("frozen", "handover")  # it is not read any more
]


@pytest.mark.parametrize(("phase", "what"), FAILURES)
def test_a_failure_before_commit_leaves_the_guest_whole(
    source: Source, monkeypatch: pytest.MonkeyPatch, phase: str, what: str
) -> None:
    stop: list[bool] = []
    with receiver(honest) as output:
        if what == "cancelled":
            fault, wanted = Fault(phase, lambda: stop.append(True)), Cancelled
        elif what == "destination gone":
            fault, wanted = Fault(phase, lambda: output._socket.shutdown(socket.SHUT_RDWR)), PeerVanished
        elif what == "destination stops reading":
            fault, wanted = Fault(phase, lambda: monkeypatch.setattr(output, "flush", lambda: False)), PeerVanished
        else:

            def failing(self: Any, into: Any) -> int:
                raise MissingFacility("the log failed")

            def fail() -> None:
                from vring.dirty.combined import CombinedLog

                monkeypatch.setattr(CombinedLog, "sync", failing)
                monkeypatch.setattr(CombinedLog, "start", failing_start)

            def failing_start(self: Any) -> None:
                raise MissingFacility("the log failed")

            fault, wanted = Fault(phase, fail), MissingFacility
        fault.arm(monkeypatch)
        began = time.monotonic()
        with pytest.raises(wanted):
            source.migrate(output, stop_requested=lambda: bool(stop))
        assert time.monotonic() - began < 5.0
        assert fault.done
    assert not source.host.handed_over
    monkeypatch.undo()
    source.assert_whole()


def garbage(sock: socket.socket) -> None:
    sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10)
    swallow(sock)


def garbage_after_hello(sock: socket.socket) -> None:
    say_hello(sock)
    sock.sendall(os.urandom(4096))
    swallow(sock)


def garbage_in_place_of_ready(sock: socket.socket) -> None:
    say_hello(sock)
    read_until(sock, Kind.END)
    sock.sendall(b"\xff" * 64)
    swallow(sock)


def wrong_version(sock: socket.socket) -> None:
    for part in StreamWriter().json(Kind.HELLO, {"version": 99}):
        sock.sendall(part)
    swallow(sock)


def refuses_at(kind: Kind) -> Callable[[socket.socket], None]:
    def behave(sock: socket.socket) -> None:
        writer = say_hello(sock)
        read_until(sock, kind)
        for part in writer.json(Kind.REFUSED, {"why": "no room here"}):
            sock.sendall(part)
        swallow(sock)

    return behave


def never_answers(sock: socket.socket) -> None:
    swallow(sock)


def never_says_ready(sock: socket.socket) -> None:
    say_hello(sock)
    swallow(sock)


def never_reads(sock: socket.socket) -> None:
    say_hello(sock)
    with contextlib.suppress(OSError):
        poll_gone(sock)


def poll_gone(sock: socket.socket) -> None:
    """Wait until the other end is closed without reading a byte."""
    import select

    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    poll.poll(20000)


@pytest.mark.parametrize(
    ("behave", "error", "says"),
    [
        (garbage, StreamError, "not a migration stream"),
        (garbage_after_hello, StreamError, "stream damaged"),
        (garbage_in_place_of_ready, StreamError, "stream damaged"),
        (wrong_version, StreamError, "version 99"),
        (refuses_at(Kind.HEADER), StreamError, "refused: no room here"),
        (refuses_at(Kind.PAGES), StreamError, "refused: no room here"),
        (refuses_at(Kind.END), StreamError, "refused: no room here"),
        (never_answers, PeerVanished, "say hello"),
        (never_says_ready, PeerVanished, "did not confirm within 0.5 s"),
        (never_reads, PeerVanished, "took nothing for 0.5 s"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_destination_that_misbehaves(
    source: Source, behave: Callable[[socket.socket], None], error: type[Exception], says: str
) -> None:
    with receiver(behave) as output, pytest.raises(error, match=says):
        source.migrate(output)
    assert not source.host.handed_over
    source.assert_whole()


def test_a_refusal_is_heard_while_the_guest_still_runs(source: Source) -> None:
    """Not after all of RAM was sent."""
    sent: list[int] = []
    with receiver(refuses_at(Kind.PAGES)) as output, pytest.raises(StreamError, match="refused"):
        source.migrate(
            output,
            hints=False,
            limits=Limits(bandwidth=64 << 20),
            on_step=lambda migration, witness: sent.append(migration.result.bytes_sent),
        )
    assert sent[-1] < 16 << 20
    source.assert_whole()


def test_a_file_that_cannot_be_finished_is_not_handed_over(
    source: Source, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """COMMIT is in the file, but there is no such file: the guest is still the source's."""
    output = FileOutput(str(tmp_path / "guest.vbm"))

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MissingFacility, match="No space left"):
        source.migrate(output)
    monkeypatch.undo()
    assert not source.host.handed_over
    assert list(tmp_path.iterdir()) == []
    source.assert_whole()


@pytest.mark.parametrize("unnamed", [True, False])
def test_a_file_without_room(source: Source, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, unnamed: bool) -> None:
    """With and without `O_TMPFILE`, on a disk that is full after 8 MiB."""
    if not unnamed:
        plain = os.open

        def without(path: Any, flags: int, *rest: Any) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(95, "Operation not supported")
            return plain(path, flags, *rest)

        monkeypatch.setattr(os, "open", without)
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    output = FileOutput(str(tmp_path / "guest.vbm"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, hard))
    try:
        with pytest.raises(MissingFacility, match=r"cannot write .*free some space"):
            source.migrate(output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    source.assert_whole()


def test_a_guest_slow_to_pause_is_thawed(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was stopped when asked to pause; it pauses after the migration was given up, and must not stay so."""
    import host_qemu_side.python_guest as module

    monkeypatch.setattr(module, "PAUSE_TIMEOUT", 0.3)
    fault = Fault("sync", lambda: os.kill(source.guest.pid, signal.SIGSTOP))
    fault.arm(monkeypatch)
    with receiver(honest) as output, pytest.raises(PeerVanished, match="paused"):
        source.migrate(output)
    os.kill(source.guest.pid, signal.SIGCONT)
    monkeypatch.undo()
    source.assert_whole()


def test_after_all_that_it_migrates(source: Source) -> None:
    """Last: the guest is frozen for good when it was handed over."""
    with receiver(honest) as output:
        outcome = source.migrate(output, limits=Limits(bandwidth=0.0))
    assert source.host.handed_over
    assert outcome.verdict is not None
    assert outcome.verdict.pages_wrong == 0
    assert outcome.result.pages()["skipped"] > 0
