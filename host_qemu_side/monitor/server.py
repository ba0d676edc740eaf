"""Puts QMP sessions behind a Unix socket, on a `Loop`. Nothing here waits for a client.

Commands are executed by `step`, never from within a callback of the loop: code that serves the loop while it waits is
entered again by a command only where it calls `step` itself.
"""

from __future__ import annotations

import logging
import socket
import time
from typing import Any

from host_qemu_side.loop import READ, WRITE, Loop
from host_qemu_side.monitor.dispatch import Dispatcher, Session
from vring.errors import reason
from vring.unix_socket import UnixListener

__all__ = ["MonitorServer"]

log = logging.getLogger(__name__)
MAX_CLIENTS = 16
READ_SIZE = 16 << 10


class _Client:
    """A connection and its session."""

    def __init__(self, server: MonitorServer, connection: socket.socket) -> None:
        self.server, self.connection = server, connection
        self.session = Session(server.dispatcher)
        self.closed = False
        self.ended = False
        """The client sends no more; what it asked for is still answered."""
        self._watching = 0
        self.update()

    def update(self) -> None:
        """Send what can be sent, then watch for what is wanted."""
        self._flush()
        if not self.closed and self.session.overflowed:
            log.warning("monitor: a client does not read its replies and was dropped")
            self.close()
        if not self.closed and self.ended and not self.session.waiting and not self.session.output:
            self.close()
        if self.closed:
            return
        events = READ if self.session.wants_input and not self.ended else 0
        events |= WRITE if self.session.output else 0
        if events != self._watching:
            if events:
                self.server.loop.watch(self.connection.fileno(), self._ready, events)
            else:
                self.server.loop.unwatch(self.connection.fileno())
            self._watching = events

    def _flush(self) -> None:
        output = self.session.output
        try:
            while output and not self.closed:
                del output[: self.connection.send(output)]
        except BlockingIOError:
            pass
        except OSError:
            self.close()

    def _ready(self) -> None:
        try:
            if self._watching & READ:
                data = self.connection.recv(READ_SIZE)
                self.ended = not data
                self.session.feed(data)
        except BlockingIOError:
            pass
        except OSError:
            self.close()
        except Exception as error:
            self.fail(error)
        self.update()

    def fail(self, error: Exception) -> None:
        """Hang up on a client that cannot be served: a fault of ours, or no memory, ends it and nobody else."""
        log.debug("monitor: a client could not be served", exc_info=True)
        log.error("monitor: a client was dropped: %s", reason(error))
        self.close()

    def close(self) -> None:
        """Hang up."""
        if not self.closed:
            self.closed = True
            self.server.loop.unwatch(self.connection.fileno())
            self.connection.close()


class MonitorServer:
    """Listens for monitor clients.

    Parameters
    ----------
    loop
        Who watches the descriptors.
    path
        Of the Unix socket.
    dispatcher
        The commands.

    Raises
    ------
    UsageError
        If one cannot listen there.
    """

    def __init__(self, loop: Loop, path: str, dispatcher: Dispatcher) -> None:
        self.loop, self.dispatcher = loop, dispatcher
        self._clients: list[_Client] = []
        self._listener = UnixListener(path, MAX_CLIENTS)
        loop.listen(self._listener, self._accept)

    def _accept(self, connection: socket.socket) -> None:
        self._clients = [client for client in self._clients if not client.closed]
        if len(self._clients) >= MAX_CLIENTS:
            log.warning("monitor: more than %d clients, one was turned away", MAX_CLIENTS)
            connection.close()
            return
        self._clients.append(_Client(self, connection))

    def step(self) -> bool:
        """Let each client have one command answered; return whether there was one."""
        stepped = False
        for client in list(self._clients):
            if not client.closed and client.session.ready:
                try:
                    client.session.step()
                    client.update()
                except Exception as error:
                    client.fail(error)
                stepped = True
        self._clients = [client for client in self._clients if not client.closed]
        return stepped

    def event(self, name: str, data: dict[str, Any] | None = None) -> None:
        """Tell all clients; those that do not read are dropped."""
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        stamp = {"seconds": seconds, "microseconds": nanoseconds // 1000}
        message = {"event": name, **({"data": data} if data is not None else {}), "timestamp": stamp}
        for client in self._clients:
            if not client.closed:
                client.session.event(message)
                client.update()

    def close(self) -> None:
        """Hang up on everybody, after what is due was offered to them, and remove the socket."""
        for client in self._clients:
            client.update()
            client.close()
        self._clients = []
        self.loop.unwatch(self._listener.fileno())
        self._listener.close()
