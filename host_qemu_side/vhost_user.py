"""A vhost-user back end: puts any `vring.device.Device` behind a Unix socket.

The front end (User-Mode Linux, this project's guest process) brings memory and rings, this side serves them from one
`Loop`. Every acknowledged request may block the whole guest, so the reply goes out first and the work is done after.
"""

from __future__ import annotations

import array
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from host_qemu_side.loop import Loop
from vring import vhost_user as vu
from vring.device import Device
from vring.errors import UsageError, VirtioError
from vring.features import CommonFeature
from vring.memory import GuestMemory, Region
from vring.split import DeviceQueue, QueueLayout
from vring.vhost_user import ProtocolFeature, Request, VhostUserError

__all__ = ["VhostUserBackend"]

log = logging.getLogger(__name__)
PROTOCOL_FEATURES = (
    ProtocolFeature.REPLY_ACK | ProtocolFeature.BACKEND_REQ | ProtocolFeature.CONFIG | ProtocolFeature.MQ
)


@dataclass(slots=True)
class _Ring:
    """What the front end said about one queue."""

    size: int = 0
    base: int = 0
    addr: vu.VringAddr | None = None
    kick: int = -1
    call: int = -1
    err: int = -1
    enabled: bool = False
    queue: DeviceQueue | None = None
    """Set while the ring is live."""
    again: bool = False
    """The loop comes back to it: there may be more than was served."""


class VhostUserBackend:
    """Serves one device to one front end at a time.

    Parameters
    ----------
    device
        The device type behind it.
    loop
        Who watches the descriptors.
    on_disconnect
        Called with the reason when the front end is gone. The device has been reset by then, and a new front end may
        connect if there is a listener.
    on_memory
        Called when the device has got its memory and no queue runs yet: the moment to load saved device state.
    """

    def __init__(
        self,
        device: Device,
        loop: Loop,
        *,
        on_disconnect: Callable[[str], None] | None = None,
        on_memory: Callable[[], None] | None = None,
    ) -> None:
        self.device = device
        self.loop = loop
        self.memory: GuestMemory | None = None
        self.features = 0
        self.connections = 0
        self.held = False
        self.last_error: str | None = None
        self._on_disconnect = on_disconnect
        self._on_memory = on_memory
        self._listener: socket.socket | None = None
        self._path: str | None = None
        self._socket: socket.socket | None = None
        self._request: socket.socket | None = None
        self._regions: list[vu.MemoryRegion] = []
        self._rings: list[_Ring] = [_Ring() for _ in device.queue_sizes]
        self._protocol = 0
        self._header: vu.Header | None = None
        self._buffer = bytearray()
        self._fds: list[int] = []
        self._after: list[Callable[[], None]] = []

    # -- connecting -----------------------------------------------------------------------------------------------

    def listen(self, path: str) -> None:
        """Wait for front ends on a Unix socket, one at a time."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            self._listener.bind(path)
        except OSError as error:
            self._listener.close()
            self._listener = None
            raise UsageError(f"cannot listen on {path}: {error.strerror}") from error
        self._path = path
        self._listener.listen(1)
        self.loop.watch(self._listener.fileno(), self._accept)

    def serve(self, connection: socket.socket) -> None:
        """Serve a front end that is connected already."""
        connection.setblocking(False)
        self._socket = connection
        self.connections += 1
        self.loop.watch(connection.fileno(), self._readable)

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(BlockingIOError):
            connection, _ = self._listener.accept()
            if self._socket is not None:
                log.warning("vhost-user: a second front end tried to connect and was turned away")
                connection.close()
                return
            self.serve(connection)

    @property
    def connected(self) -> bool:
        """Whether a front end is there."""
        return self._socket is not None

    @property
    def can_tell_config(self) -> bool:
        """Whether config changes reach the driver (BACKEND_REQ)."""
        return self._request is not None

    def close(self) -> None:
        """Give everything back."""
        self._disconnect(None)
        if self._listener is not None:
            self.loop.unwatch(self._listener.fileno())
            self._listener.close()
            self._listener = None
        if self._path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            self._path = None

    def _disconnect(self, why: str | None) -> None:
        if self._socket is None:
            return
        self.loop.unwatch(self._socket.fileno())
        self._socket.close()
        self._socket = None
        if self._request is not None:
            self._request.close()
            self._request = None
        for index, ring in enumerate(self._rings):
            self._stop_ring(index)
            for fd in (ring.kick, ring.call, ring.err):
                _close(fd)
        self._rings = [_Ring() for _ in self.device.queue_sizes]
        for fd in self._fds:
            _close(fd)
        self._fds.clear()
        self._buffer.clear()
        self._header = None
        self._regions = []
        self.device.reset()
        self.device.set_memory(None)
        if self.memory is not None:
            self.memory.close()
            self.memory = None
        if why is not None:
            self.last_error = why
            log.info("vhost-user: front end gone: %s", why)
            if self._on_disconnect is not None:
                self._on_disconnect(why)

    # -- messages in ----------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        """Read exactly one header, then exactly its body: two messages may arrive glued, and a descriptor read with
        the wrong one has no owner.
        """
        try:
            while self._socket is not None:
                wanted = (vu.HEADER_SIZE if self._header is None else self._header.size) - len(self._buffer)
                if wanted > 0:
                    data, ancillary, _, _ = self._socket.recvmsg(
                        wanted, socket.CMSG_SPACE(vu.MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
                    )
                    self._fds += _descriptors(ancillary)
                    if not data:
                        self._disconnect("it closed the socket")
                        return
                    self._buffer += data
                    if len(data) < wanted:
                        continue
                if self._header is None:
                    self._header = vu.Header.unpack(bytes(self._buffer))
                    self._buffer.clear()
                    continue
                header, payload, fds = self._header, bytes(self._buffer), self._fds
                self._header, self._fds = None, []
                self._buffer.clear()
                self._handle(header, payload, fds)
        except BlockingIOError:
            pass
        except (VhostUserError, ConnectionError) as error:
            self._disconnect(str(error))

    def _handle(self, header: vu.Header, payload: bytes, fds: list[int]) -> None:
        log.debug("vhost-user: %s, %d bytes, %d fds", header.name, len(payload), len(fds))
        handler = _HANDLERS.get(header.request)
        result: bytes | None = None
        failed: VirtioError | None = None
        try:
            if handler is None:
                raise VhostUserError(f"vhost-user: {header.name} is not supported")
            result = handler(self, payload, fds)
        except (VirtioError, OSError) as error:
            failed = error if isinstance(error, VirtioError) else VhostUserError(f"vhost-user: {header.name}: {error}")
        finally:
            for fd in fds:
                _close(fd)
        if result is not None:
            self._send(vu.pack_message(header.request, result, reply=True))
        elif header.need_reply and self._protocol & ProtocolFeature.REPLY_ACK:
            self._send(vu.pack_message(header.request, vu.pack_u64(1 if failed else 0), reply=True))
        elif failed is not None:
            raise VhostUserError(f"vhost-user: {header.name} failed: {failed}") from failed
        if failed is not None:
            log.warning("vhost-user: %s refused: %s", header.name, failed)
        after, self._after = self._after, []
        for work in after:  # the guest has its reply
            work()
        self.deliver()

    def _send(self, message: bytes) -> None:
        assert self._socket is not None
        try:
            self._socket.sendall(message)
        except BlockingIOError as error:
            raise VhostUserError("vhost-user: the front end does not read its replies") from error

    def _ring(self, index: int) -> _Ring:
        if index >= len(self._rings):
            raise VhostUserError(f"vhost-user: queue {index}, the device has {len(self._rings)}", queue=index)
        return self._rings[index]

    def _driver_gone(self) -> None:
        """The driver was removed, or another one begins: its rings lie in memory that is somebody else's now.

        No message says so. What is known: features are negotiated anew; and User-Mode Linux, which disables rings only
        with bit 30, asks for the features (to know that all before it was heard) when it has deleted them.
        """
        if all(ring.addr is None for ring in self._rings):
            return
        for index, ring in enumerate(self._rings):
            self._stop_ring(index)
            _close(ring.kick)
            ring.kick, ring.addr, ring.base, ring.enabled = -1, None, 0, False
        self.device.reset()

    def _get_features(self, payload: bytes, fds: list[int]) -> bytes:
        if not self.features & vu.F_PROTOCOL_FEATURES:
            self._driver_gone()
        return vu.pack_u64(self.device.offered_features | vu.F_PROTOCOL_FEATURES)

    def _set_features(self, payload: bytes, fds: list[int]) -> None:
        features = vu.unpack_u64(payload, "SET_FEATURES")
        self._driver_gone()
        if not self.device.set_features(features & ~vu.F_PROTOCOL_FEATURES):
            raise VhostUserError(
                f"vhost-user: features {features:#x} were not all offered", clause="basic.features.driver-1"
            )
        self.features = features

    def _get_protocol_features(self, payload: bytes, fds: list[int]) -> bytes:
        return vu.pack_u64(PROTOCOL_FEATURES)

    def _set_protocol_features(self, payload: bytes, fds: list[int]) -> None:
        self._protocol = vu.unpack_u64(payload, "SET_PROTOCOL_FEATURES") & PROTOCOL_FEATURES

    def _get_queue_num(self, payload: bytes, fds: list[int]) -> bytes:
        return vu.pack_u64(len(self._rings))

    def _nothing(self, payload: bytes, fds: list[int]) -> None:
        return None

    def _set_mem_table(self, payload: bytes, fds: list[int]) -> None:
        regions = vu.MemoryRegion.unpack_table(payload)
        if len(regions) != len(fds):
            raise VhostUserError(
                f"vhost-user: SET_MEM_TABLE names {len(regions)} regions and brings {len(fds)} descriptors"
            )
        memory = GuestMemory.from_fds(
            Region(r.gpa, r.size, fd, r.mmap_offset) for r, fd in zip(regions, fds, strict=True)
        )
        old, self.memory, self._regions = self.memory, memory, regions
        for index in range(len(self._rings)):
            self._stop_ring(index)
        self.device.set_memory(memory)
        if self._on_memory is not None:
            self._on_memory()
        if old is not None:
            old.close()
        for index in range(len(self._rings)):
            self._after.append(lambda i=index: self._start_ring(i))  # type: ignore[misc]

    def _set_vring_num(self, payload: bytes, fds: list[int]) -> None:
        state = vu.VringState.unpack(payload, "SET_VRING_NUM")
        ring, largest = self._ring(state.index), self.device.queue_sizes[state.index]
        if not 0 < state.value <= largest:
            raise VhostUserError(f"vhost-user: ring of {state.value} entries, at most {largest}", queue=state.index)
        ring.size = state.value

    def _set_vring_base(self, payload: bytes, fds: list[int]) -> None:
        state = vu.VringState.unpack(payload, "SET_VRING_BASE")
        if state.value > 0xFFFF:
            raise VhostUserError(f"vhost-user: base index {state.value}", queue=state.index)
        self._ring(state.index).base = state.value

    def _set_vring_addr(self, payload: bytes, fds: list[int]) -> None:
        addr = vu.VringAddr.unpack(payload)
        self._ring(addr.index).addr = addr

    def _get_vring_base(self, payload: bytes, fds: list[int]) -> bytes:
        index = vu.VringState.unpack(payload, "GET_VRING_BASE").index
        ring = self._ring(index)
        self._stop_ring(index)
        _close(ring.kick)
        ring.kick = -1
        return vu.VringState(index, ring.base).pack()

    def _set_vring_kick(self, payload: bytes, fds: list[int]) -> None:
        state = vu.VringFd.unpack(payload, "SET_VRING_KICK")
        ring = self._ring(state.index)
        self._stop_ring(state.index)
        _close(ring.kick)
        ring.kick = _take(fds, state, "SET_VRING_KICK")
        os.set_blocking(ring.kick, False)
        self._after.append(lambda: self._start_ring(state.index))

    def _set_vring_call(self, payload: bytes, fds: list[int]) -> None:
        state = vu.VringFd.unpack(payload, "SET_VRING_CALL")
        ring = self._ring(state.index)
        _close(ring.call)
        ring.call = _take(fds, state, "SET_VRING_CALL") if state.has_fd else -1
        if ring.call >= 0:
            os.set_blocking(ring.call, False)

    def _set_vring_err(self, payload: bytes, fds: list[int]) -> None:
        state = vu.VringFd.unpack(payload, "SET_VRING_ERR")
        ring = self._ring(state.index)
        _close(ring.err)
        ring.err = _take(fds, state, "SET_VRING_ERR") if state.has_fd else -1

    def _set_vring_enable(self, payload: bytes, fds: list[int]) -> None:
        state = vu.VringState.unpack(payload, "SET_VRING_ENABLE")
        ring = self._ring(state.index)
        ring.enabled = bool(state.value)
        if ring.enabled:
            self._after.append(lambda: self._start_ring(state.index))
        else:
            self._stop_ring(state.index)

    def _set_backend_req_fd(self, payload: bytes, fds: list[int]) -> None:
        if len(fds) != 1:
            raise VhostUserError(f"vhost-user: SET_BACKEND_REQ_FD brings {len(fds)} descriptors")
        if self._request is not None:
            self._request.close()
        self._request = socket.socket(fileno=os.dup(fds[0]))
        self._request.setblocking(False)

    def _get_config(self, payload: bytes, fds: list[int]) -> bytes:
        asked = vu.ConfigSpace.unpack(payload, "GET_CONFIG")
        return vu.ConfigSpace(asked.offset, asked.size, 0, self.device.read_config(asked.offset, asked.size)).pack()

    def _set_config(self, payload: bytes, fds: list[int]) -> None:
        asked = vu.ConfigSpace.unpack(payload, "SET_CONFIG")
        self.device.write_config(asked.offset, asked.data)

    # -- rings ----------------------------------------------------------------------------------------------------

    def _start_ring(self, index: int) -> None:
        """Start a ring once everything about it is known and it is enabled (without bit 30: by its kick alone)."""
        ring = self._rings[index]
        enabled = ring.enabled or not self.features & vu.F_PROTOCOL_FEATURES
        if (
            ring.queue is not None
            or ring.addr is None
            or ring.kick < 0
            or not ring.size
            or self.memory is None
            or not enabled
        ):
            return
        try:
            layout = QueueLayout(
                ring.size, *(self._guest_address(a, index) for a in (ring.addr.desc, ring.addr.avail, ring.addr.used))
            )
            queue = DeviceQueue(
                self.memory,
                layout,
                base=ring.base,
                event_idx=bool(self.features & CommonFeature.EVENT_IDX),
                indirect=bool(self.features & CommonFeature.INDIRECT_DESC),
                index=index,
            )
        except VirtioError as error:
            self._broken(index, error)
            return
        ring.queue = queue
        self.device.attach_queue(index, queue)
        if not self.held:
            self._go(index)

    def _guest_address(self, user: int, index: int) -> int:
        for region in self._regions:
            if region.user_address <= user < region.user_address + region.size:
                return user - region.user_address + region.gpa
        raise VhostUserError(f"vhost-user: ring address {user:#x} is in no region of guest memory", queue=index)

    def _stop_ring(self, index: int) -> None:
        ring = self._rings[index]
        if ring.queue is not None:
            ring.base = self._base(index, ring.queue)
            ring.queue = None
            self.loop.unwatch(ring.kick)
            self.device.detach_queue(index)

    def _base(self, index: int, queue: DeviceQueue) -> int:
        """Avail index to go on from; buffers that the device holds are popped again there."""
        return queue.next_avail - self.device.held_buffers(index) & 0xFFFF

    def _go(self, index: int) -> None:
        """Begin to listen for kicks, and look at what is there already."""
        try:
            self.loop.watch(self._rings[index].kick, lambda: self._kicked(index))
        except OSError as error:  # what can be sent but not waited for: a plain file, a directory
            self._broken(index, VhostUserError(f"vhost-user: cannot wait for kicks: {error.strerror}", queue=index))
            return
        self._process(index)

    def _kicked(self, index: int) -> None:
        try:
            with contextlib.suppress(BlockingIOError):
                if not os.read(self._rings[index].kick, 8):
                    raise VhostUserError("vhost-user: the front end closed its end of the kick", queue=index)
        except (VhostUserError, OSError) as error:  # else it would be readable for ever
            self._broken(index, error)
        else:
            self._process(index)
        self.deliver()

    def _process(self, index: int) -> None:
        """Serve a queue for one call of the device; the rest, if there may be one, is left to the loop.

        A guest can add buffers as fast as they are returned: whoever waited for the end of it would wait for ever.
        """
        ring = self._rings[index]
        if ring.queue is None or self.held:
            return
        try:
            if self.device.process(index) and not ring.again:
                ring.again = True
                self.loop.soon(lambda: self._again(index))
        except (VirtioError, OSError) as error:
            # The driver broke the ring, or this host could not do what it asked (a discard that failed: the buffer was
            # not returned). Either way this queue rests, and the others live on.
            self._broken(index, error)

    def _again(self, index: int) -> None:
        self._rings[index].again = False
        self._process(index)
        self.deliver()

    def process(self, index: int) -> None:
        """Serve a queue now, without a kick; used buffers are notified."""
        if index < len(self._rings):
            self._again(index)

    def _broken(self, index: int, error: Exception) -> None:
        """A ring that cannot be trusted: stop it, signal its err descriptor, log."""
        log.error("vhost-user: queue %d is stopped until it is set up again: %s", index, error)
        self.last_error = str(error)
        self._stop_ring(index)
        if self._rings[index].err >= 0:
            _signal(self._rings[index].err)

    def deliver(self) -> None:
        """Notify the driver of whatever the device has to say."""
        for index in self.device.take_calls():
            if self._rings[index].call >= 0:
                _signal(self._rings[index].call)
        if self._request is not None and self.device.take_config_change():
            try:
                self._request.send(vu.pack_message(vu.BackendRequest.CONFIG_CHANGE))
            except BlockingIOError:
                pass  # notifications that were not read yet are pending: it will look at the config space
            except OSError as error:  # the front end is gone, which its socket will say
                log.info("vhost-user: config change not delivered: %s", error)

    # -- pausing, saving ------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Serve no queue until `release`: the VM is paused."""
        self.held = True
        for ring in self._rings:
            if ring.queue is not None:
                self.loop.unwatch(ring.kick)

    def release(self) -> None:
        """Go on serving."""
        self.held = False
        for index, ring in enumerate(self._rings):
            if ring.queue is not None:
                self._go(index)
        self.deliver()

    def save(self) -> dict[str, Any]:
        """Return features and rings for a migration: sizes and base indices. Call it while held."""
        rings = []
        for index, ring in enumerate(self._rings):
            if ring.queue is not None:
                rings.append({"index": index, "size": ring.size, "base": self._base(index, ring.queue)})
        return {"features": self.features & ~vu.F_PROTOCOL_FEATURES, "rings": rings}


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)


def _take(fds: list[int], state: vu.VringFd, what: str) -> int:
    """Keep the message's one descriptor."""
    if len(fds) != 1 or not state.has_fd:
        raise VhostUserError(f"vhost-user: {what} without a descriptor: polling is not supported", queue=state.index)
    return fds.pop()


def _close(fd: int) -> None:
    if fd >= 0:
        with contextlib.suppress(OSError):
            os.close(fd)


def _signal(fd: int) -> None:
    """Eight bytes: an eventfd counts them, User-Mode Linux has a socket there."""
    with contextlib.suppress(OSError):
        os.write(fd, (1).to_bytes(8, "little"))


_Handler = Callable[[VhostUserBackend, bytes, list[int]], "bytes | None"]
_HANDLERS: dict[int, _Handler] = {
    Request.GET_FEATURES: VhostUserBackend._get_features,
    Request.SET_FEATURES: VhostUserBackend._set_features,
    Request.SET_OWNER: VhostUserBackend._nothing,
    Request.RESET_OWNER: VhostUserBackend._nothing,
    Request.SET_MEM_TABLE: VhostUserBackend._set_mem_table,
    Request.SET_VRING_NUM: VhostUserBackend._set_vring_num,
    Request.SET_VRING_ADDR: VhostUserBackend._set_vring_addr,
    Request.SET_VRING_BASE: VhostUserBackend._set_vring_base,
    Request.GET_VRING_BASE: VhostUserBackend._get_vring_base,
    Request.SET_VRING_KICK: VhostUserBackend._set_vring_kick,
    Request.SET_VRING_CALL: VhostUserBackend._set_vring_call,
    Request.SET_VRING_ERR: VhostUserBackend._set_vring_err,
    Request.GET_PROTOCOL_FEATURES: VhostUserBackend._get_protocol_features,
    Request.SET_PROTOCOL_FEATURES: VhostUserBackend._set_protocol_features,
    Request.GET_QUEUE_NUM: VhostUserBackend._get_queue_num,
    Request.SET_VRING_ENABLE: VhostUserBackend._set_vring_enable,
    Request.SET_BACKEND_REQ_FD: VhostUserBackend._set_backend_req_fd,
    Request.GET_CONFIG: VhostUserBackend._get_config,
    Request.SET_CONFIG: VhostUserBackend._set_config,
}
