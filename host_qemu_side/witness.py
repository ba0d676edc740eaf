"""Gathers the oracle's evidence during a migration: digests of the source, the tap on the ring, the guest's journal.

It watches from outside: it has no part in the engine and takes its own time, which `MigrationClock` leaves out.
"""

from __future__ import annotations

import mmap
import time

import numpy as np
import numpy.typing as npt

from balloon_dev.device import BalloonDevice
from balloon_dev.journal import Journal
from balloon_dev.oracle import Oracle, Verdict
from vring.contents import digests_of
from vring.memory import GuestMemory

__all__ = ["MigrationClock", "Witness"]


class MigrationClock:
    """Monotonic time in seconds, less the time that a witness took."""

    def __init__(self) -> None:
        self.excluded = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return time.monotonic() - self.excluded


def _shared(count: int, dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
    """An array in an anonymous mapping of its own, untouched pages of which take no memory."""
    kind = np.dtype(dtype)
    return np.frombuffer(mmap.mmap(-1, max(count * kind.itemsize, 1)), dtype=kind, count=count)


class Witness:
    """A `host_qemu_side.migration.Observer` that feeds an oracle.

    Parameters
    ----------
    memory
        The source's RAM.
    device
        Its balloon device, for the tap; None in a migration without one.
    journal
        The guest's journal of writes, None if it keeps none (Linux, other emulators): then a page that was rewritten
        with what it held is taken for one that was not written.
    clock
        Whose time leaves out what is done here; step the migration with it.
    """

    def __init__(
        self,
        memory: GuestMemory,
        device: BalloonDevice | None,
        journal: Journal | None = None,
        clock: MigrationClock | None = None,
    ) -> None:
        self.memory, self.journal, self.clock = memory, journal, clock or MigrationClock()
        pages = memory.page_layout.count
        scratch = _shared(pages, np.uint64), _shared(pages, np.uint64), _shared(pages, np.uint32)
        self.oracle = Oracle(memory.page_layout.runs, scratch)  # type: ignore[arg-type]
        self.at_pause: npt.NDArray[np.uint64] = _shared(pages, np.uint64)  # type: ignore[assignment]
        self.nonzero_at_start = 0
        self.first_digest_rounds = 0
        self._destination: npt.NDArray[np.uint64] | None = None
        self._arrived = 0
        self._epoch = 0
        self._stamps_at_start = self._stamps()
        self._device = device
        if device is not None:
            device.tap = self.oracle

    def _stamps(self) -> int:
        return 0 if self.journal is None else int(self.journal.write_epochs().sum(dtype=np.uint64))

    def round_begins(self, number: int) -> None:
        """Move the journal's epoch on, then take digests: before the id of this round can be seen by the guest."""
        began = time.monotonic()
        self._epoch = self.journal.next_epoch() if self.journal is not None else self._epoch + 1
        digests_of(self.memory, self.oracle.at_issue)
        if number == 0:
            self.nonzero_at_start = int(np.count_nonzero(self.oracle.at_issue))
        self.oracle.epoch_begins(self._epoch, None)
        self.clock.excluded += time.monotonic() - began

    def id_issued(self, command_id: int) -> None:
        """Note the id."""
        self.oracle.epoch_begins(self._epoch, command_id)

    def hints_end(self) -> None:
        """Nothing: what comes after STOP under the old id is for the oracle to judge."""

    def frozen(self) -> None:
        """Take the digests that the destination will be measured by."""
        began = time.monotonic()
        digests_of(self.memory, self.at_pause)
        self.clock.excluded += time.monotonic() - began

    def arrived(self, digests: npt.NDArray[np.uint64]) -> None:
        """Take the next digests of the destination's pages, see `host_qemu_side.migration.TakesDigests`."""
        if self._destination is None:
            self._destination = _shared(self.memory.page_layout.count, np.uint64)  # type: ignore[assignment]
        assert self._destination is not None
        self._destination[self._arrived : self._arrived + len(digests)] = digests
        self._arrived += len(digests)

    @property
    def destination(self) -> npt.NDArray[np.uint64] | None:
        """Digests of the destination's pages of RAM in order, None if none came."""
        return None if self._destination is None else self._destination[: self._arrived]

    def close(self) -> None:
        """Take the tap off."""
        if self._device is not None:
            self._device.tap = None

    # -- afterwards -----------------------------------------------------------------------------------------------

    def pages_rewritten(self) -> int:
        """Pages the guest wrote since the migration began, counted once a round; 0 without a journal."""
        return self._stamps() - self._stamps_at_start

    def nonzero_outside_hints(self) -> int:
        """Pages that were not zero when the last id was issued and were never hinted."""
        return int(np.count_nonzero((self.oracle.at_issue != 0) & ~self.oracle.hinted()))

    def verdict(self, destination: npt.NDArray[np.uint64] | None = None) -> Verdict:
        """Judge what arrived: the digest of each page of RAM, in order; None: what the destination has sent itself."""
        if destination is None:
            destination = np.zeros(0, np.uint64) if self.destination is None else self.destination
        last = None if self.journal is None else self.memory.page_layout.pick(self.journal.last_epochs())
        return self.oracle.verdict(self.at_pause, destination, last_write=last)
