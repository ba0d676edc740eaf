"""The loop: what fails in one place is nothing to the others; what cannot be had now is had later."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from host_qemu_side.loop import Loop
from vring.unix_socket import UnixListener


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


def test_what_comes_after_a_failure_has_its_turn(loop: Loop) -> None:
    done: list[str] = []

    def fails() -> None:
        raise RuntimeError

    loop.soon(lambda: done.append("first"))
    loop.soon(fails)
    loop.soon(lambda: done.append("last"))
    with pytest.raises(RuntimeError):
        loop.run_once(1)
    assert done == ["first"]
    loop.run_once(1)
    assert done == ["first", "last"]
    loop.run_once(0)
    assert done == ["first", "last"]


def test_soon_is_the_next_time_round(loop: Loop) -> None:
    done: list[int] = []

    def again() -> None:
        done.append(len(done))
        loop.soon(again)

    loop.soon(again)
    for n in range(1, 4):
        loop.run_once(1)
        assert len(done) == n


def test_later_is_not_before_its_time_and_not_missed(loop: Loop) -> None:
    done: list[str] = []
    began = time.monotonic()
    loop.later(0.2, lambda: done.append("second"))
    loop.later(0.1, lambda: done.append("first"))
    loop.run_once(0)
    assert done == []
    while len(done) < 2:
        loop.run_once(5)
        assert time.monotonic() - began < 3, "a wait does not last longer than until the next of them"
    assert done == ["first", "second"]
    assert time.monotonic() - began >= 0.2


def test_without_descriptors_connections_wait(loop: Loop, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    listener = UnixListener(str(tmp_path / "s"))
    came: list[socket.socket] = []
    loop.listen(listener, came.append)
    client = socket.socket(socket.AF_UNIX)
    client.connect(listener.path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(client.fileno())
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        for _ in range(20):
            loop.run_once(0.05)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert came == []
    assert caplog.text.count("have to wait") == 1
    deadline = time.monotonic() + 5
    while not came:
        loop.run_once(1)
        assert time.monotonic() < deadline
    assert not came[0].getblocking()
    came[0].close()
    client.close()
    loop.unwatch(listener.fileno())
    listener.close()


def test_a_listener_that_was_closed_while_it_waited(loop: Loop, tmp_path: Path) -> None:
    listener = UnixListener(str(tmp_path / "s"))
    loop.listen(listener, lambda connection: None)
    client = socket.socket(socket.AF_UNIX)
    client.connect(listener.path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(client.fileno())
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        loop.run_once(1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    listener.close()
    client.close()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        loop.run_once(0.1)
    assert loop.filenos() == [loop.filenos()[0]], "its own only"


def test_a_connection_that_cannot_be_taken_is_dropped_alone(loop: Loop, tmp_path: Path) -> None:
    taken: list[socket.socket] = []

    def take(connection: socket.socket) -> None:
        if not taken:
            taken.append(connection)
            raise OSError("no room to watch it")
        taken.append(connection)

    listener = UnixListener(str(tmp_path / "s"))
    loop.listen(listener, take)
    for n in (1, 2):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(listener.path)
            loop.run_once(1)
            assert len(taken) == n
    assert [connection.fileno() < 0 for connection in taken] == [True, False]
    taken[1].close()
    loop.unwatch(listener.fileno())
    listener.close()
