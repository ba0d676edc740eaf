"""QMP's framing: bytes in, JSON objects or errors out; objects in, bytes out. No sockets.

A client's message is one line. A message that is complete without its newline is taken at once, and several may share
a line, as QEMU allows; but a newline always ends what went before, so a client that sent half a message is never deaf.
"""

from __future__ import annotations

import json
from typing import Any

from vring.decode import DECODER, check_value

__all__ = ["MAX_LINE", "ErrorClass", "LineReader", "QmpError", "encode"]

MAX_LINE = 64 << 10
"""Bytes of the longest line that is taken."""
JSON_SPACE = " \t\r"


class ErrorClass:
    """The classes of QMP errors."""

    GENERIC = "GenericError"
    COMMAND_NOT_FOUND = "CommandNotFound"
    DEVICE_NOT_ACTIVE = "DeviceNotActive"


class QmpError(Exception):
    """An answer ``{"error": {"class": ..., "desc": ...}}``.

    Parameters
    ----------
    desc
        For a person.
    kind
        One of `ErrorClass`.
    """

    def __init__(self, desc: str, kind: str = ErrorClass.GENERIC) -> None:
        super().__init__(desc)
        self.desc, self.kind = desc, kind

    def as_dict(self) -> dict[str, str]:
        """Return the value of the member ``error``."""
        return {"class": self.kind, "desc": self.desc}


def encode(message: dict[str, Any]) -> bytes:
    """Return a message as QMP sends it: one line of ASCII, ended by CR LF."""
    return json.dumps(message, allow_nan=False, default=str).encode("ascii") + b"\r\n"


class LineReader:
    """Cuts a client's bytes into JSON values.

    Whatever is fed, the reader stays usable: what cannot be understood becomes a `QmpError` in its place.
    """

    def __init__(self, max_line: int = MAX_LINE) -> None:
        self._max = max_line
        self._buffer = bytearray()
        self._skipping = False
        self._balance = 0

    def feed(self, data: bytes) -> list[Any]:
        """Take bytes; return the values (or `QmpError`) that are complete now."""
        found: list[Any] = []
        *lines, rest = data.split(b"\n")
        for line in lines:
            self._take(line, found)
            if self._buffer:
                found += self._parse(bytes(self._buffer))
            self._clear()
            self._skipping = False
        self._take(rest, found)
        # Complete without its newline? Braces inside strings may say no wrongly: then the newline decides.
        if rest and self._balance == 0 and self._buffer.rstrip().endswith(b"}"):
            values = self._parse(bytes(self._buffer))
            if not any(isinstance(value, QmpError) for value in values):
                found += values
                self._clear()
        return found

    def _clear(self) -> None:
        self._buffer.clear()
        self._balance = 0

    def _take(self, piece: bytes, found: list[Any]) -> None:
        """Add to the current line; of a line that is too long nothing is kept, and it is complained of once."""
        if self._skipping:
            return
        if len(self._buffer) + len(piece) > self._max:
            found.append(QmpError(f"a line of more than {self._max} bytes"))
            self._clear()
            self._skipping = True
            return
        self._buffer += piece
        self._balance += piece.count(b"{") - piece.count(b"}")

    @staticmethod
    def _parse(line: bytes) -> list[Any]:
        """Return the values of a line; what follows an error in it is lost."""
        values: list[Any] = []
        try:
            text = line.decode("utf-8")
            at = len(text) - len(text.lstrip(JSON_SPACE))
            while at < len(text):
                value, at = DECODER.raw_decode(text, at)
                check_value(value)
                values.append(value)
                while at < len(text) and text[at] in JSON_SPACE:
                    at += 1
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            values.append(QmpError(f"Invalid JSON syntax: {reason}"))
        return values
