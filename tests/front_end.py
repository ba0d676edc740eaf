"""A front end that speaks vhost-user one message at a time, with a back end in the same process."""

from __future__ import annotations

import os
import socket

from balloon_dev.device import BalloonDevice
from balloon_dev.features import RING_FEATURES, BalloonFeature, QueueRole
from balloon_dev.profiles import LINUX
from host_qemu_side.loop import Loop
from host_qemu_side.vhost_user import VhostUserBackend
from vring import vhost_user as vu
from vring.memory import GuestMemory
from vring.vhost_user import Request

FEATURES = int(BalloonFeature.FREE_PAGE_HINT | BalloonFeature.DEFLATE_ON_OOM) | int(RING_FEATURES)
USER = 0x7F0000000000
RINGS = 0x10000


class Front:
    """Speaks as a front end, one message at a time."""

    def __init__(self, features: int = FEATURES) -> None:
        self.features = features
        self.memory = GuestMemory.create(((0, 1 << 20),))
        self.loop = Loop()
        self.device = BalloonDevice(features, profile=LINUX)
        self.backend = VhostUserBackend(self.device, self.loop)
        self.socket, theirs = socket.socketpair()
        self.backend.serve(theirs)

    def say(self, request: Request, payload: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        socket.send_fds(self.socket, [vu.pack_message(request, payload)], list(fds))
        self.loop.run_once(1.0)

    def probe(self, at: int, extra: int = 0, *, rings: int = 3) -> None:
        """What the driver says when it is loaded: the rings are 16 KiB apart from that address on."""
        self.say(Request.SET_FEATURES, vu.pack_u64(self.features | extra))
        region = self.memory.regions[0]
        table = vu.MemoryRegion.pack_table([vu.MemoryRegion(0, region.size, USER, 0)])
        self.say(Request.SET_MEM_TABLE, table, (region.fd,))
        for index in range(rings):
            base = USER + at + index * 0x4000
            self.say(Request.SET_VRING_NUM, vu.VringState(index, 256).pack())
            self.say(Request.SET_VRING_BASE, vu.VringState(index, 0).pack())
            self.say(
                Request.SET_VRING_ADDR, vu.VringAddr(index, 0, base, base + 0x2000, base + 0x1000, (1 << 64) - 1).pack()
            )
            kick = os.eventfd(0)
            self.say(Request.SET_VRING_KICK, vu.VringFd(index, True).pack(), (kick,))
            os.close(kick)
            if extra:
                self.say(Request.SET_VRING_ENABLE, vu.VringState(index, 1).pack())

    def live(self) -> int:
        return sum(self.device.queue(role) is not None for role in QueueRole)

    def scribble(self) -> bytes:
        """The memory is somebody else's now; return what it holds."""
        self.memory.write(RINGS, b"\x5a" * 0x10000)
        return self.memory.read(0, 1 << 20)

    def close(self) -> None:
        self.backend.close()
        self.socket.close()
        self.loop.close()
        self.memory.close()

    def provoke(self) -> None:
        """Do all that could make the device look at a ring or write to it."""
        self.device.request_stats()
        for index in range(3):
            self.backend.process(index)
        self.backend.hold()
        self.backend.release()
        self.backend.deliver()
