"""Where a migration comes from or goes to, as people write it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from vring.errors import UsageError, quoted
from vring.unix_socket import socket_path

__all__ = ["Address", "parse_address"]

MAX_HOST = 253
"""Characters of a name, as in the DNS."""
_PORT = re.compile(r"[0-9]{1,5}")
_FD = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class Address:
    """A place; `kind` says which of the others holds."""

    kind: str
    """``unix``, ``tcp``, ``file`` or ``fd``."""
    path: str = ""
    host: str = ""
    port: int = 0
    fd: int = -1

    def __str__(self) -> str:
        """Return it as `parse_address` takes it."""
        rest = {"tcp": f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}", "fd": str(self.fd)}
        return f"{self.kind}:{rest.get(self.kind, self.path)}"


def parse_address(text: str) -> Address:
    """Take ``unix:PATH``, ``tcp:HOST:PORT``, ``file:PATH`` or ``fd:N`` apart.

    Raises
    ------
    UsageError
        If it is none of them, or names what cannot be.
    """
    kind, _, rest = text.partition(":")
    if kind == "unix" and rest:
        return Address(kind, path=socket_path(rest))
    if kind == "file" and rest:
        return Address(kind, path=_file_path(rest))
    if kind == "fd" and _FD.fullmatch(rest):
        return Address(kind, fd=int(rest))
    if kind == "tcp":
        host, _, port = rest.rpartition(":")
        if host and _PORT.fullmatch(port) and int(port) < 1 << 16:
            return Address(kind, host=_host_name(host), port=int(port))
    raise UsageError(f"{quoted(text)} is no place for a migration: write unix:PATH, tcp:HOST:PORT or file:PATH")


def _file_path(path: str) -> str:
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise UsageError(f"{quoted(path)}: no file can have this name") from error
    if "\0" in path:
        raise UsageError(f"{quoted(path)}: no file can have this name")
    return path


def _host_name(host: str) -> str:
    name = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        usable = 0 < len(name.encode("idna")) <= MAX_HOST and name.isprintable() and not set(name) & set(" []/@")
    except UnicodeError:  # a part that is empty or too long, or what no name can have
        usable = False
    if not usable:
        raise UsageError(f"{quoted(host)} is no name of a host; write tcp:HOST:PORT, such as tcp:127.0.0.1:4444")
    return name
