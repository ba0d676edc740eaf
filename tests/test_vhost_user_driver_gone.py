"""A driver that is removed says so only in passing; from then on its rings are memory like any other.

The messages are those of User-Mode Linux when the driver drops a feature it was offered: without bit 30.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from front_end import RINGS, Front

from vring import vhost_user as vu
from vring.vhost_user import Request


@pytest.fixture
def front() -> Iterator[Front]:
    made = Front()
    yield made
    made.close()


def test_asking_for_features_again_ends_the_rings(front: Front) -> None:
    front.probe(RINGS)
    assert front.live() == 3
    front.say(Request.GET_FEATURES)
    assert front.live() == 0
    assert not front.device.hinting_negotiated
    held = front.scribble()
    front.provoke()
    assert front.memory.read(0, 1 << 20) == held
    front.memory.write(RINGS, bytes(0x10000))
    front.probe(RINGS)
    assert front.live() == 3
    assert front.backend.last_error is None


@pytest.mark.parametrize("bit30", [0, vu.F_PROTOCOL_FEATURES], ids=["without bit 30", "with bit 30"])
def test_negotiating_again_ends_the_rings(front: Front, bit30: int) -> None:
    """The rings of the driver before are not looked at when the new one gives its memory."""
    front.probe(RINGS, bit30)
    assert front.live() == 3
    front.device.config[4] = 17
    held = front.scribble()
    front.probe(RINGS + 0x20000, bit30)
    assert front.live() == 3
    assert front.device.actual == 0
    assert front.backend.last_error is None
    assert front.memory.read(RINGS, 0x10000) == held[RINGS : RINGS + 0x10000]
    front.provoke()
    assert front.memory.read(RINGS, 0x10000) == held[RINGS : RINGS + 0x10000]


def test_with_bit_30_features_may_be_asked_for_at_any_time(front: Front) -> None:
    front.probe(RINGS, vu.F_PROTOCOL_FEATURES)
    front.say(Request.GET_FEATURES)
    assert front.live() == 3
