"""Judge a memory image by the tagged pages in it.

``guest_tool tagger`` keeps pages whose content tells their id and version, updates them round robin, and counts the
updates in one more page, the ledger. An image of the whole guest, taken at one instant, must hold every page with
exactly the version the ledger asks for; only the page being written at that instant may be in between. Nothing here
knows how the image came about: the layout below is the whole contract with ``guest_tool.c``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from vring.errors import UsageError

__all__ = ["TagComparison", "TagReport", "compare", "scan"]

_PAGE = 4096
_WORDS = _PAGE // 8
_TAG = np.uint64(0x7461676765642D70)
_LEDGER_MAGIC = 0x6C65646765722D70
_BATCH = 4096  # pages whose pattern is worked out at a time

_U64 = npt.NDArray[np.uint64]
_I64 = npt.NDArray[np.int64]
Image = npt.NDArray[Any] | str | os.PathLike[str] | int
"""A memory image: array (of bytes or anything else), path of a file, or open descriptor."""


@dataclass(frozen=True)
class TagReport:
    """What one image holds of one tagger's pages."""

    nonce: int
    """Which tagger (its ``--nonce``)."""
    count: int
    """Pages it keeps, as the ledger says."""
    updates: int
    """Updates finished at that instant, as far as the image knows."""
    found: int
    """Ids seen with a whole, consistent page or the page in flight."""
    in_flight: int | None
    """Id of the page that was being written at that instant; its version is not judged."""
    missing: _I64 = field(repr=False)
    """Ids with no page at all."""
    stale: _I64 = field(repr=False)
    """Ids whose page has an older version than the ledger (or the other pages) ask for."""
    torn: _I64 = field(repr=False)
    """Ids whose page is damaged: versions at its ends differ, or check word or pattern are wrong."""
    duplicates: int = 0
    """Pages beyond one for each id: copies that lie in freed memory."""
    ledger_stale: bool = False
    """Whether pages are newer than the ledger allows: the ledger's own page is an old one."""
    pages: _I64 = field(default_factory=lambda: np.zeros(0, dtype=np.int64), repr=False)
    """Page number in the image of the newest copy of each id, -1 where missing; last the ledger's."""

    @property
    def ok(self) -> bool:
        """Whether every page is there, whole and of its latest version."""
        return not (self.missing.size or self.stale.size or self.torn.size or self.ledger_stale)

    def summary(self) -> str:
        """Return the counts on one line."""
        text = (
            f"{self.found} of {self.count} tagged pages, {self.updates} updates: {self.missing.size} missing, "
            f"{self.stale.size} stale, {self.torn.size} torn, {self.duplicates} duplicates"
        )
        return text + (", ledger stale" if self.ledger_stale else "")


@dataclass(frozen=True)
class TagComparison:
    """Tagged pages of the source, frozen, against the same addresses of the destination."""

    source: TagReport
    destination: TagReport | None
    """None if the destination has no ledger at all."""
    different: _I64 = field(repr=False)
    """Ids (`count` for the ledger) whose page differs in any byte."""

    @property
    def ok(self) -> bool:
        """Whether both images are sound and no tagged page differs."""
        return self.source.ok and self.destination is not None and self.destination.ok and not self.different.size


def _mix(x: _U64) -> _U64:
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _key(nonce: np.uint64, ids: _U64, versions: _U64) -> _U64:
    return _mix(nonce ^ _mix(ids ^ _mix(versions)))


def _as_words(image: Image) -> _U64:
    if isinstance(image, np.ndarray):
        raw = image.reshape(-1).view(np.uint8)
    else:
        path = f"/proc/self/fd/{image}" if isinstance(image, int) else os.fspath(image)
        raw = np.memmap(path, dtype=np.uint8, mode="r")
    if raw.size % _PAGE:
        raw = raw[: raw.size // _PAGE * _PAGE]
    return raw.view(np.uint64).reshape(-1, _WORDS)


def _first_words(image: Image, words: _U64) -> _U64:
    """Return words 0 and 1 of each page, zero for pages in holes of a file, which are not touched."""
    heads = np.zeros((len(words), 2), dtype=np.uint64)
    if isinstance(image, np.ndarray):
        heads[:] = words[:, :2]
        return heads
    fd = os.dup(image) if isinstance(image, int) else os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    try:
        at, end = 0, len(words) * _PAGE
        while at < end:
            try:
                start = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:  # no data up to the end
                break
            at = min(end, os.lseek(fd, start, os.SEEK_HOLE))
            first, last = start // _PAGE, -(-at // _PAGE)
            heads[first:last] = words[first:last, :2]
    finally:
        os.close(fd)
    return heads


def _intact(words: _U64, at: _I64, nonce: np.uint64) -> npt.NDArray[np.bool_]:
    """Whether each page is whole: both versions equal, pattern and check word as they must be."""
    good = np.zeros(len(at), dtype=bool)
    index = np.arange(4, _WORDS - 1, dtype=np.uint64)
    for first in range(0, len(at), _BATCH):
        pages = words[at[first : first + _BATCH]]
        key = _key(nonce, pages[:, 2], pages[:, 3])
        with np.errstate(over="ignore"):
            want = _mix(key[:, None] + index[None, :])
        good[first : first + _BATCH] = (pages[:, 4 : _WORDS - 1] == want).all(axis=1) & (
            pages[:, 3] == pages[:, _WORDS - 1]
        )
    return good


def _ledger(words: _U64, heads: _U64, nonce: int | None) -> int:
    at = np.flatnonzero(heads[:, 0] == np.uint64(_LEDGER_MAGIC))
    if nonce is not None:
        at = at[heads[at, 1] == np.uint64(nonce)]
    if at.size:
        rows = words[at][:, :6]
        at, rows = _checked(at, rows)
    if not at.size:
        raise UsageError("no ledger page in this image: no tagger ran, or its page is lost")
    if np.unique(rows[:, 1]).size > 1:
        raise UsageError(f"{np.unique(rows[:, 1]).size} taggers left pages in this image: name one by its nonce")
    return int(at[np.argmax(rows[:, 3])])


def _checked(at: _I64, rows: _U64) -> tuple[_I64, _U64]:
    want = np.array(
        [_key(row[1], row[2:3], np.array([_LEDGER_MAGIC], dtype=np.uint64))[0] for row in rows], dtype=np.uint64
    )
    sound = rows[:, 5] == want
    return at[sound], rows[sound]


def scan(image: Image, nonce: int | None = None) -> TagReport:
    """Find a tagger's pages in an image of a guest that was frozen, and judge them.

    Parameters
    ----------
    image
        All of the guest's RAM (addresses do not matter); holes of a file are not read.
    nonce
        Which tagger, if several ran in this guest.

    Returns
    -------
    TagReport
        See there; `TagReport.ok` is the verdict.

    Raises
    ------
    UsageError
        If there is no ledger, or there are several taggers' and `nonce` is None.
    """
    words = _as_words(image)
    heads = _first_words(image, words)
    ledger_at = _ledger(words, heads, nonce)
    ledger = words[ledger_at, :6]
    who, count, begun, finished = ledger[1], int(ledger[2]), int(ledger[3]), int(ledger[4])

    at = np.flatnonzero((heads[:, 0] == _TAG) & (heads[:, 1] == who))
    at = at[words[at, 2] < np.uint64(count)]
    ids = words[at, 2].astype(np.int64)
    good = _intact(words, at, who)
    versions = np.where(good, words[at, 3], 0).astype(np.int64)
    # Of several copies the newest whole one is the live one; a damaged page counts only where nothing else is.
    order = np.lexsort((versions, ids))
    last = np.ones(len(order), dtype=bool)
    last[:-1] = ids[order][1:] != ids[order][:-1]
    live = order[last]
    version = np.full(count, -1, dtype=np.int64)
    version[ids[live]] = versions[live]
    pages = np.full(count + 1, -1, dtype=np.int64)
    pages[ids[live]] = at[live]
    pages[count] = ledger_at

    # Updates the pages themselves prove: page i of version v >= 2 was update (v - 2) * count + i.
    proven = np.where(version >= 2, (version - 2) * count + np.arange(count) + 1, 0)
    most = int(proven.max(initial=0))
    ledger_stale = most > begun
    if ledger_stale:
        finished, begun = most, most
    want = 1 + finished // count + (np.arange(count) < finished % count)
    in_flight = finished % count if begun > finished else None
    judged = np.ones(count, dtype=bool)
    if in_flight is not None:
        judged[in_flight] = False
    missing = np.flatnonzero(version < 0)
    torn = np.flatnonzero((version == 0) & judged)
    stale = np.flatnonzero((version > 0) & (version < want))
    return TagReport(
        nonce=int(who),
        count=count,
        updates=finished,
        found=int((version > 0).sum()) + int(in_flight is not None and version[in_flight] == 0),
        in_flight=in_flight,
        missing=missing,
        stale=stale,
        torn=torn,
        duplicates=len(ids) - len(live),
        ledger_stale=ledger_stale,
        pages=pages,
    )


def compare(source: Image, destination: Image, nonce: int | None = None) -> TagComparison:
    """Compare the tagged pages of a frozen source, byte by byte, with the same addresses of the destination.

    Parameters
    ----------
    source, destination
        Images of the same size and address layout.
    nonce
        As for `scan`.

    Raises
    ------
    UsageError
        If the source has no ledger, or the images' sizes differ.
    """
    first = scan(source, nonce)
    ours, theirs = _as_words(source), _as_words(destination)
    if len(ours) != len(theirs):
        raise UsageError(f"images of {len(ours)} and {len(theirs)} pages cannot be compared")
    try:
        second = scan(destination, first.nonce)
    except UsageError:
        second = None
    known = np.flatnonzero(first.pages >= 0)
    at = first.pages[known]
    differs = np.zeros(len(at), dtype=bool)
    for begin in range(0, len(at), _BATCH):
        rows = at[begin : begin + _BATCH]
        differs[begin : begin + _BATCH] = (ours[rows] != theirs[rows]).any(axis=1)
    return TagComparison(first, second, known[differs])
