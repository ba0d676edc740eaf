"""The receiving side of a migration: builds a guest's RAM from the stream. No sockets: fed with records.

RAM is made fresh and sparse; nothing is shared with the source but the stream.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import numpy as np

from host_qemu_side.discard import punch_hole
from host_qemu_side.migration.stream import VERSION, Kind, Record, StreamError, StreamWriter, check_header
from vring.contents import digest_range, populated
from vring.errors import MissingFacility, UsageError
from vring.memory import PAGE_SHIFT, PAGE_SIZE, GuestMemory

__all__ = ["Receiver", "ReceiverState"]

DIGESTS_PER_RECORD = 1 << 17
MAX_ADDRESS = PAGE_SIZE << 32
"""Page numbers have 32 bits in the stream; arrays here are as long as the highest one."""


class ReceiverState(Enum):
    """How far the stream has come."""

    HEADER = "waiting for the header"
    RAM = "receiving memory"
    STATE = "received the device's state"
    READY = "complete, waiting for COMMIT"
    COMMITTED = "the guest is ours"
    IMAGE = "a complete image; the guest stayed at the source"
    CANCELLED = "the source gave up"


class Receiver:
    """Takes records in order.

    Parameters
    ----------
    name
        Of the memory object, shown in ``/proc/PID/maps``.
    digests
        Whether to send the digest of every page before READY, for an oracle at the source.
    inspect
        Called with the complete memory; what it returns goes into READY. JSON values.
    clock
        Tells how long the digests took, seconds: the source does not count that as downtime.
    """

    def __init__(
        self,
        name: str = "migrated-ram",
        *,
        digests: bool = True,
        inspect: Callable[[Receiver], dict[str, Any]] = lambda receiver: {},
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.state = ReceiverState.HEADER
        self.header: dict[str, Any] = {}
        self.device_state: dict[str, Any] = {}
        self.memory: GuestMemory | None = None
        self.pages = 0
        self.zero_pages = 0
        self.rounds = 0
        self.cancelled: str | None = None
        self.inspected: dict[str, Any] = {}
        """What `inspect` returned."""
        self.writer = StreamWriter()
        self._name = name
        self._digests = digests
        self._inspect = inspect
        self._clock = clock

    def hello(self) -> list[bytes | memoryview]:
        """Return the record that tells a source that somebody is there."""
        return self.writer.json(Kind.HELLO, {"version": VERSION})

    def handle(self, record: Record) -> list[bytes | memoryview]:
        """Let one record take effect; return buffers to answer with.

        Raises
        ------
        StreamError
            If the record cannot come here or names pages outside RAM.
        """
        kind = record.kind
        if self.state is ReceiverState.HEADER:
            if kind is not Kind.HEADER:
                raise StreamError(f"the stream begins with {kind.name}, not with a header")
            self._begin(record.json())
            return []
        if kind is Kind.CANCEL and self.state is not ReceiverState.COMMITTED:
            self.state, self.cancelled = ReceiverState.CANCELLED, str(record.json().get("why"))
            return []
        if self.state is ReceiverState.RAM and kind in (Kind.PAGES, Kind.ZERO):
            self._ram(record)
            return []
        if self.state is ReceiverState.RAM and kind is Kind.ROUND:
            self.rounds += 1
            return []
        if self.state is ReceiverState.RAM and kind is Kind.STATE:
            self.device_state, self.state = record.json(), ReceiverState.STATE
            return []
        if self.state is ReceiverState.STATE and kind is Kind.END:
            return self._end(record.json())
        if self.state is ReceiverState.READY and kind is Kind.COMMIT:
            self.state = ReceiverState.COMMITTED
            return []
        raise StreamError(f"a {kind.name} record cannot come while {self.state.value}")

    def _begin(self, header: dict[str, Any]) -> None:
        check_header(header)
        try:
            regions = [(int(gpa), int(size)) for gpa, size in header["regions"]]
            if header["page_size"] != PAGE_SIZE:
                raise StreamError(f"the stream's pages have {header['page_size']} bytes, this program's {PAGE_SIZE}")
            if any(gpa + size > MAX_ADDRESS for gpa, size in regions):
                raise StreamError(f"the header names RAM past {MAX_ADDRESS:#x}, where no record could put a page")
            self.memory = GuestMemory.create(regions, name=self._name)
        except (KeyError, TypeError, ValueError, OverflowError, UsageError) as error:
            raise StreamError(f"the header's memory layout makes no sense: {error}") from error
        except OSError as error:
            raise StreamError(
                f"cannot make {sum(s for _, s in regions)} bytes of guest memory: {error.strerror}"
            ) from error
        self.header, self.state = header, ReceiverState.RAM

    def _ram(self, record: Record) -> None:
        assert self.memory is not None
        runs, contents = record.runs()
        at = 0
        for first, count in zip(runs["first"].tolist(), runs["count"].tolist(), strict=True):
            gpa, size = first << PAGE_SHIFT, count << PAGE_SHIFT
            if not count or not self.memory.covers(gpa, size):
                raise StreamError(f"{record.kind.name} record for pages {first}+{count}, which are not RAM")
            if record.kind is Kind.PAGES:
                self._store(gpa, contents[at : at + size])
                at += size
                self.pages += count
            else:
                self._zero(gpa, size)
                self.zero_pages += count

    def _places(self, gpa: int, size: int) -> Iterator[tuple[int, int, int]]:
        """Yield (descriptor, offset in it, bytes) of a range of RAM."""
        assert self.memory is not None
        for index, start, length in self.memory.pieces(gpa, size):
            region = self.memory.regions[index]
            yield region.fd, start + region.offset, length

    def _store(self, gpa: int, content: memoryview) -> None:
        """Write pages by descriptor: half the time of storing through the mapping, which faults at each fresh page."""
        try:
            for fd, offset, size in self._places(gpa, len(content)):
                piece, content = content[:size], content[size:]
                while piece:
                    done = os.pwrite(fd, piece, offset)
                    piece, offset = piece[done:], offset + done
        except OSError as error:
            raise MissingFacility(f"no room for the guest's memory: {error.strerror}") from error

    def _zero(self, gpa: int, size: int) -> None:
        """Zero pages take no memory: they become holes again."""
        for piece in self._places(gpa, size):
            punch_hole(*piece)

    def _end(self, sums: dict[str, Any]) -> list[bytes | memoryview]:
        assert self.memory is not None
        if sums.get("pages") != self.pages:
            raise StreamError(f"the source sent {sums.get('pages')} pages, {self.pages} arrived")
        answer: list[bytes | memoryview] = []
        began = self._clock()
        if self._digests:
            present = populated(self.memory)
            for at in range(0, self.memory.page_span, DIGESTS_PER_RECORD):
                digests = np.empty(min(DIGESTS_PER_RECORD, self.memory.page_span - at), np.uint64)
                digest_range(self.memory, present, at, digests)
                answer += self.writer.digests(digests)
        self.inspected = self._inspect(self)
        facts = {"pages": self.pages, "zero_pages": self.zero_pages, "digest_seconds": self._clock() - began}
        answer += self.writer.json(Kind.READY, {**self.inspected, **facts})
        self.state = ReceiverState.READY if self.header.get("hand_over") else ReceiverState.IMAGE
        return answer

    def refuse(self, why: str, *, vanished: bool = False) -> list[bytes | memoryview]:
        """Return the record that tells the source what is wrong, and whether it is that the guest died here."""
        return self.writer.json(Kind.REFUSED, {"why": why, "vanished": vanished})

    def report(self, facts: dict[str, Any]) -> list[bytes | memoryview]:
        """Return the record that tells the source what became of the guest."""
        return self.writer.json(Kind.REPORT, facts)

    @property
    def complete(self) -> bool:
        """Whether nothing more is expected."""
        return self.state in (ReceiverState.COMMITTED, ReceiverState.IMAGE, ReceiverState.CANCELLED)
