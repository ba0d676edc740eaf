"""Launches the embedded Python guest as a process of its own and controls it.

The guest is started by name (``python -m guest_driver``): this side shares no code with it, only the control channel,
whose messages are JSON objects on a SOCK_SEQPACKET socket, one a message. Each command has a number, and each answer
says the number of the command it is for: what a guest says late never counts for a command it has not read yet.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from balloon_dev.journal import Journal
from host_qemu_side import deadlines
from host_qemu_side.loop import Loop
from host_qemu_side.vhost_user import VhostUserBackend
from vring.backing import keeps_size
from vring.decode import Fields, parse_json, visible
from vring.dirty import DirtyLog
from vring.dirty.combined import CombinedLog
from vring.dirty.software import SoftwareDirtyLog
from vring.dirty.wp_async import TrackedRange, WpAsyncDirtyLog
from vring.errors import DriverError, MissingFacility, PeerVanished, UsageError, VirtioError
from vring.memory import GuestMemory

__all__ = ["PythonGuest"]

log = logging.getLogger(__name__)
PAUSE_TIMEOUT = deadlines.PAUSE
MAX_MESSAGE = 1 << 16
MAX_RANGES = 64
REFUSALS: dict[int, type[VirtioError]] = {2: UsageError, 3: MissingFacility}
"""Exit codes of ``python -m guest_driver`` that are no accident."""
ANSWERS = {"attach": "attached", "check": "checked", "pause": "paused", "resume": "resumed", "status": "status"}
"""How each command is answered; ``quit`` is not. ``attach`` may be answered by ``failed``."""
_COUNTS = ("allocated_pages", "hinted_pages", "ballooned_pages", "free_pages", "total_pages", "pages_written")


@dataclass(frozen=True, slots=True)
class Hello:
    """How a guest's writes are tracked."""

    dirty_log: str
    ranges: tuple[TrackedRange, ...]
    """What ``wp-async`` tracks, in the guest's address space."""
    kernel_bytes: int
    """Its kernel area at the beginning of RAM, which a software log does not mark."""

    @classmethod
    def decode(cls, fields: Fields, pid: int) -> Hello:
        """Take it out of the event ``hello`` of process `pid`; raises the error of `fields`."""
        memory = fields.integer("memory", 4096, 1 << 52)
        if fields.integer("pid", 1) != pid:  # that of the process that is there: its memory is to be looked at
            raise fields.refusal(f"{fields.what}: pid is another process's")
        ranges = []
        for item in fields.items("ranges", MAX_RANGES):
            if not isinstance(item, list) or len(item) != 3 or any(type(part) is not int for part in item):
                raise fields.refusal(f"{fields.what}: a range is no address, size and place")
            gpa, size, place = item
            if not (0 <= gpa < gpa + size <= memory and 0 <= place < place + size < 1 << 64):
                raise fields.refusal(f"{fields.what}: range {gpa:#x}+{size:#x} is not in its RAM")
            ranges.append(TrackedRange(gpa, size, place))
        log = fields.choice("dirty_log", {"wp-async": "wp-async", "software": "software"})
        return cls(log, tuple(ranges), fields.integer("kernel_bytes", 0, memory))


def _status(fields: Fields) -> dict[str, Any]:
    """Return what a guest says of itself, checked: JSON values."""
    counters = fields.members("driver")
    return {
        **{name: fields.integer(name) for name in _COUNTS},
        "guest_seconds": fields.number("guest_seconds"),
        "driver": {name: counters.integer(name) for name in counters.names},
    }


class PythonGuest:
    """A guest process.

    Parameters
    ----------
    loop
        Who watches the control channel.
    backend
        The device's back end; None for a received guest, whose device comes with its state: see `attach`.
    socket_path
        Where it listens; None gives the guest a connected socket, which has no name that could be left behind.
    arguments
        More arguments of ``python -m guest_driver``.
    ram
        Descriptor of RAM with a migrated guest to go on with.
    environment
        Environment variables; by default those of this process.
    """

    def __init__(
        self,
        loop: Loop,
        backend: VhostUserBackend | None,
        socket_path: str | None,
        arguments: list[str],
        *,
        ram: int | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.loop, self._backend = loop, backend
        self._near: socket.socket | None = None
        self.journal: Journal | None = None
        self.hello: Hello | None = None
        self.waiting = False
        """Whether a received guest's process is up, and waits for `attach`."""
        self.ready = False
        """Whether its workload has set itself up, or a received guest has taken everything over."""
        self.status: dict[str, Any] = {}
        """What the guest said of itself last."""
        self.checked: dict[str, Any] | None = None
        """What it found when it checked itself last."""
        self._told = self._answered = 0
        self._unanswered: deque[tuple[int, str]] = deque()
        self._frozen = False
        self._log_fd = -1
        self.refusal: str | None = None
        """Why the guest cannot be made of what is in its RAM, if it said so."""
        self._gone: str | None = None
        self._had_device = self._booted = False
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        passed = [theirs.fileno()]
        with theirs, contextlib.ExitStack() as stack:
            if socket_path is None:
                self._near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
                passed.append(stack.enter_context(far).fileno())
                socket_path = f"fd:{far.fileno()}"
            command = [sys.executable, "-m", "guest_driver", "--socket", socket_path]
            command += ["--control-fd", str(theirs.fileno()), "--die-with-parent", *arguments]
            if ram is not None:
                command += ["--ram-fd", str(ram)]
                passed.append(ram)
            self.process = subprocess.Popen(
                command, pass_fds=passed, stdin=subprocess.DEVNULL, env=environment, process_group=0
            )
        self._control = mine
        self._control.setblocking(False)
        if backend is not None:
            self._connect(backend)
        self.pid = self.process.pid
        loop.watch(mine.fileno(), self._readable)

    @property
    def backend(self) -> VhostUserBackend:
        """The back end of its device."""
        assert self._backend is not None, "a received guest has a device only when it was attached"
        return self._backend

    def _connect(self, backend: VhostUserBackend) -> None:
        self._backend = backend
        if self._near is not None:
            backend.serve(self._near)
            self._near = None

    # -- control channel ------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._control, MAX_MESSAGE + 1, 8)
            except BlockingIOError:
                return
            except OSError as error:
                self._lost(str(error))
                return
            if not data:
                self._lost("it closed the control channel")
                return
            try:
                self._heard(data, fds)
            except VirtioError as error:
                with contextlib.suppress(OSError):
                    self._control.shutdown(socket.SHUT_RDWR)  # it ends, then
                self._lost(str(error), its_fault=True)
                return
            finally:
                for fd in fds:
                    os.close(fd)

    def _heard(self, data: bytes, fds: list[int]) -> None:
        """Decode an event and note it; nothing of the guest's is looked at elsewhere.

        Raises
        ------
        VirtioError
            If it makes no sense.
        """
        fields = Fields(parse_json(data, "it said", refusal=DriverError, most=MAX_MESSAGE), "it said", DriverError)
        event = fields.text("event", 16)
        fields.what = f"its event {event!r}"
        if event == "hello" and self.hello is None:
            hello = Hello.decode(fields, self.pid)
            if len(fds) != (1 if hello.ranges else 2):
                raise DriverError(f"{fields.what}: it brings {len(fds)} descriptors")
            if not all(keeps_size(fd) for fd in fds):
                raise DriverError(f"{fields.what}: what it shares could be cut off (no F_SEAL_SHRINK)")
            try:
                self.journal = Journal.open(fds[-1])
            except (OSError, ValueError) as error:
                raise DriverError(f"{fields.what}: its journal cannot be used: {error}") from error
            if not hello.ranges:
                self._log_fd = os.dup(fds[0])
            self.hello = hello
        elif event == "waiting" and not (self.waiting or self.ready):
            self.waiting = True
        elif event == "ready" and self.hello is not None and not self.ready:
            self.status, self.ready = _status(fields), True
        else:
            self._take_answer(event, fields)

    def _take_answer(self, event: str, fields: Fields) -> None:
        """Commands are answered one after another, each once: an answer can only be that of the oldest one."""
        number = fields.integer("answers")
        if not self._unanswered or number != self._unanswered[0][0]:
            raise DriverError(f"{fields.what}: it answers command {number}, which is not the next to be answered")
        wanted = self._unanswered[0][1]
        if event == "failed" and wanted == "attached":
            self.refusal = visible(fields.text("why"))
            raise DriverError(f"it cannot go on here: {self.refusal}")
        if event != wanted:
            raise DriverError(f"{fields.what}: it answers command {number}, whose answer is {wanted!r}")
        if event == "checked":
            self.checked = {name: fields.integer(name) for name in ("pages", "wrong")}
        elif event != "resumed":
            self.status = _status(fields)
        self.ready = self.ready or event == "attached"
        self._unanswered.popleft()
        self._answered = number

    def _lost(self, why: str, *, its_fault: bool = False) -> None:
        """Note that there is no guest any more, and why: how its process ended, unless it is known better."""
        self.loop.unwatch(self._control.fileno())
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)
        code = self.process.poll()
        if code is not None and not its_fault:
            why = f"it ended with {'signal ' + str(-code) if code < 0 else 'exit code ' + str(code)}"
        self._gone = why

    def check_alive(self) -> None:
        """See that the guest is there.

        Raises
        ------
        PeerVanished
            If it is gone.
        UsageError, MissingFacility
            If it said, before it was ready, that it cannot be as asked for, or that something is lacking.
        """
        if self._gone is None and self.process.poll() is not None:
            self._readable()
            if self._gone is None:
                self._lost("it ended")
        if self._gone is None and self._had_device and not self.backend.connected:
            # The device may see it first. No device, no RAM: there is nothing left to migrate or to go on with.
            if self.process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(0.2)
            if self.process.poll() is not None:
                self._lost("it ended")
            else:
                self._gone = f"the connection to its device is lost: {self.backend.last_error}"
        self._had_device = self._had_device or (self._backend is not None and self._backend.memory is not None)
        if self._gone is not None:
            kind = PeerVanished if self._booted else REFUSALS.get(self.process.poll() or 0, PeerVanished)
            raise kind(f"the guest (process {self.pid}) is gone: {self._gone}")

    def tell(self, command: str, **more: Any) -> int:
        """Send a command; return its number.

        Raises
        ------
        PeerVanished
            If the guest is gone, or has not read so many commands that no more can be sent.
        """
        self.check_alive()
        return self._send(command, **more)

    def _send(self, command: str, **more: Any) -> int:
        self._told += 1
        try:
            self._control.send(json.dumps({"command": command, "number": self._told, **more}).encode())
        except BlockingIOError:
            raise PeerVanished(f"the guest (process {self.pid}) does not read its commands") from None
        except OSError as error:
            self._lost(error.strerror or str(error))
            self.check_alive()
        if command in ANSWERS:
            self._unanswered.append((self._told, ANSWERS[command]))
        return self._told

    def has_answered(self, number: int) -> bool:
        """Return whether the guest has answered the command of that number; then it has obeyed all before it, too."""
        return self._answered >= number

    def wait_answer(self, number: int, timeout: float, attend: Callable[[], bool] = lambda: False) -> None:
        """Serve the loop until the guest has answered a command.

        Parameters
        ----------
        number
            Of the command.
        timeout
            Seconds, absolute.
        attend
            Called each time round, for what is not the loop's; True if it did something.

        Raises
        ------
        PeerVanished
            If it does not, or is gone.
        """
        word = next((word for told, word in self._unanswered if told == number), "")
        self._wait(lambda: self.has_answered(number), timeout, word, attend)

    def _wait(
        self, said: Callable[[], bool], timeout: float, word: str, attend: Callable[[], bool] = lambda: False
    ) -> None:
        deadline = time.monotonic() + timeout
        while not said():
            self.check_alive()
            left = deadline - time.monotonic()
            if left <= 0:
                raise PeerVanished(f"the guest (process {self.pid}) did not say {word!r} in {timeout:g} s")
            self.loop.run_once(0.0 if attend() else min(left, 0.05))

    def ask(self, command: str, timeout: float = 30.0, **more: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; return the guest's status."""
        self.wait_answer(self.tell(command, **more), timeout)
        return self.status

    def check(self, timeout: float = 30.0) -> dict[str, Any]:
        """Have the guest check itself; return how many pages it looked at and how many are wrong."""
        self.ask("check", timeout)
        assert self.checked is not None
        return self.checked

    def wait_hello(self, timeout: float = deadlines.LAUNCH) -> None:
        """Wait until its writes are tracked."""
        self._wait(lambda: self.hello is not None, timeout, "hello")

    def wait_ready(self, timeout: float = deadlines.LAUNCH) -> None:
        """Wait until the device is up and the workload has set itself up."""
        self._wait(lambda: self.ready, timeout, "ready")
        self._booted = True

    def attach(self, backend: VhostUserBackend, bases: dict[int, int], timeout: float = deadlines.ATTACH) -> None:
        """Have a received guest take over its RAM, which is complete now, and the device; it stays paused.

        Parameters
        ----------
        backend
            Of its device, which has the saved state, and serves no queue yet.
        bases
            Avail index of each queue, as the device saved them.
        timeout
            Seconds.

        Raises
        ------
        VirtioError
            If it cannot.
        """
        self._connect(backend)
        self.ask("attach", timeout, bases=list(bases.items()))
        self._booted = True

    def run_for(self, seconds: float) -> None:
        """Serve the guest for a while."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.loop.run_once(min(left, 0.1))
            self.check_alive()

    # -- migration ------------------------------------------------------------------------------------------------

    @property
    def memory(self) -> GuestMemory:
        """The guest's RAM as the device has it mapped."""
        if self.backend.memory is None:
            raise PeerVanished("the guest has not shared its memory")
        return self.backend.memory

    def freeze(self) -> None:
        """Pause the guest: acknowledged at a step boundary; then hold its queues."""
        self._frozen = False
        self.ask("pause", PAUSE_TIMEOUT)
        self._frozen = True
        self.backend.hold()

    def thaw(self) -> None:
        """Let it go on. One that did not pause in time is not waited for: should it pause yet, it goes on at once."""
        self.backend.release()
        number = self.tell("resume")
        if self._frozen:
            self._frozen = False
            self.wait_answer(number, PAUSE_TIMEOUT)

    def dirty_log(self, wanted: str, device_log: SoftwareDirtyLog) -> DirtyLog:
        """Return the log of this guest's writes and the device's.

        Raises
        ------
        UsageError
            If the guest was not started with the log wanted.
        """
        if self.hello is None:
            raise PeerVanished(f"the guest (process {self.pid}) has not said how its writes are tracked")
        has = self.hello.dirty_log
        if wanted not in ("auto", has):
            raise UsageError(f"dirty log {wanted!r} was asked for, the guest offers {has!r}")
        if has == "wp-async":
            return CombinedLog(
                "wp-async", [WpAsyncDirtyLog(self.pid, self.hello.ranges, self.memory.page_layout), device_log]
            )
        kernel = [(0, self.hello.kernel_bytes)]
        return CombinedLog(
            "software", [SoftwareDirtyLog(self.memory.page_span, self._log_fd), device_log], always=kernel
        )

    # -- end ------------------------------------------------------------------------------------------------------

    def close(self, timeout: float = 3.0) -> None:
        """End the guest process, asking first."""
        if self.process.poll() is None:
            with contextlib.suppress(OSError, VirtioError):
                self.tell("quit")
            deadline = time.monotonic() + timeout
            while self.process.poll() is None and time.monotonic() < deadline:
                self.loop.run_once(0.02)
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.loop.unwatch(self._control.fileno())
        self._control.close()
        if self._near is not None:
            self._near.close()
        if self.journal is not None:
            self.journal.close()
            self.journal = None
        if self._log_fd >= 0:
            os.close(self._log_fd)
            self._log_fd = -1
