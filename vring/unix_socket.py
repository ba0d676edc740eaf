"""Unix sockets by name: which names can be one, and listening on one without taking it from anybody else."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator

from vring.errors import UsageError, quoted

__all__ = ["MAX_PATH", "UnixListener", "adopted", "socket_path", "why_misnamed"]

MAX_PATH = 107
"""Bytes of a path that the system takes for a socket."""
_PATIENCE = 2.0
_MODE = 0o600
_NO_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})


def socket_path(path: str) -> str:
    """Return the path if a Unix socket can have it.

    Raises
    ------
    UsageError
        If it is empty or too long, or no name of a file at all.
    """
    try:
        size = len(os.fsencode(path))
    except UnicodeEncodeError as error:
        raise UsageError(f"{quoted(path)} cannot be the path of a socket: no file can have this name") from error
    if not path or "\0" in path:
        raise UsageError(f"{quoted(path)} cannot be the path of a socket: write a name such as /tmp/balloon.sock")
    if size > MAX_PATH:
        raise UsageError(
            f"{quoted(path)}: {size} bytes are too long for the path of a Unix socket, it can have {MAX_PATH}; "
            "choose a shorter one"
        )
    return path


def adopted(fd: int) -> socket.socket:
    """Return the socket that a descriptor of this process is: somebody who started it has connected it.

    Raises
    ------
    UsageError
        If it is none.
    """
    try:
        return socket.socket(fileno=fd)
    except OSError as error:
        raise UsageError(f"fd:{fd} is no connected socket of this process: {error.strerror}") from error


def why_misnamed(path: str) -> str:
    """Return why no socket of this name can be reached, whoever listens: its folder, a permission, what it is.

    Empty if it may be right, and whoever was to listen there is not there yet, or no longer.
    """
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        return "there is no such folder"
    if not os.access(folder, os.X_OK):
        return os.strerror(errno.EACCES)
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return "it is no socket"
    except FileNotFoundError:
        return ""
    except OSError as error:
        return error.strerror or str(error)
    return "" if os.access(path, os.W_OK) else os.strerror(errno.EACCES)


class UnixListener:
    """A listening Unix socket that only its user may connect to, whatever the umask.

    One that a dead process left behind is removed; one that a live process has, or a file that is no socket, is not.

    Parameters
    ----------
    path
        Its name.
    backlog
        Connections that may wait.

    Raises
    ------
    UsageError
        If one cannot listen there.
    """

    def __init__(self, path: str, backlog: int = 16) -> None:
        self.path = socket_path(path)
        self._identity: tuple[int, int] | None = None
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            os.fchmod(self.socket.fileno(), _MODE)  # of the socket, which its name gets: it is never wider than that
            with _one_at_a_time(os.path.dirname(path) or "."):
                _remove_left_over(path)
                self.socket.bind(path)
                self._identity = _identity(path)
                os.chmod(path, _MODE)  # nor narrower: a umask may have taken bits away
            self.socket.listen(backlog)
        except OSError as error:
            self.close()
            raise UsageError(f"cannot listen on {path}: {error.strerror or error}") from error
        except UsageError:
            self.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor, to wait for."""
        return self.socket.fileno()

    def accept(self) -> socket.socket | None:
        """Return the next connection, non-blocking; None if there is none, or it has ended already.

        Raises
        ------
        OSError
            If there is no room for another: it goes on waiting, and whoever waits for this socket is to pause.
        """
        try:
            connection, _ = self.socket.accept()
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise
            return None
        connection.setblocking(False)
        return connection

    def close(self) -> None:
        """Remove the name, if it is still this socket's, and close the socket."""
        if self.socket.fileno() < 0:
            return
        with contextlib.suppress(OSError):
            # Before the socket is closed, which keeps its inode: until then no other file can have the same number.
            if _identity(self.path) == self._identity:
                os.unlink(self.path)
        self.socket.close()


def _identity(path: str) -> tuple[int, int]:
    info = os.lstat(path)
    return info.st_dev, info.st_ino


@contextlib.contextmanager
def _one_at_a_time(folder: str) -> Iterator[None]:
    """Take turns with others that listen in this folder: of two that find the same left-over each would remove it, the
    second with what the first put in its place.

    Best effort: where folders cannot be locked, or somebody keeps the lock, it goes on without.
    """
    fd = -1
    try:
        with contextlib.suppress(OSError):
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            deadline = time.monotonic() + _PATIENCE
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.01)
        yield
    finally:
        if fd >= 0:
            os.close(fd)


def _remove_left_over(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise UsageError(f"cannot listen on {path}: it exists and is no socket; choose another path")
    except FileNotFoundError:
        return
    # A socket of another type is told whether there is a live one behind the name, and does not connect to it.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:
                raise
    raise UsageError(f"cannot listen on {path}: another process listens there already")
