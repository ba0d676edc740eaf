"""`balloon serve` migrates to destinations that say odd things: server and guest live on, and the reason is told."""

from __future__ import annotations

import contextlib
import socket
import threading

import numpy as np
import pytest
from serve_process import Process, wait_for

from host_qemu_side.migration import Kind, StreamReader, StreamWriter

DEEP = b'{"a":' * 5000 + b"1" + b"}" * 5000


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """One server for all: what it survives, it survives with its guest."""
    process = Process(tmp_path_factory.mktemp("serve"), memory="32M")
    yield process
    process.end()
    assert "Traceback" not in process.log.read_text()


def destination(path, answers):
    """Listen for one source; say to it what `answers` has for the record that came (None: a connection)."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)

    def talk():
        with listener, contextlib.suppress(OSError):
            connection, _ = listener.accept()
            reader, writer = StreamReader(reuse=True), StreamWriter()
            heard: Kind | None = None
            while True:
                for kind, payload in answers.get(heard, []):
                    for piece in writer._record(kind, payload):
                        connection.sendall(piece)
                while (record := reader.next()) is None:
                    size = connection.recv_into(reader.room())
                    if not size:
                        return
                    reader.filled(size)
                heard = record.kind

    threading.Thread(target=talk, daemon=True).start()


def migrated(serve, tmp_path, answers, **arguments):
    """Migrate to such a destination; return what the monitor says of that in the end."""
    path = tmp_path / "d.sock"
    destination(path, {None: [(Kind.HELLO, b'{"version":2}')], **answers})
    serve.ask("migrate", uri=f"unix:{path}", **arguments)
    wait_for(lambda: serve.ask("query-migrate")["status"] in ("failed", "completed", "cancelled"))
    return serve.ask("query-migrate")


ODD = {
    "no number": (b'{"digest_seconds":null}', "digest_seconds is null"),
    "a text": (b'{"digest_seconds":"x"}', "digest_seconds is 'x'"),
    "a list": (b'{"digest_seconds":[]}', "digest_seconds is a list"),
    "400 digits": (b'{"digest_seconds":1' + b"0" * 400 + b"}", "401 digits"),
    "nan": (b'{"digest_seconds":NaN}', "NaN is not JSON"),
    "infinite": (b'{"digest_seconds":1e999}', "too large a number"),
    "deep": (DEEP, "nested more than 32 deep"),
    "tags that are none": (b'{"tags":{"pages":"[/x]"}}', "tags: pages is"),
    "no JSON": (b"{", "not JSON"),
    "nothing": (b"", "not JSON"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_ready(serve, tmp_path, name):
    payload, why = ODD[name]
    state = migrated(serve, tmp_path, {Kind.END: [(Kind.READY, payload)]})
    assert state["status"] == "failed"
    assert why in state["error-desc"]
    assert serve.ask("query-status")["status"] == "running"


@pytest.mark.parametrize("payload", [DEEP, b'{"version":[1]}', b"{}", b'{"version":1}', b'{"version":2e0}'])
def test_an_odd_hello(serve, tmp_path, payload):
    state = migrated(serve, tmp_path, {None: [(Kind.HELLO, payload)]})
    assert (state["status"], "HELLO" in state["error-desc"]) == ("failed", True)
    assert serve.ask("query-status")["status"] == "running"


@pytest.mark.parametrize(
    ("digests", "why"),
    [
        (b"12345", "DIGESTS record of 5 bytes, where digests of 8192 pages are missing"),
        (np.zeros(5, np.uint64).tobytes(), "digests of all but 8187 of 8192 pages"),
        (np.zeros(8193, np.uint64).tobytes(), "DIGESTS record of 65544 bytes"),
    ],
)
@pytest.mark.parametrize("verify", [False, True])
def test_odd_digests(serve, tmp_path, digests, why, verify):
    answers = {Kind.END: [(Kind.DIGESTS, digests), (Kind.READY, b"{}")]}
    state = migrated(serve, tmp_path, answers, verify=verify)
    assert state["status"] == "failed"
    assert why in state["error-desc"]
    assert serve.ask("query-status")["status"] == "running"


def test_an_escape_in_a_refusal_is_told_as_text(serve, tmp_path):
    refused = rb'{"why":"\u001b]0;owned\u0007[/bold]"}'
    state = migrated(serve, tmp_path, {Kind.END: [(Kind.REFUSED, refused)]})
    assert r"\x1b]0;owned\x07[/bold]" in state["error-desc"]
    assert serve.ask("query-status")["status"] == "running"


def test_and_then_an_odd_report(serve, tmp_path):
    """The guest is the destination's then; the server lives on without it, and tells what came."""
    answers = {Kind.END: [(Kind.READY, b"{}")], Kind.COMMIT: [(Kind.REPORT, b'{"pages_checked":NaN}')]}
    state = migrated(serve, tmp_path, answers)
    assert state["status"] == "completed"
    wait_for(lambda: "NaN is not JSON" in serve.ask("query-migrate").get("error-desc", ""))
    assert serve.ask("query-status")["status"] == "postmigrate"


def test_a_guest_that_is_forced_to_go_on_is_as_it_was(serve, tmp_path):
    """Nobody knows whether the destination has it; a person who does may let it go on, stop it and migrate it again."""
    if serve.ask("query-status")["status"] == "running":
        migrated(serve, tmp_path, {Kind.END: [(Kind.READY, b"{}")], Kind.COMMIT: [(Kind.REPORT, b"{}")]})
    assert serve.ask("query-status")["status"] == "postmigrate"
    wait_for(lambda: {"error-desc", "destination"} & set(serve.ask("query-migrate")))
    serve.ask("cont", force=True)
    for command, status in (("stop", "paused"), ("cont", "running")):
        serve.ask(command)
        assert serve.ask("query-status")["status"] == status
