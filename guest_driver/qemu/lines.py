"""A connection to QEMU on which both sides speak in lines; what they mean is `qmp`'s and `qtest`'s."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from vring.errors import DeviceError, PeerVanished

__all__ = ["MAX_LINE", "LineConnection"]

MAX_LINE = 16 << 20
"""Bytes of the longest line that is read."""


class LineConnection:
    """Sends and receives lines, with a bounded wait for each answer.

    Parameters
    ----------
    connection
        Connected socket; owned from now on.
    name
        Of the language, for messages.
    timeout
        Seconds to wait for anything.
    """

    def __init__(self, connection: socket.socket, name: str, timeout: float) -> None:
        self._socket = connection
        self._socket.settimeout(timeout)
        self._name = name
        self._data = b""

    def _line(self, line: bytes) -> None:
        """Take in a line, without its end."""
        raise NotImplementedError

    def _receive(self) -> None:
        """Wait for more, and take in the lines that are complete.

        Raises
        ------
        PeerVanished
            If nothing comes, or QEMU is gone.
        DeviceError
            If a line has no end.
        BlockingIOError
            If the socket does not wait and there is nothing.
        """
        try:
            data = self._socket.recv(1 << 16)
        except BlockingIOError:
            raise
        except TimeoutError as error:
            raise PeerVanished(f"{self._name}: QEMU does not answer") from error
        except OSError as error:
            raise PeerVanished(f"{self._name}: {error.strerror or error}") from error
        if not data:
            raise PeerVanished(f"{self._name}: QEMU closed the connection")
        *lines, self._data = (self._data + data).split(b"\n")
        if len(self._data) > MAX_LINE:
            raise DeviceError(f"{self._name}: QEMU sends a line without end")
        for line in lines:
            self._line(line)

    def _send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        try:
            if fds:
                socket.send_fds(self._socket, [data], list(fds))
            else:
                self._socket.sendall(data)
        except OSError as error:
            raise PeerVanished(f"{self._name}: {error.strerror or error}") from error

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

    def fileno(self) -> int:
        """Return the descriptor, to wait for what comes by itself: events, interrupts."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()
