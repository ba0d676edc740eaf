"""What a discard is made of: pieces of guest memory, reasons to refuse, errors, counts. Nothing is dropped here."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vring.errors import GuestAddressError, UsageError, VirtioError
from vring.memory import PAGE_SIZE, GuestMemory, Region

__all__ = ["DiscardFailed", "DiscardRefused", "DiscardStats", "Piece", "Refusal", "cut_out", "grown", "pieces_of"]

U64 = npt.NDArray[np.uint64]


class Refusal(enum.Enum):
    """Why memory is not dropped."""

    INHIBITED = "discards are inhibited"
    PINNED = "pinned"
    FROZEN = "the guest is frozen"
    STOPPED = "discarding was stopped"
    PRIVATE_FILE = "private mapping of a file"
    BUFFER = "buffer of the embedder's"


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one region of guest memory, whole pages of 4096 bytes; what hooks are called with."""

    gpa: int
    """First guest address, bytes."""
    length: int
    """Bytes."""
    region: Region
    """The region it is in: `Region.backing` is its kind, `Region.fd` the object behind it."""
    address: int
    """Where it is mapped in this process."""

    @property
    def end(self) -> int:
        """First guest address after it."""
        return self.gpa + self.length

    @property
    def offset(self) -> int:
        """Where it starts in the object behind the region, bytes."""
        return self.gpa - self.region.gpa + self.region.offset

    def part(self, start: int, end: int) -> Piece:
        """Return the piece of guest addresses ``[start, end)`` of the same region."""
        return Piece(start, end - start, self.region, self.address + start - self.gpa)

    def describe(self) -> str:
        """Return the piece in words, for messages."""
        return f"guest range {self.gpa:#x}+{self.length:#x} in {self.region.describe()}"


class DiscardRefused(UsageError):
    """Memory of this kind cannot be dropped rightly. Nothing of the request was."""

    def __init__(self, message: str, refusal: Refusal, piece: Piece) -> None:
        super().__init__(message)
        self.refusal = refusal
        self.piece = piece


class DiscardFailed(VirtioError):
    """A discard did not take place as it should, or a hook raised: the guest's request must not be acknowledged."""

    def __init__(self, message: str, piece: Piece) -> None:
        super().__init__(message)
        self.piece = piece


@dataclass(slots=True)
class DiscardStats:
    """What was done and what was not, since the start."""

    bytes_discarded: int = 0
    ranges_discarded: int = 0
    """Pieces that were dropped, each with one system call."""
    bytes_refused: Counter[Refusal] = field(default_factory=Counter)
    """Bytes that were to be dropped and were not."""
    ranges_refused: Counter[Refusal] = field(default_factory=Counter)
    last_refused: dict[Refusal, str] = field(default_factory=dict)
    """The latest case in words."""
    failures: int = 0
    """Times `DiscardFailed` was raised."""
    bytes_deflated: int = 0
    """Bytes the guest took back, as far as `Discarder.deflate` was told."""
    bytes_populated: int = 0
    """Of those, bytes for which memory was asked back (whole host pages, so it may be more)."""
    hints_failed: int = 0
    """WILLNEED that the kernel did not take; harmless."""

    @property
    def bytes_inhibited(self) -> int:
        """Bytes that were not dropped because discards were inhibited."""
        return self.bytes_refused[Refusal.INHIBITED]


def pieces_of(memory: GuestMemory, addr: U64, length: U64) -> list[Piece]:
    """Return ranges cut at region borders, ascending, duplicates and overlaps merged.

    Parameters
    ----------
    addr, length
        Guest addresses and bytes, multiples of 4096.

    Raises
    ------
    UsageError
        If a range is not made of whole pages.
    GuestAddressError
        If one is not all RAM.
    """
    pieces: list[Piece] = []
    done = 0
    for gpa, size in sorted(zip(np.asarray(addr).tolist(), np.asarray(length).tolist(), strict=True)):
        if gpa % PAGE_SIZE or size % PAGE_SIZE:
            raise UsageError(f"range to discard {gpa:#x}+{size:#x} is not made of whole {PAGE_SIZE}-byte pages")
        if size and not memory.covers(gpa, size):
            raise GuestAddressError(f"range to discard {gpa:#x}+{size:#x} is not all RAM ({memory.describe()})")
        at, end = max(gpa, done), gpa + size
        while at < end:
            region = memory.regions[memory.region_index(at)]
            stop = min(end, region.end)
            last = pieces[-1] if pieces else None
            if last is not None and last.end == at and last.region is region:
                pieces[-1] = Piece(last.gpa, stop - last.gpa, region, last.address)
            else:
                pieces.append(Piece(at, stop - at, region, memory.host_address(at)))
            at = stop
        done = max(done, end)
    return pieces


def grown(piece: Piece) -> Piece:
    """Return a piece grown to whole host pages."""
    base, page = piece.region.host_page_base, piece.region.page_size
    return piece.part(base + (piece.gpa - base) // page * page, base - (base - piece.end) // page * page)


def cut_out(piece: Piece, holes: Iterable[tuple[int, int]]) -> tuple[list[Piece], list[Piece]]:
    """Take guest address ranges out of a piece, each grown to whole host pages.

    Parameters
    ----------
    holes
        Pairs of first address and first address after, in any order.

    Returns
    -------
    kept, cut
        Both ascending.
    """
    base, page = piece.region.host_page_base, piece.region.page_size
    kept: list[Piece] = []
    cut: list[Piece] = []
    at = piece.gpa
    for first, after in sorted(holes):
        start = max(at, base + (first - base) // page * page)
        stop = min(piece.end, base - (base - after) // page * page)
        if start >= stop:
            continue
        if at < start:
            kept.append(piece.part(at, start))
        cut.append(piece.part(start, stop))
        at = stop
    if at < piece.end:
        kept.append(piece.part(at, piece.end))
    return kept, cut
