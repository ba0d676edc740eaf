"""What another process gave and can still spoil: memory that it cuts off, descriptors that it blocks.

The Python face of ``csrc/peer``. Knows nothing of guest addresses, rings or sockets.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from vring._vring import ffi, lib
from vring.errors import MissingFacility

__all__ = ["Guard", "Signals", "survive_lost_memory", "take_signals"]


def survive_lost_memory() -> None:
    """Take SIGBUS over, for good: who cuts off memory that he shared loses it, and this process goes on.

    A fault in a mapping that a `Guard` stands for puts zeros in its place and marks it lost; every other goes on to
    the handler of before. For programs: a library leaves the signals of its process alone. ``faulthandler`` is to be
    enabled before, not after.

    Raises
    ------
    OSError
        If the system refuses.
    """
    _check(lib.peer_guard_install())


class Guard:
    """Stands for a mapping of memory that somebody else could cut off; without the handler it does nothing.

    Parameters
    ----------
    address
        Where it begins in this process.
    size
        Bytes.
    page_size
        Bytes of its pages.
    """

    def __init__(self, address: int, size: int, page_size: int) -> None:
        made = lib.peer_guard(ffi.cast("void *", address), size, page_size)
        if made == ffi.NULL:
            raise MemoryError("no memory to guard a mapping")
        self._range: Any = ffi.gc(made, lib.peer_unguard)

    @property
    def lost(self) -> bool:
        """Whether it was cut off: what is read there since the first fault is not the owner's."""
        return self._range is not None and bool(lib.peer_lost(self._range))

    def close(self) -> None:
        """Before the mapping is removed."""
        if self._range is not None:
            ffi.release(self._range)
            self._range = None


class Signals:
    """Signals eventfds and sockets that somebody else gave, without ever waiting for him, whatever he does to them.

    Raises
    ------
    MissingFacility
        If this kernel, or a filter on this process, has no asynchronous I/O.
    """

    def __init__(self) -> None:
        signals = ffi.new("struct peer_signals *")
        error = -lib.peer_signals_open(signals)
        if error:
            raise MissingFacility(
                f"guests cannot be signalled without waiting for them: asynchronous I/O (io_setup) failed with "
                f"{os.strerror(error)!r}; allow it in the filter of system calls, or raise fs.aio-max-nr"
            )
        self._signals: Any = ffi.gc(signals, lib.peer_signals_close)

    def signal(self, fd: int) -> None:
        """Signal once; where as much as possible is pending, that is enough, and nothing is added.

        Raises
        ------
        OSError
            If it is neither, or nobody has the other end of the socket.
        """
        with contextlib.suppress(BlockingIOError):
            _check(lib.peer_signal(self._signals, fd))

    def close(self) -> None:
        """Give everything back."""
        if self._signals is not None:
            ffi.release(self._signals)
            self._signals = None


def take_signals(fd: int) -> bool:
    """Take what has come to an eventfd or a socket, without waiting; return whether more can come.

    Raises
    ------
    BlockingIOError
        If nothing has come.
    OSError
        If it is neither.
    """
    return _check(lib.peer_take_signals(fd)) > 0


def _check(result: int) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result
