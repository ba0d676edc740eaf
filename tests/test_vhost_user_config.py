"""The config space over vhost-user: messages of the whole of it, of one field, padded ones, and early ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from front_end import Front

from balloon_dev.config import ACTUAL, CMD_ID, NUM_PAGES, POISON_VAL, BalloonConfig
from balloon_dev.device import SUPPORTED_FEATURES
from vring import vhost_user as vu
from vring.vhost_user import ConfigSpace, Request, VhostUserError

WHOLE = 256
"""Bytes of config space that some front ends always send, and want back."""


@pytest.fixture
def front() -> Iterator[Front]:
    made = Front(SUPPORTED_FEATURES)
    yield made
    made.close()


@pytest.mark.parametrize("room", [0, 16, WHOLE])
def test_a_reply_is_as_long_as_the_request(front: Front, room: int) -> None:
    front.device.set_target(0x1234)
    for offset, size in ((0, 16), (0, 8), (8, 4), (12, 4), (16, 4), (0, 0)):
        shown = front.get_config(offset, size, room=room)
        assert shown == front.device.read_config(offset, size).ljust(max(room, size), b"\0")


def test_padding_is_not_written(front: Front) -> None:
    front.set_config(ACTUAL, b"\x07\0\0\0", room=WHOLE)
    assert front.get_config(0, 16) == bytes(4) + b"\x07\0\0\0" + bytes(8)
    assert not front.device.bad_requests


def test_a_write_before_anything_was_negotiated_counts(front: Front) -> None:
    """QEMU passes the driver's writes on as they come, and the features only at DRIVER_OK."""
    front.set_config(POISON_VAL, b"\xaa\xaa\xaa\xaa")
    front.negotiate()
    assert front.device.poison_val == 0xAAAAAAAA
    assert not front.device.poison_unknown


def test_of_a_whole_space_only_what_differs_was_written(front: Front) -> None:
    """The rest is as old as the front end's last read."""
    front.set_config(ACTUAL, b"\x10\0\0\0")
    stale = bytearray(front.get_config(0, 16))
    front.negotiate()
    front.device.set_target(99)
    front.device.start_hinting()
    stale[POISON_VAL:] = b"\xaa\xaa\xaa\xaa"
    front.set_config(0, bytes(stale))
    device = front.device
    assert (device.config[NUM_PAGES], device.actual, device.poison_val) == (99, 16, 0xAAAAAAAA)
    assert device.config[CMD_ID] == device.hinting.command_id
    assert not device.bad_requests
    front.set_config(NUM_PAGES, b"\x05\0\0\0")
    assert device.config[NUM_PAGES] == 99
    assert sum(device.bad_requests.values()) == 1, "a write to that field alone is one"


@pytest.mark.parametrize(
    ("offset", "data", "written"),
    [
        (ACTUAL, bytes(4), [ACTUAL]),
        (POISON_VAL, bytes(4), [POISON_VAL]),
        (POISON_VAL + 3, b"\0", [POISON_VAL]),
        (0, bytes(16), []),
        (0, bytes(12) + b"\x01\0\0\0", [POISON_VAL]),
        (ACTUAL, b"\x01" + bytes(11), [ACTUAL]),
        (ACTUAL, bytes(8), []),
        (2, bytes(4), []),
        (NUM_PAGES, bytes(4), None),
        (CMD_ID, b"\x01\0\0\0", None),
        (16, bytes(4), None),
        (6, b"", None),
    ],
)
def test_what_counts_as_a_write(offset: int, data: bytes, written: list[int] | None) -> None:
    """One field alone, whatever it held; of several those that differ; None where none may be written."""
    config = BalloonConfig(SUPPORTED_FEATURES)
    assert config.write(offset, data) == written


def test_a_size_larger_than_the_message_is_refused() -> None:
    for size, length in ((17, 16), (1, 0), (4, WHOLE + 1)):
        with pytest.raises(VhostUserError, match="carries"):
            ConfigSpace.unpack(vu.CONFIG_HEAD.pack(0, size, 0) + bytes(length), "SET_CONFIG")


def test_get_config_is_no_write(front: Front) -> None:
    """What travels with the request is room for the answer, whatever it holds."""
    front.ask(Request.GET_CONFIG, ConfigSpace(0, 16, 0, b"\xff" * 16).pack())
    assert front.device.read_config(0, 16) == bytes(16)
