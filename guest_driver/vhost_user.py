"""A vhost-user front end: the driver's transport to a device in another process.

It shares guest memory by descriptor, so driver and device meet in the very same pages.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
from collections.abc import Sequence

from guest_driver.transport import Interrupts
from vring import vhost_user as vu
from vring.errors import DeviceError, PeerVanished, UsageError
from vring.memory import GuestMemory
from vring.split import QueueLayout
from vring.unix_socket import adopted, socket_path, why_misnamed
from vring.vhost_user import ProtocolFeature, Request

__all__ = ["VhostUserTransport"]

WANTED = ProtocolFeature.REPLY_ACK | ProtocolFeature.BACKEND_REQ | ProtocolFeature.CONFIG | ProtocolFeature.MQ
NEEDED = ProtocolFeature.BACKEND_REQ | ProtocolFeature.CONFIG
QUEUE_SIZE_MAX = 1024
_FD = re.compile(r"fd:([0-9]{1,9})")
WAIT_MS = 1000
"""How long a driver that has run out of memory waits for the device to use a buffer."""


class VhostUserTransport:
    """The driver's end of a vhost-user connection.

    Parameters
    ----------
    path
        Socket of the back end, or ``fd:N``, a descriptor that is connected to it.
    memory
        Guest memory to share; each region must have a descriptor.
    timeout
        Seconds to wait for any reply.
    queue_sizes
        Size of each queue by number (vhost-user has no message to ask for the maximum).

    Raises
    ------
    PeerVanished
        If nobody listens, or the other end goes away.
    UsageError
        If the path cannot be a socket's, its folder is not there or not permitted, or the descriptor is no socket.
    DeviceError
        If the back end lacks what hinting needs.
    """

    def __init__(
        self, path: str, memory: GuestMemory, *, timeout: float = 10.0, queue_sizes: Sequence[int] = ()
    ) -> None:
        self.memory = memory
        self._queue_sizes = list(queue_sizes)
        self._kicks: dict[int, int] = {}
        self._calls: dict[int, int] = {}
        self._pending = Interrupts()
        self._features = 0
        self._inbox = bytearray()
        self._mine: socket.socket | None = None
        try:
            self._socket = _connect(path, timeout)
        except OSError as error:
            if why := why_misnamed(path):
                raise UsageError(f"no vhost-user back end at {path}: {why}") from error
            raise PeerVanished(f"no vhost-user back end at {path}: {error.strerror or error}") from error
        self._send(Request.SET_OWNER)
        self._offered = vu.unpack_u64(self._ask(Request.GET_FEATURES), "GET_FEATURES")
        if not self._offered & vu.F_PROTOCOL_FEATURES:
            raise DeviceError("vhost-user: the back end has no protocol features, it cannot tell of config changes")
        protocol = vu.unpack_u64(self._ask(Request.GET_PROTOCOL_FEATURES), "GET_PROTOCOL_FEATURES")
        if NEEDED & ~protocol:
            raise DeviceError(f"vhost-user: the back end lacks protocol features {NEEDED & ~protocol!r}")
        self._protocol = int(protocol & WANTED)
        self._send(Request.SET_PROTOCOL_FEATURES, vu.pack_u64(self._protocol))
        self._mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._mine.setblocking(False)
        with theirs:
            self._send(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])

    # -- messages -------------------------------------------------------------------------------------------------

    def _send(self, request: Request, payload: bytes = b"", fds: Sequence[int] = (), *, ack: bool = True) -> None:
        """Send a request; wait for its acknowledgement where that was negotiated."""
        need = ack and bool(getattr(self, "_protocol", 0) & ProtocolFeature.REPLY_ACK)
        try:
            socket.send_fds(self._socket, [vu.pack_message(request, payload, need_reply=need)], list(fds))
        except OSError as error:
            raise PeerVanished(f"vhost-user: {request.name}: {error.strerror or error}") from error
        if need and vu.unpack_u64(self._receive(request), request.name):
            raise DeviceError(f"vhost-user: the back end refused {request.name}")

    def _ask(self, request: Request, payload: bytes = b"") -> bytes:
        self._send(request, payload, ack=False)
        return self._receive(request)

    def _receive(self, request: Request) -> bytes:
        header = vu.Header.unpack(self._exactly(vu.HEADER_SIZE))
        payload = self._exactly(header.size)
        if header.request != request or not header.is_reply:
            raise DeviceError(f"vhost-user: {request.name} was answered by message {header.request}")
        return payload

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                piece = self._socket.recv(size - len(data))
            except TimeoutError as error:
                raise PeerVanished("vhost-user: the back end does not answer") from error
            except OSError as error:
                raise PeerVanished(f"vhost-user: {error.strerror or error}") from error
            if not piece:
                raise PeerVanished("vhost-user: the back end closed the socket")
            data += piece
        return bytes(data)

    # -- Transport ------------------------------------------------------------------------------------------------

    def device_features(self) -> int:
        """Return the offered feature bits, without vhost-user's own."""
        return self._offered & ~vu.F_PROTOCOL_FEATURES

    def set_driver_features(self, features: int) -> None:
        """Accept `features` and share the memory."""
        self._features = features
        self._send(Request.SET_FEATURES, vu.pack_u64(features | vu.F_PROTOCOL_FEATURES))
        regions = [
            vu.MemoryRegion(r.gpa, r.size, self.memory.host_address(r.gpa, r.size), r.offset)
            for r in self.memory.regions
        ]
        self._send(Request.SET_MEM_TABLE, vu.MemoryRegion.pack_table(regions), [r.fd for r in self.memory.regions])

    def read_config(self, offset: int, length: int) -> bytes:
        """Return bytes of the config space."""
        ask = vu.ConfigSpace(offset, length, 0, bytes(length)).pack()
        answer = vu.ConfigSpace.unpack(self._ask(Request.GET_CONFIG, ask), "GET_CONFIG")
        if (answer.offset, answer.size) != (offset, length):
            raise DeviceError(
                f"vhost-user: GET_CONFIG of {length} bytes at {offset} brought {answer.size} at {answer.offset}"
            )
        return answer.data

    def write_config(self, offset: int, data: bytes) -> None:
        """Write bytes of the config space."""
        self._send(Request.SET_CONFIG, vu.ConfigSpace(offset, len(data), 0, data).pack())

    def queue_size_max(self, index: int) -> int:
        """Return the size configured for this queue."""
        return self._queue_sizes[index] if index < len(self._queue_sizes) else 0

    def setup_queue(self, index: int, layout: QueueLayout, *, base: int = 0) -> None:
        """Tell the back end where a queue is, and give it the doorbells."""
        kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._kicks[index], self._calls[index] = kick, call
        self._send(Request.SET_VRING_NUM, vu.VringState(index, layout.size).pack())
        self._send(Request.SET_VRING_BASE, vu.VringState(index, base).pack())
        desc, used, avail = (self.memory.host_address(a) for a in (layout.desc, layout.used, layout.avail))
        self._send(Request.SET_VRING_ADDR, vu.VringAddr(index, 0, desc, used, avail, 0).pack())
        self._send(Request.SET_VRING_CALL, vu.VringFd(index, True).pack(), [call])
        self._send(Request.SET_VRING_KICK, vu.VringFd(index, True).pack(), [kick])

    def driver_ok(self) -> None:
        """Enable the queues."""
        for index in self._kicks:
            self._send(Request.SET_VRING_ENABLE, vu.VringState(index, 1).pack())

    def kick(self, index: int) -> None:
        """Send an available buffer notification."""
        with contextlib.suppress(BlockingIOError):  # the counter is full: a notification is pending anyway
            os.eventfd_write(self._kicks[index], 1)

    def interrupts(self) -> Interrupts:
        """Return and forget what was signalled.

        Raises
        ------
        PeerVanished
            If the back end is gone.
        """
        for index, call in self._calls.items():
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(call)
                self._pending.queues.add(index)
        self._read_requests()
        pending, self._pending = self._pending, Interrupts()
        return pending

    def wait(self, index: int) -> bool:
        """Wait up to `WAIT_MS` for an interrupt of a queue; it is reported by `interrupts` all the same.

        Raises
        ------
        PeerVanished
            If the back end is gone.
        """
        call = self._calls[index]
        poll = select.poll()
        poll.register(call, select.POLLIN)
        poll.register(self._socket, select.POLLRDHUP)
        ready = [fd for fd, _ in poll.poll(WAIT_MS)]
        if call in ready:
            os.eventfd_read(call)
            self._pending.queues.add(index)
            return True
        self.check_alive()
        return False

    def _read_requests(self) -> None:
        if self._mine is None:
            return
        while True:
            try:
                data = self._mine.recv(4096)
            except BlockingIOError:
                break
            except OSError as error:
                raise PeerVanished(f"vhost-user: {error.strerror}") from error
            if not data:
                raise PeerVanished("vhost-user: the back end closed its request channel")
            self._inbox += data
        while len(self._inbox) >= vu.HEADER_SIZE:
            header = vu.Header.unpack(bytes(self._inbox[: vu.HEADER_SIZE]))
            if len(self._inbox) < vu.HEADER_SIZE + header.size:
                break
            del self._inbox[: vu.HEADER_SIZE + header.size]
            if header.request == vu.BackendRequest.CONFIG_CHANGE:
                self._pending.config = True
            if header.need_reply:
                self._mine.send(vu.pack_message(header.request, vu.pack_u64(0), reply=True))

    def check_alive(self) -> None:
        """Raise `PeerVanished` if the back end has closed the connection."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        if poll.poll(0):
            raise PeerVanished("vhost-user: the back end closed the socket")

    def filenos(self) -> list[int]:
        """Return descriptors that become readable with an interrupt or when the back end goes."""
        mine = [self._mine.fileno()] if self._mine is not None else []
        return [*mine, *self._calls.values(), self._socket.fileno()]

    def reset(self) -> None:
        """Stop all queues: after this the back end uses none of them."""
        for index in list(self._kicks):
            self._send(Request.SET_VRING_ENABLE, vu.VringState(index, 0).pack())
            self._ask(Request.GET_VRING_BASE, vu.VringState(index, 0).pack())
            os.close(self._kicks.pop(index))
            os.close(self._calls.pop(index))

    def close(self) -> None:
        """Close the connection and the doorbells."""
        self._socket.close()
        if self._mine is not None:
            self._mine.close()
            self._mine = None
        for fd in (*self._kicks.values(), *self._calls.values()):
            os.close(fd)
        self._kicks.clear()
        self._calls.clear()


def _connect(path: str, timeout: float) -> socket.socket:
    found = _FD.fullmatch(path)
    if found:
        connected = adopted(int(found[1]))
        connected.settimeout(timeout)
        connected.set_inheritable(False)
        return connected
    socket_path(path)
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    connected.settimeout(timeout)
    try:
        connected.connect(path)
    except OSError:
        connected.close()
        raise
    return connected
