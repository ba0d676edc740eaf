"""Where a migration stream goes: a socket, with answers coming back, or a file."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import socket
import stat
import tempfile
from collections import deque
from collections.abc import Sequence

from host_qemu_side.migration.records import Refused
from host_qemu_side.migration.stream import Kind, Record, StreamReader
from vring.errors import NAMED_WRONG, MissingFacility, PeerVanished, UsageError, VirtioError

__all__ = ["FileOutput", "SocketOutput", "try_name"]

IOV = 64
SEND_BUFFER = 4 << 20
LAST_WORDS = 64
"""Records of a destination that is gone in which a reason is looked for."""
MODE = 0o600
BEGIN, PARTIAL = ".balloon-", ".partial"


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
        with contextlib.suppress(VirtioError):
            for _ in range(LAST_WORDS):
                if (record := self.answer()) is None:
                    break
                if record.kind is Kind.REFUSED:
                    return f"; it said: {Refused.of(record).why}"
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

    def retract(self) -> bool:
        """Drop what the socket has not taken; return whether there was anything."""
        left = bool(self._pending)
        self._pending.clear()
        return left

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def try_name(path: str) -> str:
    """See that a file of this name can be made, or replaced if there is one; nothing is left behind.

    Parameters
    ----------
    path
        Of the file; a link is followed.

    Returns
    -------
    str
        The path without links.

    Raises
    ------
    UsageError
        If it cannot, or something that is no regular file has this name.
    """
    try:
        folder, name = os.path.split(path)
        if name in ("", os.curdir, os.pardir):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        target = os.path.join(os.path.realpath(folder, strict=True), name)
        if os.path.islink(target):
            target = os.path.realpath(target)
        if os.path.lexists(target):
            _may_replace(path, target)
        else:
            fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE)
            os.unlink(target)
            os.close(fd)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; choose another path") from error
    return target


def _may_replace(path: str, target: str) -> None:
    info, folder = os.stat(target), os.path.dirname(target)
    if not stat.S_ISREG(info.st_mode):
        raise UsageError(f"cannot write {path}: it exists and is no regular file; choose another path")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    where = os.stat(folder)
    if where.st_mode & stat.S_ISVTX and os.geteuid() not in (0, info.st_uid, where.st_uid):
        raise UsageError(f"cannot write {path}: it is another user's; choose another path")


class FileOutput:
    """Writes the stream into a file, which gets its name only when it is complete.

    Until then it has none where the file system can do that (`O_TMPFILE`), so that nothing is left whatever way this
    process ends; elsewhere it has one that nobody else has, ``.balloon-*.partial``. It holds a guest's memory, so
    nobody but this user may read it.

    Raises
    ------
    UsageError
        If the file cannot be made, or something that is no regular file has this name.
    """

    two_way = False
    blocked = False

    def __init__(self, path: str) -> None:
        self.path = path
        self._target = try_name(path)
        self._folder = os.path.dirname(self._target)
        self._aside: str | None = None
        self.bytes_sent = 0
        try:
            self._file = self._create()
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}; choose another path") from error

    def _create(self) -> io.FileIO:
        try:
            return io.FileIO(os.open(self._folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, MODE), "wb")
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
        fd, self._aside = tempfile.mkstemp(PARTIAL, BEGIN, self._folder)
        return io.FileIO(fd, "wb")

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

    def _full(self, error: OSError) -> MissingFacility | UsageError:
        if error.errno in NAMED_WRONG:  # it was right when this began
            return UsageError(f"cannot write {self.path}: {error.strerror}; its folder was changed meanwhile")
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
        MissingFacility, UsageError
            If that fails; there is no such file then.
        """
        try:
            os.fsync(self._file.fileno())
            if self._aside is None:
                self._aside = self._link()
            os.rename(self._aside, self._target)
            self._aside = self._target  # until its name is durable, too, `close` removes it
            self._sync_folder()
            self._aside = None
        except OSError as error:
            raise self._full(error) from error

    def retract(self) -> bool:
        """Nobody has read what has no name yet."""
        return True

    def _link(self) -> str:
        # Only with a folder's descriptor does os.link follow the link that /proc has for an open file.
        folder = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            while True:
                path = os.path.join(self._folder, f"{BEGIN}{secrets.token_hex(8)}{PARTIAL}")
                with contextlib.suppress(FileExistsError):
                    os.link(str(self._file.fileno()), path, src_dir_fd=folder, follow_symlinks=True)
                    return path
        finally:
            os.close(folder)

    def _sync_folder(self) -> None:
        """Make the name durable as well; some file systems know no such thing."""
        try:
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except PermissionError:  # a folder that can be written, not read
            return
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        finally:
            os.close(folder)

    def close(self) -> None:
        """Close; what is incomplete is removed."""
        self._file.close()
        if self._aside is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._aside)
            self._aside = None
