"""The errors of the whole project, and what they say. `vring.codes` makes them from C error codes.

``VirtioError`` covers everything; ``DriverError`` and ``DeviceError`` say which *peer* broke the protocol,
``UsageError`` that the caller did. Nothing here knows balloons.
"""

from __future__ import annotations

import errno

__all__ = [
    "DeviceError",
    "DriverError",
    "GuestAddressError",
    "MissingFacility",
    "NAMED_WRONG",
    "PeerVanished",
    "UsageError",
    "VirtioError",
    "quoted",
    "reason",
]

NAMED_WRONG = frozenset(
    {
        errno.EACCES,
        errno.EBADF,
        errno.EEXIST,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.ENOTEMPTY,
        errno.EPERM,
        errno.EROFS,
        errno.ETXTBSY,
    }
)
"""What the system says of a file, a folder or a permission: whoever named it can name another."""


def quoted(text: str, most: int = 200) -> str:
    """Return what somebody wrote, in quotes and printable, of a long text only the beginning."""
    return repr(text) if len(text) <= most else f"{text[:most]!r}... ({len(text)} characters)"


def reason(error: BaseException) -> str:
    """Return in words what happened; of an error that nobody foresaw, which may have no words, its class, too."""
    return str(error) if isinstance(error, (VirtioError, OSError)) else f"{type(error).__name__}: {error}"


class VirtioError(Exception):
    """Something in the virtio conversation is wrong.

    Parameters
    ----------
    message
        What happened and what to do about it.
    queue
        Number of the virtqueue, where there is one.
    index
        Ring position, descriptor or message number, where there is one.
    clause
        Id of the clause in ``docs/clauses.md`` that was broken, where there is one.
    """

    def __init__(
        self, message: str, *, queue: int | None = None, index: int | None = None, clause: str | None = None
    ) -> None:
        self.message = message
        self.queue = queue
        self.index = index
        self.clause = clause
        self.code: str | None = None
        """Name of the C error code, such as ``VQ_ELOOP``, where there is one."""
        super().__init__(message)

    def __str__(self) -> str:
        where = []
        if self.queue is not None:
            where.append(f"queue {self.queue}")
        if self.index is not None:
            where.append(f"index {self.index}")
        text = f"{', '.join(where)}: {self.message}" if where else self.message
        return f"{text} [{self.clause}]" if self.clause else text


class DriverError(VirtioError):
    """The driver (guest) broke the protocol; raised by the device side."""


class DeviceError(VirtioError):
    """The device (host) broke the protocol; raised by the driver side."""


class UsageError(VirtioError, ValueError):
    """The caller asked for something that cannot be done."""


class GuestAddressError(UsageError):
    """A guest address range is not (wholly) backed by memory."""


class MissingFacility(VirtioError):
    """This machine lacks something; the message names it and says what to install or change."""


class PeerVanished(VirtioError, ConnectionError):
    """The other process closed its socket or died."""
