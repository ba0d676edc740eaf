"""Dirty logs: which pages of guest memory were written since the last look.

`DirtyLog` is what a migration needs; the modules beside this one are the ways this project knows to provide it. An
emulator brings its own, or marks a `SoftwareDirtyLog` as it stores.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from vring.memory import GuestMemory
from vring.pages import PageSet

__all__ = ["CoversMemory", "DirtyLog", "DirtyLogVoid", "LearnsWhatWasSent", "check_covers"]


class DirtyLogVoid(Exception):
    """The log found that it may have missed writes since the last sync.

    Raised by `DirtyLog.sync` *after* it did what it could: pages found written are in the set and tracking goes on.
    Whoever skipped pages because of hints must send all of them again. The text says what happened.
    """


class DirtyLog(Protocol):
    """Tells which pages were written since the last sync.

    Two stages happen inside `sync`: fetch what was written, and clear (re-protect) it. A write between the two must be
    seen by this sync or by the next one. A page rewritten with the same content counts as written.
    """

    name: str
    """Short name, as given to ``--dirty-log``."""
    hints_safe: bool
    """Whether it sees a page rewritten with the same content. Without that a hint could lose data and is refused."""
    needs_frozen_guest: bool
    """Whether the guest must not run during `start` and `sync`."""

    def start(self) -> None:
        """Begin to track: pages written from now on are seen by the next sync.

        Raises
        ------
        MissingFacility
            If this log cannot be trusted on this machine or for this memory; the message says why.
        """

    def sync(self, into: PageSet) -> int:
        """Add the pages written since `start` or the last sync to `into`, which has the memory's layout; return how
        many there were.

        Raises
        ------
        DirtyLogVoid
            If writes may have been missed.
        """

    def stop(self) -> None:
        """End tracking and give back what it used. May be called at any time, more than once."""


@runtime_checkable
class LearnsWhatWasSent(Protocol):
    """A log that judges better when it knows what the destination has; a migration tells it."""

    def note_sent(self, pages: npt.NDArray[np.uint64], data: Any = None) -> None:
        """Learn that these pages were sent with these bytes (None: as zero pages)."""

    def note_hinted(self, pages: PageSet) -> None:
        """Learn that these pages were skipped because of hints."""


@runtime_checkable
class CoversMemory(Protocol):
    """A log that can tell whether it sees all writes to a memory."""

    def check_memory(self, memory: GuestMemory) -> None:
        """Raise `UsageError` if it is of other memory than this, or of only a part of it."""


def check_covers(log: DirtyLog, memory: GuestMemory) -> None:
    """Refuse a log that says it does not cover all of `memory`; one that cannot tell is believed.

    Raises
    ------
    UsageError
        If it does not.
    """
    if isinstance(log, CoversMemory):
        log.check_memory(memory)
