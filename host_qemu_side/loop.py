"""One `selectors` loop for everything a host process waits for. No threads."""

from __future__ import annotations

import logging
import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable

from vring.backing import close_with
from vring.errors import PeerVanished, reason
from vring.unix_socket import UnixListener

__all__ = ["TURN", "Loop"]

log = logging.getLogger(__name__)
TURN = 0.02
"""Seconds that one peer has before it is others' turn: it may have more to say than ever ends, or what takes long."""
ACCEPT_AGAIN = 0.2
"""Seconds until connections are accepted again that there was no room for."""
READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE


class Loop:
    """Calls back when descriptors are ready."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._soon: deque[Callable[[], None]] = deque()
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._close_wake = close_with(self, (self._wake,))
        self._selector.register(self._wake, READ, self._run_soon)
        self.tick: Callable[[], None] | None = None
        """Called each time round, after what was ready: for a display, or to look whether the user wants to stop."""

    def watch(self, fd: int, callback: Callable[[], None], events: int = READ) -> None:
        """Call `callback` whenever `fd` is ready; replaces an earlier watch of the same descriptor."""
        if fd in self._selector.get_map():
            self._selector.modify(fd, events, callback)
        else:
            self._selector.register(fd, events, callback)

    def unwatch(self, fd: int) -> None:
        """Stop watching `fd`; unknown descriptors are no error."""
        if fd >= 0 and fd in self._selector.get_map():
            self._selector.unregister(fd)

    def soon(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, the next time round: work that would never end comes in pieces, others between them.

        A descriptor of the loop's own is readable until then, so a caller with a wait of its own comes round, too.
        """
        self._soon.append(callback)
        os.eventfd_write(self._wake, 1)

    def _run_soon(self) -> None:
        os.eventfd_read(self._wake)
        left = len(self._soon)
        try:
            while left:
                left -= 1
                self._soon.popleft()()
        finally:
            if left:  # one raised: those after it have their turn
                os.eventfd_write(self._wake, 1)

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call `callback` once, when `seconds` have passed and the loop is served."""
        self._later.append((time.monotonic() + seconds, callback))

    def _run_later(self) -> None:
        now = time.monotonic()
        due = [callback for when, callback in self._later if when <= now]
        self._later = [(when, callback) for when, callback in self._later if when > now]
        for callback in due:
            callback()

    def listen(self, listener: UnixListener, take: Callable[[socket.socket], None]) -> None:
        """Call `take` with each connection that comes, one each time round.

        One that cannot be had, because this process or the system can have no more descriptors or memory, waits for
        those that have them to end.
        """
        full = False

        def ready() -> None:
            nonlocal full
            try:
                connection = listener.accept()
            except OSError as error:
                if not full:
                    log.warning("%s: connections have to wait: %s", listener.path, error.strerror)
                full = True
                self.unwatch(listener.fileno())
                self.later(ACCEPT_AGAIN, again)
            else:
                full = False
                if connection is not None:
                    received(connection)

        def received(connection: socket.socket) -> None:
            try:
                take(connection)
            except Exception as error:  # no memory, say, to wait for what it sends: it ends, and nobody else
                log.error("%s: a connection was dropped: %s", listener.path, reason(error))
                connection.close()

        def again() -> None:
            if listener.fileno() >= 0:
                self.watch(listener.fileno(), ready)

        listener.socket.setblocking(False)
        again()

    def filenos(self) -> list[int]:
        """Return all descriptors watched, for a caller with a wait of its own."""
        return [key.fd for key in self._selector.get_map().values()]

    def run_once(self, timeout: float = 0.0) -> None:
        """Serve what is ready, waiting for at most `timeout` seconds for something to become so."""
        if self._later:
            timeout = min(timeout, min(when for when, _ in self._later) - time.monotonic())
        for key, _ in self._selector.select(max(timeout, 0.0)):
            # A callback before this one may have ended the watch.
            if key.fd in self._selector.get_map() and self._selector.get_map()[key.fd].data is key.data:
                key.data()
        if self._later:
            self._run_later()
        if self.tick is not None:
            self.tick()

    def run_until(self, done: Callable[[], bool], timeout: float, what: str) -> None:
        """Serve until `done()`.

        Raises
        ------
        PeerVanished
            If it does not become true within `timeout` seconds; `what` says what was waited for.
        """
        deadline = time.monotonic() + timeout
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                raise PeerVanished(f"waited {timeout:g} s for {what}")
            self.run_once(min(left, 0.1))

    def close(self) -> None:
        """Forget all watches."""
        self._selector.close()
        self._close_wake()
