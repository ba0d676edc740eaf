"""Opens the destination of a migration without waiting for it: the one way there, for the command and the monitor."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from host_qemu_side.migration.address import Address, parse_address
from host_qemu_side.migration.output import FileOutput, SocketOutput
from vring.errors import PeerVanished, UsageError
from vring.unix_socket import adopted, why_misnamed

__all__ = ["Connecting", "connect"]

_POLL = 0.02


class Connecting:
    """A connection in the making; `poll` it.

    Parameters
    ----------
    address
        ``unix:PATH``, ``tcp:HOST:PORT``, ``file:PATH`` or ``fd:N``. A host name (other than a number) is looked up at
        once, and that may take time; if it has several addresses, one after another is tried.
    timeout
        Seconds until it counts as failed.

    Raises
    ------
    UsageError
        If the text makes no sense, the file cannot be made, the descriptor is no socket, or a Unix socket's folder is
        not there or not permitted.
    PeerVanished
        If nobody listens there.
    """

    def __init__(self, address: Address | str, timeout: float = 5.0) -> None:
        self.address = parse_address(address) if isinstance(address, str) else address
        self._deadline = time.monotonic() + timeout
        self._targets: deque[tuple[int, Any]] = deque()
        self._until = self._deadline
        self._socket: socket.socket | None = None
        self._target: Any = None
        self._connected = False
        self._file: FileOutput | None = None
        if self.address.kind == "file":
            self._file = FileOutput(self.address.path)
        elif self.address.kind == "fd":
            self._socket, self._connected = adopted(self.address.fd), True
        else:
            self._targets.extend(self._look_up())
            self._next(OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL)))

    def _look_up(self) -> list[tuple[int, Any]]:
        """Return families and addresses, those to try first in front."""
        if self.address.kind == "unix":
            return [(socket.AF_UNIX, self.address.path)]
        if not self.address.port:
            raise UsageError(f"{self.address}: nobody can be reached at port 0; write the port that the receiver said")
        try:
            found = socket.getaddrinfo(self.address.host, self.address.port, type=socket.SOCK_STREAM)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise PeerVanished(f"no destination at {self.address}: {why}") from error
        return [(family, target) for family, _, _, _, target in found]

    def _next(self, failed: OSError) -> None:
        """Go on with the next address that is left; `failed` says why the last one was given up."""
        while self._targets:
            if self._socket is not None:
                self._socket.close()
            now = time.monotonic()
            self._until = now + (self._deadline - now) / len(self._targets)
            family, self._target = self._targets.popleft()
            try:
                self._socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
                code = self._try()
            except OSError as error:  # such as no IPv6 on this machine
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    raise
                failed = error
                continue
            if not code:
                return
            failed = OSError(code, os.strerror(code))
        self.close()
        text = f"no destination at {self.address}: {failed.strerror or failed}"
        if self.address.kind == "unix" and (why := why_misnamed(self.address.path)):
            raise UsageError(f"no destination at {self.address}: {why}") from failed
        raise PeerVanished(f"{text}; start `balloon receive {self.address}` there first") from failed

    def _try(self) -> int:
        """Try to connect; return the error if that failed, 0 if it did not, or not yet."""
        assert self._socket is not None
        code = self._socket.connect_ex(self._target)
        self._connected = code in (0, errno.EISCONN)
        # EAGAIN: a Unix socket's queue is full.
        return 0 if self._connected or code in (errno.EINPROGRESS, errno.EALREADY, errno.EAGAIN) else code

    def poll(self) -> SocketOutput | FileOutput | None:
        """Return the output once it is there, None before.

        Raises
        ------
        PeerVanished
            If it cannot be reached, or not in time.
        """
        if self._file is not None:
            return self._file
        if not self._connected and (code := self._try()):
            self._next(OSError(code, os.strerror(code)))
        if not self._connected and time.monotonic() > self._until:
            self._next(OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))
        assert self._socket is not None
        return SocketOutput(self._socket) if self._connected else None

    def close(self) -> None:
        """Give up."""
        if self._socket is not None:
            self._socket.close()
        if self._file is not None:
            self._file.close()


def connect(address: Address | str, wait: Callable[[float], None] = time.sleep) -> SocketOutput | FileOutput:
    """Open the destination and wait until it is there; arguments and errors as those of `Connecting`.

    Parameters
    ----------
    address
        Where it is.
    wait
        Called with the seconds to wait, over and over; what it raises ends the attempt.
    """
    connecting = Connecting(address)
    try:
        while (output := connecting.poll()) is None:
            wait(_POLL)
    except BaseException:
        connecting.close()
        raise
    return output
