"""What a migration needs of others, what it may use, and what it reports: no code that does anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from host_qemu_side import deadlines
from host_qemu_side.migration.stream import Record
from vring.errors import UsageError, VirtioError

__all__ = [
    "MIN_BANDWIDTH",
    "Cancelled",
    "GuestControl",
    "HintPort",
    "HintRunStats",
    "Limits",
    "MigrationResult",
    "Observer",
    "Output",
    "Phase",
    "Round",
    "TakesDigests",
]

U64 = npt.NDArray[np.uint64]
MIN_BANDWIDTH = 1024
"""Bytes per second that are worth an attempt: a page takes four seconds then, and a destination waits for a minute."""


class Cancelled(VirtioError):
    """The migration was cancelled; the guest goes on where it was."""


class Phase(Enum):
    """Named phases, in order; `DONE`, `CANCELLED` and `FAILED` are ends."""

    SETUP = "setup"
    ROUND = "round"
    SYNC = "sync"
    FROZEN = "frozen"
    HANDOVER = "handover"
    COMMITTED = "committed"
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"


class GuestControl(Protocol):
    """Stops and starts the guest. Both calls return when it is so, or raise."""

    def freeze(self) -> None:
        """Stop the guest: not one more store to its memory, and nothing served of its queues."""

    def thaw(self) -> None:
        """Let it go on."""


class Output(Protocol):
    """Where the stream goes."""

    two_way: bool
    """Whether the other end answers (a file does not)."""

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Take buffers to send; they stay unchanged until `flush` returns True."""

    def flush(self) -> bool:
        """Send what can be sent without waiting; True when nothing is left."""

    def answer(self) -> Record | None:
        """Return the next record of the other end, None if there is none yet."""

    def finish(self) -> None:
        """Make what was sent durable."""

    def retract(self) -> bool:
        """After an error: drop what has not left; return whether anything of what was sent last has not."""


class HintPort(Protocol):
    """What the engine needs of a balloon device and the transport before it."""

    sink: Callable[[int, U64, U64], None] | None
    """Called with (command id, addresses, lengths) for hints of the current run."""

    @property
    def running(self) -> bool:
        """Whether a run is requested or started, and not yet ended by either side."""

    def start(self) -> int | None:
        """Issue a new command id and tell the driver; return it, None if there is no driver now that takes hints."""

    def stop(self) -> None:
        """End the run; the guest keeps its pages."""

    def done(self) -> None:
        """Let the guest free its pages."""

    def serve(self) -> None:
        """Serve the free page queue without waiting."""


class Observer(Protocol):
    """Watches a migration; may take its time (the caller stops the clock)."""

    def round_begins(self, number: int) -> None:
        """Tracking is on and synced; this round's id, if there will be one, is not yet issued."""

    def id_issued(self, command_id: int) -> None:
        """The guest may see this id from now on."""

    def hints_end(self) -> None:
        """STOP was said."""

    def frozen(self) -> None:
        """The guest is frozen for the last round; RAM is as the destination must get it."""


@runtime_checkable
class TakesDigests(Protocol):
    """An `Observer` that holds the destination's pages against the source's."""

    def arrived(self, digests: npt.NDArray[np.uint64]) -> None:
        """Take the next digests: of the pages of RAM in ascending order, those between two regions left out.

        All come before the guest is handed over, or none.
        """


@dataclass(frozen=True, slots=True)
class Limits:
    """What a migration may use."""

    bandwidth: float = 128 * 2**20
    """Bytes per second while the guest runs; 0 for no limit. The last round is not limited, as in QEMU."""
    downtime: float = 0.3
    """Seconds the guest may be frozen, by estimate."""
    max_rounds: int = 30
    """Rounds after which the guest is frozen however much is left."""
    answer: float = deadlines.ANSWER
    """Seconds the destination may take to check what it got and to make the guest ready to go on."""
    frozen: float = deadlines.FROZEN
    """Seconds the guest may be frozen for the last round and the hand-over; then it goes on here."""
    piece: float = 0.1
    """Seconds that may go by while nothing is sent: on a slow link little is sent at a time, a page at the least."""

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises
        ------
        UsageError
            If a limit is negative or no number.
        """
        quantities = (self.bandwidth, self.downtime, self.answer, self.frozen, self.piece)
        if not all(value >= 0 for value in quantities) or self.max_rounds < 1:
            raise UsageError(f"migration limits make no sense: {self}")


@dataclass(slots=True)
class Round:
    """One pass over what was dirty. The last one has the guest frozen."""

    bytes_sent: int = 0
    pages_dirty: int = 0
    """Pages to send when it began."""
    pages_normal: int = 0
    pages_zero: int = 0
    pages_skipped: int = 0
    """Pages that hints spared in this round."""
    seconds: float = 0.0
    frozen_seconds: float = 0.0
    log_voided: str | None = None
    """Why the dirty log could not be trusted at the sync before this round."""


@dataclass(slots=True)
class HintRunStats:
    """One run of hints."""

    command_id: int
    blocks: int = 0
    bytes: int = 0
    pages_spared: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class MigrationResult:
    """What a migration did."""

    total_seconds: float = 0.0
    downtime_seconds: float = 0.0
    bytes_sent: int = 0
    rounds: list[Round] = field(default_factory=list)
    hint_runs: list[HintRunStats] = field(default_factory=list)
    hints_refused: str | None = None
    pages_hole: int = 0
    converged: bool = True
    """False if the guest was frozen because of `Limits.max_rounds`."""

    def pages(self) -> dict[str, int]:
        """Return pages by kind: sent with content, sent (or left out) as zero, spared by hints."""
        return {
            "normal": sum(r.pages_normal for r in self.rounds),
            "zero": sum(r.pages_zero for r in self.rounds) + self.pages_hole,
            "skipped": sum(r.pages_skipped for r in self.rounds),
        }

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {**asdict(self), "pages": self.pages()}
