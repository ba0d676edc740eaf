"""The guest as a process: RAM, memory manager, balloon driver and workload in one single-threaded loop.

A host that launches it holds the other end of a control channel (a SOCK_SEQPACKET socket, one JSON object a message)
and can pause and resume it; without one it runs until the device goes away. Pausing is cooperative: it is acknowledged
at a step boundary, and from then on this process stores nothing to guest RAM until it is resumed. Commands are
numbered and obeyed in order; an answer names the command it is for.

A guest that was received (`GuestOptions.ram`) waits, its memory mapped, for the command ``attach``: its RAM is complete
then. It takes everything over and stays paused: it has not run before the first ``resume``.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import mmap
import os
import signal
import socket
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from balloon_dev.journal import Journal
from balloon_dev.profiles import SPEC, Profile
from guest_driver.balloon import DEFAULT_FEATURES, BalloonDriver, FreeAt
from guest_driver.memory_manager import MemoryManager, Owner
from guest_driver.vhost_user import VhostUserTransport
from guest_driver.waiting import wait_readable, waiter
from guest_driver.workloads import Workload
from vring.backing import keep_size, make_memfd
from vring.decode import U16, Fields, parse_json
from vring.dirty import wp_async
from vring.dirty.software import SoftwareDirtyLog
from vring.errors import DeviceError, MissingFacility, PeerVanished, UsageError, VirtioError
from vring.memory import GuestMemory, Region

__all__ = ["GuestOptions", "GuestProcess"]

log = logging.getLogger(__name__)
SLICE_STEPS = 64
"""Driver steps before the loop looks at the control channel again."""
MAX_MESSAGE = 1 << 16
MAX_QUEUES = 64
COMMANDS = ("attach", "check", "pause", "quit", "resume", "status")
PR_SET_PDEATHSIG = 1


class HostVanished(PeerVanished):
    """Who launched this guest is gone; not to be mixed up with the device, which may come back."""


@dataclass(frozen=True, slots=True)
class _Command:
    """What the host said, checked."""

    name: str
    number: int
    """Higher than that of any command before."""
    bases: dict[int, int]
    """For ``attach``: avail index of each queue, as the device saved them."""

    @classmethod
    def decode(cls, data: bytes, last: int) -> _Command:
        """Take a message apart; `last` is the number of the command before.

        Raises
        ------
        DeviceError
            If it is none.
        """
        what = "command of the host"
        fields = Fields(parse_json(data, what, refusal=DeviceError, most=MAX_MESSAGE), what, DeviceError)
        name = fields.choice("command", {name: name for name in COMMANDS})
        bases = dict(fields.pairs("bases", MAX_QUEUES, U16, default=[]))
        return cls(name, fields.integer("number", last + 1), bases)


@dataclass(frozen=True, slots=True)
class GuestOptions:
    """How to start a guest."""

    socket: str
    """vhost-user socket of the balloon device."""
    memory: int = 1 << 30
    """Bytes of RAM."""
    workload: str = "churn"
    seed: int = 1
    profile: Profile = SPEC
    features: int = DEFAULT_FEATURES
    batch: int = 64
    free_at: FreeAt = FreeAt.DONE
    poison: int | None = None
    """32-bit value that freed pages are filled with, None for none."""
    dirty_log: str = "auto"
    """``wp-async``, ``software``, or ``auto``: the first that works."""
    reconnect: float = 0.0
    """Seconds to try to reach the device again when it has gone away; 0: the guest ends then."""
    control: int = -1
    """Descriptor of the control channel, -1 for none."""
    ram: int = -1
    """Descriptor of RAM that holds a migrated guest to go on with, -1 to boot a fresh one."""
    queue_sizes: tuple[int, ...] = (1024,) * 5
    """Largest sizes by queue number; the profile's hold as well."""


class GuestProcess:
    """One guest. `run` returns when it is told to quit."""

    def __init__(self, options: GuestOptions) -> None:
        self.options = options
        self._control: socket.socket | None = None
        if options.control >= 0:
            self._control = socket.socket(fileno=options.control)
            self._control.setblocking(False)
        self._paused = self._quit = False
        self._attached = options.ram < 0
        self._last_command = 0
        self._set_up = False
        self._protection: wp_async.WriteProtection | None = None
        self._shared_log: mmap.mmap | None = None
        self._journal: Journal | None = None

    # -- control channel ------------------------------------------------------------------------------------------

    def _tell(self, event: str, fds: tuple[int, ...] = (), **facts: Any) -> None:
        if self._control is None:
            return
        message = json.dumps({"event": event, **facts}).encode()
        try:
            self._control.setblocking(True)
            socket.send_fds(self._control, [message], list(fds))
        except OSError as error:
            raise HostVanished(f"the host closed the control channel: {error.strerror}") from error
        finally:
            self._control.setblocking(False)

    def _listen(self) -> bool:
        """Obey one command, if there is one."""
        if self._control is None:
            return False
        try:
            data = self._control.recv(MAX_MESSAGE + 1)
        except BlockingIOError:
            return False
        except OSError as error:
            raise HostVanished(f"the host closed the control channel: {error.strerror}") from error
        if not data:
            raise HostVanished("the host closed the control channel")
        command = _Command.decode(data, self._last_command)
        self._last_command = command.number
        log.debug("guest: %s", command)
        if self._attached == (command.name == "attach") and command.name != "quit":
            raise DeviceError(
                f"the host said {command.name!r} to a guest that is {'' if self._attached else 'not '}whole"
            )
        if command.name == "attach":
            try:
                self._attach(command.bases)
            except VirtioError as error:
                self._answer("failed", why=str(error))
                raise
            self._answer("attached", **self._status())
        elif command.name == "pause":
            self._pause()
        elif command.name == "resume":
            self._resume()
        elif command.name == "check":
            self._check()
        elif command.name == "status":
            self._answer("status", **self._status())
        else:
            self._quit = True
        return True

    def _answer(self, event: str, **facts: Any) -> None:
        """Answer the last command."""
        self._tell(event, answers=self._last_command, **facts)

    def _pause(self) -> None:
        self._clock[0] = self._guest_time()  # before it counts as paused: the time since the last resume is in it
        self._paused = True
        self._answer("paused", **self._status())

    def _resume(self) -> None:
        if self._paused:
            self._paused = False
            self._resumed_at = time.monotonic()
        self._answer("resumed")

    def _check(self) -> None:
        """Check the allocator and the content of every page the workload owns."""
        self.manager.verify()
        result = self.workload.check()
        self._answer("checked", pages=result.pages, wrong=result.wrong)

    def _status(self) -> dict[str, Any]:
        owners = self.manager.pages_by_owner()
        return {
            "allocated_pages": owners.get(int(Owner.WORKLOAD), 0),
            "hinted_pages": owners.get(int(Owner.HINT), 0),
            "ballooned_pages": owners.get(int(Owner.BALLOON), 0),
            "free_pages": self.manager.free_pages,
            "total_pages": self.manager.total_pages,
            "pages_written": self.workload.pages_written,
            "guest_seconds": float(self._clock[0]),
            "driver": self.driver.statistics(),
        }

    # -- starting -------------------------------------------------------------------------------------------------

    def boot(self) -> None:
        """Make the RAM, connect to the device, set up the workload; or wait for what a received guest needs.

        Raises
        ------
        VirtioError
            If this machine, the device, the host, or the RAM that was received is not as it has to be.
        """
        options = self.options
        if options.ram >= 0:
            self.memory = GuestMemory.from_fds([Region(0, os.fstat(options.ram).st_size, options.ram)])
            self._tell("waiting")
            while not (self._attached or self._quit):
                self._obey()
                if not self._attached and self._control is not None:
                    wait_readable([self._control.fileno()], 1.0)
            return
        self.memory = GuestMemory.create(options.memory)
        self.manager = MemoryManager.create(self.memory, seed=options.seed)
        self.manager.kernel.reserve("clock", 8, 8)
        self._find_clock()
        self._introduce()
        if options.poison is not None:
            self.manager.poison = options.poison
            self.manager.poison_free_pages()  # log and journal see it
        self.transport = self._connect()
        self.driver = BalloonDriver(self.manager, self.transport, features=options.features, **self._driver_options)
        self.driver.probe()
        self.workload = Workload.create(self.manager, options.workload, seed=options.seed)
        while not self.workload.setup_step():
            try:
                self._serve_driver()
            except PeerVanished as error:
                self._reconnect(error)
            while self._obey():
                if self._quit:
                    return
        self._set_up = True
        self._tell("ready", **self._status())

    def _attach(self, bases: dict[int, int]) -> None:
        """Take over the guest in the RAM, which is complete now. It counts as paused: nothing of it runs yet."""
        self.manager = MemoryManager.attach(self.memory)
        self._find_clock()
        self._paused = True
        self._introduce()
        self.transport = self._connect()
        self.driver = BalloonDriver.attach(self.manager, self.transport, bases, **self._driver_options)
        self.workload = Workload.attach(self.manager)
        self._attached = self._set_up = True

    def _find_clock(self) -> None:
        clock = self.manager.kernel.find("clock")
        if clock is None:
            raise UsageError("the RAM holds no guest of this program: there is no clock in its kernel area")
        self._clock = self.memory.array(clock, 1, np.float64)
        self._resumed_at = time.monotonic()

    @property
    def _driver_options(self) -> dict[str, Any]:
        return {"profile": self.options.profile, "batch": self.options.batch, "free_at": self.options.free_at}

    def _connect(self) -> VhostUserTransport:
        return VhostUserTransport(self.options.socket, self.memory, queue_sizes=self.options.queue_sizes)

    def _introduce(self) -> None:
        """Say hello: what tracks this guest's writes, and where."""
        wanted = self.options.dirty_log
        ranges: list[list[int]] = []
        fds: list[int] = []
        why = None
        if wanted in ("auto", "wp-async"):
            try:
                wp_async.probe()
                self._protection = wp_async.WriteProtection(self.memory)
                ranges = [[r.gpa, r.size, r.address] for r in self._protection.ranges]
            except MissingFacility as error:
                why = str(error)
                if wanted == "wp-async":
                    raise
        log_fd = -1
        if not ranges:  # no kernel help, or not wanted: mark what is written
            size = SoftwareDirtyLog.bytes_for(self.memory.page_span)
            log_fd = make_memfd("dirty-log")
            os.ftruncate(log_fd, size)
            keep_size(log_fd)
            self._shared_log = mmap.mmap(log_fd, size)
            self.manager.use_dirty_log(np.frombuffer(self._shared_log, dtype=np.uint64))
            fds.append(log_fd)
        self._journal = Journal.create(self.memory.page_span)
        self.manager.use_journal(self._journal)
        fds.append(self._journal.fd)
        self._tell(
            "hello",
            tuple(fds),
            pid=os.getpid(),
            memory=self.memory.size,
            dirty_log="wp-async" if ranges else "software",
            why_not_wp_async=why,
            ranges=ranges,
            kernel_bytes=self.manager.kernel.size,
        )
        if log_fd >= 0:
            os.close(log_fd)

    # -- running --------------------------------------------------------------------------------------------------

    def _guest_time(self) -> float:
        """Seconds this guest has run, in all its processes."""
        return float(self._clock[0]) + (0.0 if self._paused else time.monotonic() - self._resumed_at)

    def _serve_driver(self) -> bool:
        """Let the driver work a bounded while; return whether it wants more."""
        self.driver.interrupt(self.transport.interrupts())
        return all(self.driver.step(self._guest_time()) for _ in range(SLICE_STEPS))

    def run(self) -> None:
        """Run until told to quit; with `GuestOptions.reconnect` also while the device is away.

        Raises
        ------
        PeerVanished
            If the device or the host is gone.
        """
        while not self._quit:
            try:
                self._run_connected()
            except PeerVanished as error:
                self._reconnect(error)

    def _obey(self) -> bool:
        """Take in commands; return whether there is nothing else to do, since the guest is to stand still or to end."""
        while self._listen():
            pass
        if self._paused and not self._quit and self._control is not None:
            wait_readable([self._control.fileno()], 1.0)
        return self._paused or self._quit

    def _run_connected(self) -> None:
        wait = waiter([*self.transport.filenos(), *([self._control.fileno()] if self._control else [])])
        while not self._quit:
            if self._obey():
                continue
            busy = self._serve_driver()
            now = self._guest_time()
            wake = min(self.workload.step(now), self.driver.next_wake)
            timeout = 0.0 if busy else min(max(wake - self._guest_time(), 0.0), 0.5)
            if wait(timeout):
                self.transport.check_alive()

    def _reconnect(self, error: PeerVanished) -> None:
        """Take back what the device had, go on without it, and probe the driver anew when it is back.

        Nothing of the device's state is known to have lived on, so it is as with Linux: removed, then bound again.
        Raises `error` where that was not asked for, or if it is the host that is gone.
        """
        if not self.options.reconnect or isinstance(error, HostVanished):
            raise error
        log.warning("guest: %s; trying to reach it again for %g s", error, self.options.reconnect)
        with contextlib.suppress(PeerVanished):
            self.driver.remove()
        self.transport.close()
        deadline = time.monotonic() + self.options.reconnect
        while not self._quit:
            if self._obey():
                continue
            try:
                self.transport = self.driver.transport = self._connect()
                self.driver.probe()
            except PeerVanished as again:
                self.transport.close()
                if time.monotonic() > deadline:
                    raise PeerVanished(f"{error}, and not back within {self.options.reconnect:g} s") from again
            else:
                log.warning("guest: the device is back")
                return
            now = self._guest_time()
            wake = self.workload.step(now) if self._set_up else now + 0.05
            time.sleep(min(max(wake - self._guest_time(), 0.0), 0.05))

    def close(self) -> None:
        """Let go of everything."""
        transport = getattr(self, "transport", None)
        if transport is not None:
            transport.close()
        if self._protection is not None:
            self._protection.close()


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that launched it dies, whatever way."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent or parent == 1:
        with contextlib.suppress(ProcessLookupError):
            os.kill(os.getpid(), signal.SIGKILL)
