"""Launches the embedded Python guest as a process of its own and controls it.

The guest is started by name (``python -m guest_driver``): this side shares no code with it, only the control channel,
whose messages are JSON objects on a SOCK_SEQPACKET socket, one a message. Commands: pause, resume, status, check, quit.
Events: hello (with descriptors), ready, paused, resumed, status, checked.
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
from typing import Any

from balloon_dev.journal import Journal
from host_qemu_side.loop import Loop
from host_qemu_side.vhost_user import VhostUserBackend
from vring.dirty import DirtyLog
from vring.dirty.combined import CombinedLog
from vring.dirty.software import SoftwareDirtyLog
from vring.dirty.wp_async import TrackedRange, WpAsyncDirtyLog
from vring.errors import MissingFacility, PeerVanished, UsageError, VirtioError
from vring.memory import GuestMemory

__all__ = ["PythonGuest"]

log = logging.getLogger(__name__)
MAX_MESSAGE = 1 << 16
PAUSE_TIMEOUT = 10.0
REFUSALS: dict[int, type[VirtioError]] = {2: UsageError, 3: MissingFacility}
"""Exit codes of ``python -m guest_driver`` that are no accident."""


class PythonGuest:
    """A guest process.

    Parameters
    ----------
    loop
        Who watches the control channel.
    backend
        The device's back end.
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
        backend: VhostUserBackend,
        socket_path: str | None,
        arguments: list[str],
        *,
        ram: int | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.loop, self.backend = loop, backend
        self.journal: Journal | None = None
        self.hello: dict[str, Any] = {}
        self.status: dict[str, Any] = {}
        """What the guest said of itself last."""
        self.checked: dict[str, Any] | None = None
        self.events: list[str] = []
        self._log_fd = -1
        self._gone: str | None = None
        self._had_device = self._booted = False
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        passed = [theirs.fileno()]
        with theirs, contextlib.ExitStack() as stack:
            if socket_path is None:
                near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
                backend.serve(near)
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
        self.pid = self.process.pid
        loop.watch(mine.fileno(), self._readable)

    # -- control channel ------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._control, MAX_MESSAGE, 8)
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
            except (ValueError, AttributeError, IndexError, OSError, VirtioError) as error:
                self._lost(f"it said what makes no sense ({data[:40]!r}: {error})")
                return
            finally:
                for fd in fds:
                    os.close(fd)

    def _heard(self, data: bytes, fds: list[int]) -> None:
        message = json.loads(data)
        event = message.pop("event", "")
        if event == "hello":
            self.hello = message
            self.journal = Journal.open(fds[-1])
            if len(fds) > 1:
                self._log_fd = os.dup(fds[0])
        elif event == "checked":
            self.checked = message
        elif message:
            self.status = message
        self.events.append(event)

    def _lost(self, why: str) -> None:
        self.loop.unwatch(self._control.fileno())
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)
        code = self.process.poll()
        self._gone = (
            why if code is None else f"it ended with {'signal ' + str(-code) if code < 0 else 'exit code ' + str(code)}"
        )

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
        self._had_device = self._had_device or self.backend.memory is not None
        if self._gone is not None:
            kind = PeerVanished if self._booted else REFUSALS.get(self.process.poll() or 0, PeerVanished)
            raise kind(f"the guest (process {self.pid}) is gone: {self._gone}")

    def tell(self, command: str) -> None:
        """Send a command."""
        self.check_alive()
        try:
            self._control.send(json.dumps({"command": command}).encode())
        except OSError as error:
            self._lost(error.strerror or str(error))
            self.check_alive()

    def wait_for(self, event: str, timeout: float) -> None:
        """Serve the loop until the guest says `event`.

        Raises
        ------
        PeerVanished
            If it does not within `timeout` seconds, or is gone.
        """

        def heard() -> bool:
            if event in self.events:
                return True
            self.check_alive()
            return False

        self.loop.run_until(heard, timeout, f"the guest (process {self.pid}) to say {event!r}")
        while self.events.pop(0) != event:
            pass

    def ask(self, command: str, answer: str, timeout: float = 30.0) -> dict[str, Any]:
        """Send a command and wait for its answer; return the guest's status."""
        self.tell(command)
        self.wait_for(answer, timeout)
        return self.status

    def wait_ready(self, timeout: float = 120.0) -> None:
        """Wait until the device is up and the workload has set itself up."""
        self.wait_for("hello", timeout)
        self.wait_for("ready", timeout)
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
        self.ask("pause", "paused", PAUSE_TIMEOUT)
        self.backend.hold()

    def thaw(self) -> None:
        """Let it go on."""
        self.backend.release()
        self.ask("resume", "resumed", PAUSE_TIMEOUT)

    def dirty_log(self, wanted: str, device_log: SoftwareDirtyLog) -> DirtyLog:
        """Return the log of this guest's writes and the device's.

        Raises
        ------
        UsageError
            If the guest was not started with the log wanted.
        """
        has = self.hello.get("dirty_log")
        if wanted not in ("auto", has):
            raise UsageError(f"dirty log {wanted!r} was asked for, the guest offers {has!r}")
        if has == "wp-async":
            ranges = [TrackedRange(*r) for r in self.hello["ranges"]]
            tracked = WpAsyncDirtyLog(int(self.hello["pid"]), ranges, self.memory.page_layout)
            return CombinedLog("wp-async", [tracked, device_log])
        kernel = [(0, int(self.hello["kernel_bytes"]))]
        marked = SoftwareDirtyLog(self.memory.page_span, self._log_fd)
        return CombinedLog("software", [marked, device_log], always=kernel)

    # -- end ------------------------------------------------------------------------------------------------------

    def close(self, timeout: float = 3.0) -> None:
        """End the guest process, asking first."""
        if self.process.poll() is None:
            with contextlib.suppress(OSError, PeerVanished):
                self.tell("quit")
            deadline = time.monotonic() + timeout
            while self.process.poll() is None and time.monotonic() < deadline:
                self.loop.run_once(0.02)
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.loop.unwatch(self._control.fileno())
        self._control.close()
        if self.journal is not None:
            self.journal.close()
            self.journal = None
        if self._log_fd >= 0:
            os.close(self._log_fd)
            self._log_fd = -1
