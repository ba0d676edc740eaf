"""Several dirty logs as one."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vring.dirty import DirtyLog, DirtyLogVoid, LearnsWhatWasSent, check_covers
from vring.memory import PAGE_SHIFT, GuestMemory
from vring.pages import PageSet

__all__ = ["CombinedLog"]


class CombinedLog:
    """Several logs as one: what the guest wrote, what the device wrote, what is always counted as written.

    Parameters
    ----------
    name
        Short name.
    logs
        The logs; their findings are added up.
    always
        ``(gpa, bytes)`` ranges that every sync reports.
    """

    def __init__(self, name: str, logs: list[DirtyLog], always: list[tuple[int, int]] | None = None) -> None:
        self.name = name
        self._logs = logs
        self._learners = [part for part in logs if isinstance(part, LearnsWhatWasSent)]
        self._always = [(gpa >> PAGE_SHIFT, size >> PAGE_SHIFT) for gpa, size in always or []]
        self.hints_safe = all(part.hints_safe for part in logs)
        self.needs_frozen_guest = any(part.needs_frozen_guest for part in logs)

    def check_memory(self, memory: GuestMemory) -> None:
        """Raise `UsageError` if one of the logs does not cover all of `memory`."""
        for part in self._logs:
            check_covers(part, memory)

    def start(self) -> None:
        """Begin to track in every log."""
        for part in self._logs:
            part.start()

    def sync(self, into: PageSet) -> int:
        """Add what all logs found to `into`; return the sum of what each found."""
        for first, pages in self._always:
            into.set_run(first, pages)
        found = 0
        voided = []
        for part in self._logs:  # one that is void keeps none of the others from being read
            try:
                found += part.sync(into)
            except DirtyLogVoid as reason:
                voided.append(str(reason))
        if voided:
            raise DirtyLogVoid("; ".join(voided))
        return found

    def note_sent(self, pages: npt.NDArray[np.uint64], data: Any = None) -> None:
        """Pass on what was sent to the logs that want to know."""
        for part in self._learners:
            part.note_sent(pages, data)

    def note_hinted(self, pages: PageSet) -> None:
        """Pass on what was skipped."""
        for part in self._learners:
            part.note_hinted(pages)

    def stop(self) -> None:
        """End tracking."""
        for part in self._logs:
            part.stop()
