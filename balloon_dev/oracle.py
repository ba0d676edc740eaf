"""Judges a migration: is every page of the destination what it has to be?

A page of the destination must equal the source at the pause, or it was hinted and not written since that command id
was issued. The oracle shares nothing with the engine it judges: it never sees the migration bitmap, the dirty log or
the device's hint state. Its evidence is

- digests of all pages of both images at the end, and of the source when each id is issued,
- a tap on the free page queue (`Oracle.command`, `Oracle.pages`: a `balloon_dev.device.RingTap`),
- the guest's own journal of writes, where the guest keeps one.

No I/O and no clock: who takes the digests is the caller's matter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

__all__ = ["Oracle", "Verdict", "WrongPage"]

U64 = npt.NDArray[np.uint64]
PAGE = 4096
REPORTED = 16


@dataclass(frozen=True, slots=True)
class WrongPage:
    """One page that the destination has no right to hold as it does."""

    page: int
    why: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the oracle found."""

    pages_checked: int
    pages_wrong: int
    pages_skipped: int
    """Pages that differ and may: hinted, not written since."""
    wrong: list[WrongPage] = field(default_factory=list)
    """The first few wrong pages."""

    def as_dict(self) -> dict[str, object]:
        """Return the numbers, and the wrong pages in words."""
        return {
            "pages_checked": self.pages_checked,
            "pages_wrong": self.pages_wrong,
            "pages_skipped": self.pages_skipped,
            "wrong": [f"page {w.page:#x}: {w.why}" for w in self.wrong],
        }


class Oracle:
    """Collects evidence during a migration and judges at the end.

    Parameters
    ----------
    runs
        Which pages exist: ``(first page, pages)`` of each run, ascending; or how many, from page 0 on. All arrays given
        to the oracle have one item for each page that exists, in this order.
    scratch
        Arrays of that many items to keep evidence in, or None to make them. They are the oracle's whole memory; give it
        shared memory to keep it out of the process's private memory.
    """

    def __init__(
        self, runs: int | Iterable[tuple[int, int]], scratch: tuple[U64, U64, npt.NDArray[np.uint32]] | None = None
    ) -> None:
        self._runs = [(0, runs)] if isinstance(runs, int) else list(runs)
        pages = sum(count for _, count in self._runs)
        if scratch is None:
            scratch = np.zeros(pages, np.uint64), np.zeros(pages, np.uint64), np.zeros(pages, np.uint32)
        self.at_issue, self._at_hint, self._hint_epoch = scratch
        self.page_count = pages
        self.epoch = 0
        """Number of ids issued (and of rounds, in a migration without hints); the journal is stamped with it."""
        self._issued: int | None = None
        self._running = False
        self.blocks = 0
        """Blocks seen on the ring under a current id."""

    # -- evidence -------------------------------------------------------------------------------------------------

    def epoch_begins(self, epoch: int, command_id: int | None) -> None:
        """Take note that `command_id` is about to be issued (None: a round without hints).

        `at_issue` must hold the digests of the source as of now, and the guest's journal must stamp writes from now on
        with `epoch`.
        """
        self.epoch = epoch
        self._issued = command_id
        self._running = False

    def command(self, command_id: int) -> None:
        """See a command on the free page queue."""
        if self._running:
            self._running, self._issued = False, None  # any command ends a run, and an id opens one only
        else:
            self._running = command_id == self._issued  # what comes before it is of the run before

    def pages(self, addr: U64, length: U64) -> None:
        """See blocks on the free page queue."""
        if not self._running:
            return
        for a, n in zip(addr.tolist(), length.tolist(), strict=True):
            at = 0
            for run, count in self._runs:
                first, end = max(-(-a // PAGE), run) - run + at, min((a + n) // PAGE, run + count) - run + at
                if first < end:
                    self._at_hint[first:end] = self.at_issue[first:end]
                    self._hint_epoch[first:end] = self.epoch
                at += count
        self.blocks += len(addr)

    def hinted(self) -> npt.NDArray[np.bool_]:
        """Return which pages were hinted at all."""
        return self._hint_epoch > 0

    def _number(self, index: int) -> int:
        for first, count in self._runs:
            if index < count:
                return first + index
            index -= count
        raise IndexError(index)

    # -- judgement ------------------------------------------------------------------------------------------------

    def verdict(
        self,
        source: U64,
        destination: U64,
        *,
        last_write: npt.NDArray[np.uint32] | None = None,
    ) -> Verdict:
        """Compare the two images.

        Parameters
        ----------
        source
            Digest of each page of the source at the pause.
        destination
            Digest of each page the destination received.
        last_write
            From the guest's journal: the epoch of the last write to each page, 0 for never. None: no journal; then a
            page counts as written if its digest changed since the id was issued.
        """
        if len(source) != self.page_count or len(destination) != self.page_count:
            missing = f"{len(source)} and {len(destination)} digests for {self.page_count} pages"
            return Verdict(0, self.page_count, 0, [WrongPage(0, missing)])
        differs = np.flatnonzero(source != destination)
        epoch = self._hint_epoch[differs]
        hinted = epoch > 0
        changed = self._at_hint[differs] != source[differs]
        written = np.zeros(len(differs), np.bool_) if last_write is None else last_write[differs] >= epoch
        bad = ~hinted | changed | written
        wrong = []
        for i in np.flatnonzero(bad)[:REPORTED].tolist():
            why = (
                "differs and was never hinted"
                if not hinted[i]
                else "hinted, then written (the guest's journal says so)"
                if written[i]
                else "hinted, then changed (its digest says so)"
            )
            wrong.append(WrongPage(self._number(int(differs[i])), why))
        n_bad = int(bad.sum())
        return Verdict(self.page_count, n_bad, len(differs) - n_bad, wrong)
