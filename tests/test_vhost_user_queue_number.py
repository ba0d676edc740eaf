"""GET_QUEUE_NUM: what the device could have at most. Linux 7.2 refuses one that answers less than it knows."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import pytest
from front_end import FEATURES, Front

from balloon_dev.device import BalloonDevice
from balloon_dev.features import ALL_BALLOON_FEATURES, QueueRole
from balloon_dev.profiles import PROFILES
from host_qemu_side.loop import Loop
from host_qemu_side.vhost_user import VhostUserBackend
from vring import vhost_user as vu
from vring.device import Device, most_queues
from vring.vhost_user import Request


def answer(device: Device) -> int:
    """What a front end is told."""
    loop = Loop()
    backend = VhostUserBackend(device, loop)
    mine, theirs = socket.socketpair()
    with mine:
        backend.serve(theirs)
        mine.sendall(vu.pack_message(Request.GET_QUEUE_NUM, b""))
        loop.run_once(1.0)
        reply = mine.recv(100)
    backend.close()
    loop.close()
    return vu.unpack_u64(reply[12:], "GET_QUEUE_NUM")


@pytest.mark.parametrize("profile", PROFILES.values(), ids=list(PROFILES))
def test_a_balloon_answers_five_whatever_is_offered(profile) -> None:
    for features in (0, FEATURES, int(ALL_BALLOON_FEATURES)):
        device = BalloonDevice(features, profile=profile)
        assert answer(device) == most_queues(device) == len(QueueRole) == 5


def test_a_device_that_says_nothing_answers_what_it_has() -> None:
    class Plain:
        """As an embedder's device, without `most_queues`."""

        queue_sizes: Sequence[int] = (64, 8)

        def take_config_change(self) -> bool:
            return False

        def take_calls(self) -> list[int]:
            return []

        def __getattr__(self, name: str):
            if name == "most_queues":
                raise AttributeError(name)
            return lambda *arguments: None

    assert answer(Plain()) == most_queues(Plain()) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("offered", [FEATURES, FEATURES & ~int(ALL_BALLOON_FEATURES)], ids=["three", "two"])
def test_a_front_end_may_set_up_as_many_as_it_was_told_of(offered: int) -> None:
    """A queue without a purpose rests; the others are served, and a sixth is refused."""
    front = Front(offered)
    served = len(front.device.queue_sizes)
    front.probe(0x10000, rings=5)
    assert front.live() == served
    for index in range(5):
        front.backend.process(index)
    assert front.backend.last_error is None
    assert front.backend.connected
    front.close()
    front = Front(offered)
    front.say(Request.SET_VRING_NUM, vu.VringState(5, 8).pack())
    assert "queue 5" in str(front.backend.last_error)
    front.close()


def test_a_buffer_on_a_queue_without_a_purpose_stops_that_queue_alone() -> None:
    front = Front(FEATURES)
    front.probe(0x10000, rings=5)
    avail = 0x10000 + 4 * 0x4000 + 0x1000
    front.memory.write(0x10000 + 4 * 0x4000, (0x1000).to_bytes(8, "little") + (4).to_bytes(8, "little"))
    front.memory.write(avail + 2, (1).to_bytes(2, "little"))
    front.backend.process(4)
    assert "no purpose" in str(front.backend.last_error)
    assert front.backend.connected
    assert front.live() == 3
    front.close()
