"""What a balloon device takes along in a migration, as a checked value: it comes from another program or a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from balloon_dev.config import CONFIG_BYTES
from balloon_dev.hinting import SavedHints
from balloon_dev.stats import SavedStats
from vring.decode import U64, Fields, Refusal
from vring.errors import UsageError

__all__ = ["SavedDevice"]

MAX_RUNS = 1 << 22
"""Runs of pages in a balloon."""
MAX_PAGES = (U64 + 1) >> 12
"""Pages that addresses of 64 bits can name."""


@dataclass(frozen=True, slots=True)
class SavedDevice:
    """State of a `balloon_dev.device.BalloonDevice`, without its queues, which are the transport's."""

    profile: str
    """Name of its `balloon_dev.profiles.Profile`."""
    offered: int
    """Feature bits."""
    negotiated: int
    """Feature bits, of those offered."""
    config: bytes
    """The config space, `CONFIG_BYTES` long whatever was offered."""
    poison_told: bool
    """Whether its driver has written `poison_val`."""
    hinting: SavedHints
    stats: SavedStats
    ballooned: tuple[tuple[int, int], ...]
    """Runs of pages in the balloon: first page and number of pages."""

    @classmethod
    def from_json(cls, value: Any, refusal: Refusal = UsageError) -> Self:
        """Check what `to_json` returned.

        Parameters
        ----------
        value
            JSON values, or what somebody takes for such.
        refusal
            Makes the error from its text.

        Raises
        ------
        VirtioError
            What `refusal` makes, if it is malformed.
        """
        said = Fields(value, "saved device state", refusal)
        offered, negotiated = said.integer("offered"), said.integer("negotiated")
        if negotiated & ~offered:
            raise refusal(f"{said.what}: features {negotiated & ~offered:#x} were negotiated and not offered")
        ballooned = tuple(said.pairs("ballooned", MAX_RUNS, MAX_PAGES))
        for first, pages in ballooned:
            if not pages or first + pages > MAX_PAGES:
                raise refusal(f"{said.what}: ballooned pages {first}+{pages} cannot be")
        return cls(
            said.text("profile", 64),
            offered,
            negotiated,
            said.hexadecimal("config", CONFIG_BYTES),
            said.boolean("poison_told", default=False),  # in doubt reported pages are left alone
            SavedHints.from_json(said.any("hinting"), refusal),
            SavedStats.from_json(said.any("stats"), refusal),
            ballooned,
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "profile": self.profile,
            "offered": self.offered,
            "negotiated": self.negotiated,
            "config": self.config.hex(),
            "poison_told": self.poison_told,
            "hinting": self.hinting.to_json(),
            "stats": self.stats.to_json(),
            "ballooned": [list(run) for run in self.ballooned],
        }
