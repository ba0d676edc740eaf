"""The records of a migration stream that are JSON, as typed values: what each says, and what it may say.

Both ends speak through these. `of` decodes what the other end sent and refuses what it cannot mean; behind it no check
is needed. Texts for people are made printable on arrival (`vring.decode.visible`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from host_qemu_side.migration.stream import LIMITS, MAX_ADDRESS, PAGE, VERSION, Kind, Record, StreamError
from vring._vring import lib
from vring.decode import U32, Fields, Refusal, parse_json, visible
from vring.errors import UsageError

__all__ = [
    "Cancel",
    "End",
    "Header",
    "Hello",
    "HintAnswer",
    "JsonRecord",
    "Ready",
    "Refused",
    "Report",
    "RoundEnd",
    "State",
    "TagsFound",
]

MAX_TEXT = 4096
"""Characters of a text for people."""
MAX_SECONDS = 1e9
MAX_OPTIONS = 32


def _text(why: str) -> str:
    """Return a text of ours as it can be sent: what names a path may hold what cannot be encoded."""
    return why.encode(errors="replace").decode()[:MAX_TEXT]


@dataclass(frozen=True, slots=True)
class JsonRecord:
    """One record whose payload is a JSON object. Members that this program does not know are left alone."""

    kind: ClassVar[Kind]

    @classmethod
    def of(cls, record: Record) -> Self:
        """Decode what the other end sent.

        Raises
        ------
        StreamError
            If it is another record, no JSON, or says what cannot be.
        """
        if record.kind is not cls.kind:
            raise StreamError(f"a {record.kind.name} record came where {cls.kind.name} was due")
        what = f"{record.kind.name} record"
        return cls.from_json(parse_json(record.payload, what, refusal=StreamError, most=LIMITS[record.kind]))

    @classmethod
    def from_json(cls, value: Any, refusal: Refusal = StreamError) -> Self:
        """Check a decoded JSON object and return it as a value.

        Raises
        ------
        VirtioError
            What `refusal` makes, if it is none or says what cannot be.
        """
        return cls._take(Fields(value, f"{cls.kind.name} record", refusal))

    @classmethod
    def _take(cls, said: Fields) -> Self:
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        raise NotImplementedError


def _check_version(said: Fields) -> None:
    version = said.integer("version")
    if version != VERSION:
        raise said.refusal(f"{said.what}: stream of version {version}; this program reads version {VERSION}")


@dataclass(frozen=True, slots=True)
class Hello(JsonRecord):
    """The receiver is there, and speaks this version."""

    kind: ClassVar[Kind] = Kind.HELLO
    launches: bool = False
    """Whether it launches a process for the guest and will say LAUNCHED: worth waiting for before the last freeze."""

    @classmethod
    def _take(cls, said: Fields) -> Self:
        _check_version(said)
        return cls(said.boolean("launches", default=False))

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"version": VERSION, "launches": self.launches}


@dataclass(frozen=True, slots=True)
class Header(JsonRecord):
    """What the receiver has to know before RAM."""

    kind: ClassVar[Kind] = Kind.HEADER
    regions: tuple[tuple[int, int], ...]
    """Where RAM lies: guest address and bytes of each region, whole pages, ascending, apart."""
    hand_over: bool = False
    """Whether the receiver takes the guest (COMMIT); else the stream is an image."""
    guest: str = ""
    """What kind of guest it is; empty if the source did not say."""
    resume: Mapping[str, str] = field(default_factory=dict)
    """Options that the guest is to be gone on with, by name."""
    tag_nonce: int | None = None
    """Number of the tagger whose pages are in a Linux guest's RAM."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the source's program put there for its own receiver: JSON values, not looked at."""

    @property
    def size(self) -> int:
        """Bytes of RAM."""
        return sum(size for _, size in self.regions)

    @classmethod
    def describing(cls, regions: Iterable[tuple[int, int]], hand_over: bool, facts: Mapping[str, Any]) -> Self:
        """Return the header of a guest with these regions; `facts` are the members that describe it.

        Raises
        ------
        UsageError
            If they are no such values.
        """
        own = {"version": VERSION, "page_size": PAGE, "hand_over": hand_over, "regions": [list(r) for r in regions]}
        return cls.from_json({**facts, **own}, UsageError)

    @classmethod
    def _take(cls, said: Fields) -> Self:
        _check_version(said)
        if (size := said.integer("page_size")) != PAGE:
            raise said.refusal(f"the stream's pages have {size} bytes, this program's {PAGE}")
        regions = tuple(sorted(said.pairs("regions", lib.VQ_MAX_REGIONS)))
        _check_regions(regions, said.refusal)
        options = said.members("resume", default={})
        if len(options.names) > MAX_OPTIONS:
            raise said.refusal(f"{said.what}: resume has {len(options.names)} options, at most {MAX_OPTIONS}")
        known = {"version", "page_size", "regions", "hand_over", "guest", "resume", "tag_nonce"}
        return cls(
            regions,
            said.boolean("hand_over"),
            visible(said.text("guest", 64, default="")),
            {visible(name): _option(options, name) for name in options.names},
            said.integer("tag_nonce") if "tag_nonce" in said else None,
            {name: said.any(name) for name in said.names if name not in known},
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        named = {"guest": self.guest, "resume": dict(self.resume)}
        nonce = {} if self.tag_nonce is None else {"tag_nonce": self.tag_nonce}
        regions = [list(region) for region in self.regions]
        shape = {"version": VERSION, "page_size": PAGE, "hand_over": self.hand_over, "regions": regions}
        return {**self.facts, **{name: value for name, value in named.items() if value}, **nonce, **shape}


def _option(options: Fields, name: str) -> str:
    value = options.any(name)
    return str(options.integer(name)) if type(value) is int else visible(options.text(name, 256))


def _check_regions(regions: tuple[tuple[int, int], ...], refusal: Refusal) -> None:
    if not regions:
        raise refusal("the header names no RAM")
    last = 0
    for gpa, size in regions:
        if gpa + size > MAX_ADDRESS:
            raise refusal(f"the header names RAM past {MAX_ADDRESS:#x}, where no record could put a page")
        if not size or gpa % PAGE or size % PAGE or gpa < last:
            raise refusal(
                f"the header's memory layout makes no sense: region {gpa:#x}+{size:#x} is not made of whole pages, or "
                "lies over another"
            )
        last = gpa + size


@dataclass(frozen=True, slots=True)
class RoundEnd(JsonRecord):
    """A round is over."""

    kind: ClassVar[Kind] = Kind.ROUND
    number: int
    """Of the round that comes next; the first was 0."""

    @classmethod
    def _take(cls, said: Fields) -> Self:
        return cls(said.integer("round", 0, U32))

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"round": self.number}


@dataclass(frozen=True, slots=True)
class State(JsonRecord):
    """The state of device and transport at the pause: an object whose members are between the two programs.

    `host_qemu_side.saved.SavedGuest` decodes those that this project's own guests have.
    """

    kind: ClassVar[Kind] = Kind.STATE
    members: Mapping[str, Any]

    @classmethod
    def _take(cls, said: Fields) -> Self:
        return cls({name: said.any(name) for name in said.names})

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return dict(self.members)


@dataclass(frozen=True, slots=True)
class End(JsonRecord):
    """All was sent."""

    kind: ClassVar[Kind] = Kind.END
    pages: int
    """Pages in PAGES records, each time one was sent counted."""
    zero_pages: int
    """Pages in ZERO records, the same way; pages that were not sent because they are holes are none of them."""

    @classmethod
    def _take(cls, said: Fields) -> Self:
        return cls(said.integer("pages"), said.integer("zero_pages"))

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"pages": self.pages, "zero_pages": self.zero_pages}


@dataclass(frozen=True, slots=True)
class Cancel(JsonRecord):
    """The source gave up; the guest stays there."""

    kind: ClassVar[Kind] = Kind.CANCEL
    why: str
    """For people; printable."""

    @classmethod
    def _take(cls, said: Fields) -> Self:
        return cls(visible(said.text("why", MAX_TEXT)))

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"why": _text(self.why)}


@dataclass(frozen=True, slots=True)
class TagsFound:
    """How the tagged pages of a Linux guest are in an image."""

    pages: int = 0
    """Pages that the tagger keeps."""
    found: int = 0
    missing: int = 0
    stale: int = 0
    torn: int = 0
    updates: int = 0
    ok: bool = False
    error: str = ""
    """Why they could not be judged; empty if they were."""

    @classmethod
    def take(cls, said: Fields) -> Self:
        """Return the value of a JSON object."""
        if "error" in said:
            return cls(error=visible(said.text("error", MAX_TEXT)) or "it did not say why")
        pages, found, missing, stale, torn, updates = (said.integer(name) for name in _TAG_COUNTS)
        return cls(pages, found, missing, stale, torn, updates, said.boolean("ok"))

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        if self.error:
            return {"error": _text(self.error)}
        return {**{name: getattr(self, name) for name in _TAG_COUNTS}, "ok": self.ok}


_TAG_COUNTS = ("pages", "found", "missing", "stale", "torn", "updates")


@dataclass(frozen=True, slots=True)
class Ready(JsonRecord):
    """Everything arrived, and the receiver can go on with it."""

    kind: ClassVar[Kind] = Kind.READY
    pages: int = 0
    """Pages that arrived, as in `End`."""
    zero_pages: int = 0
    digest_seconds: float = 0.0
    """Time that digests took, which only an oracle wants: no downtime."""
    tags: TagsFound | None = None
    """Of a Linux guest."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the receiver's program found for its own source: JSON values, not looked at."""

    @classmethod
    def _take(cls, said: Fields) -> Self:
        known = {"pages", "zero_pages", "digest_seconds", "tags"}
        return cls(
            said.integer("pages", default=0),
            said.integer("zero_pages", default=0),
            said.number("digest_seconds", 0.0, MAX_SECONDS, default=0.0),
            TagsFound.take(said.members("tags")) if "tags" in said else None,
            {name: said.any(name) for name in said.names if name not in known},
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        counts = {"pages": self.pages, "zero_pages": self.zero_pages, "digest_seconds": self.digest_seconds}
        return {**self.facts, **({} if self.tags is None else {"tags": self.tags.to_json()}), **counts}


@dataclass(frozen=True, slots=True)
class HintAnswer:
    """How a guest answered a run of hints."""

    command_id: int
    blocks: int
    seconds: float

    @classmethod
    def take(cls, said: Fields) -> Self:
        """Return the value of a JSON object."""
        seconds = said.number("seconds", 0.0, MAX_SECONDS)
        return cls(said.integer("command_id", 0, U32), said.integer("blocks"), seconds)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"command_id": self.command_id, "blocks": self.blocks, "seconds": self.seconds}


@dataclass(frozen=True, slots=True)
class Report(JsonRecord):
    """What became of the guest at the destination. None: not looked at."""

    kind: ClassVar[Kind] = Kind.REPORT
    pages_checked: int | None = None
    """Allocated pages whose content was checked on arrival."""
    pages_wrong: int | None = None
    allocated_pages: int | None = None
    hinted_pages_after_done: int | None = None
    """Pages that the guest still held for hints of the source when it had run for a while."""
    pages_checked_again: int | None = None
    """The same when it had run on and answered a run of hints."""
    pages_wrong_again: int | None = None
    pages_written_since: int | None = None
    hinted_pages_left: int | None = None
    hint_run: HintAnswer | None = None
    running: bool | None = None
    """Whether it runs there, or is stopped as it was at the source."""

    @classmethod
    def _take(cls, said: Fields) -> Self:
        counts = {name: said.integer(name) for name in _COUNTS if name in said}
        hint_run = HintAnswer.take(said.members("hint_run")) if "hint_run" in said else None
        return cls(**counts, hint_run=hint_run, running=said.boolean("running") if "running" in said else None)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values; what was not looked at is left out."""
        counts = {name: value for name in _COUNTS if (value := getattr(self, name)) is not None}
        running = {} if self.running is None else {"running": self.running}
        return {**counts, **running, **({} if self.hint_run is None else {"hint_run": self.hint_run.to_json()})}


_COUNTS = tuple(each.name for each in fields(Report) if each.name not in ("hint_run", "running"))


@dataclass(frozen=True, slots=True)
class Refused(JsonRecord):
    """The receiver gives up."""

    kind: ClassVar[Kind] = Kind.REFUSED
    why: str
    """For people; printable."""
    vanished: bool = False
    """Whether the guest died there."""
    returned: bool = False
    """Whether the guest never ran there: the source may let it go on, also after COMMIT."""

    @classmethod
    def _take(cls, said: Fields) -> Self:
        why = visible(said.text("why", MAX_TEXT))
        return cls(why, said.boolean("vanished", default=False), said.boolean("returned", default=False))

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"why": _text(self.why), "vanished": self.vanished, "returned": self.returned}
