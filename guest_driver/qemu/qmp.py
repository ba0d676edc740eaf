"""A small synchronous QMP client: commands with descriptors, and events. Nothing here knows what they mean."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from typing import Any

from guest_driver.waiting import wait_readable
from vring.errors import DeviceError, PeerVanished

__all__ = ["QmpClient", "QmpError"]


class QmpError(DeviceError):
    """QEMU refused a command. `error_class` is its own word for it."""

    def __init__(self, message: str, error_class: str = "GenericError") -> None:
        super().__init__(message)
        self.error_class = error_class


class QmpClient:
    """The client's end of a monitor connection; negotiates capabilities at once.

    Parameters
    ----------
    connection
        Connected unix socket; owned from now on.
    timeout
        Seconds to wait for any answer.
    """

    def __init__(self, connection: socket.socket, *, timeout: float = 20.0) -> None:
        self._socket = connection
        self._socket.settimeout(timeout)
        self._data = b""
        self._messages: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        """Events heard and not taken yet, as QEMU sent them."""
        while not self._messages:
            self._receive()
        self.version: dict[str, Any] = self._messages.pop(0)["QMP"]["version"]
        """Version as QEMU says it: ``qemu`` with ``major``, ``minor``, ``micro``, and ``package``."""
        self.execute("qmp_capabilities")

    def _receive(self) -> None:
        try:
            data = self._socket.recv(1 << 16)
        except BlockingIOError:
            raise
        except TimeoutError as error:
            raise PeerVanished("QMP: QEMU does not answer") from error
        except OSError as error:
            raise PeerVanished(f"QMP: {error.strerror or error}") from error
        if not data:
            raise PeerVanished("QMP: QEMU closed the connection")
        *lines, self._data = (self._data + data).split(b"\n")
        for line in lines:
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
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode() + b"\n"], list(fds))
        except OSError as error:
            raise PeerVanished(f"QMP: {error.strerror or error}") from error
        while not self._messages:
            self._receive()
        answer = self._messages.pop(0)
        if "error" in answer:
            raise QmpError(f"QEMU refuses {command}: {answer['error']['desc']}", answer["error"]["class"])
        return answer["return"]

    def look(self) -> None:
        """Take in what has arrived without waiting."""
        timeout = self._socket.gettimeout()
        self._socket.setblocking(False)
        try:
            while True:
                self._receive()
        except BlockingIOError:
            pass
        finally:
            self._socket.settimeout(timeout)

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
            if wait_readable([self._socket.fileno()], left):
                self.look()

    def fileno(self) -> int:
        """Return the descriptor, to wait for events."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()
