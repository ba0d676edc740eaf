"""Descriptors that a front end gave: taken from its socket whole or not at all, and each of a kind that it can be.

Their flags are never changed: they belong to open file descriptions that the front end has, too.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import stat
import struct

from vring import vhost_user as vu
from vring.backing import describe_fd
from vring.vhost_user import VhostUserError

__all__ = ["NoDoorbell", "adopt_socket", "check_doorbell", "check_held", "close_fd", "receive"]

EVENTFD = "anon_inode:[eventfd]"
CREDENTIALS = struct.Struct("3i")
"""``struct ucred``: process, user, group."""


class NoDoorbell(VhostUserError):
    """What came as kick, call or err descriptor cannot be one: its ring is the worse for it, nothing else."""


def close_fd(fd: int) -> None:
    """Close a descriptor, -1 for none."""
    if fd >= 0:
        with contextlib.suppress(OSError):
            os.close(fd)


def receive(connection: socket.socket, size: int) -> tuple[bytes, list[int]]:
    """Read at most `size` bytes and the descriptors that came with them, without waiting.

    Raises
    ------
    VhostUserError
        If not all descriptors arrived; those that did are closed.
    BlockingIOError
        If there is nothing to read.
    """
    room = socket.CMSG_SPACE(vu.MAX_FDS * array.array("i").itemsize)
    data, ancillary, flags, _ = connection.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    if flags & socket.MSG_CTRUNC:
        for fd in fds:
            close_fd(fd)
        raise VhostUserError(
            f"vhost-user: not all descriptors of a message arrived: it has more than {vu.MAX_FDS}, or this process "
            "can have no more (ulimit -n)"
        )
    return data, list(fds)


def check_held(fds: list[int], connection: socket.socket) -> None:
    """See that no descriptor is a connection to this process: held here, its end would never be seen.

    Raises
    ------
    VhostUserError
        If one is.
    """
    if not fds or _peer(connection) == os.getpid():  # this very process is the front end, or made its socket for it
        return
    for fd in fds:
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            with socket.socket(fileno=os.dup(fd)) as theirs:
                if theirs.family == socket.AF_UNIX and _peer(theirs) == os.getpid():
                    raise VhostUserError("vhost-user: a descriptor is the front end's own connection to this process")


def _peer(connection: socket.socket) -> int:
    """Return which process has, or made, the other end; 0: none, or none that can be named here."""
    try:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    except OSError:
        return 0
    return int(CREDENTIALS.unpack(credentials)[0])


def check_doorbell(fd: int, what: str, queue: int) -> None:
    """See that a descriptor can be rung and heard without waiting: an eventfd, or as User-Mode Linux has it a socket.

    Raises
    ------
    NoDoorbell
        If it is anything else: a pipe, say, whose reader could keep its writer waiting.
    """
    if describe_fd(fd) != EVENTFD and not stat.S_ISSOCK(os.fstat(fd).st_mode):
        name = describe_fd(fd) or "what came"
        raise NoDoorbell(
            f"vhost-user: {what}: {name} is no doorbell: kick, call and err are eventfds or sockets", queue=queue
        )


def adopt_socket(fds: list[int], what: str) -> socket.socket:
    """Take over a message's one descriptor, which must be a connected socket.

    Raises
    ------
    VhostUserError
        If it is not, or not one; it stays in the list.
    """
    if len(fds) != 1:
        raise VhostUserError(f"vhost-user: {what} brings {len(fds)} descriptors, not one")
    if not stat.S_ISSOCK(os.fstat(fds[0]).st_mode):
        raise VhostUserError(f"vhost-user: {what}: {describe_fd(fds[0]) or 'what came'} is no socket")
    adopted = socket.socket(fileno=fds[0])
    fds.clear()
    return adopted
