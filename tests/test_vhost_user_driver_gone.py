"""A driver that is removed says so only in passing; from then on its rings are memory like any other.

The messages are those of User-Mode Linux: with bit 30 the rings are disabled, without it (when the driver drops a
feature it was offered) nothing is said, but the features are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from front_end import BIT_30, RINGS, Front

from balloon_dev.hinting import HintState
from vring.vhost_user import Request


@pytest.fixture
def front() -> Iterator[Front]:
    made = Front()
    yield made
    made.close()


def remove(front: Front, bit_30: int) -> None:
    if bit_30:
        for index in range(3):
            front.enable(index, on=False)
    front.ask(Request.GET_FEATURES)


BITS = pytest.mark.parametrize("bit_30", [0, BIT_30], ids=["without bit 30", "with bit 30"])


@BITS
def test_the_rings_of_a_driver_that_is_gone_are_left_alone(front: Front, bit_30: int) -> None:
    front.probe(RINGS, bit_30)
    assert front.live() == 3
    front.inflate(40, 41)
    remove(front, bit_30)
    assert front.live() == 0
    assert front.device.ballooned_pages == 2, "nothing is reset: it may have been a pause"
    held = front.scribble()
    front.provoke()
    front.negotiate(bit_30)
    front.table()
    front.provoke()
    assert front.memory.read(0, 1 << 20) == held
    assert front.live() == 0


@BITS
def test_the_next_driver_begins_afresh_elsewhere(front: Front, bit_30: int) -> None:
    front.probe(RINGS, bit_30)
    front.inflate(40, 41)
    front.set_config(4, (2).to_bytes(4, "little"))
    front.device.start_hinting()
    remove(front, bit_30)
    held = front.scribble()
    front.probe(RINGS + 0x20000, bit_30)
    assert front.live() == 3
    assert (front.device.actual, front.device.ballooned_pages) == (0, 0)
    assert front.device.hinting.state is HintState.REQUESTED, "its queue was never used: harmless"
    assert front.backend.last_error is None
    front.provoke()
    assert front.memory.read(RINGS, 0x10000) == held[RINGS : RINGS + 0x10000]
    front.inflate(50)
    assert front.used() == 1
    assert front.device.ballooned_pages == 1


def test_bit_30_that_goes_away_enables_no_ring(front: Front) -> None:
    """The driver was removed with bit 30, and the next one comes without: its rings are not those disabled before."""
    front.probe(RINGS, BIT_30)
    front.inflate(40)
    remove(front, BIT_30)
    held = front.scribble()
    front.negotiate(0)
    front.table()
    front.provoke()
    assert front.live() == 0
    assert front.memory.read(0, 1 << 20) == held


def test_with_bit_30_features_may_be_asked_for_at_any_time(front: Front) -> None:
    front.probe(RINGS, BIT_30)
    front.ask(Request.GET_FEATURES)
    assert front.live() == 3
