"""What each message of a vhost-user front end does: to its rings, its memory, the device and its config space.

The connection that they come over is `host_qemu_side.vhost_user.backend`'s.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from host_qemu_side.vhost_user.descriptors import adopt_socket, check_doorbell
from host_qemu_side.vhost_user.rings import Rings
from host_qemu_side.vhost_user.table import MemoryTable
from vring import vhost_user as vu
from vring.device import Device
from vring.memory import MAX_REGIONS
from vring.vhost_user import ProtocolFeature, Request, VhostUserError

__all__ = ["Messages"]

PROTOCOL_FEATURES = (
    ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.MQ
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)


class Messages:
    """Obeys one front end.

    Parameters
    ----------
    device
        The device type it speaks to.
    rings
        The device's rings.
    on_memory
        Called when the device has got its memory and no queue runs yet.
    """

    def __init__(self, device: Device, rings: Rings, on_memory: Callable[[], None] | None) -> None:
        self._device, self._rings, self._on_memory = device, rings, on_memory
        self.protocol = 0
        """Protocol features negotiated."""
        self.channel: socket.socket | None = None
        """Where the front end takes requests of the back end's."""

    def obey(self, request: int, payload: bytes, fds: list[int]) -> bytes | None:
        """Do what a message says; return the payload of the reply it has by itself.

        Descriptors that are kept are taken out of `fds`.

        Raises
        ------
        VirtioError, OSError
            If it cannot be obeyed.
        """
        handler = _HANDLERS.get(request)
        if handler is None:
            raise VhostUserError(f"vhost-user: {vu.Header(request, 0, 0).name} is not supported")
        return handler(self, payload, fds)

    def forget(self) -> None:
        """The front end is gone."""
        self.protocol = 0
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def _get_features(self, payload: bytes, fds: list[int]) -> bytes:
        # User-Mode Linux, which disables rings only with bit 30, asks when it has deleted them, to know that all before
        # was heard. Nothing else says that its driver was removed.
        if not (self._rings.features or 0) & vu.F_PROTOCOL_FEATURES:
            self._rings.retire()
        return vu.pack_u64(self._device.offered_features | vu.F_PROTOCOL_FEATURES)

    def _set_features(self, payload: bytes, fds: list[int]) -> None:
        features = vu.unpack_u64(payload, "SET_FEATURES")
        if not self._rings.set_features(features):
            raise VhostUserError(
                f"vhost-user: features {features:#x} were not all offered", clause="basic.features.driver-1"
            )

    def _get_protocol_features(self, payload: bytes, fds: list[int]) -> bytes:
        return vu.pack_u64(PROTOCOL_FEATURES)

    def _set_protocol_features(self, payload: bytes, fds: list[int]) -> None:
        self.protocol = vu.unpack_u64(payload, "SET_PROTOCOL_FEATURES") & PROTOCOL_FEATURES

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
        self._device.reset()

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
        old = self._rings.table.memory
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
        old, self.channel = self.channel, adopt_socket(fds, "SET_BACKEND_REQ_FD")
        if old is not None:
            old.close()

    def _get_config(self, payload: bytes, fds: list[int]) -> bytes:
        asked = vu.ConfigSpace.unpack(payload, "GET_CONFIG")
        shown = self._device.read_config(asked.offset, asked.size)
        return vu.ConfigSpace(asked.offset, asked.size, 0, shown.ljust(len(asked.data), b"\0")).pack()

    def _set_config(self, payload: bytes, fds: list[int]) -> None:
        asked = vu.ConfigSpace.unpack(payload, "SET_CONFIG")
        self._device.write_config(asked.offset, asked.data[: asked.size])


_Handler = Callable[[Messages, bytes, list[int]], "bytes | None"]
_HANDLERS: dict[int, _Handler] = {
    Request.GET_FEATURES: Messages._get_features,
    Request.SET_FEATURES: Messages._set_features,
    Request.SET_OWNER: Messages._nothing,
    Request.RESET_OWNER: Messages._reset_owner,
    Request.RESET_DEVICE: Messages._reset_device,
    Request.SET_STATUS: Messages._set_status,
    Request.SET_MEM_TABLE: Messages._set_mem_table,
    Request.GET_MAX_MEM_SLOTS: Messages._get_max_mem_slots,
    Request.ADD_MEM_REG: Messages._add_mem_reg,
    Request.REM_MEM_REG: Messages._rem_mem_reg,
    Request.SET_VRING_NUM: Messages._set_vring_num,
    Request.SET_VRING_ADDR: Messages._set_vring_addr,
    Request.SET_VRING_BASE: Messages._set_vring_base,
    Request.GET_VRING_BASE: Messages._get_vring_base,
    Request.SET_VRING_KICK: Messages._set_vring_kick,
    Request.SET_VRING_CALL: Messages._set_vring_call,
    Request.SET_VRING_ERR: Messages._set_vring_err,
    Request.GET_PROTOCOL_FEATURES: Messages._get_protocol_features,
    Request.SET_PROTOCOL_FEATURES: Messages._set_protocol_features,
    Request.GET_QUEUE_NUM: Messages._get_queue_num,
    Request.SET_VRING_ENABLE: Messages._set_vring_enable,
    Request.SET_BACKEND_REQ_FD: Messages._set_backend_req_fd,
    Request.GET_CONFIG: Messages._get_config,
    Request.SET_CONFIG: Messages._set_config,
}
