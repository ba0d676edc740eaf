"""QMP's conversation: greeting, negotiation, commands with checked arguments, replies in order. No sockets, no clock.

A `Dispatcher` knows the commands; a `Session` is one client. A command that takes time returns a `Deferred`, and its
client's next command waits until that is resolved, as QEMU does; other clients do not wait.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from host_qemu_side.monitor.framing import ErrorClass, LineReader, QmpError, encode
from vring.errors import PeerVanished, VirtioError

__all__ = ["MAX_OUTPUT", "Command", "Deferred", "Dispatcher", "Param", "Session"]

log = logging.getLogger(__name__)
MAX_OUTPUT = 256 << 10
"""Bytes of replies and events kept for a client that does not read; one that has more is dropped."""
MAX_WAITING = 64
"""Commands of one client that may wait; no more is read from it until they are done."""

_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "number": (int, float), "str": (str,), "bool": (bool,)}
_SAID = {"int": "integer", "number": "number", "str": "string", "bool": "boolean"}


@dataclass(frozen=True, slots=True)
class Param:
    """An argument of a command."""

    kind: str
    """``int``, ``number``, ``str``, ``bool`` or ``any``."""
    required: bool = True
    help: str = ""

    def check(self, name: str, value: Any) -> None:
        """Raise `QmpError` if `value` is of another type (true is no integer)."""
        if self.kind == "any":
            return
        if not isinstance(value, _KINDS[self.kind]) or (isinstance(value, bool) and self.kind != "bool"):
            raise QmpError(f"Invalid parameter type for '{name}', expected: {_SAID[self.kind]}")


class Deferred:
    """The result of a command that takes time: resolved or failed once, later."""

    def __init__(self) -> None:
        self.done = False
        self.value: Any = None
        self.error: QmpError | None = None

    def resolve(self, value: Any) -> None:
        """Give the result; a second one is ignored."""
        if not self.done:
            self.done, self.value = True, value

    def fail(self, error: QmpError) -> None:
        """Give an error instead."""
        if not self.done:
            self.done, self.error = True, error


@dataclass(frozen=True, slots=True)
class Command:
    """A command."""

    name: str
    handler: Callable[..., Any]
    """Called with the arguments by name, dashes turned into underscores; returns a JSON value, None for ``{}``, or a
    `Deferred`; raises `QmpError` or `VirtioError`."""
    help: str = ""
    params: dict[str, Param] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Return what ``query-commands`` says of it: QEMU's ``name``, and what a person wants to know."""
        params = {n: {"type": p.kind, "optional": not p.required, "help": p.help} for n, p in self.params.items()}
        return {"name": self.name, "help": self.help, "arguments": params}


class Dispatcher:
    """A table of commands.

    Parameters
    ----------
    version
        Major, minor, micro.
    package
        Said in the greeting beside it.
    """

    def __init__(self, version: tuple[int, int, int], package: str) -> None:
        major, minor, micro = version
        self.version = {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": package}
        self._commands: dict[str, Command] = {}
        self.add(Command("query-version", lambda: self.version, "the version of this program"))
        self.add(Command("query-commands", self._list, "what is listed here"))

    def add(self, command: Command) -> None:
        """Add a command; one of the same name is replaced."""
        self._commands[command.name] = command

    def _list(self) -> list[dict[str, Any]]:
        negotiation = Command("qmp_capabilities", lambda: None, "leave negotiation; the first command of a client")
        return [c.describe() for c in (negotiation, *self._commands.values())]

    def greeting(self) -> dict[str, Any]:
        """Return the first message to a client."""
        return {"QMP": {"version": self.version, "capabilities": []}}

    def execute(self, name: str, arguments: dict[str, Any]) -> Any:
        """Run a command; return its result or a `Deferred`.

        Raises
        ------
        QmpError
            For an unknown command, wrong arguments, and whatever the handler says.
        """
        command = self._commands.get(name)
        if command is None:
            raise QmpError(f"The command {name[:80]} has not been found", ErrorClass.COMMAND_NOT_FOUND)
        for key, value in arguments.items():
            if key not in command.params:
                raise QmpError(f"Parameter '{key[:80]}' is unexpected")
            command.params[key].check(key, value)
        for key, param in command.params.items():
            if param.required and key not in arguments:
                raise QmpError(f"Parameter '{key}' is missing")
        try:
            return command.handler(**{key.replace("-", "_"): value for key, value in arguments.items()})
        except PeerVanished as error:
            raise QmpError(str(error), ErrorClass.DEVICE_NOT_ACTIVE) from error
        except (VirtioError, OSError) as error:
            raise QmpError(str(error)) from error


class Session:
    """One client: feed it bytes, step it, send what is in `output`.

    Parameters
    ----------
    dispatcher
        The commands.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._reader = LineReader()
        self._waiting: deque[Any] = deque()
        self._pending: tuple[Deferred, dict[str, Any]] | None = None
        self.negotiated = False
        self.output = bytearray(encode(dispatcher.greeting()))

    @property
    def overflowed(self) -> bool:
        """Whether the client left more unread than is kept for it."""
        return len(self.output) > MAX_OUTPUT

    @property
    def wants_input(self) -> bool:
        """Whether more may be fed: false while many commands wait."""
        return len(self._waiting) < MAX_WAITING

    @property
    def ready(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._waiting) if self._pending is None else self._pending[0].done

    @property
    def waiting(self) -> bool:
        """Whether a reply is still owed."""
        return bool(self._waiting) or self._pending is not None

    def feed(self, data: bytes) -> None:
        """Take bytes from the client; nothing is executed yet."""
        self._waiting.extend(self._reader.feed(data))

    def event(self, message: dict[str, Any]) -> None:
        """Send an event; a client that has not negotiated gets none."""
        if self.negotiated:
            self.output += encode(message)

    def step(self) -> None:
        """Answer one command, or one whose deferred result has come."""
        if not self.ready:
            return
        if self._pending is not None:
            deferred, reply = self._pending
            self._pending = None
            self._reply(reply, deferred.value, deferred.error)
            return
        reply = {}
        try:
            value = self._execute(self._waiting.popleft(), reply)
        except QmpError as error:
            self._reply(reply, None, error)
        except Exception as error:  # a fault of ours must not end the monitor
            log.exception("monitor: a command failed")
            self._reply(reply, None, QmpError(f"internal error: {error!r}"))
        else:
            if isinstance(value, Deferred):
                self._pending = (value, reply)
            else:
                self._reply(reply, value, None)

    def _reply(self, reply: dict[str, Any], value: Any, error: QmpError | None) -> None:
        content = {"return": {} if value is None else value} if error is None else {"error": error.as_dict()}
        try:
            self.output += encode({**content, **reply})
        except ValueError:  # a fault of ours: whatever came as an id can be sent back
            log.exception("monitor: a result cannot be written as JSON")
            self.output += encode({"error": QmpError("internal error: no JSON").as_dict(), **reply})

    def _execute(self, message: Any, reply: dict[str, Any]) -> Any:
        if isinstance(message, QmpError):
            raise message
        if not isinstance(message, dict):
            raise QmpError("QMP input must be a JSON object")
        if "id" in message:
            reply["id"] = message["id"]
        if "execute" not in message:
            raise QmpError("QMP input lacks member 'execute'")
        for key in message:
            if key not in ("execute", "arguments", "id"):
                raise QmpError(f"QMP input member '{key[:80]}' is unexpected")
        name, arguments = message["execute"], message.get("arguments", {})
        if not isinstance(name, str):
            raise QmpError("QMP input member 'execute' must be a string")
        if not isinstance(arguments, dict):
            raise QmpError("QMP input member 'arguments' must be an object")
        if name == "qmp_capabilities":
            return self._negotiate(arguments)
        if not self.negotiated:
            text = f"Expecting capabilities negotiation with 'qmp_capabilities', not {name[:80]}"
            raise QmpError(text, ErrorClass.COMMAND_NOT_FOUND)
        return self._dispatcher.execute(name, arguments)

    def _negotiate(self, arguments: dict[str, Any]) -> None:
        if self.negotiated:
            text = "Capabilities negotiation is already complete, command ignored"
            raise QmpError(text, ErrorClass.COMMAND_NOT_FOUND)
        if arguments.keys() - {"enable"} or arguments.get("enable") not in (None, []):
            raise QmpError("no capabilities are offered, so none can be enabled")
        self.negotiated = True
