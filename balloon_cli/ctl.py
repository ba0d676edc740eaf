"""``balloon ctl``: the monitor of ``balloon serve`` for people. A small QMP client that may wait."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import click

from balloon_cli.options import SECONDS
from balloon_cli.streams import result
from host_qemu_side.migration import Cancelled
from vring.errors import DeviceError, MissingFacility, PeerVanished, UsageError, VirtioError, quoted
from vring.sizes import MAX_SECONDS, format_size, parse_size
from vring.unix_socket import socket_path, why_misnamed

__all__ = ["CommandFailed", "MonitorClient", "ctl", "render"]

MAX_MESSAGE = 16 << 20
_KINDS: dict[str, type[VirtioError]] = {"usage": UsageError, "missing": MissingFacility, "vanished": PeerVanished}
BYTES = {"bytes", "actual", "memory", "transferred", "remaining", "total", "normal-bytes", "max-bandwidth"}
"""Members shown as sizes."""
SIZES = {"value", "max-bandwidth"}
"""Arguments that may be written as sizes."""


EXAMPLES = """\b
Examples:
  balloon ctl /tmp/m.sock
  balloon ctl /tmp/m.sock balloon value=192M
  balloon ctl /tmp/m.sock hint-run deadline=2
  balloon ctl /tmp/m.sock qom-get property=guest-stats
  balloon ctl /tmp/m.sock migrate uri=unix:/tmp/d.sock --wait
"""


class CommandFailed(UsageError):
    """The monitor answered with an error.

    Parameters
    ----------
    kind
        Class of the error.
    desc
        What it said.
    """

    def __init__(self, kind: str, desc: str) -> None:
        super().__init__(desc)
        self.kind = kind


class MonitorClient:
    """A connection to a QMP monitor, negotiated.

    Parameters
    ----------
    path
        Its Unix socket.
    timeout
        Seconds to wait for any message.

    Raises
    ------
    PeerVanished
        If nobody listens there or it goes away.
    UsageError
        If the path cannot be that of a socket, its folder is not there, or it is not permitted.
    DeviceError
        If it does not speak QMP.
    """

    def __init__(self, path: str, timeout: float = 30.0) -> None:
        self.events: list[dict[str, Any]] = []
        """Events that came while replies were waited for."""
        socket_path(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            hint = "start `balloon serve SOCKET --monitor PATH` first"
            if why := why_misnamed(path):
                raise UsageError(f"no monitor at {path}: {why}") from error
            raise PeerVanished(f"no monitor at {path}: {error.strerror or error}; {hint}") from error
        self._buffer = bytearray()
        self.greeting = self.receive()
        if "QMP" not in self.greeting:
            raise DeviceError(f"{path} does not greet as QMP does")
        self.execute("qmp_capabilities")

    def receive(self) -> dict[str, Any]:
        """Return the next message."""
        while b"\n" not in self._buffer:
            if len(self._buffer) > MAX_MESSAGE:
                raise DeviceError("the monitor sends a message without end")
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError as error:
                raise PeerVanished(f"the monitor was silent for {self._socket.gettimeout():g} s") from error
            except OSError as error:
                raise PeerVanished(f"the monitor is gone: {error.strerror or error}") from error
            if not data:
                raise PeerVanished("the monitor closed the connection")
            self._buffer += data
        line, _, rest = self._buffer.partition(b"\n")
        self._buffer = bytearray(rest)
        try:
            message = json.loads(line)
        except ValueError as error:
            raise DeviceError(f"the monitor sent something that is not JSON: {error}") from error
        if not isinstance(message, dict):
            raise DeviceError("the monitor sent something that is not a JSON object")
        return message

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run a command; return its result.

        Raises
        ------
        CommandFailed
            If it answers with an error.
        """
        message = json.dumps({"execute": command, "arguments": arguments or {}, "id": 1})
        try:
            self._socket.sendall(message.encode() + b"\n")
        except OSError as error:
            raise PeerVanished(f"the monitor is gone: {error.strerror or error}") from error
        while True:
            reply = self.receive()
            if "event" in reply:
                self.events.append(reply)
            elif "return" in reply:
                return reply["return"]
            elif isinstance(reply.get("error"), dict):
                raise CommandFailed(str(reply["error"].get("class")), str(reply["error"].get("desc")))
            else:
                raise DeviceError(f"the monitor sent neither event nor reply: {str(reply)[:80]}")

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


def parse_argument(text: str) -> tuple[str, Any]:
    """Return name and value of ``key=value``: JSON where it is such, sizes where bytes are meant, else text."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"{quoted(text)} is no argument; write key=value")
    if key in SIZES:
        with contextlib.suppress(UsageError):
            return key, parse_size(value)
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):
        return key, value


def render(value: Any, indent: str = "") -> Iterator[str]:
    """Yield a result as lines for a person."""
    if isinstance(value, dict):
        width = max((len(str(key)) for key in value), default=0)
        for key, item in value.items():
            if item and isinstance(item, dict | list) and not _flat(item):
                yield f"{indent}{key}:"
                yield from render(item, indent + "  ")
            else:
                yield f"{indent}{key!s:<{width}}  {_word(key, item)}"
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, dict):
                yield indent + "  ".join(f"{key} {_word(key, part)}" for key, part in item.items())
            else:
                yield from render(item, indent)
    else:
        yield f"{indent}{_word('', value)}"


def _flat(value: Any) -> bool:
    return isinstance(value, list) and not any(isinstance(item, dict | list) for item in value)


def _word(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key == "since" and isinstance(value, int | float):
        return time.strftime("%H:%M:%S", time.localtime(value))
    if isinstance(value, int) and "id" in key.split("-"):
        return f"{value:#x}"
    if isinstance(value, int) and (key in BYTES or (key.startswith("stat-") and key.endswith(("-memory", "-caches")))):
        return f"{value} ({format_size(value)})" if value >= 1024 else str(value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {_word(str(name), item)}" for name, item in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "-"
    return str(value)


def _commands(commands: list[dict[str, Any]]) -> Iterator[str]:
    width = max(len(command["name"]) for command in commands)
    for command in commands:
        yield f"{command['name']:<{width}}  {command.get('help', '')}"
        for name, about in command.get("arguments", {}).items():
            yield f"{'':<{width}}    {_form(name, about)}  {about['help']}"


def _form(name: str, about: dict[str, Any]) -> str:
    """Return how an argument is written, in brackets if it may be left out."""
    text = f"{name}={about['type']}"
    return f"[{text}]" if about["optional"] else text


def _what_it_takes(client: MonitorClient, command: str) -> str:
    """Return the arguments of a command in words, empty if the monitor does not tell."""
    with contextlib.suppress(VirtioError, LookupError, TypeError, AttributeError):
        known = {entry["name"]: entry["arguments"] for entry in client.execute("query-commands")}
        forms = " ".join(_form(name, about) for name, about in known[command].items())
        return f"; write `{command} {forms}`" if forms else f"; `{command}` takes no arguments"
    return ""


def _wait_migration(client: MonitorClient) -> dict[str, Any]:
    """Ask until the migration has ended; progress goes to stderr where that is a terminal."""
    while True:
        state: dict[str, Any] = client.execute("query-migrate")
        ram = state.get("ram", {})
        if sys.stderr.isatty():
            text = f"{state['status']}: {format_size(ram.get('transferred', 0))} sent"
            print(f"\r{text}, {format_size(ram.get('remaining', 0))} left   ", end="", file=sys.stderr, flush=True)
        if state["status"] in ("none", "completed", "failed", "cancelled"):
            if sys.stderr.isatty():
                print(file=sys.stderr)
            return state
        time.sleep(0.05)


@click.command(epilog=EXAMPLES)
@click.argument("monitor", metavar="MONITOR")
@click.argument("command", required=False)
@click.argument("arguments", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--wait", is_flag=True, help="With migrate: wait until it has ended.")
@click.option(
    "--timeout", type=SECONDS, metavar="SECONDS", default=30.0, show_default=True, help="Seconds to wait for a reply."
)
def ctl(monitor: str, command: str | None, arguments: tuple[str, ...], **options: Any) -> None:
    """Send a COMMAND to the monitor of `balloon serve` at the socket MONITOR; without one, list the commands.

    Exit codes: 0 done, 2 the command was refused, 4 the other end does not speak QMP, 5 nobody is there, the guest is
    not, or it did not answer in time. With --wait those of `balloon migrate`, 130 if it was cancelled.
    """
    as_json = options["as_json"]
    given = dict(parse_argument(text) for text in arguments)
    timeout = options["timeout"]
    deadline = given.get("deadline")
    if command == "hint-run" and isinstance(deadline, int | float) and 0 <= deadline < MAX_SECONDS - 10:
        timeout = max(timeout, deadline + 10)
    if command in ("qom-get", "qom-set"):
        given.setdefault("path", "/machine/peripheral/balloon0")
    client = MonitorClient(monitor, timeout)
    try:
        try:
            found = client.execute(command or "query-commands", given)
            if command == "migrate" and options["wait"]:
                found = _wait_migration(client)
        except CommandFailed as error:
            kind = {"DeviceNotActive": PeerVanished}.get(error.kind, UsageError)
            hint = f"; `balloon ctl {monitor}` lists the commands" if error.kind == "CommandNotFound" else ""
            if str(error).startswith(("Parameter", "Invalid parameter")):
                hint = _what_it_takes(client, str(command))
            raise kind(f"{command}: {error}{hint}") from error
    finally:
        client.close()
    with result():
        _print(command or "query-commands", found, as_json)
    _judge(command, options["wait"], found)


def _print(command: str, found: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"schema_version": 1, "command": command, "return": found}))
    elif command == "query-commands":
        print("\n".join(_commands(found)))
    elif isinstance(found, dict) and set(found) == {"human-readable-text"}:
        print(found["human-readable-text"])
    elif found not in ({}, []):
        print("\n".join(render(found)))


def _judge(command: str | None, waited: bool, result: Any) -> None:
    """Raise where the result is not what was asked for."""
    if command == "hint-run" and not result.get("completed"):
        ended = result.get("ended-by")
        raise PeerVanished("the guest did not end the run in time" if ended == "deadline" else f"ended by the {ended}")
    if command == "migrate" and waited and result.get("status") != "completed":
        text = f"the migration has {result.get('status')}: {result.get('error-desc', 'no reason given')}"
        if result.get("status") == "cancelled":
            raise Cancelled("the migration was cancelled")
        raise _KINDS.get(str(result.get("error-kind")), VirtioError)(text)
