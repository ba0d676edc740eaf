"""A small synchronous QMP client: commands with descriptors, and events. Nothing here knows what they mean."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from typing import Any

from guest_driver.qemu.lines import MAX_LINE, LineConnection
from guest_driver.waiting import wait_readable
from vring.decode import Fields, parse_json, visible
from vring.errors import DeviceError, PeerVanished

__all__ = ["QmpClient", "QmpError"]


class QmpError(DeviceError):
    """QEMU refused a command. `error_class` is its own word for it."""

    def __init__(self, message: str, error_class: str = "GenericError") -> None:
        super().__init__(message)
        self.error_class = error_class


class QmpClient(LineConnection):
    """The client's end of a monitor connection; negotiates capabilities at once.

    Parameters
    ----------
    connection
        Connected unix socket; owned from now on.
    timeout
        Seconds to wait for any answer.
    """

    def __init__(self, connection: socket.socket, *, timeout: float = 20.0) -> None:
        super().__init__(connection, "QMP", timeout)
        self._messages: list[Fields] = []
        self.events: list[dict[str, Any]] = []
        """Events heard and not taken yet, as QEMU sent them."""
        while not self._messages:
            self._receive()
        version = self._messages.pop(0).members("QMP").members("version")
        numbers = version.members("qemu")
        self.version: dict[str, Any] = {
            "qemu": {part: numbers.integer(part) for part in ("major", "minor", "micro")},
            "package": visible(version.text("package")),
        }
        """Version as QEMU says it: ``qemu`` with ``major``, ``minor``, ``micro``, and ``package``."""
        self.execute("qmp_capabilities")

    def _line(self, line: bytes) -> None:
        said = parse_json(line, "what QEMU's monitor sent", refusal=DeviceError, most=MAX_LINE)
        message = Fields(said, "what QEMU's monitor sent", DeviceError)
        if "event" not in message:
            self._messages.append(message)
            return
        message.text("event")
        if "data" in message:
            message.members("data")
        self.events.append(said)

    def execute(self, command: str, fds: Sequence[int] = (), /, **arguments: Any) -> Any:
        """Run a command and return what it returns.

        Parameters
        ----------
        command
            Its name.
        fds
            Descriptors to send along (for ``getfd``).
        arguments
            Its arguments; an underscore stands for a minus sign.

        Raises
        ------
        QmpError
            If QEMU refuses it.
        PeerVanished
            If QEMU is gone.
        """
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._send(json.dumps(request).encode() + b"\n", fds)
        while not self._messages:
            self._receive()
        answer = self._messages.pop(0)
        if "return" in answer:
            return answer.any("return")
        error = answer.members("error")
        raise QmpError(f"QEMU refuses {command}: {visible(error.text('desc'))}", error.text("class"))

    def take_events(self) -> list[dict[str, Any]]:
        """Return the events that came, and forget them; does not wait."""
        self.look()
        events, self.events = self.events, []
        return events

    def wait_event(self, name: str, timeout: float, **data: Any) -> dict[str, Any]:
        """Wait for an event with this name and at least this data; events before it are dropped.

        Raises
        ------
        PeerVanished
            If it does not come in time, or QEMU is gone.
        """
        deadline = time.monotonic() + timeout
        while True:
            while self.events:
                event = self.events.pop(0)
                if event["event"] == name and data.items() <= event.get("data", {}).items():
                    return event
            left = deadline - time.monotonic()
            if left <= 0:
                raise PeerVanished(f"QMP: no event {name} {data or ''} within {timeout:g} s")
            if wait_readable([self.fileno()], left):
                self.look()
