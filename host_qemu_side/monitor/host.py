"""What the groups of commands share: the device, its transport, and the guest if it is one of ours."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from balloon_dev.device import BalloonDevice
from host_qemu_side.loop import Loop
from host_qemu_side.migration import HintRunStats
from host_qemu_side.monitor.dispatch import Command, Deferred
from host_qemu_side.monitor.framing import ErrorClass, QmpError
from host_qemu_side.python_guest import PAUSE_TIMEOUT, PythonGuest
from host_qemu_side.vhost_user import VhostUserBackend
from vring.errors import PeerVanished
from vring.memory import GuestMemory

__all__ = ["CommandGroup", "Host", "OwnGuest"]

IDLE = 1.0
"""Seconds after which a group without anything to do wants to be asked again."""


class CommandGroup(Protocol):
    """Some commands, and what has to happen between them."""

    def commands(self) -> list[Command]:
        """Return the commands."""

    def tick(self, now: float) -> float:
        """Look what has happened and do one small piece; return the seconds that may pass until the next call."""


class OwnGuest:
    """A Python guest launched by this process: paused by people and by migrations, independently.

    Parameters
    ----------
    guest
        The process.
    header
        What a destination needs to know to go on with it.
    emit
        Sends an event.
    attend
        Answers a command of a monitor client, if there is one, and tells whether there was: called while a migration
        waits for the guest.
    """

    def __init__(
        self,
        guest: PythonGuest,
        header: dict[str, Any],
        emit: Callable[[str, dict[str, Any] | None], None],
        attend: Callable[[], bool] = lambda: False,
    ) -> None:
        self.guest, self.header, self._emit, self._attend = guest, header, emit, attend
        self.ready = False
        self.handed_over = False
        self._holders: set[str] = set()
        self._pausing: Deferred | None = None
        self._pause_deadline = 0.0
        self._answered = True

    @property
    def paused(self) -> bool:
        """Whether somebody has it paused."""
        return bool(self._holders)

    @property
    def stopped(self) -> bool:
        """Whether a person has it paused."""
        return "user" in self._holders

    # -- a migration's side ---------------------------------------------------------------------------------------

    def check_alive(self) -> None:
        """Raise `PeerVanished` if it is gone."""
        self.guest.check_alive()

    def freeze(self) -> None:
        """Pause it for a migration; returns when it is so. Clients are answered meanwhile."""
        paused = bool(self._holders) and self._pausing is None
        asked = self._pausing is not None
        self._holders.add("migration")
        if paused:
            return
        if not asked:
            self.guest.tell("pause")
        self._answered = False
        self._await("paused")
        self._answered = True
        self._is_paused()

    def thaw(self) -> None:
        """Let it go on, unless a person has stopped it. One that did not pause in time is not waited for."""
        self._holders.discard("migration")
        if self._pausing is not None:
            self._pause_failed()
        elif not self._holders:
            self.guest.backend.release()
            self.guest.tell("resume")
            if self._answered:
                self._await("resumed")
        elif not self._answered:
            self.guest.backend.hold()

    def _await(self, word: str) -> None:
        """Serve everybody until the guest says `word`."""
        deadline = time.monotonic() + PAUSE_TIMEOUT
        while word not in self.guest.events:
            self.guest.check_alive()
            if time.monotonic() > deadline:
                raise PeerVanished(f"the guest (process {self.guest.pid}) did not say {word!r} in {PAUSE_TIMEOUT:g} s")
            if not self._attend():
                self.guest.loop.run_once(0.05)
            else:
                self.guest.loop.run_once(0.0)
        while self.guest.events.pop(0) != word:
            pass

    # -- a person's side ------------------------------------------------------------------------------------------

    def stop(self) -> Deferred | None:
        """Pause it; the result comes when it has acknowledged."""
        if self.handed_over or self.stopped:
            return self._pausing
        if not self.ready:
            raise QmpError("the guest has not started yet")
        self._holders.add("user")
        if "migration" in self._holders:
            self._emit("STOP", None)
            return None
        self.guest.tell("pause")
        self._pausing, self._pause_deadline = Deferred(), time.monotonic() + PAUSE_TIMEOUT
        return self._pausing

    def cont(self) -> None:
        """Let it go on."""
        if self.handed_over:
            raise QmpError("the guest was migrated: it runs at the destination and must not run twice")
        if self._pausing is not None:
            raise QmpError("the guest is about to pause; try again")
        if not self.stopped:
            return
        self._holders.discard("user")
        self._emit("RESUME", None)
        if not self._holders:
            self.guest.backend.release()
            self.guest.tell("resume")

    def _is_paused(self) -> None:
        self.guest.backend.hold()
        if self._pausing is not None:
            self._emit("STOP", None)
            self._pausing.resolve(None)
            self._pausing = None

    def _pause_failed(self) -> None:
        """A person who wants it paused is told; should it pause yet, it goes on at once."""
        assert self._pausing is not None
        self._holders.discard("user")
        self._pausing.fail(QmpError(f"the guest did not pause within {PAUSE_TIMEOUT:g} s"))
        self._pausing = None
        self.guest.tell("resume")

    def tick(self, now: float) -> float:
        """Hear what the guest said.

        Raises
        ------
        PeerVanished
            If it is gone.
        """
        self.guest.check_alive()
        heard, self.guest.events[:] = list(self.guest.events), []
        self.ready = self.ready or "ready" in heard
        if self._pausing is None:
            return IDLE
        if "paused" in heard:
            self._is_paused()
        elif now > self._pause_deadline:
            self._pause_failed()
        return 0.1


@dataclass(slots=True)
class Host:
    """One device being served."""

    loop: Loop
    device: BalloonDevice
    backend: VhostUserBackend
    emit: Callable[[str, dict[str, Any] | None], None]
    """Sends an event to all clients of the monitor."""
    guest: OwnGuest | None = None
    """None: the front end was started by somebody else."""
    migrating: Callable[[], bool] = field(default=lambda: False)
    """Whether a migration is going on: it does the hinting then."""
    migration_run: Callable[[], HintRunStats | None] = field(default=lambda: None)
    """The last run of hints of the migration that is going on."""

    def memory(self) -> GuestMemory:
        """Return the guest's RAM; without it that is an error."""
        if not self.backend.connected:
            raise QmpError("no front end is connected: the device has no guest", ErrorClass.DEVICE_NOT_ACTIVE)
        if self.backend.memory is None:
            raise QmpError(
                "the front end has given no memory yet: its guest has no driver", ErrorClass.DEVICE_NOT_ACTIVE
            )
        return self.backend.memory

    def at_rest(self) -> dict[str, str]:
        """Return what an answer says beside its values if they are the last ones of rings that do not run now."""
        return {} if self.backend.memory is None or self.backend.running else {"rings": "stopped"}

    def run_state(self) -> str:
        """Return one of QEMU's run states."""
        if self.guest is not None:
            if self.guest.handed_over:
                return "postmigrate"
            if self.guest.stopped:
                return "paused"
            if self.guest.paused:
                return "finish-migrate"
            return "running" if self.guest.ready else "prelaunch"
        return "running" if self.backend.memory is not None else "prelaunch"
