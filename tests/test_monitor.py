"""QMP's framing, conversation and socket adapter, without a device behind them."""

import contextlib
import json
import os
import socket
import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from host_qemu_side.loop import Loop
from host_qemu_side.monitor.dispatch import MAX_OUTPUT, MAX_WAITING, Command, Deferred, Dispatcher, Param, Session
from host_qemu_side.monitor.framing import MAX_LINE, LineReader, QmpError
from host_qemu_side.monitor.server import MAX_CLIENTS, MonitorServer
from vring.decode import MAX_DEPTH
from vring.errors import PeerVanished, UsageError


def line(**message):
    return json.dumps(message).encode() + b"\n"


NEGOTIATE = line(execute="qmp_capabilities")


# -- framing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "values"),
    [
        ([b'{"a": 1}\n'], [{"a": 1}]),
        ([b'{"a": 1}\r\n\r\n\n  \n'], [{"a": 1}]),
        ([b'{"a"', b": ", b"1}", b"\n"], [{"a": 1}]),
        ([b'{"a": 1}'], [{"a": 1}]),
        ([b'{"a": 1}{"b": 2} {"c": 3}'], [{"a": 1}, {"b": 2}, {"c": 3}]),
        ([b'{"a": "}"', b"}"], []),  # the balance of braces is off: the newline will decide
        ([b'{"a": "}"', b"}\n"], [{"a": "}"}]),
        ([b"1\n", b'"x"\n', b"[]\n"], [1, "x", []]),
        ([b'{"a": {"b": 1}', b"}"], [{"a": {"b": 1}}]),
        (['{"a": "\u00e9"}\n'.encode()], [{"a": "\u00e9"}]),
    ],
)
def test_lines_become_values(pieces, values):
    reader = LineReader()
    assert [value for piece in pieces for value in reader.feed(piece)] == values


@pytest.mark.parametrize(
    "text",
    [b"{", b"}", b"{]", b'{"a": nan}', b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1e999}', b'{"a": 1, "a": 2}', b"\xff",
     b'{"a": "\x01"}', b"[" * 60000, b'{"a":' * 10000, b"9" * 5000, b"{'a': 1}", b'{"a": 1,}', b'{"a": 1} x', b"\x00"],
)  # fmt: skip
def test_what_is_not_json_is_an_error_and_the_next_line_is_heard(text):
    reader = LineReader()
    found = reader.feed(text + b"\n" + b'{"b": 2}\n')
    assert isinstance(found[-2], QmpError)
    assert found[-1] == {"b": 2}
    assert sum(isinstance(value, QmpError) for value in found) == 1


@pytest.mark.parametrize("piece", [1, 1000, 10 * MAX_LINE])
def test_an_oversize_line_is_complained_of_once(piece):
    reader, found = LineReader(), []
    data = b"x" * (3 * MAX_LINE) + b"\n" + b'{"b": 2}\n'
    for at in range(0, len(data), piece):
        found += reader.feed(data[at : at + piece])
    assert isinstance(found[0], QmpError)
    assert str(MAX_LINE) in found[0].desc
    assert found[1:] == [{"b": 2}]


@given(st.lists(st.binary(max_size=40), max_size=20))
def test_the_reader_keeps_bounded_memory_and_recovers(pieces):
    reader = LineReader(max_line=64)
    for piece in pieces:
        reader.feed(piece)
        assert len(reader._buffer) <= 64
    reader.feed(b"\n")
    assert reader.feed(b'{"a": 1}\n') == [{"a": 1}]


# -- conversation ---------------------------------------------------------------------------------------------------


class Talk:
    """A session in memory."""

    def __init__(self):
        self.deferred = Deferred()
        self.calls = []
        self.dispatcher = Dispatcher((1, 2, 3), "test")
        add = self.dispatcher.add
        add(Command("echo", lambda **a: self.calls.append(a) or a, params={
            "some-int": Param("int"), "flag": Param("bool", required=False), "part": Param("number", required=False),
        }))  # fmt: skip
        add(Command("later", lambda: self.deferred))
        add(Command("fail", self.fail))
        add(Command("gone", self.gone))
        add(Command("bug", lambda: 1 / 0))
        self.session = Session(self.dispatcher)
        self.read()

    def fail(self):
        raise UsageError("it cannot be")

    def gone(self):
        raise PeerVanished("nobody")

    def read(self):
        messages = [json.loads(text) for text in bytes(self.session.output).split(b"\r\n") if text]
        self.session.output.clear()
        return messages

    def say(self, data):
        self.session.feed(data)
        while self.session.ready:
            self.session.step()
        return self.read()


@pytest.fixture
def talk():
    talk = Talk()
    assert talk.say(NEGOTIATE) == [{"return": {}}]
    return talk


def test_greeting():
    session = Session(Dispatcher((1, 2, 3), "test"))
    version = {"qemu": {"major": 1, "minor": 2, "micro": 3}, "package": "test"}
    assert json.loads(session.output) == {"QMP": {"version": version, "capabilities": []}}
    assert session.output.endswith(b"\r\n")


def test_nothing_but_negotiation_comes_first():
    talk = Talk()
    [answer] = talk.say(line(execute="query-version", id=7))
    assert answer["error"]["class"] == "CommandNotFound"
    assert answer["id"] == 7
    [answer] = talk.say(line(execute="qmp_capabilities", arguments={"enable": ["oob"]}))
    assert answer["error"]["class"] == "GenericError"
    talk.session.event({"event": "X"})
    assert talk.say(NEGOTIATE) == [{"return": {}}]
    [answer] = talk.say(NEGOTIATE)
    assert answer["error"]["class"] == "CommandNotFound"
    talk.session.event({"event": "X"})
    assert talk.read() == [{"event": "X"}]


@pytest.mark.parametrize("ident", [0, "a", None, [1, {"b": 2}], {"x": "\U0001f600"}, 1.5, 2**64 - 1])
def test_the_id_comes_back(talk, ident):
    [answer] = talk.say(line(execute="echo", arguments={"some-int": 1}, id=ident))
    assert answer == {"return": {"some_int": 1}, "id": ident}


@pytest.mark.parametrize(
    ("message", "kind", "words"),
    [
        ({"execute": "echo", "arguments": {}}, "GenericError", "'some-int' is missing"),
        ({"execute": "echo", "arguments": {"some-int": True}}, "GenericError", "expected: integer"),
        ({"execute": "echo", "arguments": {"some-int": "1"}}, "GenericError", "expected: integer"),
        ({"execute": "echo", "arguments": {"some-int": 1.0}}, "GenericError", "expected: integer"),
        ({"execute": "echo", "arguments": {"some-int": 1, "flag": 1}}, "GenericError", "expected: boolean"),
        ({"execute": "echo", "arguments": {"some-int": 1, "x": 1}}, "GenericError", "'x' is unexpected"),
        ({"execute": "echo", "arguments": {"some_int": 1}}, "GenericError", "'some_int' is unexpected"),
        ({"execute": "echo", "arguments": [1]}, "GenericError", "must be an object"),
        ({"execute": 5}, "GenericError", "must be a string"),
        ({"execute": "nothing"}, "CommandNotFound", "nothing"),
        ({"exec-oob": "echo"}, "GenericError", "'execute'"),
        ({"execute": "echo", "control": 1}, "GenericError", "'control' is unexpected"),
        ({}, "GenericError", "'execute'"),
        ([], "GenericError", "object"),
        (7, "GenericError", "object"),
        ({"execute": "fail"}, "GenericError", "it cannot be"),
        ({"execute": "gone"}, "DeviceNotActive", "nobody"),
        ({"execute": "bug"}, "GenericError", "internal error"),
    ],
)
def test_errors(talk, message, kind, words):
    [answer] = talk.say(json.dumps(message).encode() + b"\n")
    assert answer["error"]["class"] == kind
    assert words in answer["error"]["desc"]
    assert talk.say(line(execute="echo", arguments={"some-int": 1})) == [{"return": {"some_int": 1}}]


def test_numbers_may_be_integers(talk):
    answer = talk.say(line(execute="echo", arguments={"some-int": 1, "part": 2}))
    assert answer == [{"return": {"some_int": 1, "part": 2}}]


def test_a_deferred_reply_keeps_the_order(talk):
    assert talk.say(line(execute="later", id=1) + line(execute="echo", arguments={"some-int": 1}, id=2)) == []
    talk.deferred.resolve({"x": 1})
    talk.deferred.fail(QmpError("too late"))
    assert talk.say(b"") == [{"return": {"x": 1}, "id": 1}, {"return": {"some_int": 1}, "id": 2}]


def test_a_deferred_reply_may_fail(talk):
    talk.say(line(execute="later", id=1))
    talk.deferred.fail(QmpError("no"))
    assert talk.say(b"") == [{"error": {"class": "GenericError", "desc": "no"}, "id": 1}]


@pytest.mark.parametrize("depth", [MAX_DEPTH - 1, MAX_DEPTH, 900, 1000, 20_000])
def test_an_id_that_is_nested_too_deeply_is_refused(talk, depth):
    data = b'{"execute": "echo", "arguments": {"some-int": 1}, "id": ' + b"[" * depth + b"]" * depth + b"}\n"
    [answer] = talk.say(data)
    assert "return" in answer if depth < MAX_DEPTH else "nested" in answer["error"]["desc"]


@pytest.mark.parametrize("ident", [b"1" + b"0" * 400, b'"\\ud800"', b"1e999", b"NaN", b'{"a": 1, "a": 2}'])
def test_an_id_that_could_not_be_sent_back_is_refused(talk, ident):
    [answer] = talk.say(b'{"execute": "echo", "arguments": {"some-int": 1}, "id": ' + ident + b"}\n")
    assert answer["error"]["desc"].startswith("Invalid JSON syntax")
    assert talk.say(line(execute="echo", arguments={"some-int": 1})) == [{"return": {"some_int": 1}}]


def test_query_commands_lists_itself(talk):
    [answer] = talk.say(line(execute="query-commands"))
    names = {command["name"] for command in answer["return"]}
    assert {"qmp_capabilities", "query-commands", "query-version", "echo"} <= names


# -- sockets --------------------------------------------------------------------------------------------------------


class Wire:
    """A monitor server and raw clients, all in this thread."""

    def __init__(self, path):
        self.path, self.loop = str(path), Loop()
        self.dispatcher = Dispatcher((1, 2, 3), "test")
        self.dispatcher.add(Command("big", lambda: "x" * 100_000))
        self.dispatcher.add(Command("later", Deferred))
        self.server = MonitorServer(self.loop, self.path, self.dispatcher)

    def client(self):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(self.path)
        sock.setblocking(False)
        self.turn()
        return sock

    def turn(self, times=4):
        for _ in range(times):
            self.loop.run_once(0)
            self.server.step()

    def lines(self, sock, count, timeout=5.0):
        """Read so many messages, [] if the server hangs up."""
        data, end = b"", time.monotonic() + timeout
        while data.count(b"\n") < count and time.monotonic() < end:
            self.turn()
            try:
                got = sock.recv(1 << 20)
            except BlockingIOError:
                continue
            if not got:
                break
            data += got
        return [json.loads(text) for text in data.splitlines()]

    def close(self):
        self.server.close()
        self.loop.close()


@pytest.fixture
def wire(tmp_path):
    wire = Wire(tmp_path / "m.sock")
    yield wire
    wire.close()


def test_clients_are_apart(wire):
    a, b = wire.client(), wire.client()
    assert "QMP" in wire.lines(a, 1)[0]
    assert "QMP" in wire.lines(b, 1)[0]
    a.send(NEGOTIATE)
    assert wire.lines(a, 1) == [{"return": {}}]
    wire.server.event("HELLO", {"x": 1})
    [event] = wire.lines(a, 1)
    assert event["event"] == "HELLO"
    assert event["data"] == {"x": 1}
    assert abs(event["timestamp"]["seconds"] - time.time()) < 5
    b.send(NEGOTIATE)
    assert wire.lines(b, 1) == [{"return": {}}]  # and no event
    a.send(line(execute="later") + line(execute="query-version", id=1))
    b.send(line(execute="query-version", id=2))
    assert wire.lines(b, 1)[0]["id"] == 2  # b does not wait for a
    assert wire.lines(a, 1, timeout=0.05) == []


def test_a_client_that_does_not_read_is_dropped(wire):
    deaf, other = wire.client(), wire.client()
    wire.lines(other, 1)
    other.send(NEGOTIATE)
    wire.lines(other, 1)
    deaf.send(NEGOTIATE + line(execute="big") * 20)
    wire.turn(60)
    sessions = [client.session for client in wire.server._clients]
    assert len(sessions) == 1
    other.send(line(execute="query-version", id=3))
    assert wire.lines(other, 1)[0]["id"] == 3


def test_events_alone_fill_the_buffer_of_a_client_that_does_not_read(wire):
    deaf = wire.client()
    deaf.send(NEGOTIATE)
    wire.turn()
    for _ in range(100):
        wire.server.event("NOISE", {"text": "x" * 10_000})
    wire.turn()
    assert not wire.server._clients


def test_a_flood_of_commands_waits_in_the_socket(wire):
    sock = wire.client()
    wire.lines(sock, 1)
    sock.send(NEGOTIATE + line(execute="later"))
    wire.lines(sock, 1)
    sent = 0
    for _ in range(2000):
        try:
            sent += sock.send(line(execute="query-version") * 100)
        except BlockingIOError:
            wire.turn()
    [client] = wire.server._clients
    assert len(client.session._waiting) < MAX_WAITING + 16 * 1024 // 20
    assert len(client.session.output) <= MAX_OUTPUT


def test_a_client_that_ends_its_side_is_still_answered(wire):
    sock = wire.client()
    sock.send(NEGOTIATE + line(execute="query-version", id=1))
    sock.shutdown(socket.SHUT_WR)
    assert [m.get("id") for m in wire.lines(sock, 99, timeout=1.0)] == [None, None, 1]
    assert not wire.server._clients


def test_too_many_clients_are_turned_away(wire):
    clients = [wire.client() for _ in range(MAX_CLIENTS)]
    extra = wire.client()
    assert extra.recv(10) == b""
    clients.pop().close()
    wire.turn()
    assert "QMP" in wire.lines(wire.client(), 1)[0]


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path):
    path = tmp_path / "m.sock"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()  # nobody listens there
    wire = Wire(path)
    assert path.stat().st_mode & 0o077 == 0
    with pytest.raises(UsageError, match="another process listens"):
        Wire(path)
    wire.close()
    assert not path.exists()
    path.write_text("not a socket")
    with pytest.raises(UsageError, match="is no socket"):
        Wire(path)
    assert path.read_text() == "not a socket"


pieces = st.one_of(
    st.binary(max_size=200),
    st.sampled_from([NEGOTIATE, line(execute="query-version"), line(execute="query-commands", id="x"), b"\n", b"{",
                     b"}", b'"', b"\xff", b"\x00", b"x" * (MAX_LINE + 1), b"[" * 3000, line(execute="nothing", id=[])]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
            ["execute", "arguments", "id", "exec-oob", "path", "value"]) | st.text(max_size=5), inner, max_size=4),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode() + b"\n"),
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example([b"{" * 100, b'\\"'])
@given(st.lists(pieces, max_size=12))
def test_random_bytes_never_make_the_monitor_deaf(tmp_path, chunks):
    path = tmp_path / "m.sock"
    if path.exists():
        os.unlink(path)
    wire = Wire(path)
    sock = wire.client()
    try:
        for chunk in chunks:
            while chunk:
                with contextlib.suppress(BlockingIOError):
                    chunk = chunk[sock.send(chunk) :]
                wire.turn(2)
        sock.send(b"\n" + NEGOTIATE + line(execute="query-version", id="the end"))
        end, seen = time.monotonic() + 5, b""
        while b'"the end"}' not in seen and time.monotonic() < end:
            wire.turn()
            try:
                seen += sock.recv(1 << 20)
            except BlockingIOError:
                continue
        last = json.loads(seen.splitlines()[-1])
        assert last["return"]["package"] == "test"
        for text in seen.splitlines():
            message = json.loads(text)
            assert message.keys() & {"return", "error", "QMP"}
    finally:
        sock.close()
        wire.close()
