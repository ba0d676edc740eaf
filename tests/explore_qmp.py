"""Odd QMP messages to a real `balloon serve` with a guest: each gets a reply, none is a fault of the server.

Usage: python tests/explore_qmp.py [MESSAGES [SEED]]
"""

from __future__ import annotations

import json
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from explore_messages import SILENT, Findings, under_watch
from serve_process import Process

ESCAPES = "\x1b]0;owned\x07\x1b[2J[bold]x[/]\u202e"
TEXTS = ["", "x", "a\0b", ESCAPES, "x" * 5000, "\u0141\U0001f600", "/nonexistent/x", "../x"]
URIS = [
    "file:", "file:.", "file:/", "file:a\0b", "file:/nonexistent/a", "file:/" + "n" * 300, "file:/dev/null",
    "file:/proc/x",
    "unix:", "unix:a\0b", "unix:/nonexistent/s", "unix:" + "n" * 200, "unix:@x", "tcp:", "tcp::", "tcp:a..b:1",
    "tcp:x:70000",
    "tcp:127.0.0.1:1", "tcp:[::1", "fd:3", "exec:true", "x:y", ":", "rdma:1:2", "tcp:127.0.0.1:-1",
    "tcp:\U0001f600:1",
]  # fmt: skip
NUMBERS = [0, -1, 1, 4096, 1 << 20, 1 << 31, 1 << 32, 1 << 62, 1 << 63, (1 << 64) - 1, 10**19, 0.5, -0.0, 1e-300, 1e300]
RAW = [
    b"", b"{", b"}", b"[]", b"null", b"1", b'"x"', b"{}{}", b'{"execute"', b'{"execute": 1e999}', b'{"execute": NaN}',
    b"\xff\xfe", b"\x00", b"{" * 60_000, b"[" * 60_000, b'{"a":' * 5000 + b"1" + b"}" * 5000, b"x" * 100_000,
    b'{"execute": "\\ud800"}', b'{"execute": "x", "execute": "y"}', b'{"id": 1' + b"0" * 400 + b"}", b"' OR 1=1",
]  # fmt: skip
LEFT_OUT = {"quit"}
"""Does what it says."""


class Client:
    """A raw connection, negotiated unless it is to be odd."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20.0)
        self.socket.connect(str(path))
        self.file = self.socket.makefile("rb")
        self.file.readline()

    def ask(self, line: bytes) -> list[dict[str, Any]]:
        """Send a line; return the replies to it, of which odd ones have any number."""
        self.socket.sendall(line + b"\n" + b'{"execute": "query-version", "id": "that was all"}\n')
        replies = []
        while True:
            said = self.file.readline()
            if not said:
                raise ConnectionError("the monitor hung up")
            message: dict[str, Any] = json.loads(said)
            if message.get("id") == "that was all":
                return replies
            if "event" not in message:
                replies.append(message)

    def close(self) -> None:
        self.file.close()
        self.socket.close()


def odd_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind < 2:
        return rng.choice(TEXTS)
    if kind < 4:
        return rng.choice(NUMBERS)
    if kind == 4:
        return rng.choice([None, True, False])
    if kind == 5:
        return [odd_value(rng, depth + 1) for _ in range(rng.randrange(3))]
    return {rng.choice(TEXTS)[:50]: odd_value(rng, depth + 1) for _ in range(rng.randrange(3))}


def odd_line(rng: random.Random, commands: list[dict[str, Any]]) -> bytes:
    """Return one line: mostly a real command with odd arguments."""
    if rng.random() < 0.1:
        return rng.choice(RAW)
    command = rng.choice(commands)
    arguments = {}
    for name, about in command["arguments"].items():
        if about["optional"] and rng.random() < 0.5:
            continue
        if rng.random() < 0.5:
            arguments[name] = odd_value(rng)
        elif name == "uri":
            arguments[name] = rng.choice(URIS)
        else:
            right = {"int": NUMBERS[:11], "number": NUMBERS, "str": TEXTS, "bool": [True, False]}
            arguments[name] = rng.choice(right.get(about["type"], NUMBERS))
        if name == "deadline" and isinstance(arguments[name], int | float):
            arguments[name] = min(arguments[name], 0.2)  # a run may take as long as it is given
    if rng.random() < 0.1:
        arguments[rng.choice(TEXTS)[:50]] = odd_value(rng)
    message: dict[str, Any] = {"execute": command["name"], "arguments": arguments}
    if rng.random() < 0.2:
        message["id"] = odd_value(rng)
    if rng.random() < 0.05:
        message[rng.choice(["execute", "arguments", "id", "x"])] = odd_value(rng)
    return json.dumps(message).encode()


def explore(folder: Path, messages: int, seed: int, within: float = SILENT) -> tuple[Findings, Counter[str]]:
    """Send so many; return what came of it, and how often which class of reply came."""
    rng, findings, replies = random.Random(seed), Findings(), Counter[str]()
    serve = Process(folder, memory="32M")
    try:
        with under_watch(serve, findings, within):
            client = Client(serve.monitor)
            client.ask(b'{"execute": "qmp_capabilities"}')
            commands = serve.ask("query-commands")
            commands = [command for command in commands if command["name"] not in LEFT_OUT]
            while findings.messages < messages:
                line = odd_line(rng, commands)
                findings.messages += 1
                try:
                    answered = client.ask(line)
                except OSError as error:
                    findings.wrong.append(f"no reply to {line[:200]!r}: {error}")
                    break
                replies.update(reply["error"]["class"] if "error" in reply else "return" for reply in answered)
                if "internal error" in str(answered) or not (answered or line in RAW):
                    findings.wrong.append(f"{line[:200]!r}: {answered}")
            client.close()
        if serve.process.poll() is None:
            serve.ask("migrate_cancel")
            deadline = time.monotonic() + 10
            while serve.ask("query-migrate")["status"] in ("setup", "active", "cancelling"):
                time.sleep(0.05)
                if time.monotonic() > deadline:
                    findings.wrong.append("a cancelled migration does not end")
                    break
            serve.ask("cont")
            if serve.ask("query-status")["status"] != "running":
                findings.wrong.append("the guest does not run any more")
    finally:
        serve.end()
    return findings, replies


def main() -> int:
    messages = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 32)
    print(f"explore: {messages} QMP messages, seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        found, replies = explore(Path(folder), messages, seed)
        if found.wrong:
            print((Path(folder) / "log").read_text(errors="replace")[-2000:])
    print(
        f"explore: {found.messages} QMP messages in {time.monotonic() - began:.0f} s, replies {dict(replies)}, "
        f"descriptors {found.descriptors}, monitor: {found.asked} answers, the slowest {found.slowest * 1000:.0f} ms"
    )
    for text in found.wrong:
        print(f"explore: WRONG: {text}")
    return bool(found.wrong)


if __name__ == "__main__":
    sys.exit(main())
