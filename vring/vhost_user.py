"""The vhost-user protocol's messages, as bytes. No sockets here: both ends bring their own.

Source: the vhost-user specification that ships with QEMU (docs/interop/vhost-user.rst). All integers are in host
byte order, which on the hosts this project supports is little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from vring.errors import VirtioError

__all__ = [
    "F_LOG_ALL",
    "F_PROTOCOL_FEATURES",
    "HEADER_SIZE",
    "MAX_PAYLOAD",
    "BackendRequest",
    "ConfigSpace",
    "Header",
    "MemoryRegion",
    "ProtocolFeature",
    "Request",
    "VringAddr",
    "VringFd",
    "VringState",
    "pack_message",
]

VERSION = 1
FLAG_VERSION_MASK = 3
FLAG_REPLY = 4
FLAG_NEED_REPLY = 8
HEADER = struct.Struct("=III")
HEADER_SIZE = HEADER.size
MAX_PAYLOAD = 4096
"""Larger than any message this project understands; what claims more is not vhost-user."""
MAX_FDS = 16

F_LOG_ALL = 1 << 26
"""Feature bit by which a front end asks for a log of writes while it migrates: it comes and goes with one driver."""
F_PROTOCOL_FEATURES = 1 << 30
"""Feature bit that vhost-user itself adds: protocol features can be negotiated and rings start disabled."""

U64 = struct.Struct("=Q")
STATE = struct.Struct("=II")
ADDR = struct.Struct("=IIQQQQ")
MEMORY_HEAD = struct.Struct("=II")
MEMORY_REGION = struct.Struct("=QQQQ")
SINGLE_REGION = struct.Struct("=QQQQQ")
CONFIG_HEAD = struct.Struct("=III")
CONFIG_MAX = 256


class Request(IntEnum):
    """Requests of the front end (the guest's side)."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40


class BackendRequest(IntEnum):
    """Requests of the back end (the device's side), on the socket given by SET_BACKEND_REQ_FD."""

    CONFIG_CHANGE = 2


class ProtocolFeature(IntFlag):
    """Protocol feature bits this project knows."""

    MQ = 1 << 0
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16


class VhostUserError(VirtioError):
    """The bytes on the socket are not the vhost-user protocol, or a message of it that cannot be right."""


@dataclass(frozen=True, slots=True)
class Header:
    """The 12 bytes before each payload."""

    request: int
    """`Request` or `BackendRequest`; unknown numbers are kept as they are."""
    flags: int
    """Version in the low two bits, reply (4), need_reply (8)."""
    size: int
    """Bytes of payload that follow."""

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """Parse 12 bytes.

        Raises
        ------
        VhostUserError
            If the version or the size makes no sense.
        """
        header = cls(*HEADER.unpack(data))
        if header.flags & FLAG_VERSION_MASK != VERSION:
            raise VhostUserError(
                f"vhost-user: message {header.request} has version {header.flags & 3}, only 1 is known"
            )
        if header.size > MAX_PAYLOAD:
            raise VhostUserError(
                f"vhost-user: message {header.request} claims {header.size} bytes, at most {MAX_PAYLOAD}"
            )
        return header

    @property
    def need_reply(self) -> bool:
        """Whether the sender asked for an acknowledgement (REPLY_ACK)."""
        return bool(self.flags & FLAG_NEED_REPLY)

    @property
    def is_reply(self) -> bool:
        """Whether this answers a request."""
        return bool(self.flags & FLAG_REPLY)

    @property
    def name(self) -> str:
        """The request in words, for messages."""
        try:
            return Request(self.request).name
        except ValueError:
            return f"request {self.request}"


def pack_message(request: int, payload: bytes = b"", *, reply: bool = False, need_reply: bool = False) -> bytes:
    """Return header and payload of one message."""
    flags = VERSION | (FLAG_REPLY if reply else 0) | (FLAG_NEED_REPLY if need_reply else 0)
    return HEADER.pack(request, flags, len(payload)) + payload


def _exact(layout: struct.Struct, payload: bytes, what: str) -> tuple[int, ...]:
    if len(payload) != layout.size:
        raise VhostUserError(f"vhost-user: {what} has {len(payload)} bytes of payload, it must have {layout.size}")
    return layout.unpack(payload)


def pack_u64(value: int) -> bytes:
    """Return a 64-bit payload."""
    return U64.pack(value & (1 << 64) - 1)


def unpack_u64(payload: bytes, what: str) -> int:
    """Parse a 64-bit payload; `what` names the message in the error."""
    return _exact(U64, payload, what)[0]


@dataclass(frozen=True, slots=True)
class VringState:
    """SET_VRING_NUM, SET_VRING_BASE, GET_VRING_BASE, SET_VRING_ENABLE: a queue number and a value."""

    index: int
    value: int

    def pack(self) -> bytes:
        """Return the payload."""
        return STATE.pack(self.index, self.value)

    @classmethod
    def unpack(cls, payload: bytes, what: str) -> VringState:
        """Parse the payload."""
        return cls(*_exact(STATE, payload, what))


@dataclass(frozen=True, slots=True)
class VringAddr:
    """SET_VRING_ADDR: where the three parts of a ring are, as addresses in the front end's own space."""

    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int

    def pack(self) -> bytes:
        """Return the payload."""
        return ADDR.pack(self.index, self.flags, self.desc, self.used, self.avail, self.log)

    @classmethod
    def unpack(cls, payload: bytes) -> VringAddr:
        """Parse the payload."""
        return cls(*_exact(ADDR, payload, "SET_VRING_ADDR"))


@dataclass(frozen=True, slots=True)
class VringFd:
    """SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR: a queue number; the descriptor travels beside the message."""

    NO_FD = 1 << 8

    index: int
    has_fd: bool

    def pack(self) -> bytes:
        """Return the payload."""
        return U64.pack(self.index | (0 if self.has_fd else self.NO_FD))

    @classmethod
    def unpack(cls, payload: bytes, what: str) -> VringFd:
        """Parse the payload."""
        value = unpack_u64(payload, what)
        return cls(value & 0xFF, not value & cls.NO_FD)


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """One entry of SET_MEM_TABLE, or that of ADD_MEM_REG or REM_MEM_REG; its descriptor travels beside the message."""

    gpa: int
    size: int
    user_address: int
    """Where the front end has it mapped; ring addresses are given in these terms."""
    mmap_offset: int

    @staticmethod
    def pack_table(regions: Sequence[MemoryRegion]) -> bytes:
        """Return the payload of SET_MEM_TABLE."""
        body = b"".join(MEMORY_REGION.pack(r.gpa, r.size, r.user_address, r.mmap_offset) for r in regions)
        return MEMORY_HEAD.pack(len(regions), 0) + body

    @classmethod
    def unpack_table(cls, payload: bytes) -> list[MemoryRegion]:
        """Parse SET_MEM_TABLE; bytes after the last region are padding (Linux sends room for two)."""
        if len(payload) < MEMORY_HEAD.size:
            raise VhostUserError(f"vhost-user: SET_MEM_TABLE has only {len(payload)} bytes")
        count = MEMORY_HEAD.unpack_from(payload)[0]
        if count * MEMORY_REGION.size > len(payload) - MEMORY_HEAD.size:
            raise VhostUserError(f"vhost-user: SET_MEM_TABLE names {count} regions in {len(payload)} bytes")
        at = MEMORY_HEAD.size
        return [cls(*MEMORY_REGION.unpack_from(payload, at + i * MEMORY_REGION.size)) for i in range(count)]

    def pack(self) -> bytes:
        """Return the payload of ADD_MEM_REG and REM_MEM_REG."""
        return SINGLE_REGION.pack(0, self.gpa, self.size, self.user_address, self.mmap_offset)

    @classmethod
    def unpack(cls, payload: bytes, what: str) -> MemoryRegion:
        """Parse the payload of ADD_MEM_REG and REM_MEM_REG."""
        return cls(*_exact(SINGLE_REGION, payload, what)[1:])


@dataclass(frozen=True, slots=True)
class ConfigSpace:
    """GET_CONFIG and SET_CONFIG: a piece of the config space."""

    offset: int
    size: int
    flags: int
    data: bytes
    """At least `size` bytes; some front ends always send 256, and want as many back."""

    def pack(self) -> bytes:
        """Return the payload."""
        return CONFIG_HEAD.pack(self.offset, self.size, self.flags) + self.data

    @classmethod
    def unpack(cls, payload: bytes, what: str) -> ConfigSpace:
        """Parse the payload."""
        if len(payload) < CONFIG_HEAD.size:
            raise VhostUserError(f"vhost-user: {what} has only {len(payload)} bytes")
        offset, size, flags = CONFIG_HEAD.unpack_from(payload)
        data = payload[CONFIG_HEAD.size :]
        if not size <= len(data) <= CONFIG_MAX:
            raise VhostUserError(f"vhost-user: {what} of {size} bytes carries {len(data)} (at most {CONFIG_MAX})")
        return cls(offset, size, flags, data)
