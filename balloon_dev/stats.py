"""Memory statistics (VIRTIO 5.5.6.3 and 5.5.6.4): tags, the layout of an entry, and what a device makes of a buffer.

The driver puts one buffer on the statsq; the device keeps it, and giving it back is the request for fresh figures. Who
holds which buffer is the device's business (`balloon_dev.requests`); here are only the figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Self

import numpy as np

from balloon_dev.rules import Rule
from vring.decode import Fields, Refusal
from vring.errors import UsageError, quoted

__all__ = ["ENTRY", "MAX_ENTRIES", "STAT_NAMES", "GuestStats", "SavedStats", "StatTag"]


class StatTag(IntEnum):
    """What an entry is about. 0 to 9 are in the standard; 10 to 15 are Linux's since 6.12 (defect D4).

    Memory is in bytes, all else counts events.
    """

    SWAP_IN = 0
    SWAP_OUT = 1
    MAJOR_FAULTS = 2
    MINOR_FAULTS = 3
    FREE_MEMORY = 4
    TOTAL_MEMORY = 5
    AVAILABLE_MEMORY = 6
    DISK_CACHES = 7
    HTLB_PGALLOC = 8
    HTLB_PGFAIL = 9
    OOM_KILLS = 10
    ALLOC_STALLS = 11
    ASYNC_SCANS = 12
    DIRECT_SCANS = 13
    ASYNC_RECLAIMS = 14
    DIRECT_RECLAIMS = 15


STAT_NAMES = {tag: "stat-" + tag.name.lower().replace("_", "-") for tag in StatTag}
"""Names as in QEMU's guest-stats."""
ENTRY = np.dtype([("tag", "<u2"), ("value", "<u8")])
"""One entry, 10 bytes without padding (balloon.stats-entry; the multiple of 6 in the standard is erratum D3)."""
MAX_ENTRIES = 256
"""More entries than these in a buffer are not looked at."""


@dataclass(frozen=True, slots=True)
class SavedStats:
    """What a migration carries of `GuestStats`."""

    values: dict[str, int]
    updates: int

    @classmethod
    def from_json(cls, value: Any, refusal: Refusal = UsageError) -> Self:
        """Check what `to_json` returned.

        Raises
        ------
        VirtioError
            What `refusal` makes, if it is malformed.
        """
        said = Fields(value, "saved statistics", refusal)
        values = said.members("values")
        unknown = set(values.names) - set(STAT_NAMES.values())
        if unknown:
            raise refusal(f"{values.what}: {len(unknown)} unknown names, such as {quoted(min(unknown), 40)}")
        return cls({name: values.integer(name) for name in values.names}, said.integer("updates"))

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"values": dict(self.values), "updates": self.updates}


class GuestStats:
    """The figures a guest has sent last."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}
        """By name (`STAT_NAMES`); empty until the guest has sent some. A tag left out this time keeps no old value."""
        self.updates = 0
        """Buffers taken in since the device was reset."""

    def clear(self) -> None:
        """Forget all: figures of a guest that is gone are stale."""
        self.values = {}
        self.updates = 0

    def take(self, data: bytes) -> tuple[list[Rule], int]:
        """Take the figures of one buffer; entries in any order, the last of several with one tag counts.

        Parameters
        ----------
        data
            The bytes of the buffer, no more than the first ``MAX_ENTRIES * ENTRY.itemsize`` are looked at.

        Returns
        -------
        broken, unknown
            Rules that the buffer breaks, and how many entries were skipped for their tag (balloon.stats.device-1).
        """
        broken, unknown = [], 0
        whole, rest = divmod(len(data), ENTRY.itemsize)
        if rest:
            broken.append(Rule.STATS_LENGTH)
        if whole > MAX_ENTRIES:
            broken.append(Rule.STATS_ENTRIES)
        entries = np.frombuffer(data, ENTRY, min(whole, MAX_ENTRIES))
        values = {}
        for tag, value in zip(entries["tag"].tolist(), entries["value"].tolist(), strict=True):
            if tag in STAT_NAMES:
                values[STAT_NAMES[StatTag(tag)]] = value
            else:
                unknown += 1
        self.values = values
        self.updates += 1
        return broken, unknown

    def save(self) -> SavedStats:
        """Return what a migration carries."""
        return SavedStats(dict(self.values), self.updates)

    def load(self, saved: SavedStats) -> None:
        """Take over saved figures."""
        self.values, self.updates = dict(saved.values), saved.updates
