"""The second signal that asks to end: it kills, whatever the first has begun."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable

__all__ = ["next_one_kills"]


def next_one_kills(signals: Iterable[int]) -> None:
    """From now on let each of these signals kill this process.

    By a handler: one that came together with the first is still to be handled, and Python would complain of it if it
    found that there was nothing to do.

    Parameters
    ----------
    signals
        Their numbers.
    """
    for number in signals:
        signal.signal(number, _die)


def _die(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
