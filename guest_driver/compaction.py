"""Compaction: what to move so that a large block becomes free. Nothing is moved here, only chosen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from guest_driver.zone import Pfns, Zone

__all__ = ["Plan", "plan"]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The pages in the way of one block."""

    start: int
    """First page of the block that would become free."""
    end: int
    """First page behind it."""
    pages: Pfns
    """Pages to move out of it, ascending."""


def plan(zone: Zone, order: int, owner: int, limit: int) -> Plan | None:
    """Choose the aligned block of 2^order pages that takes the fewest moves to free.

    Parameters
    ----------
    zone
        The zone.
    order
        Of the block wanted.
    owner
        Whose pages can be moved; all others must be free. They must be blocks of one page.
    limit
        No more pages than these.

    Returns
    -------
    Plan or None
        None if there is no such block, or if the pages could only go to a block that is free already.
    """
    size, span = 1 << order, zone.memory.page_span
    padded = -(-span // size) * size

    def table(words: Pfns) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
        bits = np.zeros(padded, dtype=np.bool_)
        bits[:span] = np.unpackbits(words.view(np.uint8), bitorder="little", count=span)
        return bits.reshape(-1, size)

    free, mine = table(zone.bitmap(free=True)), table(zone.bitmap(owner))
    movable = mine.sum(axis=1)
    free_in = free.sum(axis=1)
    fits = (movable > 0) & (movable <= limit) & (movable + free_in == size)
    if not fits.any():
        return None
    block = int(np.flatnonzero(fits)[np.argmin(movable[fits])])
    elsewhere = int(free_in[free_in < size].sum() - free_in[block])
    if elsewhere < movable[block]:
        return None
    start = block * size
    return Plan(start, start + size, (np.flatnonzero(mine[block]) + start).astype(np.uint64))
