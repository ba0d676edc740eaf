"""A migration that is stepped by somebody's loop: hello of the destination, the engine, the destination's report.

Nothing here waits. `SourceHost.migrate` steps one to its end, `balloon serve` steps one between all else it does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from balloon_dev.device import BalloonDevice
from balloon_dev.features import QueueRole
from balloon_dev.oracle import Verdict
from host_qemu_side import deadlines
from host_qemu_side.loop import READ, WRITE
from host_qemu_side.migration import (
    MIN_BANDWIDTH,
    Cancelled,
    DeviceHints,
    GuestControl,
    Limits,
    Migration,
    MigrationResult,
)
from host_qemu_side.migration.output import FileOutput, SocketOutput
from host_qemu_side.migration.records import Hello, Ready, Refused, Report
from host_qemu_side.migration.stream import Kind, Record, StreamError
from host_qemu_side.vhost_user import VhostUserBackend
from host_qemu_side.witness import MigrationClock, Witness
from vring.dirty import DirtyLog
from vring.errors import PeerVanished

__all__ = ["BackendHints", "GuestHandle", "MigrationRunner", "Outcome", "RunnerPhase"]

U64 = npt.NDArray[np.uint64]
POLL = 0.1
"""Seconds at most between two looks at a destination that is waited for."""


class GuestHandle(GuestControl, Protocol):
    """A guest that was launched: frozen, thawed, watched."""

    def check_alive(self) -> None:
        """Raise `PeerVanished` if it is gone."""


class BackendHints(DeviceHints):
    """A `host_qemu_side.migration.HintPort` over a balloon device behind vhost-user."""

    def __init__(self, device: BalloonDevice, backend: VhostUserBackend) -> None:
        def serve() -> None:
            index = device.queue_number(QueueRole.FREE_PAGE)
            if index is not None:
                backend.process(index)

        super().__init__(device, deliver=backend.deliver, serve=serve)


@dataclass(slots=True)
class Outcome:
    """A finished migration and what is known of the other end."""

    result: MigrationResult
    verdict: Verdict | None = None
    """None where the destination sent no digests."""
    ready: Ready | None = None
    """What the destination said when everything had arrived; a file says nothing."""
    report: dict[str, Any] | None = None
    """What became of the guest there."""
    nonzero_at_start: int = 0
    nonzero_outside_hints: int = 0
    pages_rewritten: int = 0
    guest_at_pause: dict[str, Any] = field(default_factory=dict)
    oracle_seconds: float = 0.0
    """Time the oracle took; not part of the migration's."""
    judge: Callable[[U64], Verdict] | None = None
    """Judges page digests of the destination that were got another way (a file does not answer). Valid as long as the
    guest's journal is open."""


class RunnerPhase(Enum):
    """What a runner waits for."""

    HELLO = "the destination to say hello"
    MIGRATE = "the migration"
    REPORT = "the destination to report"
    FINISHED = "nothing"


class MigrationRunner:
    """One migration of the guest behind `backend`.

    Parameters
    ----------
    device, backend
        The balloon device and its transport; the guest's memory is connected.
    guest
        To freeze and thaw.
    log
        Which pages it and the device write.
    output
        Where to; the caller closes it.
    hints
        Whether to ask for free page hints.
    limits
        Bandwidth, downtime, rounds.
    journal
        The guest's `balloon_dev.journal.Journal`, if it keeps one; for the oracle.
    oracle
        Whether to watch the migration with one. It reads all of RAM at each round, and keeps the loop for that long.
    header
        What the destination needs to know to go on with the guest.
    hand_over
        False for a guest that cannot go on elsewhere.
    at_pause
        Called when the guest is frozen for the last time; what it returns is in the outcome.
    running
        Whether the guest is to run at the destination; called when it is frozen for the last time.
    report_timeout
        Seconds to wait for the destination to say how the guest does there; 0: do not, nor whether it gives it back.
    silence
        Seconds the destination may say no hello, or take next to nothing of what is sent, before it counts as gone.

    Notes
    -----
    Call `step` until `finished`, and serve the back end's loop for at most as many seconds as it returns in between.
    """

    def __init__(
        self,
        device: BalloonDevice,
        backend: VhostUserBackend,
        guest: GuestHandle,
        log: DirtyLog,
        output: SocketOutput | FileOutput,
        *,
        hints: bool = True,
        limits: Limits = Limits(),
        journal: Any = None,
        oracle: bool = True,
        header: dict[str, Any] | None = None,
        hand_over: bool = True,
        at_pause: Callable[[], dict[str, Any]] = dict,
        running: Callable[[], bool] = lambda: True,
        report_timeout: float = 0.0,
        silence: float = deadlines.SILENCE,
    ) -> None:
        assert backend.memory is not None
        self._loop, self._guest, self._output = backend.loop, guest, output
        self._report_timeout, self._silence = report_timeout, silence
        self._hello_timeout = min(silence, deadlines.HELLO)
        self._sent, self._sent_at = 0, time.monotonic()
        self._watched = output.fileno() if isinstance(output, SocketOutput) else -1
        self._clock = MigrationClock()
        self.witness = Witness(backend.memory, device, journal, self._clock) if oracle else None
        refused = None
        port = BackendHints(device, backend) if hints else None
        if port is not None and not device.hinting_negotiated:
            port, refused = None, "the driver did not accept FREE_PAGE_HINT"
        elif port is not None and not backend.can_tell_config:
            port, refused = None, "the front end takes no config change notifications"

        def state() -> dict[str, Any]:
            self.outcome.guest_at_pause = at_pause()
            return {"device": device.save(), "transport": backend.save(), "running": running()}

        self.migration = Migration(
            backend.memory,
            log,
            output,
            guest,
            hints=port,
            limits=limits,
            header=header,
            state=state,
            observer=self.witness,
            hand_over=hand_over,
        )
        self.migration.result.hints_refused = refused or self.migration.result.hints_refused
        self.outcome = Outcome(self.migration.result)
        self.phase = RunnerPhase.HELLO if isinstance(output, SocketOutput) else RunnerPhase.MIGRATE
        self._deadline = time.monotonic() + self._hello_timeout
        self._confirmed = False

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.phase is RunnerPhase.FINISHED

    @property
    def whereabouts(self) -> str | None:
        """What is known of a guest that does not go on here, in words; None: it is here."""
        if not self.migration.committed:
            return None
        if self._confirmed or isinstance(self._output, FileOutput):
            return "the guest was handed over and does not go on here"
        return "COMMIT may have reached the destination: the guest may be running there, and does not go on here"

    def cancel(self, why: str) -> None:
        """Give up at the next step; without effect once the guest was handed over."""
        self.migration.cancel(why)

    def step(self) -> float:
        """Do one small piece; return the seconds that may pass until the next one.

        Raises
        ------
        Cancelled, VirtioError, OSError
            What went wrong; the guest has been given DONE and goes on unless it was handed over. What goes wrong
            while the destination's report is waited for is no failure of the migration.
        """
        try:
            if self.phase is RunnerPhase.HELLO:
                return self._hello()
            if self.phase is RunnerPhase.MIGRATE:
                return self._migrate()
            if self.phase is RunnerPhase.REPORT:
                return self._report()
        except BaseException as error:
            self.abort(error)
            raise
        return 0.0

    def abort(self, error: BaseException) -> None:
        """End it because of something that happened outside; no exception is raised."""
        self.migration.abort(error)
        self._end()

    # -- phases ---------------------------------------------------------------------------------------------------

    def _hello(self) -> float:
        """A destination speaks first: a migration does not begin before somebody is there who understands it."""
        if self.migration.cancelled is not None:
            raise Cancelled(f"{self.migration.cancelled} before it began")
        self._guest.check_alive()
        record = self._answer("the destination to say hello (is it `balloon receive`?)", self._hello_timeout)
        if record is None:
            return POLL
        if record.kind is not Kind.HELLO:
            raise StreamError(f"the destination began with {record.kind.name}, not with HELLO")
        self.migration.greeted(Hello.of(record))
        self._loop.unwatch(self._watched)
        self.phase = RunnerPhase.MIGRATE
        return 0.0

    def _migrate(self) -> float:
        if not self.migration.committed:  # then it is the destination's, and this one may end
            self._guest.check_alive()
        wake = self.migration.step(self._clock())
        if self.migration.finished:
            self._collect()
            self._end()
            if self._report_timeout and isinstance(self._output, SocketOutput):
                self.phase = RunnerPhase.REPORT
                self._deadline = time.monotonic() + self._report_timeout
        elif self._output.blocked:
            self._loop.watch(self._watched, _nothing, WRITE)
            self._check_progress()
        else:
            self._loop.unwatch(self._watched)
            self._sent, self._sent_at = self._output.bytes_sent, time.monotonic()
        return max(wake - self._clock(), 0.0)

    def _check_progress(self) -> None:
        if time.monotonic() - self._sent_at > self._silence:
            taken = self._output.bytes_sent - self._sent
            if taken < self._silence * MIN_BANDWIDTH:
                much = f"only {taken} bytes" if taken else "nothing"
                raise PeerVanished(f"the destination took {much} for {self._silence:g} s")
            self._sent, self._sent_at = self._output.bytes_sent, time.monotonic()

    def _report(self) -> float:
        if self.migration.cancelled is not None:  # too late for that; but nobody wants to wait any more
            self._end()
            return 0.0
        record = self._answer("the destination to report on the guest", self._report_timeout)
        if record is None:
            return POLL
        if record.kind is Kind.REFUSED:
            self._refused(Refused.of(record))
        self.outcome.report, self._confirmed = Report.of(record).to_json(), True
        self._end()
        return 0.0

    def _refused(self, refused: Refused) -> NoReturn:
        kind = PeerVanished if refused.vanished else StreamError
        if refused.returned:
            error = kind(f"the destination refused: {refused.why}")
            self.migration.take_back(error)
            raise error
        self._confirmed = True
        raise kind(f"the guest did not go on at the destination: {refused.why}")

    def _answer(self, what: str, timeout: float) -> Record | None:
        record = self._output.answer()
        if record is None:
            if time.monotonic() > self._deadline:
                raise PeerVanished(f"waited {timeout:g} s for {what}")
            self._loop.watch(self._watched, _nothing, READ)
        return record

    def _collect(self) -> None:
        outcome, witness = self.outcome, self.witness
        outcome.ready = self.migration.ready
        outcome.oracle_seconds = self._clock.excluded
        if witness is None:
            return
        outcome.judge = witness.verdict
        if (digests := witness.destination) is not None:
            outcome.verdict = witness.verdict(digests)
        outcome.nonzero_at_start = witness.nonzero_at_start
        outcome.nonzero_outside_hints = witness.nonzero_outside_hints()
        outcome.pages_rewritten = witness.pages_rewritten()

    def _end(self) -> None:
        self._loop.unwatch(self._watched)
        if self.witness is not None:
            self.witness.close()
        self.phase = RunnerPhase.FINISHED


def _nothing() -> None:
    """Being woken up is all that was wanted."""
