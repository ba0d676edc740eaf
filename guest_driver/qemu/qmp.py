"""A small synchronous QMP client: commands with descriptors, and events. Nothing here knows what they mean."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from typing import Any

from guest_driver.qemu.lines import LineConnection
from guest_driver.waiting import wait_readable
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
        self._messages: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        """Events heard and not taken yet, as QEMU sent them."""
        while not self._messages:
            self._receive()
        self.version: dict[str, Any] = self._messages.pop(0)["QMP"]["version"]
        """Version as QEMU says it: ``qemu`` with ``major``, ``minor``, ``micro``, and ``package``."""
        self.execute("qmp_capabilities")

    def _line(self, line: bytes) -> None:
        message = json.loads(line)
        (self.events if "event" in message else self._messages).append(message)

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
        if "error" in answer:
            raise QmpError(f"QEMU refuses {command}: {answer['error']['desc']}", answer["error"]["class"])
        return answer["return"]

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
