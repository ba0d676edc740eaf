"""`balloon ctl` against a monitor that says odd things: one line, the right exit code, nothing interpreted."""

import contextlib
import io
import json
import socket
import threading

import pytest

from balloon_cli.__main__ import main

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'
DONE = b'{"return": {}}\n'
DEEP = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m[bold red]x[/]\u202e"


def returned(value) -> bytes:
    return json.dumps({"return": value}).encode() + b"\n"


class OddMonitor:
    """Greets, agrees to negotiate, then gives its answers in turn, the last one over and over."""

    def __init__(self, path, answers, greeting=GREETING, negotiated=DONE):
        self.path = str(path / "odd.sock")
        self._answers, self._first = answers, (greeting, negotiated)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(4)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                self._talk(self._listener.accept()[0])

    def _talk(self, connection):
        with connection, contextlib.suppress(OSError):
            asked = connection.makefile("rb")
            greeting, negotiated = self._first
            connection.sendall(greeting)
            if not asked.readline():
                return
            connection.sendall(negotiated)
            for at in range(100):
                if not asked.readline():
                    return
                connection.sendall(self._answers[min(at, len(self._answers) - 1)])

    def close(self):
        self._listener.close()


def run(*arguments):
    """Return exit code, standard output and standard error of the command line."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(arguments))
        except SystemExit as ended:
            code = ended.code
    return code, *(stream.detach().getvalue().decode() for stream in (out, err))


ANYTHING = [
    None, True, 0, -1, 10**19, 1e300, "", "x", ESCAPES, [], {}, [[]], [{}], [1, [2, {"a": []}]], {"a": {"b": [None]}},
    {ESCAPES: ESCAPES}, [{ESCAPES: ESCAPES}], {"since": 1e30}, {"since": -5}, {"id": 10**19}, {"bytes": 10**19},
    {"human-readable-text": ESCAPES + "\n" + ESCAPES}, {"human-readable-text": 5}, {"status": 5}, {"status": None},
    {"status": "completed", "ram": []}, {"status": "failed", "error-desc": 5},
    {"status": ESCAPES, "ram": {"remaining": "x"}},
    {"status": "failed", "error-desc": ESCAPES, "error-kind": "odd"}, {"completed": "yes"}, {"completed": False},
    {"completed": False, "ended-by": ESCAPES}, [{"name": 5}], [{"name": ESCAPES, "help": ESCAPES}],
    [{"name": "x", "arguments": []}], [{"name": "x", "arguments": {"a": 5}}], [{"name": "x", "arguments": {"a": {}}}],
    [{"name": "x", "arguments": {ESCAPES: {"type": ESCAPES, "optional": 5, "help": ESCAPES}}}], [5],
]  # fmt: skip


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["words", "json"])
@pytest.mark.parametrize("command", [[], ["query-x"], ["hint-run", "deadline=1"], ["migrate", "uri=unix:/x", "--wait"]])
def test_any_result_ends_in_words_or_one_error(tmp_path, command, form):
    for value in ANYTHING:
        state = value if isinstance(value, dict) else {"status": "failed"}
        # What would be asked again for ever is no fault of the monitor's: it says that the migration goes on.
        if command[:1] == ["migrate"] and state.get("status") == ESCAPES:
            continue
        odd = OddMonitor(tmp_path, [DONE, returned(value)] if command[:1] == ["migrate"] else [returned(value)])
        try:
            code, out, err = run("ctl", odd.path, *command, *form, "--timeout", "5")
        finally:
            odd.close()
            (tmp_path / "odd.sock").unlink()
        assert code in (0, 1, 2, 4, 5, 130), (value, err)
        assert "Traceback" not in err
        assert len(err.splitlines()) == (code != 0), (value, err)
        for text in (*out.splitlines(), *err.splitlines()):
            assert text.isprintable(), (value, text)


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (b"5\n", 4), (b"[]\n", 4), (b"null\n", 4), (b"{}\n", 4), (b"\n", 4), (b"\xff\xfe\n", 4), (b"{\n", 4),
        (DEEP + b"\n", 4), (b'{"return": ' + DEEP + b"}\n", 4), (b'{"return": {"a": NaN}}\n', 4),
        (b'{"return": {"a": 1e999}}\n', 4), (b'{"return": {"a": 1' + b"0" * 5000 + b"}}\n", 4),
        (b'{"return": "\\ud800"}\n', 4), (b'{"error": 5}\n', 4), (b'{"error": {}}\n', 4),
        (b'{"error": {"class": 5, "desc": 6}}\n', 4),
        (b'{"error": {"class": "X", "desc": "no"}}\n', 2),
        (b'{"error": {"class": "DeviceNotActive", "desc": "gone"}}\n', 5),
        (json.dumps({"error": {"class": ESCAPES, "desc": ESCAPES}}).encode() + b"\n", 2),
        (b'{"error": {"class": "X", "desc": "Parameter \'x\' is missing"}}\n', 2),
        (b'{"event": "X"}\n' * 1000, 5), (b"", 5), (b"x" * (5 << 20), 4),
    ],
    ids=lambda v: repr(v[:30]) if isinstance(v, bytes) else None,
)  # fmt: skip
@pytest.mark.parametrize("when", ["greeting", "negotiated", "answer"])
def test_any_message_ends_in_one_error(tmp_path, said, code, when):
    first = {when: said} if when != "answer" else {}
    odd = OddMonitor(tmp_path, [said], **first)
    try:
        found, out, err = run("ctl", odd.path, "query-x", "--timeout", "0.3")
    finally:
        odd.close()
    assert found == code if when == "answer" else found in (2, 4, 5)
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("balloon: ")
    assert err.rstrip("\n").isprintable()


def test_events_without_end_do_not_keep_it(tmp_path):
    class Chatty(OddMonitor):
        def _talk(self, connection):
            with connection, contextlib.suppress(OSError):
                connection.sendall(GREETING)
                while True:
                    connection.sendall(b'{"event": "X", "data": {}}\n' * 100)

    odd = Chatty(tmp_path, [])
    try:
        code, out, err = run("ctl", odd.path, "query-x", "--timeout", "0.5")
    finally:
        odd.close()
    assert (code, out) == (5, "")
    assert "no answer" in err
