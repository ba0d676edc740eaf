"""Waiting for descriptors, for the places on the guest's side that have an event loop."""

from __future__ import annotations

import math
import select
from collections.abc import Iterable

__all__ = ["wait_readable"]


def wait_readable(fds: Iterable[int], seconds: float) -> list[int]:
    """Wait until a descriptor is readable or its other end is gone; return those that are, none if time is up.

    Any number will do, unlike with ``select.select``, which cannot wait for a descriptor over 1023.
    """
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(math.ceil(max(seconds, 0.0) * 1000))]
