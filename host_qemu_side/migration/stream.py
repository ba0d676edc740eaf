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
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from vring.errors import VirtioError

__all__ = ["MAGIC", "MAX_PAGES", "VERSION", "Kind", "Record", "StreamError", "StreamReader", "StreamWriter"]

MAGIC = b"VBALMIG\n"
VERSION = 1
PAGE = 4096
MAX_PAGES = 256
"""Pages in one PAGES record: 1 MiB, so that the hint queue is served at least every 1 MiB."""
_HEADER = struct.Struct("<HHIQQ")
HEADER_SIZE = _HEADER.size
MAX_PAYLOAD = 64 << 20
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
    READY = 16
    """JSON, from the receiver: everything arrived."""
    DIGESTS = 17
    """From the receiver: digest of each page (uint64), a piece at a time, before READY."""
    REPORT = 18
    """JSON, from the receiver: what became of the guest."""
    REFUSED = 19
    """JSON, from the receiver: what is wrong."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record."""

    kind: Kind
    payload: memoryview

    def json(self) -> dict[str, Any]:
        """Parse a JSON payload.

        Raises
        ------
        StreamError
            If it is not a JSON object.
        """
        try:
            value = json.loads(bytes(self.payload))
        except ValueError as error:
            raise StreamError(f"{self.kind.name} record: not JSON: {error}") from error
        if not isinstance(value, dict):
            raise StreamError(f"{self.kind.name} record: not a JSON object")
        return value

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
        if int(runs["count"].sum(dtype=np.uint64)) != n_pages:
            raise StreamError(f"{self.kind.name} record: its runs do not add up to {n_pages} pages")
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
        """Return a record with a JSON payload."""
        return self._record(kind, json.dumps(value, separators=(",", ":")).encode())

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
            if flags or length > MAX_PAYLOAD or kind not in Kind.__members__.values():
                raise StreamError(
                    f"stream damaged at record {self._sequence}: type {kind}, flags {flags}, {length} bytes",
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


def check_header(value: dict[str, Any]) -> None:
    """Check the version in a HEADER record.

    Raises
    ------
    StreamError
        If this project cannot read it.
    """
    if value.get("version") != VERSION:
        raise StreamError(f"stream of version {value.get('version')!r}; this program reads version {VERSION}")
