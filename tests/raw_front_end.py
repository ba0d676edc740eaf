"""A vhost-user front end without manners, for `balloon serve` as a process: says what it is told to say."""

from __future__ import annotations

import array
import mmap
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

from vring import vhost_user as vu
from vring.vhost_user import ProtocolFeature, Request

USER = 0x7F00_0000_0000
RAM = 4 << 20
SIZE = 64
AVAIL, USED = 0x1000, 0x2000
BUFFER = 0x20000
"""Where the one buffer of each request lies."""
NEED_REPLY = 9


class RawFrontEnd:
    """One connection; ring 0 lies at guest address 0."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(str(path))
        self.ram = os.memfd_create("raw-ram")
        os.ftruncate(self.ram, RAM)
        self.map = mmap.mmap(self.ram, RAM)
        self.kick, self.call = os.eventfd(0), os.eventfd(0)
        self.added = 0

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 1) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([vu.HEADER.pack(request, flags, len(payload)) + payload], ancillary)

    def reply(self) -> int | None:
        """Return the number that came as a reply, None if the other end hung up."""
        try:
            head = self.socket.recv(12, socket.MSG_WAITALL)
            if not head:
                return None
            payload = self.socket.recv(vu.HEADER.unpack(head)[2], socket.MSG_WAITALL)
        except ConnectionResetError:
            return None
        return int(vu.unpack_u64(payload, "reply"))

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int | None:
        """Send a request that wants an acknowledgement; 0: it was taken, 1: refused, None: that was the end."""
        try:
            self.send(request, payload, fds, NEED_REPLY)
        except (BrokenPipeError, ConnectionResetError):
            return None
        return self.reply()

    def hello(self) -> RawFrontEnd:
        """Negotiate what is offered, share memory."""
        self.send(Request.GET_FEATURES)
        features = self.reply()
        if features is None:
            raise ConnectionResetError("turned away")
        wanted = ProtocolFeature.REPLY_ACK | ProtocolFeature.BACKEND_REQ | ProtocolFeature.CONFIG
        self.send(Request.SET_PROTOCOL_FEATURES, vu.pack_u64(int(wanted)))
        # Without EVENT_IDX each buffer that comes back is an interrupt.
        self.send(Request.SET_FEATURES, vu.pack_u64(features & ~(1 << 29)))
        table = vu.MemoryRegion.pack_table([vu.MemoryRegion(0, RAM, USER, 0)])
        assert self.ask(Request.SET_MEM_TABLE, table, [self.ram]) == 0
        return self

    def ring(self, index: int = 0) -> RawFrontEnd:
        """Set a ring up, with this front end's kick and call."""
        at = USER + index * 0x4000
        for request, payload, fds in (
            (Request.SET_VRING_NUM, vu.VringState(index, SIZE).pack(), []),
            (Request.SET_VRING_BASE, vu.VringState(index, 0).pack(), []),
            (Request.SET_VRING_ADDR, vu.VringAddr(index, 0, at, at + USED, at + AVAIL, 0).pack(), []),
            (Request.SET_VRING_CALL, vu.VringFd(index, True).pack(), [self.call]),
            (Request.SET_VRING_KICK, vu.VringFd(index, True).pack(), [self.kick]),
            (Request.SET_VRING_ENABLE, vu.VringState(index, 1).pack(), []),
        ):
            assert self.ask(request, payload, fds) == 0, request
        return self

    def add(self) -> None:
        """Make one buffer available, of one page number, and say nothing."""
        slot = self.added % SIZE
        struct.pack_into("<I", self.map, BUFFER, 100)
        struct.pack_into("<QIHH", self.map, 16 * slot, BUFFER, 4, 0, 0)
        self.map[AVAIL + 4 + 2 * slot : AVAIL + 6 + 2 * slot] = struct.pack("<H", slot)
        self.added += 1
        memoryview(self.map).cast("H")[AVAIL // 2 + 1] = self.added & 0xFFFF

    @property
    def used(self) -> int:
        return memoryview(self.map).cast("H")[USED // 2 + 1]

    def ring_the_bell(self) -> None:
        os.eventfd_write(self.kick, 1)

    def close(self) -> None:
        self.socket.close()
        for fd in (self.ram, self.kick, self.call):
            os.close(fd)
