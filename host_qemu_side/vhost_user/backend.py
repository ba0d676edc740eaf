"""A vhost-user back end: puts any `vring.device.Device` behind a Unix socket.

The front end (User-Mode Linux, this project's guest process) brings memory and rings, this side serves them from one
`Loop`. Every acknowledged request may block the whole guest, so the reply goes out first and the work is done after.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Any

from host_qemu_side.loop import Loop
from host_qemu_side.vhost_user.descriptors import (
    NoDoorbell,
    adopt_socket,
    check_doorbell,
    check_held,
    close_fd,
    receive,
)
from host_qemu_side.vhost_user.rings import Rings
from host_qemu_side.vhost_user.table import MemoryTable
from vring import vhost_user as vu
from vring.device import Device
from vring.errors import VirtioError, reason
from vring.memory import MAX_REGIONS, GuestMemory
from vring.unix_socket import UnixListener
from vring.vhost_user import ProtocolFeature, Request, VhostUserError

__all__ = ["VhostUserBackend"]

log = logging.getLogger(__name__)
READS_A_TURN = 64
"""Of one front end, before it is others' turn."""
REFUSALS_TOLD = 20
"""Of one connection, in warnings: a front end that is refused for ever fills no disk."""
PROTOCOL_FEATURES = (
    ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.MQ
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)


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
        self.connections = 0
        self._on_disconnect = on_disconnect
        self._on_memory = on_memory
        self._listener: UnixListener | None = None
        self._socket: socket.socket | None = None
        self._request: socket.socket | None = None
        self._rings = Rings(device, loop, self.deliver)
        self._protocol = 0
        self._header: vu.Header | None = None
        self._buffer = bytearray()
        self._fds: list[int] = []
        self._refusals = 0

    # -- connecting -----------------------------------------------------------------------------------------------

    def listen(self, path: str) -> None:
        """Wait for front ends on a Unix socket, one at a time.

        Raises
        ------
        UsageError
            If one cannot listen there, such as where another process does.
        """
        self._listener = UnixListener(path, 1)
        self.loop.listen(self._listener, self._accept)

    def serve(self, connection: socket.socket) -> None:
        """Serve a front end that is connected already."""
        connection.setblocking(False)
        self._socket = connection
        self._refusals = 0
        self.connections += 1
        self.loop.watch(connection.fileno(), self._readable)

    def _accept(self, connection: socket.socket) -> None:
        if self._socket is not None:
            log.warning("vhost-user: a second front end tried to connect and was turned away")
            connection.close()
            return
        self.serve(connection)

    @property
    def memory(self) -> GuestMemory | None:
        """RAM of the guest that is connected."""
        return self._rings.table.memory

    @property
    def features(self) -> int:
        """Features negotiated, with vhost-user's own."""
        return self._rings.features or 0

    @property
    def running(self) -> bool:
        """Whether the driver's rings run, or at least one of them."""
        return self._rings.running

    def at_rest(self, index: int) -> dict[str, Any]:
        """Return the last values of a ring that does not run, and what it needs for that, in names of messages."""
        ring = self._rings[index]
        return {"size": ring.size, "next-avail": ring.base, "needs": self._rings.missing(index)}

    @property
    def last_error(self) -> str | None:
        """What a front end did wrong last, or why it went."""
        return self._rings.last_error

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
        self.disconnect(None)
        if self._listener is not None:
            self.loop.unwatch(self._listener.fileno())
            self._listener.close()
            self._listener = None
        self._rings.close()

    def disconnect(self, why: str | None = "the back end closed the connection") -> None:
        """End the connection and reset the device; with a listener another front end may come.

        Parameters
        ----------
        why
            Told to `on_disconnect`; None: it is not told.
        """
        if self._socket is None:
            return
        self.loop.unwatch(self._socket.fileno())
        self._socket.close()
        self._socket = None
        if self._request is not None:
            self._request.close()
            self._request = None
        memory = self.memory
        self._rings.clear()
        for fd in self._fds:
            close_fd(fd)
        self._fds.clear()
        self._buffer.clear()
        self._header = None
        self._protocol = 0
        self.device.reset()
        self.device.set_memory(None)
        if memory is not None:
            memory.close()
        if why is not None:
            self._rings.last_error = why
            log.info("vhost-user: front end gone: %s", why)
            if self._on_disconnect is not None:
                self._on_disconnect(why)

    # -- messages in ----------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        """Read exactly one header, then exactly its body: two messages may arrive glued, and a descriptor read with
        the wrong one has no owner.
        """
        reads = 0
        try:
            while self._socket is not None:
                wanted = (vu.HEADER_SIZE if self._header is None else self._header.size) - len(self._buffer)
                if wanted > 0:
                    if reads == READS_A_TURN:
                        return  # what is left to read is still there the next time round
                    reads += 1
                    data, fds = receive(self._socket, wanted)
                    self._fds += fds
                    if len(self._fds) > vu.MAX_FDS:
                        raise VhostUserError(f"vhost-user: a message with more than {vu.MAX_FDS} descriptors")
                    if not data:
                        self.disconnect("it closed the socket")
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
            self.disconnect(str(error))
        except Exception as error:  # no memory for what it asked, a fault of ours: it ends, and nobody else
            log.debug("vhost-user: a front end could not be served", exc_info=True)
            self.disconnect(f"it could not be served: {reason(error)}")

    def _handle(self, header: vu.Header, payload: bytes, fds: list[int]) -> None:
        log.debug("vhost-user: %s, %d bytes, %d fds", header.name, len(payload), len(fds))
        assert self._socket is not None
        handler = _HANDLERS.get(header.request)
        result: bytes | None = None
        failed: VirtioError | None = None
        try:
            if handler is None:
                raise VhostUserError(f"vhost-user: {header.name} is not supported")
            check_held(fds, self._socket)
            result = handler(self, payload, fds)
        except (VirtioError, OSError) as error:
            failed = error if isinstance(error, VirtioError) else VhostUserError(f"vhost-user: {header.name}: {error}")
        finally:
            for fd in fds:
                close_fd(fd)
        self._rings.rest()
        if result is not None:
            self._send(vu.pack_message(header.request, result, reply=True))
        elif header.need_reply and self._protocol & ProtocolFeature.REPLY_ACK:
            self._send(vu.pack_message(header.request, vu.pack_u64(1 if failed else 0), reply=True))
        elif isinstance(failed, NoDoorbell) and failed.queue is not None:
            self._rings.no_doorbell(failed.queue, failed)
        elif failed is not None:
            raise VhostUserError(f"vhost-user: {header.name} failed: {failed}") from failed
        if failed is not None:
            self._rings.last_error = str(failed)
            self._refusals += 1
            level = logging.WARNING if self._refusals <= REFUSALS_TOLD else logging.DEBUG
            log.log(level, "vhost-user: %s refused: %s", header.name, failed)
        self._rings.wake()  # the guest has its reply
        self.deliver()

    def _send(self, message: bytes) -> None:
        assert self._socket is not None
        try:
            self._socket.sendall(message)
        except BlockingIOError as error:
            raise VhostUserError("vhost-user: the front end does not read its replies") from error

    def _get_features(self, payload: bytes, fds: list[int]) -> bytes:
        # User-Mode Linux, which disables rings only with bit 30, asks when it has deleted them, to know that all before
        # was heard. Nothing else says that its driver was removed.
        if not self.features & vu.F_PROTOCOL_FEATURES:
            self._rings.retire()
        return vu.pack_u64(self.device.offered_features | vu.F_PROTOCOL_FEATURES)

    def _set_features(self, payload: bytes, fds: list[int]) -> None:
        features = vu.unpack_u64(payload, "SET_FEATURES")
        if not self._rings.set_features(features):
            raise VhostUserError(
                f"vhost-user: features {features:#x} were not all offered", clause="basic.features.driver-1"
            )

    def _get_protocol_features(self, payload: bytes, fds: list[int]) -> bytes:
        return vu.pack_u64(PROTOCOL_FEATURES)

    def _set_protocol_features(self, payload: bytes, fds: list[int]) -> None:
        self._protocol = vu.unpack_u64(payload, "SET_PROTOCOL_FEATURES") & PROTOCOL_FEATURES

    def _get_queue_num(self, payload: bytes, fds: list[int]) -> bytes:
        # Not what is offered at the moment: Linux 7.2 refuses a device that could not have all its driver knows.
        return vu.pack_u64(len(self._rings))

    def _nothing(self, payload: bytes, fds: list[int]) -> None:
        return None

    def _set_status(self, payload: bytes, fds: list[int]) -> None:
        if not vu.unpack_u64(payload, "SET_STATUS"):
            self._rings.end_all()

    def _reset_owner(self, payload: bytes, fds: list[int]) -> None:
        self._rings.end_all()

    def _reset_device(self, payload: bytes, fds: list[int]) -> None:
        self._rings.clear(table=False)
        self.device.reset()

    # Guest memory.

    def _set_mem_table(self, payload: bytes, fds: list[int]) -> None:
        self._change_table(MemoryTable.of(vu.MemoryRegion.unpack_table(payload), fds))

    def _get_max_mem_slots(self, payload: bytes, fds: list[int]) -> bytes:
        return vu.pack_u64(MAX_REGIONS)

    def _add_mem_reg(self, payload: bytes, fds: list[int]) -> None:
        self._change_table(self._rings.table.adding(vu.MemoryRegion.unpack(payload, "ADD_MEM_REG"), fds))

    def _rem_mem_reg(self, payload: bytes, fds: list[int]) -> None:
        self._change_table(self._rings.table.removing(vu.MemoryRegion.unpack(payload, "REM_MEM_REG")))

    def _change_table(self, table: MemoryTable) -> None:
        old = self.memory
        self._rings.set_table(table)
        if self._on_memory is not None and table.memory is not None:
            self._on_memory()
        if old is not None:
            old.close()

    # Rings.

    def _set_vring_num(self, payload: bytes, fds: list[int]) -> None:
        state = vu.VringState.unpack(payload, "SET_VRING_NUM")
        self._rings.set_size(state.index, state.value)

    def _set_vring_base(self, payload: bytes, fds: list[int]) -> None:
        state = vu.VringState.unpack(payload, "SET_VRING_BASE")
        self._rings.set_base(state.index, state.value)

    def _set_vring_addr(self, payload: bytes, fds: list[int]) -> None:
        self._rings.set_addr(vu.VringAddr.unpack(payload))

    def _get_vring_base(self, payload: bytes, fds: list[int]) -> bytes:
        index = vu.VringState.unpack(payload, "GET_VRING_BASE").index
        return vu.VringState(index, self._rings.end(index)).pack()

    def _doorbell(self, fds: list[int], state: vu.VringFd, what: str) -> int:
        """Keep the message's one descriptor for a ring there is; -1 if it says that there is none."""
        _ = self._rings[state.index]  # else nobody would own it
        if len(fds) != int(state.has_fd):
            raise VhostUserError(f"vhost-user: {what} with {len(fds)} descriptors", queue=state.index)
        if not state.has_fd:
            return -1
        check_doorbell(fds[0], what, state.index)
        return fds.pop()

    def _set_vring_kick(self, payload: bytes, fds: list[int]) -> None:
        state = vu.VringFd.unpack(payload, "SET_VRING_KICK")
        if not state.has_fd:
            raise VhostUserError("vhost-user: SET_VRING_KICK without a descriptor: polling is not supported")
        self._rings.set_kick(state.index, self._doorbell(fds, state, "SET_VRING_KICK"))

    def _set_vring_call(self, payload: bytes, fds: list[int]) -> None:
        state = vu.VringFd.unpack(payload, "SET_VRING_CALL")
        self._rings.set_call(state.index, self._doorbell(fds, state, "SET_VRING_CALL"))

    def _set_vring_err(self, payload: bytes, fds: list[int]) -> None:
        state = vu.VringFd.unpack(payload, "SET_VRING_ERR")
        self._rings[state.index].own("err", self._doorbell(fds, state, "SET_VRING_ERR"))

    def _set_vring_enable(self, payload: bytes, fds: list[int]) -> None:
        state = vu.VringState.unpack(payload, "SET_VRING_ENABLE")
        self._rings[state.index].enabled = bool(state.value)

    def _set_backend_req_fd(self, payload: bytes, fds: list[int]) -> None:
        old, self._request = self._request, adopt_socket(fds, "SET_BACKEND_REQ_FD")
        if old is not None:
            old.close()

    def _get_config(self, payload: bytes, fds: list[int]) -> bytes:
        asked = vu.ConfigSpace.unpack(payload, "GET_CONFIG")
        shown = self.device.read_config(asked.offset, asked.size)
        return vu.ConfigSpace(asked.offset, asked.size, 0, shown.ljust(len(asked.data), b"\0")).pack()

    def _set_config(self, payload: bytes, fds: list[int]) -> None:
        asked = vu.ConfigSpace.unpack(payload, "SET_CONFIG")
        self.device.write_config(asked.offset, asked.data[: asked.size])

    # -- the host's side ------------------------------------------------------------------------------------------

    def process(self, index: int) -> None:
        """Serve a queue now, without a kick; used buffers are notified."""
        if index < len(self._rings):
            self._rings.process(index)
            self.deliver()

    def check_memory(self) -> None:
        """End the connection of a front end that has cut off the memory it gave."""
        if self.memory is not None and self.memory.lost:
            self.disconnect("the guest's memory is lost: its file was made shorter, or its storage is full")

    def deliver(self) -> None:
        """Notify the driver of whatever the device has to say.

        A config change waits until a ring runs: told of one while its driver is reset or stopped, QEMU 11.1 dies.
        """
        self.check_memory()
        self._rings.call()
        if self._request is not None and self.running and self.device.take_config_change():
            try:
                message = vu.pack_message(vu.BackendRequest.CONFIG_CHANGE)
                self._request.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                pass  # notifications that were not read yet are pending: it will look at the config space
            except OSError as error:  # the front end is gone, which its socket will say
                log.info("vhost-user: config change not delivered: %s", error)

    def resume(self, bases: dict[int, int]) -> None:
        """Expect the driver whose state was loaded into the device, with rings that start at these bases by number.

        Call it from `on_memory`. A ring that starts elsewhere is taken for another driver's, which begins afresh.
        """
        self._rings.resume(bases)

    def hold(self) -> None:
        """Serve no queue until `release`: the VM is paused."""
        self._rings.hold()

    def release(self) -> None:
        """Go on serving."""
        self._rings.release()
        self.deliver()

    def save(self) -> dict[str, Any]:
        """Return features and rings for a migration: sizes and base indices. Call it while held."""
        return {"features": self.features & ~vu.F_PROTOCOL_FEATURES, "rings": self._rings.save()}


_Handler = Callable[[VhostUserBackend, bytes, list[int]], "bytes | None"]
_HANDLERS: dict[int, _Handler] = {
    Request.GET_FEATURES: VhostUserBackend._get_features,
    Request.SET_FEATURES: VhostUserBackend._set_features,
    Request.SET_OWNER: VhostUserBackend._nothing,
    Request.RESET_OWNER: VhostUserBackend._reset_owner,
    Request.RESET_DEVICE: VhostUserBackend._reset_device,
    Request.SET_STATUS: VhostUserBackend._set_status,
    Request.SET_MEM_TABLE: VhostUserBackend._set_mem_table,
    Request.GET_MAX_MEM_SLOTS: VhostUserBackend._get_max_mem_slots,
    Request.ADD_MEM_REG: VhostUserBackend._add_mem_reg,
    Request.REM_MEM_REG: VhostUserBackend._rem_mem_reg,
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
