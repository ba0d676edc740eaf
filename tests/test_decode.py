"""What somebody else said: JSON and its members, taken or refused with one class of error."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vring.decode import MAX_DEPTH, Fields, check_value, parse_json, visible
from vring.errors import DeviceError, UsageError, VirtioError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda v: st.lists(v) | st.dictionaries(st.text(), v),
)


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (nested(100_000), "nested"),
        (nested(900), "nested"),
        (nested(MAX_DEPTH + 1), "nested"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":1e999}', "too large"),
        (b'{"a":-1e999}', "too large"),
        (b'{"a":1' + b"0" * 400 + b"}", "digits"),
        (b'{"a":1' + b"0" * 5000 + b"}", "digits"),
        (b'{"a":1,"a":2}', "two members"),
        (b'{"a":"\\ud800"}', "surrogate"),
        (b'{"\\ud800":1}', "surrogate"),
        (b'{"a":[[["\\udfff"]]]}', "surrogate"),
        (b"\xff", "utf-8"),
        (b"", "not JSON"),
        (b"{} {}", "not JSON"),
        (b'"' + b"x" * 2_000_000 + b'"', "at most"),
    ],
    ids=lambda v: None if isinstance(v, str) else repr(v[:12]),
)
def test_refused(data: bytes, says: str) -> None:
    with pytest.raises(DeviceError, match=f"^READY record: .*{says}"):
        parse_json(data, "READY record", refusal=DeviceError, most=1 << 20)


def test_taken() -> None:
    assert parse_json(nested(MAX_DEPTH), "x")
    assert parse_json('{"a": [18446744073709551615, -1.5, "\\ud83d\\ude00\\u0000"]}', "x")["a"][2] == "\U0001f600\0"


@given(st.binary(max_size=200) | values.map(lambda v: json.dumps(v).encode()))
def test_bytes_become_a_value_that_can_be_written_or_one_error(data: bytes) -> None:
    try:
        value = parse_json(data, "x")
    except UsageError:
        return
    check_value(value)
    json.dumps(value, allow_nan=False).encode()


@given(values, st.sampled_from(["integer", "number", "boolean", "text", "members", "items", "objects", "pairs"]))
def test_fields_give_what_they_promise_or_one_error(value: object, method: str) -> None:
    more = {"items": (5,), "objects": (5,), "pairs": (5,)}.get(method, ())
    said = ""
    try:
        found = getattr(Fields({"m": value}, "x", DeviceError), method)("m", *more)
    except DeviceError as error:
        said = str(error)
    if said:
        assert len(said) < 400
        assert said.isprintable()
        return
    if method == "number":
        assert isinstance(found, float)
        assert math.isfinite(found)
    elif method in ("integer", "boolean", "text"):
        assert type(found) is {"integer": int, "boolean": bool, "text": str}[method]


def test_each_member() -> None:
    have = {"n": 5, "s": "x", "b": True, "h": "00ff", "l": [[1, 2]], "o": {"k": 1}, "os": [{"k": 2}]}
    f = Fields(have, "saved state")
    assert f.integer("n", 0, 5) == 5
    assert f.number("n") == 5.0
    assert f.text("s") == "x"
    assert f.boolean("b") is True
    assert f.hexadecimal("h", 2) == b"\0\xff"
    assert f.pairs("l", 1) == [(1, 2)]
    assert f.members("o").integer("k") == 1
    assert [o.integer("k") for o in f.objects("os", 1)] == [2]
    assert f.choice("s", {"x": 7}) == 7
    assert (f.integer("missing", default=3), f.text("missing", default="")) == (3, "")
    assert "n" in f
    assert f.names == list(have)
    for wrong in (
        lambda: f.integer("n", 0, 4),
        lambda: f.integer("b"),
        lambda: f.number("b"),
        lambda: f.boolean("n"),
        lambda: f.text("n"),
        lambda: f.text("s", 0),
        lambda: f.hexadecimal("h", 3),
        lambda: f.hexadecimal("s", 1),
        lambda: f.pairs("l", 0),
        lambda: f.pairs("l", 1, high=1),
        lambda: f.pairs("os", 1),
        lambda: f.objects("l", 1),
        lambda: f.members("n"),
        lambda: f.choice("s", {"y": 1}),
        lambda: f.integer("missing"),
        lambda: f.members("o").text("k"),
    ):
        with pytest.raises(UsageError, match=r"^saved state: "):
            wrong()
    with pytest.raises(VirtioError, match="no JSON object"):
        Fields([1], "saved state")


def test_visible() -> None:
    assert visible("grün 漢") == "grün 漢"
    assert visible("\x1b]0;owned\x07\x1b[2J\nline\u202e\ud800") == r"\x1b]0;owned\x07\x1b[2J\nline\u202e\ud800"
    assert visible("x" * 1000, 10) == "xxxxxxxxxx... (1000 characters)"
