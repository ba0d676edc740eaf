"""The receiving side of a migration: builds a guest's RAM from the stream. No sockets: fed with records.

RAM is made fresh and sparse; nothing is shared with the source but the stream.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import Enum
from typing import Any

from host_qemu_side.discard import punch_hole
from host_qemu_side.migration.records import Cancel, End, Header, Hello, Ready, Refused, Report, RoundEnd, State
from host_qemu_side.migration.stream import MAX_DIGESTS, Kind, Record, StreamError, StreamWriter
from vring.contents import digests_in_order
from vring.errors import MissingFacility, UsageError
from vring.memory import PAGE_SHIFT, Backing, GuestMemory, Region

__all__ = ["Receiver", "ReceiverState"]

CLEARED = 1 << 20
"""Bytes of an embedder's buffer that are looked at, and zeroed if need be, at a time."""


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
    memory
        RAM to receive into, of exactly the regions that the source has; what is in it is dropped. None: it is made,
        fresh and sparse. Either way it is the caller's to close.
    digests
        Whether to send the digest of every page before READY, for an oracle at the source.
    on_header
        Told what the source says of its guest, before there is any memory for it; what it raises refuses the guest.
    inspect
        Called when all has arrived; what it returns goes into READY, whose counts are filled in here. What it raises
        refuses the guest.
    prepare
        Called then, before READY, if the source hands the guest over: whatever can fail is done and raises here, so
        that the guest stays where it is. It may change the memory.
    clock
        Tells how long the digests took, seconds: the source does not count that as downtime.
    """

    def __init__(
        self,
        name: str = "migrated-ram",
        *,
        memory: GuestMemory | None = None,
        digests: bool = True,
        on_header: Callable[[Header], None] = lambda header: None,
        inspect: Callable[[Receiver], Ready] = lambda receiver: Ready(),
        prepare: Callable[[Receiver], None] = lambda receiver: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.state = ReceiverState.HEADER
        self.header: Header | None = None
        self.device_state: Mapping[str, Any] = {}
        """What the source said in STATE; `host_qemu_side.saved.SavedGuest` decodes that of this project's guests."""
        self.memory = memory
        self.pages = 0
        self.zero_pages = 0
        self.rounds = 0
        self.cancelled: str | None = None
        self.ready: Ready | None = None
        """What was said when all had arrived."""
        self.writer = StreamWriter()
        self._name = name
        self._digests = digests
        self._on_header = on_header
        self._inspect, self._prepare = inspect, prepare
        self._clock = clock

    def hello(self, *, launches: bool = False) -> list[bytes | memoryview]:
        """Return the record that tells a source that somebody is there, and whether `launched` will follow."""
        return self.writer.say(Hello(launches))

    def launched(self) -> list[bytes | memoryview]:
        """Return the record that tells a source that a process is there for the guest."""
        return self.writer.launched()

    def handle(self, record: Record) -> list[bytes | memoryview]:
        """Let one record take effect; return buffers to answer with.

        Raises
        ------
        StreamError
            If the record cannot come here, says what cannot be, or names pages outside RAM.
        MissingFacility
            If this machine has no memory for it.
        """
        kind = record.kind
        if kind is Kind.CANCEL and self.state is not ReceiverState.COMMITTED:
            self.cancelled, self.state = Cancel.of(record).why, ReceiverState.CANCELLED
            return []
        if self.state is ReceiverState.HEADER:
            if kind is not Kind.HEADER:
                raise StreamError(f"the stream begins with {kind.name}, not with a header")
            self._begin(Header.of(record))
            return []
        if self.state is ReceiverState.RAM and kind in (Kind.PAGES, Kind.ZERO):
            self._ram(record)
            return []
        if self.state is ReceiverState.RAM and kind is Kind.ROUND:
            RoundEnd.of(record)
            self.rounds += 1
            return []
        if self.state is ReceiverState.RAM and kind is Kind.STATE:
            self.device_state, self.state = State.of(record).members, ReceiverState.STATE
            return []
        if self.state is ReceiverState.STATE and kind is Kind.END:
            return self._end(End.of(record))
        if self.state is ReceiverState.READY and kind is Kind.COMMIT:
            self.state = ReceiverState.COMMITTED
            return []
        raise StreamError(f"a {kind.name} record cannot come while {self.state.value}")

    def _begin(self, header: Header) -> None:
        self._on_header(header)
        if self.memory is None:
            self.memory = self._made(header)
        else:
            here = tuple((region.gpa, region.size) for region in self.memory.regions)
            if here != header.regions:
                raise StreamError(
                    f"the stream is of a guest with RAM at {_layout(header.regions)}, here is {_layout(here)}"
                )
            for region in self.memory.regions:
                self._zero(region.gpa, region.size)
        self.header, self.state = header, ReceiverState.RAM

    def _made(self, header: Header) -> GuestMemory:
        try:
            return GuestMemory.create(header.regions, name=self._name)
        except (OSError, OverflowError, MemoryError, UsageError) as error:
            why = getattr(error, "strerror", None) or error
            raise MissingFacility(f"cannot make {header.size} bytes of guest memory: {why}") from error

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

    def _store(self, gpa: int, content: memoryview) -> None:
        """Write pages by descriptor: half the time of storing through the mapping, which faults at each fresh page."""
        assert self.memory is not None
        try:
            for index, start, size in self.memory.pieces(gpa, len(content)):
                region = self.memory.regions[index]
                piece, content = content[:size], content[size:]
                if not _by_descriptor(region):
                    self.memory.view(region.gpa + start, size)[:] = piece
                    continue
                offset = region.offset + start
                while piece:
                    done = os.pwrite(region.fd, piece, offset)
                    piece, offset = piece[done:], offset + done
        except OSError as error:
            raise MissingFacility(f"no room for the guest's memory: {error.strerror}") from error

    def _zero(self, gpa: int, size: int) -> None:
        """Zero pages take no memory: they become holes again, where a descriptor allows that."""
        assert self.memory is not None
        try:
            for index, start, length in self.memory.pieces(gpa, size):
                region = self.memory.regions[index]
                if not _by_descriptor(region):
                    self._clear(index, start, length)
                else:
                    punch_hole(region.fd, region.offset + start, length)
        except OSError as error:
            raise MissingFacility(f"cannot drop pages of the guest's memory: {error.strerror}") from error

    def _clear(self, index: int, start: int, length: int) -> None:
        """Zero a range of a buffer; what is zero is only read, which takes no memory of a fresh mapping."""
        assert self.memory is not None
        for at in range(start, start + length, CLEARED):
            piece = self.memory.arrays[index][at : min(at + CLEARED, start + length)]
            if piece.any():
                piece[:] = 0

    def _end(self, sent: End) -> list[bytes | memoryview]:
        assert self.memory is not None
        for what, there, here in (("pages", sent.pages, self.pages), ("zero pages", sent.zero_pages, self.zero_pages)):
            if there != here:
                raise StreamError(f"the source sent {there} {what}, {here} arrived")
        began = self._clock()
        digests = list(digests_in_order(self.memory, MAX_DIGESTS)) if self._digests else []
        found, took = self._inspect(self), self._clock() - began
        if self.hands_over:
            self._prepare(self)
        self.ready = replace(found, pages=self.pages, zero_pages=self.zero_pages, digest_seconds=took)
        # No record is made before all is well: else the one that refuses the guest would not be the next one.
        answer = [part for some in digests for part in self.writer.digests(some)] + self.writer.say(self.ready)
        self.state = ReceiverState.READY if self.hands_over else ReceiverState.IMAGE
        return answer

    def refuse(self, why: str, *, vanished: bool = False, started: bool = False) -> list[bytes | memoryview]:
        """Return the record that tells the source what is wrong; nothing may be taken from the source after it.

        Parameters
        ----------
        why
            In words.
        vanished
            Whether it is that the guest died here.
        started
            Whether the guest may have run here. If not, the source may let it go on, also if it has sent COMMIT.
        """
        return self.writer.say(Refused(why, vanished, returned=not started))

    def report(self, found: Report) -> list[bytes | memoryview]:
        """Return the record that tells the source what became of the guest."""
        return self.writer.say(found)

    @property
    def hands_over(self) -> bool:
        """Whether the source means to give the guest away, once the header has come."""
        return self.header is not None and self.header.hand_over

    @property
    def complete(self) -> bool:
        """Whether nothing more is expected."""
        return self.state in (ReceiverState.COMMITTED, ReceiverState.IMAGE, ReceiverState.CANCELLED)


def _by_descriptor(region: Region) -> bool:
    """Whether pages can be written and dropped through the region's descriptor: not those of hugetlbfs."""
    return region.fd >= 0 and region.backing is not Backing.HUGETLB


def _layout(regions: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{gpa:#x}+{size:#x}" for gpa, size in regions)
