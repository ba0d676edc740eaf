"""Waiting for descriptors, for the places on the guest's side that have an event loop."""

from __future__ import annotations

import math
import select
from collections.abc import Callable, Iterable

__all__ = ["waiter", "wait_readable"]


def waiter(fds: Iterable[int]) -> Callable[[float], list[int]]:
    """Return a wait for descriptors to be readable or their other end gone, for a loop that waits often.

    It takes seconds, and returns those that are, none if time is up. Any number will do, unlike with ``select.select``,
    which cannot wait for a descriptor over 1023.
    """
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)

    def wait(seconds: float) -> list[int]:
        return [fd for fd, _ in poll.poll(math.ceil(max(seconds, 0.0) * 1000))]

    return wait


def wait_readable(fds: Iterable[int], seconds: float) -> list[int]:
    """Wait once, as `waiter` says."""
    return waiter(fds)(seconds)
