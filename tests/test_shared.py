"""What tests share is made once, and anew only when a test has broken it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from shared import Shared

from vring.errors import PeerVanished


class Guest:
    broken: Exception | None = None

    def check(self) -> None:
        if self.broken is not None:
            raise self.broken


@pytest.mark.parametrize("error", [AssertionError(), OSError(), PeerVanished("gone")], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("ends", [True, False])
def test_a_broken_one_is_replaced(error: Exception, ends: bool) -> None:
    story: list[str] = []

    @contextlib.contextmanager
    def make() -> Iterator[Guest]:
        story.append("made")
        guest = Guest()
        yield guest
        story.append("ended")
        if guest.broken is not None and not ends:
            raise RuntimeError("cannot even end")

    with Shared(make, Guest.check) as guests:
        assert not story
        first = guests.get()
        assert guests.get() is first
        first.broken = error
        second = guests.get()
        assert second is not first
        assert guests.get() is second
        assert story == ["made", "ended", "made"]
    assert story == ["made", "ended", "made", "ended"]


def test_a_check_that_is_wrong_itself_is_told() -> None:
    def check(guest: Guest) -> None:
        raise TypeError("the check is wrong")

    with Shared(lambda: contextlib.nullcontext(Guest()), check) as guests:
        guests.get()
        with pytest.raises(TypeError, match="the check is wrong"):
            guests.get()
