"""The migration stream: what is sent, as bytes. No sockets, no files.

The stream begins with `MAGIC`, then records follow. Each record has a header with its type, a sequence number, the
length of its payload and a checksum over all of that, so what is cut off, damaged, doubled or left out is noticed at
the record where it happens. The same bytes go over a socket and into a file; the answers of a receiver (`Kind.READY`
and after) are records too.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from vring.errors import UsageError, VirtioError

__all__ = [
    "LIMITS",
    "MAGIC",
    "MAX_ADDRESS",
    "MAX_PAGES",
    "VERSION",
    "Kind",
    "Record",
    "StreamError",
    "StreamReader",
    "StreamWriter",
]

MAGIC = b"VBALMIG\n"
VERSION = 2
PAGE = 4096
MAX_ADDRESS = PAGE << 32
"""First guest address that has no page number here: those have 32 bits."""
MAX_PAGES = 256
"""Pages in one PAGES record: 1 MiB, so that the hint queue is served at least every 1 MiB."""
MAX_ZEROS = 1 << 16
"""Pages in one ZERO record."""
MAX_DIGESTS = 1 << 17
"""Digests in one DIGESTS record."""
_HEADER = struct.Struct("<HHIQQ")
HEADER_SIZE = _HEADER.size
_RUN = np.dtype([("first", "<u4"), ("count", "<u4")])
_PAGES = struct.Struct("<II")


class StreamError(VirtioError):
    """The stream is damaged, cut off, or not one of ours."""


class Kind(IntEnum):
    """Types of records."""

    HEADER = 1
    """JSON: version, memory layout, device, guest. Always the first."""
    PAGES = 2
    """Runs of pages and their contents."""
    ZERO = 3
    """Runs of pages that are all zero."""
    ROUND = 4
    """JSON: a round ended."""
    STATE = 5
    """JSON: the device's and the transport's state at the pause."""
    END = 6
    """JSON: all was sent; pages and records so far. The receiver checks and answers READY."""
    COMMIT = 7
    """The guest is the receiver's from here on."""
    CANCEL = 8
    """JSON: the source gave up; the guest stays there."""
    HELLO = 15
    """JSON, from the receiver, before anything else: its version."""
    LAUNCHED = 14
    """From the receiver, once, before READY, if its HELLO announced it: a process is there for the guest."""
    READY = 16
    """JSON, from the receiver: everything arrived."""
    DIGESTS = 17
    """From the receiver: digest of each page of RAM (uint64), ascending, a piece at a time, before READY. What lies
    between two regions has none."""
    REPORT = 18
    """JSON, from the receiver: what became of the guest."""
    REFUSED = 19
    """JSON, from the receiver: what is wrong."""


_SMALL = 1 << 16
LIMITS: dict[int, int] = {
    **dict.fromkeys(Kind, _SMALL),
    Kind.PAGES: _PAGES.size + MAX_PAGES * (_RUN.itemsize + PAGE),
    Kind.ZERO: _PAGES.size + MAX_ZEROS * _RUN.itemsize,
    Kind.STATE: 16 << 20,
    Kind.COMMIT: 0,
    Kind.LAUNCHED: 0,
    Kind.DIGESTS: MAX_DIGESTS * 8,
}
"""Bytes that the payload of each kind of record may have. STATE has a pair of numbers for each run of ballooned pages;
sixteen MiB are more than a million."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record."""

    kind: Kind
    payload: memoryview

    def digests(self, left: int) -> npt.NDArray[np.uint64]:
        """Parse the payload of a DIGESTS record.

        Parameters
        ----------
        left
            Pages whose digests have not come yet.

        Raises
        ------
        StreamError
            If it is made of no whole numbers, or of more than those.
        """
        count, rest = divmod(len(self.payload), 8)
        if rest or not count or count > left:
            raise StreamError(
                f"{self.kind.name} record of {len(self.payload)} bytes, where digests of {left} pages are missing"
            )
        return np.frombuffer(self.payload, "<u8", count)

    def runs(self) -> tuple[npt.NDArray[Any], memoryview]:
        """Parse the runs of a PAGES or ZERO record; return them (fields ``first``, ``count``) and the contents.

        Raises
        ------
        StreamError
            If the numbers do not fit the payload.
        """
        if len(self.payload) < _PAGES.size:
            raise StreamError(f"{self.kind.name} record of {len(self.payload)} bytes is too short")
        n_runs, n_pages = _PAGES.unpack_from(self.payload)
        body = _PAGES.size + n_runs * _RUN.itemsize
        expected = body + (n_pages * PAGE if self.kind is Kind.PAGES else 0)
        if len(self.payload) != expected:
            raise StreamError(
                f"{self.kind.name} record: {n_runs} runs, {n_pages} pages do not fit {len(self.payload)} bytes"
            )
        runs = np.frombuffer(self.payload, dtype=_RUN, count=n_runs, offset=_PAGES.size)
        first, count = runs["first"].astype(np.uint64), runs["count"].astype(np.uint64)
        if int(count.sum()) != n_pages:
            raise StreamError(f"{self.kind.name} record: its runs do not add up to {n_pages} pages")
        if not n_pages or not count.all() or (first[1:] < (first + count)[:-1]).any():
            raise StreamError(f"{self.kind.name} record: its runs are not ascending, or one has no pages")
        return runs, self.payload[body:]


def _checksum(kind: int, sequence: int, payload: Sequence[bytes | memoryview]) -> int:
    state = xxhash.xxh3_64(struct.pack("<HI", kind, sequence))
    for part in payload:
        state.update(part)
    return int(state.intdigest())


def _to_runs(pages: npt.NDArray[np.uint64]) -> npt.NDArray[Any]:
    breaks = np.flatnonzero(np.diff(pages) != 1) + 1
    starts = np.concatenate(([0], breaks)).astype(np.int64)
    runs = np.empty(len(starts), dtype=_RUN)
    runs["first"] = pages[starts]
    runs["count"] = np.diff(np.concatenate((starts, [len(pages)])))
    return runs


class Says(Protocol):
    """What becomes a JSON record."""

    @property
    def kind(self) -> Kind:
        """Of the record."""

    def to_json(self) -> dict[str, Any]:
        """Return its payload."""


class StreamWriter:
    """Turns what is to be sent into bytes: each method returns buffers to send, in order."""

    def __init__(self) -> None:
        self._sequence = 0

    def _record(self, kind: Kind, *payload: bytes | memoryview) -> list[bytes | memoryview]:
        length = sum(len(part) for part in payload)
        header = _HEADER.pack(kind, 0, self._sequence, length, _checksum(kind, self._sequence, payload))
        first = self._sequence == 0
        self._sequence += 1
        return [*([MAGIC] if first else []), header, *payload]

    def json(self, kind: Kind, value: dict[str, Any]) -> list[bytes | memoryview]:
        """Return a record with a JSON payload.

        Raises
        ------
        UsageError
            If these are no JSON values, or more than a record of this kind holds.
        """
        try:
            payload = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"{kind.name} record: these are no JSON values: {error}") from error
        if len(payload) > LIMITS[kind]:
            raise UsageError(f"{kind.name} record: {len(payload)} bytes of JSON, it holds {LIMITS[kind]}")
        return self._record(kind, payload)

    def say(self, what: Says) -> list[bytes | memoryview]:
        """Return the record of a value of `host_qemu_side.migration.records`."""
        return self.json(what.kind, what.to_json())

    def pages(self, pages: npt.NDArray[np.uint64], contents: memoryview) -> list[bytes | memoryview]:
        """Return a record of ascending pages with their contents one after another.

        The buffers refer to `contents`: it must not change until they are sent.
        """
        runs = _to_runs(pages)
        return self._record(Kind.PAGES, _PAGES.pack(len(runs), len(pages)) + runs.tobytes(), contents)

    def zeros(self, pages: npt.NDArray[np.uint64]) -> list[bytes | memoryview]:
        """Return a record of ascending pages that are all zero."""
        runs = _to_runs(pages)
        return self._record(Kind.ZERO, _PAGES.pack(len(runs), len(pages)) + runs.tobytes())

    def digests(self, digests: npt.NDArray[np.uint64]) -> list[bytes | memoryview]:
        """Return a record of page digests."""
        return self._record(Kind.DIGESTS, digests.astype("<u8").tobytes())

    def launched(self) -> list[bytes | memoryview]:
        """Return the LAUNCHED record."""
        return self._record(Kind.LAUNCHED)

    def commit(self) -> list[bytes | memoryview]:
        """Return the COMMIT record."""
        return self._record(Kind.COMMIT)


class StreamReader:
    """Parses a stream: read into its `room` (or `feed` pieces of any size), take records.

    Parameters
    ----------
    reuse
        Records share one piece of memory: the payload of one is valid until the next is asked for. Fresh memory for
        each costs more than all the rest, so whoever receives RAM wants this.
    """

    def __init__(self, *, reuse: bool = False) -> None:
        self._space = bytearray(1 << 16)
        self._at = 0
        self._end = 0
        self._reuse = reuse
        self._sequence = 0
        self._header: tuple[int, int, int, int] | None = None

    @property
    def _have(self) -> int:
        return self._end - self._at

    @property
    def wanted(self) -> int:
        """How many more bytes are needed before `next` can return something new."""
        if self._header is None:
            need = HEADER_SIZE + (len(MAGIC) if self._sequence == 0 else 0)
        else:
            need = self._header[2]
        return max(need - self._have, 0)

    def room(self, size: int | None = None) -> memoryview:
        """Return space to read into, for `size` bytes or exactly those `wanted`; then say how many came: `filled`."""
        size = max(self.wanted, 1) if size is None else size
        if self._end + size > len(self._space):
            have = self._space[self._at : self._end]
            if len(have) + size > len(self._space):
                self._space = bytearray(len(have) + size)
            self._space[: len(have)] = have
            self._at, self._end = 0, len(have)
        return memoryview(self._space)[self._end : self._end + size]

    def filled(self, size: int) -> None:
        """Take the first `size` bytes that were read into `room`."""
        self._end += size

    def feed(self, data: bytes | memoryview) -> None:
        """Take bytes from the peer."""
        self.room(len(data))[:] = data
        self.filled(len(data))

    def _take(self, size: int) -> memoryview:
        taken = memoryview(self._space)[self._at : self._at + size]
        self._at += size
        if self._at == self._end:
            self._at = self._end = 0
        return taken

    def next(self) -> Record | None:
        """Return the next record, or None if more bytes are needed.

        Raises
        ------
        StreamError
            If the bytes cannot be right; the message says at which record.
        """
        if self._header is None:
            magic = len(MAGIC) if self._sequence == 0 else 0
            begin = bytes(self._space[self._at : self._at + min(self._have, len(MAGIC))])
            if magic and not MAGIC.startswith(begin):
                raise StreamError(f"not a migration stream: it begins with {begin!r}, not {MAGIC!r}")
            if self._have < magic + HEADER_SIZE:
                return None
            kind, flags, sequence, length, checksum = _HEADER.unpack_from(self._take(magic + HEADER_SIZE), magic)
            if flags or kind not in LIMITS:
                raise StreamError(
                    f"stream damaged at record {self._sequence}: type {kind}, flags {flags}", index=self._sequence
                )
            if length > LIMITS[kind]:
                raise StreamError(
                    f"stream damaged at record {self._sequence}: {Kind(kind).name} of {length} bytes, at most "
                    f"{LIMITS[kind]} are taken",
                    index=self._sequence,
                )
            if sequence != self._sequence:
                raise StreamError(
                    f"stream damaged: record {sequence} follows record {self._sequence - 1}", index=sequence
                )
            self._header = kind, sequence, length, checksum
        kind, sequence, length, checksum = self._header
        if self._have < length:
            return None
        payload = self._take(length)
        if _checksum(kind, sequence, [payload]) != checksum:
            raise StreamError(
                f"stream damaged: checksum of record {sequence} ({Kind(kind).name}) is wrong", index=sequence
            )
        self._header = None
        self._sequence += 1
        return Record(Kind(kind), payload if self._reuse else memoryview(bytes(payload)))

    @property
    def at_boundary(self) -> bool:
        """Whether the stream could end here: between two records, after the first."""
        return self._header is None and not self._have and self._sequence > 0

    @property
    def position(self) -> str:
        """Where the reader is, for messages."""
        return f"after record {self._sequence - 1}" if self._sequence else "before the first record"
