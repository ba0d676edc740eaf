"""Doorbells are the front end's: any descriptor may come as one, and a guest may add buffers for ever."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from front_end import RINGS, Front

from vring import vhost_user as vu
from vring.vhost_user import F_PROTOCOL_FEATURES, Request


@pytest.fixture
def front() -> Iterator[Front]:
    front = Front()
    yield front
    front.close()


def give_kick(front: Front, fd: int, index: int = 0) -> None:
    front.say(Request.SET_VRING_KICK, vu.VringFd(index, True).pack(), (fd,))
    os.close(fd)


def closed_pipe() -> int:
    out, back = os.pipe()
    os.close(back)
    return out


def closed_socket() -> int:
    mine, theirs = socket.socketpair()
    theirs.close()
    return mine.detach()


@pytest.mark.parametrize(
    "make",
    [
        lambda: os.open("/", os.O_RDONLY),
        lambda: os.open(__file__, os.O_RDONLY),
        closed_pipe,
        closed_socket,
    ],
    ids=["directory", "file", "closed pipe", "closed socket"],
)
def test_a_kick_that_is_none_stops_its_ring_alone(front: Front, make) -> None:
    front.probe(RINGS, F_PROTOCOL_FEATURES)
    assert front.live() == 3
    before = len(os.listdir("/proc/self/fd"))
    give_kick(front, make())
    for _ in range(10):
        front.loop.run_once(0.0)
    assert front.backend.connected
    assert front.live() == 2
    assert front.backend.last_error is not None
    assert "queue 0" in front.backend.last_error
    assert "kick" in front.backend.last_error
    give_kick(front, os.eventfd(0))
    assert front.live() == 3, "a good one makes all well again"
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_guest_that_never_stops_keeps_nobody_waiting(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is never done with a queue: messages are answered all the same, and other queues served."""
    front.probe(RINGS, F_PROTOCOL_FEATURES)
    served: list[int] = []

    def busy(index: int) -> int:
        served.append(index)
        assert len(served) < 1000, "the loop does not come back"
        return int(index == 0)

    monkeypatch.setattr(front.device, "process", busy)
    front.backend.process(0)
    front.loop.run_once(0.0)
    front.say(Request.SET_VRING_ENABLE, vu.VringState(1, 0).pack())
    front.say(Request.SET_VRING_ENABLE, vu.VringState(1, 1).pack())
    assert 1 in served
    assert served.count(0) >= 4, "one piece each time round"
    front.backend.hold()
    n = len(served)
    front.loop.run_once(0.0)
    assert len(served) == n, "a guest that is paused is not served"
