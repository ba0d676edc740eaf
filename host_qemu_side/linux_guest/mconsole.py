"""User-Mode Linux's management console: one datagram asks, one or more answer. Never blocks.

Frame (native byte order): request = magic, version, length (three 32-bit words), then 512 bytes of text;
answer = error, "more follows", length (three 32-bit words), then 512 bytes of text.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from pathlib import Path

from vring.errors import PeerVanished, UsageError

__all__ = ["Reply", "Request"]

_MAGIC = 0xCAFEBABE
_VERSION = 2
_TEXT = 512
_HEAD = struct.Struct("=III")

Reply = tuple[bool, str]
"""Whether the guest did what was asked, and its words."""


class Request:
    """One question to a guest kernel, sent at once; `poll` until the answer is there.

    Each request has a socket of its own: an answer that comes after the asker gave up reaches nobody,
    instead of being taken for the answer to the next question.

    Parameters
    ----------
    path
        The guest's ``mconsole`` socket.
    command
        For instance ``version``, ``stop``, ``go``.

    Raises
    ------
    UsageError
        If the command is longer than 511 bytes.
    PeerVanished
        If nobody listens there.
    """

    def __init__(self, path: Path, command: str) -> None:
        text = command.encode()
        if len(text) >= _TEXT:
            raise UsageError(f"management console commands have at most {_TEXT - 1} bytes, not {len(text)}")
        self._words = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            self._socket.bind("")  # an abstract address of the kernel's choice: the answer needs one to go to
            self._socket.sendto(_HEAD.pack(_MAGIC, _VERSION, len(text)) + text.ljust(_TEXT, b"\0"), os.fspath(path))
        except OSError as error:
            self._socket.close()
            raise PeerVanished(f"the guest's management console {path} is not there: {error.strerror}") from error

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when (a part of) the answer is there."""
        return self._socket.fileno()

    def poll(self) -> Reply | None:
        """Return the answer, or None while it is not complete."""
        with contextlib.suppress(BlockingIOError):
            while True:
                frame = self._socket.recv(_HEAD.size + _TEXT)
                if len(frame) < _HEAD.size:
                    continue
                error, more, length = _HEAD.unpack_from(frame)
                self._words += frame[_HEAD.size : _HEAD.size + length]
                if not more:
                    return not error, self._words.rstrip(b"\0").decode(errors="replace")
        return None

    def close(self) -> None:
        """Give up the question or its answer."""
        self._socket.close()

    def __enter__(self) -> Request:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
