"""What fails while one front end or one monitor client is served ends that one, with a reason, and nobody else.

Also the flags of what a front end gave, which stay as they are.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from front_end import RINGS, Front

from host_qemu_side.loop import Loop
from host_qemu_side.monitor.dispatch import Command, Dispatcher, Session
from host_qemu_side.monitor.server import MonitorServer
from host_qemu_side.vhost_user.rings import BREAKS_TOLD
from vring import vhost_user as vu
from vring.errors import VirtioError
from vring.vhost_user import F_PROTOCOL_FEATURES, Request


@pytest.fixture
def front() -> Iterator[Front]:
    made = Front()
    yield made
    made.close()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("a fault of ours"), OverflowError("too much")])
def test_a_message_that_cannot_be_served(front: Front, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(front.device, "write_config", fails)
    front.probe(RINGS, F_PROTOCOL_FEATURES)
    before = len(os.listdir("/proc/self/fd"))
    held = os.eventfd(0)
    front.say(Request.SET_CONFIG, vu.ConfigSpace(4, 4, 0, b"1234").pack(), (held,))
    os.close(held)
    assert not front.backend.connected
    assert type(error).__name__ in str(front.backend.last_error)
    assert len(os.listdir("/proc/self/fd")) < before, "all it had is closed"
    front.socket.close()
    front.socket, theirs = socket.socketpair()
    front.backend.serve(theirs)
    front.probe(RINGS, F_PROTOCOL_FEATURES)
    assert front.live() == 3


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("a fault of ours"), VirtioError("broken")])
def test_a_queue_that_cannot_be_served(front: Front, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(index: int) -> int:
        if index == 1:
            raise error
        return 0

    front.probe(RINGS, F_PROTOCOL_FEATURES)
    monkeypatch.setattr(front.device, "process", fails)
    for index in range(3):
        front.backend.process(index)
    assert front.backend.connected
    assert front.live() == 2
    assert str(error) in str(front.backend.last_error)
    assert front.backend.last_error, "it has words"


@pytest.mark.parametrize("blocking", [True, False])
def test_flags_stay(front: Front, blocking: bool) -> None:
    """They belong to the open file descriptions that the front end has, too; one may wait, the other may not."""
    front.probe(RINGS, F_PROTOCOL_FEATURES)
    mine, theirs = socket.socketpair()
    kick, call, err = (os.eventfd(0) for _ in range(3))
    given = {Request.SET_VRING_CALL: call, Request.SET_VRING_ERR: err, Request.SET_VRING_KICK: kick}
    for fd in (*given.values(), theirs.fileno()):
        os.set_blocking(fd, blocking)
    before = [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (*given.values(), theirs.fileno())]
    front.say(Request.SET_BACKEND_REQ_FD, fds=(theirs.fileno(),))
    for request, fd in given.items():
        front.say(request, vu.VringFd(0, True).pack(), (fd,))
    assert front.live() == 3
    front.device.set_target(1)
    front.backend.deliver()
    assert len(mine.recv(100)) == vu.HEADER_SIZE
    _inflate(front, kick)
    assert struct.unpack("<Q", os.read(call, 8)) == (1,)
    assert [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (*given.values(), theirs.fileno())] == before
    for fd in given.values():
        os.close(fd)
    mine.close()
    theirs.close()


def _inflate(front: Front, kick: int) -> None:
    """One buffer of one page number on queue 0."""
    front.memory.write(0x8000, struct.pack("<I", 40))
    front.memory.write(RINGS, struct.pack("<QIHH", 0x8000, 4, 0, 0))
    front.memory.write(RINGS + 0x1004, struct.pack("<H", 0))
    front.memory.write(RINGS + 0x1002, struct.pack("<H", 1))
    os.eventfd_write(kick, 1)
    front.loop.run_once(1.0)
    assert struct.unpack("<H", front.memory.read(RINGS + 0x2002, 2)) == (1,)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_sockets_as_doorbells(front: Front, kind: socket.SocketKind) -> None:
    """As User-Mode Linux has them; one that is full, or whose other end is gone, keeps nobody waiting."""
    front.probe(RINGS, F_PROTOCOL_FEATURES)
    call, their_call = socket.socketpair(socket.AF_UNIX, kind)
    kick, their_kick = socket.socketpair(socket.AF_UNIX, kind)
    front.say(Request.SET_VRING_CALL, vu.VringFd(0, True).pack(), (their_call.fileno(),))
    front.say(Request.SET_VRING_KICK, vu.VringFd(0, True).pack(), (their_kick.fileno(),))
    front.memory.write(0x8000, struct.pack("<I", 40))
    front.memory.write(RINGS, struct.pack("<QIHH", 0x8000, 4, 0, 0))
    front.memory.write(RINGS + 0x1002, struct.pack("<H", 1))
    kick.send(bytes(8))
    front.loop.run_once(1.0)
    assert call.recv(100) == struct.pack("<Q", 1)
    while True:
        try:
            their_call.send(bytes(8), socket.MSG_DONTWAIT)
        except BlockingIOError:
            break
    front.memory.write(RINGS + 0x1006, struct.pack("<H", 0))
    front.memory.write(RINGS + 0x1002, struct.pack("<H", 2))
    kick.send(bytes(8))
    front.loop.run_once(1.0)
    assert struct.unpack("<H", front.memory.read(RINGS + 0x2002, 2)) == (2,)
    assert front.backend.connected
    for end in (call, their_call, kick, their_kick):
        end.close()


def test_reading_goes_by_turns(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much a front end has sent, others come in between, and nothing of it is lost."""
    monkeypatch.setattr("host_qemu_side.vhost_user.backend.TURN", 0.0)
    turns = 0
    answers = 50
    front.socket.sendall(vu.pack_message(Request.GET_QUEUE_NUM) * answers)
    got = bytearray()
    front.socket.setblocking(False)
    while len(got) < answers * (vu.HEADER_SIZE + 8):
        front.loop.run_once(1.0)
        turns += 1
        got += front.socket.recv(1 << 20)
    assert turns == answers
    assert len(got) == answers * (vu.HEADER_SIZE + 8)


def test_a_monitor_client_that_cannot_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, dispatcher = Loop(), Dispatcher((1, 0, 0), "test")
    dispatcher.add(Command("good", lambda: "well"))
    server = MonitorServer(loop, str(tmp_path / "m"), dispatcher)
    feed = Session.feed

    def fails(session: Session, data: bytes) -> None:
        if b"bad" in data:
            raise MemoryError
        feed(session, data)

    monkeypatch.setattr(Session, "feed", fails)
    clients = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    for client in clients:
        client.settimeout(10)
        client.connect(str(tmp_path / "m"))
        loop.run_once(1)
        client.recv(1000)
    clients[0].send(b"bad")
    clients[1].send(b'{"execute": "qmp_capabilities"} {"execute": "good"}')
    for _ in range(10):
        loop.run_once(0.05)
        server.step()
    assert clients[0].recv(100) == b""
    assert json.loads(clients[1].recv(1000).splitlines()[-1]) == {"return": "well"}
    for client in clients:
        client.close()
    server.close()
    loop.close()


def test_a_queue_that_takes_long_goes_by_turns(front: Front) -> None:
    """A call serves one buffer at least, and what it leaves is found again, in order."""
    front.probe(RINGS, F_PROTOCOL_FEATURES)
    front.device.enough = lambda: True
    for page in (40, 41, 42):
        front.put(struct.pack("<I", page), kick=False)
    for served in (1, 2, 3):
        assert front.device.process(0) == 1
        assert front.used() == served
        assert front.device.ballooned_pages == served
    assert front.device.process(0) == 0
    front.inflate(43)
    assert front.used() == 4


def test_an_interrupt_that_could_not_be_sent_is_sent_by_the_next_descriptor(front: Front) -> None:
    front.probe(RINGS, F_PROTOCOL_FEATURES)
    ours, theirs = socket.socketpair()
    front.say(Request.SET_VRING_CALL, vu.VringFd(0, True).pack(), (theirs.fileno(),))
    ours.close()
    theirs.close()
    front.inflate(40)
    assert front.used() == 1
    front.call()
    assert front.rung()


def test_a_ring_that_breaks_for_ever_fills_no_log(front: Front, caplog: pytest.LogCaptureFixture) -> None:
    front.probe(RINGS, F_PROTOCOL_FEATURES)
    for _ in range(3 * BREAKS_TOLD):
        front.backend._rings._broken(0, VirtioError("a ring that cannot be trusted"))
    assert sum("cannot be trusted" in record.message for record in caplog.records) == BREAKS_TOLD
    front.backend.disconnect()
    front.socket.close()
    front.socket, theirs = socket.socketpair()
    front.backend.serve(theirs)
    front.backend._rings._broken(0, VirtioError("a ring that cannot be trusted"))
    assert sum("cannot be trusted" in record.message for record in caplog.records) == BREAKS_TOLD + 1
