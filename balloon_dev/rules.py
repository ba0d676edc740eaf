"""What a driver's request can be that has no effect: against a rule of the standard, or merely late.

The device counts the first in `bad_requests` and the second in `late`. A driver that takes the device's word as soon as
it can is late now and then; one that keeps the rules has no bad request.
"""

from __future__ import annotations

from collections import Counter
from enum import Enum
from typing import Any, NamedTuple

from balloon_dev.features import QueueRole

__all__ = ["BadRequest", "Late", "Rule", "as_json"]


class Rule(Enum):
    """A rule a driver can break: in words, and the clause; None where the standard is silent and the device is not."""

    HINT_COMMAND_SIZE = "command that is not exactly 4 readable bytes", "balloon.hint.driver-1"
    HINT_COMMAND_ID = "command with an id that was not issued, or older than that of the run", "balloon.hint.driver-2"
    HINT_OUTSIDE_RUN = "hint outside a run that the driver opened", "balloon.hint.driver-2"
    HINT_ID_TWICE = "command id sent a second time", "balloon.hint.driver-3"
    PFNS_BUFFER = "buffer that is writable or too long", "balloon.pfn-1"
    PFNS_LENGTH = "length that is no multiple of 4", "balloon.pfn-1"
    PFN_OUTSIDE_RAM = "PFN outside RAM", "balloon.pfn-1"
    REPORT_BUFFER = "report that is readable or has too many ranges", None
    REPORT_RANGE = "range that is not made of whole host pages", None
    STATS_WRITABLE = "buffer that is writable", "balloon.stats-entry"
    STATS_LENGTH = "length that is no multiple of 10", "balloon.stats.driver-5"
    STATS_ENTRIES = "more entries than are looked at", None
    STATS_BUFFERS = "more than one buffer", "balloon.stats.driver-1"
    CONFIG_READ_ONLY = "config write to a read-only field", "balloon.config-1"
    CONFIG_UNSETTLED = "config write while features are negotiated", "basic.init.driver-3"
    POISON_CHANGED = "poison_val changed after DRIVER_OK", "balloon.poison.driver-3"
    FEATURES_NOT_CONFIRMED = "DRIVER_OK without FEATURES_OK", "basic.init.driver-1"

    def __init__(self, what: str, clause: str | None) -> None:
        self.what = what
        """What the driver did, in words."""
        self.clause = clause
        """Id of the clause, as in ``docs/clauses.md``."""


class BadRequest(NamedTuple):
    """A rule, and the queue on which it was broken (None: not on a queue)."""

    rule: Rule
    queue: QueueRole | None = None

    def __str__(self) -> str:
        """Return it in words."""
        where = f"{self.queue.value}: " if self.queue else ""
        clause = f" ({self.rule.clause})" if self.rule.clause else ""
        return f"{where}{self.rule.what}{clause}"


class Late(Enum):
    """What was on its way when the host ended the run it belongs to: no offence, and without effect."""

    COMMAND = "hint command of a run that is over"
    HINT = "hint of a run that is over"


def as_json(bad: Counter[BadRequest], late: Counter[Late]) -> dict[str, Any]:
    """Return both counters as JSON values, for those who show them."""
    return {
        "bad-requests": [
            {
                "queue": request.queue.value if request.queue else None,
                "what": request.rule.what,
                "clause": request.rule.clause,
                "count": count,
            }
            for request, count in bad.items()
        ],
        "late": {kind.value: count for kind, count in late.items()},
    }
