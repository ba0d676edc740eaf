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
        self.handed_over = False
        """Whether a destination has it, or may have it: it must not go on here."""
        self._holders: set[str] = set()
        self._pause: int | None = None
        """Number of the command that pauses it; None: it goes on, or will."""
        self._pausing: Deferred | None = None
        self._pause_deadline = 0.0
        self._departing = False

    @property
    def ready(self) -> bool:
        """Whether it has booted."""
        return self.guest.ready

    @property
    def paused(self) -> bool:
        """Whether somebody has it paused."""
        return bool(self._holders)

    @property
    def stopped(self) -> bool:
        """Whether a person has it paused."""
        return "user" in self._holders

    def _ask_to_pause(self) -> None:
        if self._pause is None:
            self._pause = self.guest.tell("pause")

    @property
    def _stands_still(self) -> bool:
        """Whether it has answered the very command that is to pause it."""
        return self._pause is not None and self.guest.has_answered(self._pause)

    def _let_go(self) -> int:
        """Let it go on; one that has not paused yet goes on at once should it yet. Return the command's number."""
        self._pause = None
        self.guest.backend.release()
        return self.guest.tell("resume")

    # -- a migration's side ---------------------------------------------------------------------------------------

    def check_alive(self) -> None:
        """Raise `PeerVanished` if it is gone."""
        self.guest.check_alive()

    def freeze(self) -> None:
        """Pause it for a migration; returns when it is so. Clients are answered meanwhile."""
        self._holders.add("migration")
        self._ask_to_pause()
        assert self._pause is not None
        self.guest.wait_answer(self._pause, PAUSE_TIMEOUT, self._attend)
        self._is_paused()

    def thaw(self) -> None:
        """Let it go on, unless a person has stopped it. One that did not pause in time is not waited for."""
        self._holders.discard("migration")
        self._departing = False
        if not self._holders:
            stood_still = self._stands_still
            number = self._let_go()
            if stood_still:
                self.guest.wait_answer(number, PAUSE_TIMEOUT, self._attend)

    def depart(self) -> bool:
        """Return whether it runs, for the destination: from now until it is thawed no person changes that."""
        self._departing = True
        return not self.stopped

    # -- a person's side ------------------------------------------------------------------------------------------

    def stop(self) -> Deferred | None:
        """Pause it; the result comes when it has acknowledged."""
        if self.handed_over or self.stopped:
            return self._pausing
        self._may_change()
        if not self.ready:
            raise QmpError("the guest has not started yet")
        self._holders.add("user")
        self._ask_to_pause()
        if self._stands_still:
            self._emit("STOP", None)
            return None
        self._pausing, self._pause_deadline = Deferred(), time.monotonic() + PAUSE_TIMEOUT
        return self._pausing

    def cont(self, force: bool = False) -> None:
        """Let it go on; `force`: also if a destination might have it."""
        if self.handed_over and not force:
            raise QmpError(
                "the guest was migrated: it runs at the destination, or may, and must not run twice; if it certainly "
                "does not, force=true lets it go on here"
            )
        self._may_change()
        if self._pausing is not None:
            raise QmpError("the guest is about to pause; try again")
        if self.handed_over:
            self.handed_over = self._departing = False
            self._holders.clear()
        elif self.stopped:
            self._holders.discard("user")
        else:
            return
        self._emit("RESUME", None)
        if not self._holders:
            self._let_go()

    def _may_change(self) -> None:
        if self._departing and not self.handed_over:
            raise QmpError("the guest is being handed over at this moment; try again")

    def _is_paused(self) -> None:
        self.guest.backend.hold()
        if self._pausing is not None:
            self._emit("STOP", None)
            self._pausing.resolve(None)
            self._pausing = None

    def tick(self, now: float) -> float:
        """Hear what the guest said.

        Raises
        ------
        PeerVanished
            If it is gone.
        """
        self.guest.check_alive()
        if self._pausing is None:
            return IDLE
        if self._stands_still:
            self._is_paused()
        elif now > self._pause_deadline:
            self._holders.discard("user")
            self._pausing.fail(QmpError(f"the guest did not pause within {PAUSE_TIMEOUT:g} s"))
            self._pausing = None
            if not self._holders:
                self._let_go()
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
