"""Where a migration stream goes: a socket, with answers coming back, or a file."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import socket
from collections import deque
from collections.abc import Sequence

from host_qemu_side.migration.stream import Record, StreamReader
from vring.errors import MissingFacility, PeerVanished, UsageError

__all__ = ["FileOutput", "SocketOutput", "connect", "parse_address"]

IOV = 64
SEND_BUFFER = 4 << 20


def parse_address(text: str) -> tuple[str, str]:
    """Split ``unix:PATH``, ``tcp:HOST:PORT``, ``file:PATH`` or ``fd:N`` into kind and rest.

    Raises
    ------
    UsageError
        If it is none of them.
    """
    kind, _, rest = text.partition(":")
    if kind in ("unix", "file") and rest:
        return kind, rest
    if kind == "fd" and rest.isdigit():
        return kind, rest
    if kind == "tcp":
        host, _, port = rest.rpartition(":")
        if host and port.isdigit() and int(port) < 65536:
            return kind, rest
    raise UsageError(f"{text!r} is no place for a migration: write unix:PATH, tcp:HOST:PORT or file:PATH")


def connect(text: str, timeout: float = 5.0) -> SocketOutput | FileOutput:
    """Open the place named by `text`, see `parse_address`.

    Raises
    ------
    PeerVanished
        If nobody listens there.
    UsageError
        If the text makes no sense, or the file cannot be made.
    """
    kind, rest = parse_address(text)
    if kind == "file":
        return FileOutput(rest)
    if kind == "fd":
        return SocketOutput(socket.socket(fileno=int(rest)))
    try:
        if kind == "unix":
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            sock.settimeout(timeout)
            sock.connect(rest)
        else:
            host, _, port = rest.rpartition(":")
            sock = socket.create_connection((host.strip("[]"), int(port)), timeout=timeout)
    except OSError as error:
        raise PeerVanished(
            f"no destination at {text}: {error.strerror or error}; start `balloon receive {text}` there first"
        ) from error
    return SocketOutput(sock)


class SocketOutput:
    """Sends over a connected stream socket without ever waiting; answers are read from it."""

    two_way = True

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._pending: deque[memoryview] = deque()
        self.bytes_sent = 0
        """What the socket took."""
        self._reader = StreamReader()

    def fileno(self) -> int:
        """Return the socket, to wait for."""
        return self._socket.fileno()

    @property
    def blocked(self) -> bool:
        """Whether there are bytes the socket would not take yet."""
        return bool(self._pending)

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Take buffers to send."""
        self._pending.extend(memoryview(b).cast("B") for b in buffers if len(b))

    def flush(self) -> bool:
        """Send what the socket takes.

        Raises
        ------
        PeerVanished
            If the destination is gone; what it said last is in the message.
        """
        while self._pending:
            try:
                sent = self._socket.sendmsg([self._pending[i] for i in range(min(IOV, len(self._pending)))])
            except BlockingIOError:
                return False
            except OSError as error:
                raise PeerVanished(f"the destination is gone: {error.strerror or error}{self._last_words()}") from error
            self.bytes_sent += sent
            while sent:
                head = self._pending[0]
                if sent >= len(head):
                    sent -= len(head)
                    self._pending.popleft()
                else:
                    self._pending[0] = head[sent:]
                    sent = 0
        return True

    def _last_words(self) -> str:
        with contextlib.suppress(Exception):
            while (record := self.answer()) is not None:
                if "why" in record.json():
                    return f"; it said: {record.json()['why']}"
        return ""

    def answer(self) -> Record | None:
        """Return the next record from the destination, None if there is none yet.

        Raises
        ------
        PeerVanished
            If it is gone.
        StreamError
            If it does not speak our language.
        """
        while True:
            record = self._reader.next()
            if record is not None:
                return record
            try:
                size = self._socket.recv_into(self._reader.room())
            except BlockingIOError:
                return None
            except OSError as error:
                raise PeerVanished(f"the destination is gone: {error.strerror or error}") from error
            if not size:
                raise PeerVanished("the destination closed the connection")
            self._reader.filled(size)

    def finish(self) -> None:
        """Nothing: the destination has confirmed."""

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


class FileOutput:
    """Writes the stream into a file, which gets its name only when it is complete.

    Until then it has none where the file system can do that (`O_TMPFILE`), so that nothing is left whatever way this
    process ends; elsewhere it is called ``PATH.partial``.

    Raises
    ------
    UsageError
        If the file cannot be made, or something that is no regular file has this name.
    """

    two_way = False
    blocked = False

    def __init__(self, path: str) -> None:
        self.path = path
        self._partial = f"{path}.partial"
        self._named = False
        self.bytes_sent = 0
        if os.path.lexists(path) and not os.path.isfile(path):
            raise UsageError(f"cannot write {path}: it exists and is no regular file; choose another path")
        try:
            self._file = self._create()
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}") from error
        self._complete = False

    def _create(self) -> io.FileIO:
        folder = os.path.dirname(os.path.abspath(self.path))
        try:
            return io.FileIO(os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o666), "wb")
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
        self._named = True
        return io.FileIO(self._partial, "wb")

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Write.

        Raises
        ------
        MissingFacility
            If there is no room.
        """
        try:
            for buffer in buffers:
                view = memoryview(buffer).cast("B")
                self.bytes_sent += len(view)
                while len(view):
                    view = view[self._file.write(view) :]
        except OSError as error:
            raise self._full(error) from error

    def _full(self, error: OSError) -> MissingFacility:
        return MissingFacility(f"cannot write {self.path}: {error.strerror}; free some space or choose another place")

    def flush(self) -> bool:
        """Everything is written already."""
        return True

    def answer(self) -> Record | None:
        """A file does not answer."""
        return None

    def finish(self) -> None:
        """Make the file durable and give it its name.

        Raises
        ------
        MissingFacility
            If that fails; there is no such file then.
        """
        try:
            os.fsync(self._file.fileno())
            if not self._named:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._partial)
                self._named = True
                self._link(self._partial)
            os.rename(self._partial, self.path)
        except OSError as error:
            raise self._full(error) from error
        self._complete = True

    def _link(self, path: str) -> None:
        # Only with a folder's descriptor does os.link follow the link that /proc has for an open file.
        folder = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.link(str(self._file.fileno()), path, src_dir_fd=folder, follow_symlinks=True)
        finally:
            os.close(folder)

    def close(self) -> None:
        """Close; what is incomplete is removed."""
        self._file.close()
        if self._named and not self._complete:
            with contextlib.suppress(OSError):
                os.unlink(self._partial)
