"""Serves a balloon device to vhost-user front ends that come and go, with a monitor. One loop, no threads."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from balloon_dev.config import CMD_ID
from balloon_dev.device import DEFAULT_FEATURES, BalloonDevice
from balloon_dev.features import BalloonFeature
from balloon_dev.hinting import HintState
from balloon_dev.profiles import SPEC, Profile
from host_qemu_side.discard.current import CurrentDiscarder
from host_qemu_side.loop import Loop
from host_qemu_side.monitor.balloon import BalloonCommands
from host_qemu_side.monitor.device import DeviceCommands, feature_names
from host_qemu_side.monitor.dispatch import Dispatcher
from host_qemu_side.monitor.hints import HintCommands
from host_qemu_side.monitor.host import CommandGroup, Host, OwnGuest
from host_qemu_side.monitor.migration import MigrationCommands
from host_qemu_side.monitor.server import MonitorServer
from host_qemu_side.python_guest import PythonGuest
from host_qemu_side.vhost_user import VhostUserBackend
from vring import __version__
from vring.errors import PeerVanished

__all__ = ["ServeOptions", "Server"]

U64 = npt.NDArray[np.uint64]
NAME = "virtio-balloon"
DONE_TIMEOUT = 5.0
"""Seconds a front end gets, when this program ends, to see that the run of hints is over."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What to serve."""

    socket: str
    """Where front ends connect."""
    monitor: str | None = None
    """Where monitor clients connect."""
    profile: Profile = SPEC
    features: int = DEFAULT_FEATURES
    target: int | None = None
    """Bytes a guest is to have; None: all it has."""
    guest_arguments: list[str] | None = None
    """Launch a Python guest with these arguments of ``python -m guest_driver``; None: wait for front ends."""
    resume: dict[str, Any] = field(default_factory=dict)
    """What a destination needs to know to go on with that guest: the member ``resume`` of the stream's header."""


class _Device(BalloonDevice):
    """The device, which notes that the driver has looked at the command id."""

    id_reads = 0

    def read_config(self, offset: int, length: int) -> bytes:
        """Return bytes of the config space."""
        if offset <= CMD_ID < offset + length:
            self.id_reads += 1
        return super().read_config(offset, length)


def _version() -> tuple[tuple[int, int, int], str]:
    numbers = [int(part) if part.isdigit() else 0 for part in [*__version__.split("."), "0", "0", "0"][:3]]
    return (numbers[0], numbers[1], numbers[2]), f"{NAME} {__version__}"


class Server:
    """A device, its front ends, its monitor, perhaps its guest. Use it as a context manager, and call `run`.

    Parameters
    ----------
    options
        What to serve.
    tell
        Told what happens: a name and facts that are JSON values.

    Raises
    ------
    UsageError
        If one cannot listen where asked.
    """

    def __init__(
        self, options: ServeOptions, tell: Callable[[str, dict[str, Any]], None] = lambda name, facts: None
    ) -> None:
        self._tell = tell
        self.loop = Loop()
        self.device = _Device(options.features, profile=options.profile)
        self.device.discard = CurrentDiscarder(
            lambda: self.backend.memory, lambda: bool(self.device.negotiated & BalloonFeature.MUST_TELL_HOST)
        )
        self.backend = VhostUserBackend(
            self.device, self.loop, on_disconnect=self._front_end_gone, on_memory=self._memory_came
        )
        self.host = Host(self.loop, self.device, self.backend, self._emit)
        self.balloon = BalloonCommands(self.host, options.target)
        self.hints = HintCommands(self.host)
        self.migration = MigrationCommands(self.host)
        self.control = DeviceCommands(self.host)
        self.host.migrating = lambda: self.migration.active
        self.host.migration_run = self.migration.hint_run
        self._groups: list[CommandGroup] = [self.balloon, self.hints, self.migration, self.control]
        self.monitor: MonitorServer | None = None
        self._negotiated = self._memory = 0
        self._guest: PythonGuest | None = None
        self._guest_ready = False
        try:
            self.backend.listen(options.socket)
            if options.monitor is not None:
                dispatcher = Dispatcher(*_version())
                for command in (c for group in self._groups for c in group.commands()):
                    dispatcher.add(command)
                self.monitor = MonitorServer(self.loop, options.monitor, dispatcher)
            if options.guest_arguments is not None:
                self._guest = PythonGuest(self.loop, self.backend, None, options.guest_arguments)
                header = {"guest": "python", "resume": options.resume}
                self.host.guest = OwnGuest(self._guest, header, self._emit, self._attend)
        except BaseException:
            self.close()
            raise
        tell("listening", {"socket": options.socket, "monitor": options.monitor})

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- what happens ---------------------------------------------------------------------------------------------

    def _emit(self, name: str, data: dict[str, Any] | None) -> None:
        self._tell(name, data or {})
        if self.monitor is not None:
            self.monitor.event(name, data)

    def _attend(self) -> bool:
        return self.monitor is not None and self.monitor.step()

    def _memory_came(self) -> None:
        assert self.backend.memory is not None
        if self.backend.memory.size != self._memory:
            self._memory = self.backend.memory.size
            self._tell("front-end-memory", {"bytes": self._memory})
        self.balloon.apply()

    def _front_end_gone(self, why: str) -> None:
        self._memory = 0
        self.hints.front_end_gone()
        self._tell("front-end-gone", {"why": why})

    def _notice(self) -> None:
        self.backend.check_memory()
        if self.device.negotiated != self._negotiated:
            self._negotiated = self.device.negotiated
            if self._negotiated:
                self._tell("front-end-ready", {"features": feature_names(self._negotiated)})

    # -- running --------------------------------------------------------------------------------------------------

    def step(self, longest: float = 1.0) -> None:
        """Do what is due, then serve the loop for at most `longest` seconds.

        Raises
        ------
        PeerVanished
            If the guest that was launched is gone.
        """
        now, wait = time.monotonic(), longest
        if self.host.guest is not None:
            wait = min(wait, self.host.guest.tick(now))
            if self.host.guest.ready and not self._guest_ready:
                self._guest_ready = True
                self._tell("guest-ready", {"pid": self.host.guest.guest.pid})
        for group in self._groups:
            wait = min(wait, group.tick(now))
        if self._attend():
            wait = 0.0
        self.loop.run_once(wait)
        self._notice()

    def run(self, stop_requested: Callable[[], bool] = lambda: False) -> None:
        """Serve until `quit` or `stop_requested`, then end what is going on: a migration is cancelled, hints get DONE.

        Raises
        ------
        PeerVanished
            If the guest that was launched is gone.
        """
        try:
            while not self.control.quit_asked and not stop_requested():
                self.step()
            reason = "host-qmp-quit" if self.control.quit_asked else "host-signal"
            self._emit("SHUTDOWN", {"guest": False, "reason": reason})
        except PeerVanished:
            self._emit("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})
            raise
        finally:
            self._wind_down()

    def _wind_down(self) -> None:
        deadline = time.monotonic() + DONE_TIMEOUT
        self.migration.cancel()
        while self.migration.active and time.monotonic() < deadline:
            self.loop.run_once(min(self.migration.tick(time.monotonic()), 0.05))
        if self.hints.held and self.device.hinting.state is not HintState.DONE and self.backend.running:
            seen = self.device.id_reads
            self.hints.finish()
            while self.backend.running and self.device.id_reads == seen and time.monotonic() < deadline:
                self.loop.run_once(0.02)

    def close(self) -> None:
        """End the guest, hang up on everybody, remove the sockets."""
        self.migration.close()
        if self._guest is not None:
            with contextlib.suppress(OSError):
                self._guest.close()
            self._guest = None
        if self.monitor is not None:
            self.monitor.close()
            self.monitor = None
        self.backend.close()
        self.loop.close()
