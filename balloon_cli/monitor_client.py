"""A small QMP client for `balloon ctl`. What the monitor says is checked here: the other end may be anything."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from dataclasses import dataclass
from typing import Any

from vring.decode import Fields, parse_json, visible
from vring.errors import DeviceError, PeerVanished, UsageError, VirtioError
from vring.unix_socket import socket_path, why_misnamed

__all__ = ["Argument", "CommandFailed", "CommandHelp", "MigrationState", "MonitorClient", "described"]

MAX_MESSAGE = 4 << 20
"""Bytes of the longest message that is read."""
MOST = 4096
"""Commands, and arguments of one, that a monitor may have."""
READ_SIZE = 64 << 10


class CommandFailed(UsageError):
    """The monitor answered with an error.

    Parameters
    ----------
    kind
        Class of the error.
    desc
        What it said, printable.
    """

    def __init__(self, kind: str, desc: str) -> None:
        super().__init__(desc)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Argument:
    """What ``query-commands`` tells of an argument."""

    name: str
    type: str
    optional: bool
    help: str

    @property
    def form(self) -> str:
        """How it is written, in brackets if it may be left out."""
        return f"[{self.name}={self.type}]" if self.optional else f"{self.name}={self.type}"


@dataclass(frozen=True, slots=True)
class CommandHelp:
    """What ``query-commands`` tells of a command; QEMU tells only its name."""

    name: str
    help: str
    arguments: tuple[Argument, ...]


@dataclass(frozen=True, slots=True)
class MigrationState:
    """What ``query-migrate`` tells, as far as somebody who waits for the end wants to know."""

    status: str
    transferred: int
    remaining: int
    said: dict[str, Any]
    """All of it."""

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.status in ("none", "completed", "failed", "cancelled")


class MonitorClient:
    """A connection to a QMP monitor, negotiated.

    Parameters
    ----------
    path
        Its Unix socket.
    timeout
        Seconds to wait for the reply to a command, whatever else comes meanwhile.

    Raises
    ------
    PeerVanished
        If nobody listens there, it goes away or does not answer in time.
    UsageError
        If the path cannot be that of a socket, its folder is not there, or it is not permitted.
    DeviceError
        If it does not speak QMP.
    """

    def __init__(self, path: str, timeout: float = 30.0) -> None:
        socket_path(path)
        self._timeout = timeout
        self._buffer = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        with contextlib.ExitStack() as stack:
            stack.callback(self._socket.close)
            self._connect(path)
            if "QMP" not in self._receive(time.monotonic() + timeout):
                raise DeviceError(f"{path} does not greet as QMP does")
            self.execute("qmp_capabilities")
            stack.pop_all()

    def _connect(self, path: str) -> None:
        try:
            self._socket.connect(path)
        except OSError as error:
            if why := why_misnamed(path):
                raise UsageError(f"no monitor at {path}: {why}") from error
            hint = "start `balloon serve SOCKET --monitor PATH` first"
            raise PeerVanished(f"no monitor at {path}: {error.strerror or error}; {hint}") from error

    def _receive(self, deadline: float) -> dict[str, Any]:
        """Return the next message."""
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > MAX_MESSAGE:
                raise DeviceError("the monitor sends a message without end")
            try:
                self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
                data = self._socket.recv(READ_SIZE)
            except TimeoutError as error:
                raise PeerVanished(f"the monitor gave no answer for {self._timeout:g} s") from error
            except OSError as error:
                raise PeerVanished(f"the monitor is gone: {error.strerror or error}") from error
            if not data:
                raise PeerVanished("the monitor closed the connection")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        message = parse_json(line, "what the monitor sent", refusal=DeviceError, most=MAX_MESSAGE)
        if not isinstance(message, dict):
            raise DeviceError("the monitor sent something that is not a JSON object")
        return message

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run a command; return its result, a JSON value. Events that come meanwhile are dropped.

        Raises
        ------
        CommandFailed
            If it answers with an error.
        """
        message = json.dumps({"execute": command, "arguments": arguments or {}, "id": 1})
        deadline = time.monotonic() + self._timeout
        try:
            self._socket.settimeout(self._timeout)
            self._socket.sendall(message.encode() + b"\n")
        except OSError as error:
            raise PeerVanished(f"the monitor is gone: {error.strerror or error}") from error
        while time.monotonic() < deadline:
            reply = self._receive(deadline)
            if "event" in reply:
                continue
            if "return" in reply:
                return reply["return"]
            failed = Fields(reply, "the monitor's reply", DeviceError).members("error")
            raise CommandFailed(visible(failed.text("class")), visible(failed.text("desc", MAX_MESSAGE)))
        raise PeerVanished(f"the monitor gave no answer for {self._timeout:g} s")

    def migration(self) -> MigrationState:
        """Return what ``query-migrate`` tells."""
        said = self.execute("query-migrate")
        found = Fields(said, "the monitor's query-migrate", DeviceError)
        ram = found.members("ram", default={})
        # QEMU says nothing of a migration that was never begun.
        status = visible(found.text("status", 100, default="none"))
        return MigrationState(status, ram.integer("transferred", default=0), ram.integer("remaining", default=0), said)

    def arguments_of(self, command: str) -> str:
        """Return the arguments of a command in words, empty if the monitor does not tell."""
        with contextlib.suppress(VirtioError):
            for known in described(self.execute("query-commands")):
                if known.name == command:
                    forms = " ".join(argument.form for argument in known.arguments)
                    return f"; write `{command} {forms}`" if forms else f"; `{command}` takes no arguments"
        return ""

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


def described(found: Any) -> list[CommandHelp]:
    """Return what a result of ``query-commands`` tells.

    Raises
    ------
    DeviceError
        If it is no such result.
    """
    said = Fields({"commands": found}, "the monitor's query-commands", DeviceError)
    return [_command(command) for command in said.objects("commands", MOST)]


def _command(said: Fields) -> CommandHelp:
    arguments = said.members("arguments", default={})
    return CommandHelp(
        visible(said.text("name")),
        visible(said.text("help", default="")),
        tuple(_argument(name, arguments.members(name)) for name in arguments.names[:MOST]),
    )


def _argument(name: str, about: Fields) -> Argument:
    return Argument(
        visible(name),
        visible(about.text("type", default="any")),
        about.boolean("optional", default=True),
        visible(about.text("help", default="")),
    )
