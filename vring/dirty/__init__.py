"""Dirty logs: which pages of guest memory were written since the last look.

`DirtyLog` is what a migration needs; the modules beside this one are the ways this project knows to provide it. An
emulator brings its own, or marks a `SoftwareDirtyLog` as it stores.
"""

from __future__ import annotations

from typing import Protocol

from vring.bitmap import Bitmap

__all__ = ["Bitmap", "DirtyLog", "DirtyLogVoid"]


class DirtyLogVoid(Exception):
    """The log found that it may have missed writes since the last sync.

    Raised by `DirtyLog.sync` *after* it did what it could: pages found written are in the bitmap and tracking goes on.
    Whoever skipped pages because of hints must send all of them again. The text says what happened.
    """


class DirtyLog(Protocol):
    """Tells which pages were written since the last sync.

    Two stages happen inside `sync`: fetch what was written, and clear (re-protect) it. A write between the two must be
    seen by this sync or by the next one. A page rewritten with the same content counts as written.
    """

    name: str
    """Short name, as given to ``--dirty-log``."""
    needs_frozen_guest: bool
    """Whether the guest must not run during `start` and `sync`."""

    def start(self) -> None:
        """Begin to track: pages written from now on are seen by the next sync.

        Raises
        ------
        MissingFacility
            If this log cannot be trusted on this machine or for this memory; the message says why.
        """

    def sync(self, into: Bitmap) -> int:
        """Or the pages written since `start` or the last sync into `into`; return how many there were.

        Raises
        ------
        DirtyLogVoid
            If writes may have been missed.
        """

    def stop(self) -> None:
        """End tracking and give back what it used. May be called at any time, more than once."""
