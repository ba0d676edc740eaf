"""Records and saved state as typed values: what one end says the other understands, and anything else is refused."""

from __future__ import annotations

import contextlib
import json
import math

import hypothesis.strategies as st
import pytest
from explore_streams import ODD
from hypothesis import given, settings

from balloon_dev.hinting import HintState, SavedHints
from balloon_dev.saved import SavedDevice
from balloon_dev.stats import STAT_NAMES, SavedStats
from host_qemu_side.migration.records import (
    Cancel,
    End,
    Header,
    Hello,
    HintAnswer,
    JsonRecord,
    Ready,
    Refused,
    Report,
    RoundEnd,
    State,
    TagsFound,
)
from host_qemu_side.migration.stream import LIMITS, MAX_ADDRESS, Kind, Record, StreamError, StreamReader, StreamWriter
from host_qemu_side.saved import SavedGuest, SavedRing, SavedTransport, resume_arguments
from vring.errors import UsageError
from vring.mmio_saved import SavedQueue, SavedRegisters

HINTS, FIGURES = SavedHints(HintState.START, 0x80000007), SavedStats({"stat-swap-in": 5}, 2)
DEVICE = SavedDevice("spec", 0x3F, 0x0B, bytes(range(16)), True, HINTS, FIGURES, ((3, 4), (9, 1)))
RINGS = tuple(SavedRing(index, 128, 65535 - index) for index in (0, 1, 2, 3))
GUEST = SavedGuest(DEVICE, SavedTransport(0x0B, RINGS), running=False)
QUEUE = SavedQueue(128, 0x1000, 0x2000, (1 << 64) - 16, 65535, ready=True, broken=False)
REGISTERS = SavedRegisters(15, (1 << 40) - 1, {"device": 0, "driver": 1, "queue": 7}, (QUEUE, QUEUE))
RESUME = {"profile": "spec", "batch": "64"}
RECORDS: list[JsonRecord] = [
    Hello(),
    Header(((0, 4096),)),
    Header(((0, 8192), (1 << 32, 4096)), True, "python", RESUME, 5, {"mine": [1, {"a": None}]}),
    RoundEnd(3),
    State({"device": DEVICE.to_json(), "other": [1.5, "x"]}),
    End(0, 0),
    End((1 << 64) - 1, 7),
    Cancel("the guest died; it said 'äöü'"),
    Ready(),
    Ready(5, 6, 0.25, TagsFound(9, 8, 1, 2, 3, 70, ok=True), {"mine": "yes"}),
    Ready(tags=TagsFound(error="no ledger")),
    Report(),
    Report(9, 0, 12, 0, 10, 1, 99, 0, HintAnswer(0x80000001, 7, 0.5)),
    Refused("no room"),
    Refused("the guest died", vanished=True, returned=True),
]
CLASSES = {type(each): each for each in RECORDS}
SAVED = [
    (DEVICE, SavedDevice.from_json),
    (GUEST, SavedGuest.from_json),
    (REGISTERS, SavedRegisters.from_json),
    (DEVICE.hinting, SavedHints.from_json),
    (DEVICE.stats, SavedStats.from_json),
]


def arrived(pieces):
    reader = StreamReader()
    for piece in pieces:
        reader.feed(piece)
    return reader.next()


def raw(kind, payload):
    return Record(kind, memoryview(payload))


@pytest.mark.parametrize("said", RECORDS, ids=lambda said: type(said).__name__)
def test_what_one_end_says_the_other_understands(said):
    record = arrived(StreamWriter().say(said))
    assert record.kind is said.kind
    assert type(said).of(record) == said


@pytest.mark.parametrize(("value", "decode"), SAVED, ids=lambda each: type(each).__name__)
def test_what_is_saved_is_loaded(value, decode):
    assert decode(json.loads(json.dumps(value.to_json(), allow_nan=False))) == value


def paths(value, at=()):
    """Return the way to each member and item, the whole first."""
    found = [at]
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            found += paths(value[key], (*at, key))
    return found


def replaced(value, path, text):
    """Return a value as JSON, with other JSON, or what is none, in one place."""
    changed = {"": json.loads(json.dumps(value))}
    holder, key = changed, ""
    for step in path:
        holder, key = holder[key], step
    holder[key] = "@odd@"
    return json.dumps(changed[""]).replace('"@odd@"', text)


@pytest.mark.parametrize("said", RECORDS, ids=lambda said: type(said).__name__)
def test_any_member_may_be_anything(said):
    """Each member in turn is replaced by each odd value: it is refused, or what comes of it can be said again."""
    for path in paths(said.to_json()):
        for odd in ODD:
            payload = replaced(said.to_json(), path, odd).encode()
            try:
                found = type(said).of(raw(said.kind, payload))
            except StreamError:
                continue
            assert type(said).of(arrived(StreamWriter().say(found))) == found, (path, odd[:40])


@pytest.mark.parametrize(("value", "decode"), SAVED, ids=lambda each: type(each).__name__)
def test_any_member_of_saved_state_may_be_anything(value, decode):
    """As it comes from a program that trusts its own JSON reader: with nan, infinity and integers of any length."""
    odd = [None, True, -1, 0, 0.5, 1e300, math.nan, math.inf, 10**400, "", "x" * 9999, "\ud800", [], {}, [[]], b"\xff"]
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    for path in paths(value.to_json()):
        for each in [*odd, nested]:
            changed = {"": json.loads(json.dumps(value.to_json()))}
            holder, key = changed, ""
            for step in path:
                holder, key = holder[key], step
            holder[key] = each
            try:
                found = decode(changed[""], UsageError)
            except UsageError as refused:
                why = str(refused)
            else:
                why = ""
                assert decode(json.loads(json.dumps(found.to_json(), allow_nan=False)), UsageError) == found
            assert not why or why.isprintable()


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=3)
    | st.sampled_from(["spec", "STOP", *STAT_NAMES.values()]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(sorted({str(step) for each in RECORDS for path in paths(each.to_json()) for step in path})),
            inner,
            max_size=6,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300)
@given(anything)
def test_arbitrary_values(value):
    for kind in CLASSES:
        try:
            found = kind.from_json(value)
        except StreamError:
            continue
        assert kind.from_json(found.to_json()) == found
    for example, decode in SAVED:
        with contextlib.suppress(UsageError, StreamError):
            assert type(decode(value)) is type(example)


@settings(max_examples=300)
@given(st.binary(max_size=40) | st.text('[]{}",:\\u0d8-+.eE1 truefalsnN', max_size=40).map(str.encode))
def test_arbitrary_bytes(payload):
    for kind in CLASSES:
        with contextlib.suppress(StreamError):
            assert kind.of(raw(kind.kind, payload)).kind is kind.kind


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b"7", b"\xff\xfe", b'"x"', b'{"a":' * 100_000])
@pytest.mark.parametrize("kind", CLASSES)
def test_json_that_is_none(kind, payload):
    with pytest.raises(StreamError, match=f"{kind.kind.name} record"):
        kind.of(raw(kind.kind, payload))


def test_more_json_than_a_record_holds():
    text = b'{"why":"' + b"x" * LIMITS[Kind.CANCEL] + b'"}'
    with pytest.raises(StreamError, match="at most"):
        Cancel.of(raw(Kind.CANCEL, text))


def test_another_record():
    with pytest.raises(StreamError, match="a HELLO record came where READY was due"):
        Ready.of(arrived(StreamWriter().say(Hello())))


# -- header -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "regions",
    [
        [],
        [[0, 0]],
        [[0, 100]],
        [[1, 4096]],
        [[0, 8192], [4096, 4096]],
        [[MAX_ADDRESS - 4096, 8192]],
        [[(1 << 64) - 4096, 4096]],
        [[-4096, 4096]],
        [[0, 4096.0]],
        [[0, True]],
        [[i << 20, 4096] for i in range(1000)],
    ],
)
def test_ram_that_cannot_be(regions):
    with pytest.raises(StreamError):
        Header.from_json({**Header(((0, 4096),)).to_json(), "regions": regions})


def test_regions_in_any_order():
    said = Header(((0, 8192), (1 << 20, 4096))).to_json()
    said["regions"].reverse()
    assert Header.from_json(said) == Header(((0, 8192), (1 << 20, 4096)))


@pytest.mark.parametrize("version", [1, 3, 1 << 40])
@pytest.mark.parametrize("said", [Hello(), Header(((0, 4096),))])
def test_another_version(said, version):
    with pytest.raises(StreamError, match=f"stream of version {version}; this program reads version 2"):
        type(said).from_json({**said.to_json(), "version": version})


def test_a_header_that_an_embedder_cannot_mean():
    with pytest.raises(UsageError, match="guest is 7"):
        Header.describing([(0, 4096)], True, {"guest": 7})
    with pytest.raises(UsageError, match="no JSON values"):
        StreamWriter().say(Header.describing([(0, 4096)], True, {"mine": math.inf}))


def test_options_to_go_on_with():
    wanted = Header(((0, 4096),), True, "python", RESUME)
    assert resume_arguments(wanted) == ["--profile", "spec", "--batch", "64"]
    for wrong in (
        Header(((0, 4096),), True, "linux", RESUME),
        Header(((0, 4096),), True, "", RESUME),
        Header(((4096, 4096),), True, "python", RESUME),
        Header(((0, 4096), (8192, 4096)), True, "python", RESUME),
        Header(((0, 4096),), True, "python", {"control_fd": "5"}),
        Header(((0, 4096),), True, "python", {"batch": "64 --ram-fd 0"}),
        Header(((0, 4096),), True, "python", {"batch": "٣"}),
    ):
        with pytest.raises(StreamError):
            resume_arguments(wrong)


# -- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Cancel, Refused])
def test_texts_are_made_printable_where_they_arrive(make):
    """Escapes, line ends, direction marks, and half a pair, as a file's name may have it, are shown, not obeyed."""
    text = "\x1b]0;owned\x07 line\nnext \u202e back\0 \udc80 [/bold]"
    found = make.of(arrived(StreamWriter().say(make(text))))
    assert found.why.isprintable()
    assert found.why == r"\x1b]0;owned\x07 line\nnext \u202e back\x00 ? [/bold]"
    assert len(make.of(arrived(StreamWriter().say(make("\x1b" * 100_000)))).why) < 3000


def test_names_in_a_header_are_printable():
    said = Header(((0, 4096),), True, "\x1b[2J", {"\x1b": "\x07"})
    found = Header.of(arrived(StreamWriter().say(said)))
    assert (found.guest, dict(found.resume)) == (r"\x1b[2J", {r"\x1b": r"\x07"})


# -- saved state ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "change", "why"),
    [
        ("device", {"negotiated": 0x40}, "were negotiated and not offered"),
        ("device", {"ballooned": [[0, 0]]}, "cannot be"),
        ("device", {"ballooned": [[1 << 52, 1]]}, "cannot be"),
        ("device", {"config": "00" * 17}, "at most 32 characters"),
        ("device", {"profile": "[/x]"}, "unknown here"),
        ("transport", {"rings": [GUEST.transport.rings[0].to_json()] * 2}, "two rings are of the same queue"),
        ("transport", {"rings": [{"index": 5, "size": 16, "base": 0}]}, "index is 5"),
        ("transport", {"rings": [{"index": 0, "size": 0, "base": 0}]}, "size is 0"),
        ("transport", {"rings": [{"index": 0, "size": 16, "base": 65536}]}, "base is 65536"),
        ("transport", {"rings": [{"index": i, "base": i} for i in range(20_000)]}, "a list of 20000 items"),
        (
            "transport",
            {"rings": [ring.to_json() for ring in RINGS[:3]]},
            r"\[0, 1, 2\] ran .*, the driver has .*\[0, 1, 2, 3\]",
        ),
        ("transport", {"rings": []}, r"queues \[\] ran at the pause"),
        ("device", {"negotiated": 1}, r"the driver has queues \[0, 1\]"),
    ],
)
def test_a_guest_that_was_never_saved(part, change, why):
    saved = GUEST.to_json()
    saved[part] = {**saved[part], **change}
    with pytest.raises(StreamError, match=why):
        SavedGuest.from_json(saved)
