"""Streams and answers that nobody should send, to the receiver in memory and to a real `balloon receive`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from explore_streams import explore
from real_stream import MIB, join, real_stream

from balloon_cli.errors import MISSING, OK, PROTOCOL, USAGE, VANISHED, message
from host_qemu_side.migration import Kind, Receiver, ReceiverState, StreamReader
from vring.decode import Fields
from vring.errors import VirtioError
from vring.memory import GuestMemory

REAL = real_stream()
HEADER, STATE = (
    json.loads(next(data for kind, data in REAL if kind == wanted)) for wanted in (Kind.HEADER, Kind.STATE)
)
DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
SPACE = 4 << 20
"""KiB of addresses that a receiver may use: the program with its libraries, and little for a tiny stream."""


def test_mutated_streams_states_and_answers():
    """A short run of what `./run explore` does for long."""
    found = explore(1200, seed=8)
    assert not found.wrong
    assert found.outcomes["loaded"] > 10
    assert found.outcomes["believed"] > 10
    assert found.outcomes["refused: StreamError"] > 300


@pytest.mark.parametrize("method", ["integer", "text", "pairs"])
def test_a_border_that_checks_nothing_is_noticed(monkeypatch, method):
    """What the exploration is worth: without one of the checks other exceptions come out, or odd values."""
    monkeypatch.setattr(Fields, method, lambda self, name, *limits, default=0: self._value.get(name, default))
    assert explore(600, seed=8).wrong


def said(kind, payload, real=REAL):
    """Return the real stream with another payload in the first record of a kind."""
    at = next(i for i, (each, _) in enumerate(real) if each == kind)
    return join([*real[:at], (kind, payload), *real[at + 1 :]])


def header(**changes):
    return json.dumps({**HEADER, **changes}).encode()


def tiny(**changes):
    """Return a stream without any page."""
    end = b'{"pages":0,"zero_pages":0}'
    return join([(Kind.HEADER, header(**changes)), (Kind.STATE, b"{}"), (Kind.END, end), (Kind.COMMIT, b"")])


def state(part, **changes):
    return said(Kind.STATE, json.dumps({**STATE, part: {**STATE[part], **changes}}).encode())


ESCAPES = rb'{"why":"\u001b]0;owned\u0007\u001b[2J line\nnext [/bold]"}'
STREAMS = {
    "deep header": (said(Kind.HEADER, DEEP), PROTOCOL, "at most 65536"),
    "deep state": (said(Kind.STATE, DEEP), PROTOCOL, "nested more than"),
    "escapes": (join([REAL[0], (Kind.CANCEL, ESCAPES)]), VANISHED, r"\x1b]0;owned\x07\x1b[2J line\nnext [/bold]"),
    "a page at 16 TiB": (tiny(guest="x", hand_over=False, regions=[[2**44 - 4096, 4096]]), OK, "a complete image"),
    "RAM past 16 TiB": (tiny(regions=[[0, 2**50]]), PROTOCOL, "past 0x100000000000"),
    "16 TiB of RAM": (tiny(guest="x", hand_over=False, regions=[[0, 2**44]]), MISSING, "left"),
    "markup": (tiny(guest="[/bold]", hand_over=False), OK, "[/bold] guest"),
    "another emulator's": (tiny(guest=""), USAGE, "--no-resume"),
    "linux without a nonce": (tiny(guest="linux", hand_over=False), OK, "linux guest"),
    "an infinite number": (said(Kind.STATE, json.dumps(STATE).replace("28672", "1e999").encode()), PROTOCOL, ""),
    "RAM without a guest": (join(REAL), PROTOCOL, "this RAM holds no guest"),
    "20000 rings": (state("transport", rings=[{"index": 0}] * 20_000), PROTOCOL, "20000 items"),
    "RAM elsewhere": (tiny(regions=[[4096, MIB]]), PROTOCOL, "one region from 0"),
    "zero pages lost": (said(Kind.END, b'{"pages":7,"zero_pages":3}'), PROTOCOL, "3 zero pages, 4 arrived"),
}


@pytest.fixture(scope="module")
def received(tmp_path_factory):
    """Have a real program read each of them, all at once; return exit code and what it said."""
    folder = tmp_path_factory.mktemp("streams")
    running = {}
    for name, (data, _, _) in STREAMS.items():
        (folder / name).write_bytes(data)
        out = (folder / f"{name}.said").open("w+b")
        command = ["sh", "-c", f'ulimit -v {SPACE} && exec "$@"', "sh"]
        command += [sys.executable, "-m", "balloon_cli", "receive", f"file:{folder / name}"]
        running[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out), out
    found = {}
    for name, (process, out) in running.items():
        process.wait(120)
        with out:
            out.seek(0)
            found[name] = process.returncode, out.read().decode()
    return found


@pytest.mark.parametrize("name", STREAMS)
def test_a_real_program_says_what_is_wrong(received, name):
    """In one line, with the exit code that says who is at fault, and with little memory."""
    _, code, text = STREAMS[name]
    found, told = received[name]
    assert found == code, told
    assert text in told
    assert "Traceback" not in told
    assert told.replace("\n", "").isprintable()
    if code != OK:
        assert name in told.splitlines()[-1], "the file is named where the error is"


def test_who_reads_a_sparse_guest_needs_little(tmp_path):
    """Bookkeeping is sized by what is there: digests are those of RAM, not of all addresses below it."""
    with GuestMemory.create([(0, MIB), (2**44 - MIB, MIB)]) as memory:
        receiver = Receiver(memory=memory)
        regions = [[0, MIB], [2**44 - MIB, MIB]]
        reader = StreamReader()
        reader.feed(tiny(regions=regions))
        answers = []
        while (record := reader.next()) is not None:
            answers += receiver.handle(record)
    assert sum(len(piece) for piece in answers) < 16 * MIB // 4096 + 1000
    assert receiver.state is ReceiverState.COMMITTED


def test_a_message_is_one_printable_line():
    error = VirtioError("it said \x1b[2J\nand\u202e more")
    error.add_note("the guest \x07goes on")
    assert message(error) == r"it said \x1b[2J and\u202e more (the guest \x07goes on)"
