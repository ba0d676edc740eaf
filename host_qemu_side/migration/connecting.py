"""Opens the destination of a migration without waiting for it."""

from __future__ import annotations

import errno
import os
import socket
import time

from host_qemu_side.migration.output import FileOutput, SocketOutput, parse_address
from vring.errors import PeerVanished, UsageError

__all__ = ["Connecting"]


class Connecting:
    """A connection in the making; `poll` it.

    Parameters
    ----------
    text
        ``unix:PATH``, ``tcp:HOST:PORT`` or ``file:PATH``. A host name (other than a number) is looked up at once, and
        that may take time.
    timeout
        Seconds until it counts as failed.

    Raises
    ------
    UsageError
        If the text makes no sense, or the file cannot be made.
    PeerVanished
        If nobody listens there.
    """

    def __init__(self, text: str, timeout: float = 5.0) -> None:
        kind, rest = parse_address(text)
        if kind == "fd":
            raise UsageError(f"{text!r}: no descriptors here; write unix:PATH, tcp:HOST:PORT or file:PATH")
        self._text, self._deadline = text, time.monotonic() + timeout
        self._socket: socket.socket | None = None
        self._connected = False
        self._file: FileOutput | None = None
        self._target: str | tuple[str, int]
        if kind == "file":
            self._file = FileOutput(rest)
            return
        family, self._target = socket.AF_UNIX, rest
        if kind == "tcp":
            host, _, port = rest.rpartition(":")
            try:
                found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
            except OSError as error:
                raise self._failed(error) from error
            family, self._target = found[0], (str(found[4][0]), int(found[4][1]))
        self._socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._try()

    def _failed(self, error: OSError) -> PeerVanished:
        self.close()
        why = error.strerror or error
        return PeerVanished(f"no destination at {self._text}: {why}; start `balloon receive {self._text}` there first")

    def _try(self) -> None:
        assert self._socket is not None
        code = self._socket.connect_ex(self._target)
        if code in (0, errno.EISCONN):
            self._connected = True
        elif code not in (errno.EINPROGRESS, errno.EALREADY, errno.EAGAIN):  # EAGAIN: a Unix socket's queue is full
            raise self._failed(OSError(code, os.strerror(code)))

    def poll(self) -> SocketOutput | FileOutput | None:
        """Return the output once it is there, None before.

        Raises
        ------
        PeerVanished
            If it cannot be reached, or not in time.
        """
        if self._file is not None:
            return self._file
        assert self._socket is not None
        if not self._connected:
            self._try()
        if not self._connected:
            if time.monotonic() > self._deadline:
                raise self._failed(OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))
            return None
        return SocketOutput(self._socket)

    def close(self) -> None:
        """Give up."""
        if self._socket is not None:
            self._socket.close()
        if self._file is not None:
            self._file.close()
