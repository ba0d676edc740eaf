"""An unmodified Linux guest joined with a balloon device, for tests of the feature bits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from balloon_dev.device import BalloonDevice
from balloon_dev.features import ALL_BALLOON_FEATURES, RING_FEATURES, QueueRole
from balloon_dev.hinting import HintState
from balloon_dev.profiles import LINUX
from balloon_dev.rules import BadRequest, Rule
from host_qemu_side.discard.current import CurrentDiscarder
from host_qemu_side.linux_guest import LinuxGuest, tags
from host_qemu_side.linux_guest.handle import LinuxGuestHandle
from host_qemu_side.loop import Loop
from host_qemu_side.vhost_user import VhostUserBackend
from vring.errors import MissingFacility, UsageError

MIB = 1 << 20
PAGE = 4096
BLOCK = 4 * MIB
ALL = ALL_BALLOON_FEATURES | RING_FEATURES
NONCE = 77
RACES = {BadRequest(rule, QueueRole.FREE_PAGE) for rule in (Rule.HINT_OUTSIDE_RUN, Rule.HINT_COMMAND_ID)}
"""Rules Linux breaks: it reads the id a second time when it opens a run, and a STOP or DONE in between makes it open
one under id 0 or 1."""
PLATFORM = "/sys/bus/platform/drivers/virtio-uml"
VIRTIO = "/sys/bus/virtio/drivers/virtio_balloon"


BUILT = ("guest_tool-", "initramfs-", "ptrace_xstate-")
"""Beginnings of the names of what is built once and kept in a work folder."""


class SlowDevice(BalloonDevice):
    """Serves only as many buffers of a queue as the test allows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allowed: dict[QueueRole, int] = {}
        """Buffers still to be served; queues that are not in here are served as usual."""

    def process(self, index: int) -> int:
        role = self.role_of(index)
        if role is None or role not in self.allowed:
            return super().process(index)
        served = self.process_batch(index, self.allowed[role]) if self.allowed[role] else 0
        self.allowed[role] -= served
        return served


class LinuxPair:
    """One booted Linux guest. Its device can be taken away and replaced by another one (`replug`).

    Parameters
    ----------
    folder
        For the RAM file and the sockets.
    memory
        RAM in bytes.
    features
        What the device offers.
    kernel_args
        For the guest's kernel.
    """

    def __init__(
        self,
        folder: Path,
        memory: int = 512 * MIB,
        features: int = ALL,
        kernel_args: tuple[str, ...] = (),
    ) -> None:
        self.loop = Loop()
        self.socket = str(folder / "s")
        self.bytes = memory
        self._plug(features)
        try:
            self.guest = LinuxGuest(
                memory, folder / "w", self.socket, kernel_args=kernel_args, watch=lambda: self.loop.filenos()
            )
        except MissingFacility as missing:
            self.backend.close()
            pytest.skip(str(missing))
        self.tagged = False

    def _plug(self, features: int) -> None:
        self.device = SlowDevice(features, profile=LINUX)
        self.backend = VhostUserBackend(self.device, self.loop)
        self.device.discard = CurrentDiscarder(lambda: self.backend.memory, lambda: True)
        self.backend.listen(self.socket)

    def __enter__(self) -> LinuxPair:
        self.guest.start()
        try:
            self.guest.wait_ready(60.0, self.serve)
            self.run("echo 1 >/proc/sys/vm/overcommit_memory")
            # MemFree leaves out what lies in the lists of each CPU: tens of MiB where the kernel chooses their length.
            self.run("echo 1000000 >/proc/sys/vm/percpu_pagelist_high_fraction")
            self.load()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.guest.kill()
        self.backend.close()
        self.loop.close()

    # -- the guest ------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        self.loop.run_once(0.0)

    def run(self, command: str, timeout: float = 30.0, *, check: bool = True) -> str:
        """Run a command in the guest; return what it printed."""
        return self.guest.run(command, timeout, self.serve, check=check).output

    def tool(self, arguments: str) -> dict[str, int | float]:
        return self.guest.tool(arguments, serve=self.serve)

    def load(self) -> None:
        """Load the driver and wait until its device works."""
        if "virtio_balloon" not in self.run("lsmod"):
            self.guest.load_balloon(self.serve)
        self.until(lambda: self.device.queue(QueueRole.INFLATE) is not None)

    def unload(self) -> None:
        self.guest.unload_balloon(self.serve)

    def replug(self, features: int = ALL) -> None:
        """Take the device away and give the guest another one: all through sysfs, the guest goes on."""
        name = self.run(f"cd {PLATFORM}; ls | grep '^virtio-uml'").split()[0]
        self.run(f"echo {name} >{PLATFORM}/unbind")
        self.until(lambda: not self.backend.connected)
        self.backend.close()
        self._plug(features)
        self.run(f"echo {name} >{PLATFORM}/bind")
        self.load()

    def rebind(self) -> None:
        """Take the driver from its device and give it back, through sysfs."""
        name = self.run(f"cd {VIRTIO}; ls | grep '^virtio[0-9]'").split()[0]
        self.run(f"echo {name} >{VIRTIO}/unbind")
        assert not self.device.ballooned_pages, "the driver left pages in the balloon"
        self.run(f"echo {name} >{VIRTIO}/bind")
        self.until(lambda: self.device.queue(QueueRole.INFLATE) is not None)

    def meminfo(self, name: str = "MemFree") -> int:
        return self.guest.meminfo(self.serve)[name]

    def vmstat(self) -> dict[str, int]:
        lines = (line.split() for line in self.run("cat /proc/vmstat").splitlines())
        return {name: int(value) for name, value in lines}

    def until(self, condition: Callable[[], Any], seconds: float = 15.0, what: str = "the Linux guest") -> None:
        self.loop.run_until(lambda: bool(condition()), seconds, what)

    def until_free(self, at_least: int, seconds: float = 10.0) -> int:
        """Wait until MemFree is that much; return it."""
        found = 0

        def enough() -> bool:
            nonlocal found
            found = self.meminfo()
            return found >= at_least

        self.until(enough, seconds, f"{at_least >> 20} MiB to be free")
        return found

    def start_tagger(self, pages: int = 512, rate: int = 500) -> None:
        self.tool(f"tagger --pages {pages} --rate {rate} --nonce {NONCE}")
        self.tagged = True

    def fill(self) -> None:
        """Write to nearly all of the guest's memory once and free it, so that the host has all of it."""
        size = int(self.meminfo() * 0.93) >> 20
        self.run(f"dd if=/dev/urandom of=/fill/x bs=1M count={size} 2>/dev/null; rm /fill/x")

    # -- the host -------------------------------------------------------------------------------------------------

    @property
    def file_bytes(self) -> int:
        """What the file behind the guest's RAM takes up."""
        assert self.backend.memory is not None
        return os.fstat(self.backend.memory.regions[0].fd).st_blocks * 512

    def deliver(self) -> None:
        self.backend.deliver()

    def set_target(self, pages: int, *, wait: bool = True, seconds: float = 20.0) -> None:
        """Ask for a balloon; with `wait` until it is so."""
        self.device.set_target(pages)
        self.deliver()
        if wait:
            self.until(lambda: self.device.actual == pages, seconds, f"a balloon of {pages} pages")

    def stats(self) -> dict[str, int]:
        """Return fresh figures."""
        before = self.device.stats.updates
        self.until(self.device.request_stats)
        self.deliver()
        self.until(lambda: self.device.stats.updates > before)
        return self.device.stats.values

    def start_hints(self) -> int:
        command_id = self.device.start_hinting()
        self.deliver()
        return command_id

    def stop_hints(self) -> None:
        self.device.stop_hinting()
        self.deliver()

    def done(self) -> None:
        self.device.finish_hinting()
        self.deliver()

    def serve_queue(self, role: QueueRole) -> None:
        """Serve what a `SlowDevice` left."""
        index = self.device.queue_number(role)
        if index is not None:
            self.backend.process(index)

    def hint_round(self) -> int:
        """A whole round up to the guest's own stop; return the blocks that came."""
        blocks = 0

        def count(command_id: int, addr: Any, length: Any) -> None:
            nonlocal blocks
            blocks += len(addr)
            assert (length == BLOCK).all()

        self.device.hint_sink = count
        self.start_hints()
        self.until(lambda: self.device.hinting.state is HintState.STOP, what="the guest to end its round")
        self.device.hint_sink = None
        return blocks

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        handle = LinuxGuestHandle(self.guest, self.backend)
        handle.freeze()
        try:
            yield
        finally:
            handle.thaw()

    def check(self, *, look_at_tags: bool = True) -> None:
        """The guest's kernel answers, no queue is broken, no request was bad, and tagged pages are sound."""
        assert self.guest.alive(self.serve)
        assert self.backend.last_error is None
        if self.device.negotiated:
            for role in QueueRole:
                number = self.device.queue_number(role)
                assert number is None or self.device.queue(role) is not None, role
        assert not set(self.device.bad_requests) - RACES, self.device.bad_requests
        if self.tagged and look_at_tags:
            assert self.backend.memory is not None
            with self.frozen():
                report = tags.scan(self.backend.memory.regions[0].fd, NONCE)
            assert report.ok, report.summary()

    def settle(self) -> None:
        """Take back what a test may have left; the guest obeys, its driver works, and nothing was wrong."""
        assert not self.guest.frozen
        assert self.run("echo sound", 5.0) == "sound\n"
        assert self.device.queue(QueueRole.INFLATE) is not None
        self.device.allowed.clear()
        self.serve_queue(QueueRole.FREE_PAGE)
        self.serve_queue(QueueRole.DEFLATE)
        self.device.hint_sink = None
        self.done()
        self.set_target(0)
        self.check()
        assert not kernel_complains(self)


@contextlib.contextmanager
def linux_pair(folder: Path, **options: Any) -> Iterator[LinuxPair]:
    """A `LinuxPair` that is running."""
    with LinuxPair(folder, **options) as pair:
        yield pair


def kernel_complains(pair: LinuxPair) -> str:
    """Return lines of the guest's log that tell of damage."""
    words = "BUG|Oops|WARNING|corrupt|Bad page|use-after|hung task|blocked for more"
    with contextlib.suppress(UsageError):
        return pair.run(f"dmesg | grep -E '{words}'")
    return ""
