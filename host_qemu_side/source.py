"""The source host: a balloon device behind vhost-user, a guest, and a migration of it, in one loop."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from balloon_dev.device import DEFAULT_FEATURES, BalloonDevice
from balloon_dev.features import BalloonFeature
from balloon_dev.profiles import SPEC, Profile
from host_qemu_side import deadlines
from host_qemu_side.discard.current import CurrentDiscarder
from host_qemu_side.loop import Loop
from host_qemu_side.migration import Limits, Migration
from host_qemu_side.migration.output import FileOutput, SocketOutput
from host_qemu_side.runner import BackendHints, GuestHandle, MigrationRunner, Outcome, RunnerPhase
from host_qemu_side.vhost_user import VhostUserBackend
from host_qemu_side.witness import Witness
from vring.dirty import DirtyLog
from vring.dirty.software import SoftwareDirtyLog
from vring.errors import MissingFacility, UsageError
from vring.memory import GuestMemory

__all__ = ["BackendHints", "GuestHandle", "Outcome", "SourceHost"]

U64 = npt.NDArray[np.uint64]
LAST_MOMENTS = 1.5
"""Seconds in which a guest process that has begun to end is gone."""
NAP = 0.1
"""Seconds after which a wait looks around: a signal alone does not end it."""


class SourceHost:
    """Holds device, back end and loop; use it as a context manager.

    Parameters
    ----------
    profile
        Of the device.
    features
        It offers.
    """

    def __init__(self, *, profile: Profile = SPEC, features: int = DEFAULT_FEATURES) -> None:
        self.loop = Loop()
        self.device = BalloonDevice(features, profile=profile)
        self.discard = CurrentDiscarder(
            lambda: self.memory, lambda: bool(self.device.negotiated & BalloonFeature.MUST_TELL_HOST)
        )
        self.device.discard = self.discard
        self.backend = VhostUserBackend(self.device, self.loop)
        self.device_log: SoftwareDirtyLog | None = None
        self._runner: MigrationRunner | None = None
        self._folder: str | None = None

    def __enter__(self) -> SourceHost:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the device and remove the socket."""
        self.backend.close()
        self.loop.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def socket_path(self) -> str:
        """Path where a front end can connect, made when it is first asked for.

        It lies in a folder of its own, which `close` removes. A program that is killed leaves it behind, so a guest
        that can be given a connected socket (`PythonGuest`) needs none.
        """
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="virtio-balloon-")
            try:
                self.backend.listen(os.path.join(self._folder, "balloon.sock"))
            except UsageError as error:
                error.add_note("the folder is that of temporary files: TMPDIR in the environment names another")
                raise
        return os.path.join(self._folder, "balloon.sock")

    @property
    def handed_over(self) -> bool:
        """Whether the last migration gave the guest away, also if it failed afterwards: it must not go on here."""
        return self.whereabouts is not None

    @property
    def whereabouts(self) -> str | None:
        """What is known of a guest that the last migration gave away, in words; None: it is here."""
        return None if self._runner is None else self._runner.whereabouts

    @property
    def memory(self) -> GuestMemory | None:
        """RAM of the guest that is connected."""
        return self.backend.memory

    def track_device_writes(self) -> SoftwareDirtyLog:
        """Return the log of what the device itself writes to guest memory."""
        assert self.memory is not None
        if self.device_log is None or self.device_log.layout != self.memory.page_layout:
            self.device_log = SoftwareDirtyLog.for_memory(self.memory)
            self.device.dirty_log = self.device_log
        return self.device_log

    def migrate(
        self,
        guest: GuestHandle,
        log: DirtyLog,
        output: SocketOutput | FileOutput,
        *,
        hints: bool = True,
        limits: Limits = Limits(),
        journal: Any = None,
        header: dict[str, Any] | None = None,
        hand_over: bool = True,
        on_step: Callable[[Migration, Witness], None] | None = None,
        at_pause: Callable[[], dict[str, Any]] = dict,
        report_timeout: float = 0.0,
        stop_requested: Callable[[], bool] = lambda: False,
        silence: float = deadlines.SILENCE,
    ) -> Outcome:
        """Migrate the guest that is connected.

        Parameters
        ----------
        guest
            To freeze and thaw.
        log
            Which pages it and the device write.
        output
            Where to.
        hints
            Whether to ask for free page hints.
        limits
            Bandwidth, downtime, rounds.
        journal
            The guest's `balloon_dev.journal.Journal`, if it keeps one.
        header
            What the destination needs to know to go on with the guest.
        hand_over
            False for a guest that cannot go on elsewhere.
        on_step
            Called after each step, e.g. for a display.
        at_pause
            Called when the guest is frozen for the last time; what it returns is in the outcome.
        report_timeout
            Seconds to wait for the destination to say how the guest does there; 0: do not.
        stop_requested
            Asked at each step; True cancels.
        silence
            Seconds the destination may say no hello, or take next to nothing of what is sent, before it counts as gone.

        Raises
        ------
        VirtioError, OSError
            As `Migration.step`.
        """
        runner = MigrationRunner(
            self.device,
            self.backend,
            guest,
            log,
            output,
            hints=hints,
            limits=limits,
            journal=journal,
            header=header,
            hand_over=hand_over,
            at_pause=at_pause,
            report_timeout=report_timeout,
            silence=silence,
        )
        assert runner.witness is not None
        self._runner = runner
        try:
            while not runner.finished:
                if stop_requested():
                    runner.cancel("cancelled by the user")
                migrating = runner.phase is RunnerPhase.MIGRATE
                wait = runner.step()
                if migrating and on_step is not None:
                    on_step(runner.migration, runner.witness)
                self.loop.run_once(min(wait, NAP))
        except BaseException as error:
            runner.abort(error)
            if isinstance(error, (MissingFacility, UsageError, OSError)) and not runner.migration.committed:
                self._look_after(guest)
            raise
        return runner.outcome

    def _look_after(self, guest: GuestHandle) -> None:
        """After a failure: a guest that is gone is the reason. One that is dying fails its dirty log a moment before.

        Raises
        ------
        PeerVanished
            If it is gone.
        """
        end = time.monotonic() + LAST_MOMENTS
        while time.monotonic() < end:
            guest.check_alive()
            self.loop.run_once(NAP / 10)
