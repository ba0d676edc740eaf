"""A front end that speaks vhost-user one message at a time, with a back end in the same process."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Sequence

from balloon_dev.device import BalloonDevice
from balloon_dev.features import RING_FEATURES, BalloonFeature, QueueRole
from balloon_dev.profiles import LINUX
from host_qemu_side.loop import Loop
from host_qemu_side.serve import Server
from host_qemu_side.vhost_user import VhostUserBackend
from vring import vhost_user as vu
from vring.memory import GuestMemory
from vring.vhost_user import Request

FEATURES = int(BalloonFeature.FREE_PAGE_HINT | BalloonFeature.DEFLATE_ON_OOM) | int(RING_FEATURES)
USER = 0x7F0000000000
RINGS = 0x10000
APART = 0x4000
"""Bytes from one ring to the next: descriptors, 4 KiB on the avail ring, 4 KiB on the used ring."""
BUFFERS = 0x8000
"""Where the buffers of a driver lie, 4 KiB for each queue."""
BIT_30 = vu.F_PROTOCOL_FEATURES


class Front:
    """Speaks as a front end, one message at a time; `put` is the driver's part.

    It has a device and a back end of its own, or is the front end of a server, which is not closed with it.
    """

    def __init__(self, features: int = FEATURES, *, size: int = 256, server: Server | None = None) -> None:
        self.features, self.size = features, size
        self.memory = GuestMemory.create(((0, 1 << 20),))
        self.server = server
        self.loop = Loop() if server is None else server.loop
        self.device = BalloonDevice(features, profile=LINUX) if server is None else server.device
        self.backend = VhostUserBackend(self.device, self.loop) if server is None else server.backend
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(5.0)
        self.backend.serve(theirs)
        self.channel: socket.socket | None = None
        self.at = [RINGS + index * APART for index in range(5)]
        """Where the driver has its rings."""
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(5)]
        self.calls = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(5)]

    def close(self) -> None:
        self.socket.close()
        if self.server is None:
            self.backend.close()
            self.loop.close()
        self.memory.close()
        if self.channel is not None:
            self.channel.close()
        for fd in (*self.kicks, *self.calls):
            os.close(fd)

    # -- messages -------------------------------------------------------------------------------------------------

    def open_channel(self) -> None:
        """Give the back end a channel for requests of its own; `told` reads it."""
        self.channel, theirs = socket.socketpair()
        self.channel.setblocking(False)
        with theirs:
            self.say(Request.SET_BACKEND_REQ_FD, fds=(theirs.fileno(),))

    def told(self) -> int:
        """How often a config change was told since the last time."""
        assert self.channel is not None
        with contextlib.suppress(BlockingIOError):
            return self.channel.recv(4096).count(vu.pack_message(vu.BackendRequest.CONFIG_CHANGE))
        return 0

    def say(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        socket.send_fds(self.socket, [vu.pack_message(request, payload)], list(fds))
        self.loop.run_once(1.0)

    def ask(self, request: Request, payload: bytes = b"") -> bytes:
        """Return the payload of the reply."""
        self.say(request, payload)
        header = vu.Header.unpack(self.socket.recv(vu.HEADER_SIZE))
        assert header.is_reply
        assert header.request == request
        return self.socket.recv(header.size)

    def acked(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> bool:
        """Send a request that wants to be acknowledged; return whether it was obeyed."""
        self.say(Request.SET_PROTOCOL_FEATURES, vu.pack_u64(vu.ProtocolFeature.REPLY_ACK))
        socket.send_fds(self.socket, [vu.pack_message(request, payload, need_reply=True)], list(fds))
        self.loop.run_once(1.0)
        return not vu.unpack_u64(self.socket.recv(vu.HEADER_SIZE + 8)[vu.HEADER_SIZE :], request.name)

    def negotiate(self, extra: int = 0, features: int | None = None) -> None:
        self.say(Request.SET_FEATURES, vu.pack_u64((self.features if features is None else features) | extra))

    def table(self, user: int = USER) -> None:
        region = self.memory.regions[0]
        table = vu.MemoryRegion.pack_table([vu.MemoryRegion(0, region.size, user, 0)])
        self.say(Request.SET_MEM_TABLE, table, (region.fd,))

    def num(self, index: int = 0) -> None:
        self.say(Request.SET_VRING_NUM, vu.VringState(index, self.size).pack())

    def base(self, index: int = 0, base: int = 0) -> None:
        self.say(Request.SET_VRING_BASE, vu.VringState(index, base).pack())

    def addr(self, index: int = 0, user: int = USER) -> None:
        at = user + self.at[index]
        parts = vu.VringAddr(index, 0, at, at + 0x2000, at + 0x1000, (1 << 64) - 1)
        self.say(Request.SET_VRING_ADDR, parts.pack())

    def kick(self, index: int = 0) -> None:
        self.say(Request.SET_VRING_KICK, vu.VringFd(index, True).pack(), (self.kicks[index],))

    def call(self, index: int = 0, *, there: bool = True) -> None:
        fds = (self.calls[index],) if there else ()
        self.say(Request.SET_VRING_CALL, vu.VringFd(index, there).pack(), fds)

    def enable(self, index: int = 0, *, on: bool = True) -> None:
        self.say(Request.SET_VRING_ENABLE, vu.VringState(index, int(on)).pack())

    def get_base(self, index: int = 0) -> int:
        return vu.VringState.unpack(
            self.ask(Request.GET_VRING_BASE, vu.VringState(index, 0).pack()), "GET_VRING_BASE"
        ).value

    def set_config(self, offset: int, data: bytes, *, room: int = 0) -> None:
        """Write config space; the message is padded to `room` bytes of it."""
        self.say(Request.SET_CONFIG, vu.ConfigSpace(offset, len(data), 0, data.ljust(room, b"\xee")).pack())

    def get_config(self, offset: int, size: int, *, room: int = 0) -> bytes:
        """Read config space; the message is padded to `room` bytes of it, and so is what is returned."""
        asked = vu.ConfigSpace(offset, size, 0, bytes(max(size, room)))
        return vu.ConfigSpace.unpack(self.ask(Request.GET_CONFIG, asked.pack()), "GET_CONFIG").data

    def probe(self, at: int = RINGS, extra: int = 0, *, rings: int = 3, bases: Sequence[int] = (0,) * 5) -> None:
        """What the driver says when it is loaded, or goes on: the rings are 16 KiB apart from that address on."""
        self.negotiate(extra)
        self.table()
        self.at = [at + index * APART for index in range(5)]
        for index in range(rings):
            self.num(index)
            self.base(index, bases[index])
            self.addr(index)
            self.kick(index)
            if extra:
                self.enable(index)

    def stop(self, rings: int = 3) -> list[int]:
        """What QEMU says when it stops the machine, or the guest resets the device; return the bases."""
        for index in range(rings):
            self.enable(index, on=False)
        return [self.get_base(index) for index in range(rings)]

    # -- the driver -----------------------------------------------------------------------------------------------

    def begin(self, rings: int = 3) -> None:
        """Another driver lays its rings out: all of them are empty."""
        for index in range(rings):
            self.memory.write(self.at[index], bytes(APART))

    def put(self, data: bytes, index: int = 0, *, at: int = 0, writable: bool = False, kick: bool = True) -> None:
        """Make one buffer available, at a place of its own or at a guest address, and kick."""
        ring = self.at[index]
        n = int.from_bytes(self.memory.read(ring + 0x1002, 2), "little")
        slot = n % self.size
        buffer = at or BUFFERS + 0x1000 * index + 0x100 * (n % 16)
        self.memory.write(buffer, data)
        self.memory.write(ring + 16 * slot, struct.pack("<QIHH", buffer, len(data), 2 * writable, 0))
        self.memory.write(ring + 0x1004 + 2 * slot, struct.pack("<H", slot))
        self.memory.write(ring + 0x1002, struct.pack("<H", (n + 1) & 0xFFFF))
        if kick:
            os.eventfd_write(self.kicks[index], 1)
            self.loop.run_once(0.0)

    def inflate(self, *pages: int, index: int = 0) -> None:
        """Give pages to the balloon; on the deflateq (1): take them back."""
        self.put(struct.pack(f"<{len(pages)}I", *pages), index)

    def used(self, index: int = 0) -> int:
        return int.from_bytes(self.memory.read(self.at[index] + 0x2002, 2), "little")

    def rung(self, index: int = 0) -> int:
        """How many interrupts have come."""
        with contextlib.suppress(BlockingIOError):
            return os.eventfd_read(self.calls[index])
        return 0

    # -- looking at it --------------------------------------------------------------------------------------------

    def live(self) -> int:
        return sum(self.device.queue(role) is not None for role in QueueRole)

    def scribble(self) -> bytes:
        """The memory is somebody else's now; return what it holds."""
        self.memory.write(RINGS, b"\x5a" * 0x10000)
        return self.memory.read(0, 1 << 20)

    def provoke(self) -> None:
        """Do all that could make the device look at a ring or write to it."""
        self.device.request_stats()
        for index in range(3):
            self.backend.process(index)
        self.backend.hold()
        self.backend.release()
        self.backend.deliver()
