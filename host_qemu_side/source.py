"""The source host: a balloon device behind vhost-user, a guest, and a migration of it, in one loop."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from balloon_dev.device import DEFAULT_FEATURES, BalloonDevice
from balloon_dev.features import QueueRole
from balloon_dev.oracle import Verdict
from balloon_dev.profiles import SPEC, Profile
from host_qemu_side.discard import Discarder
from host_qemu_side.loop import WRITE, Loop
from host_qemu_side.migration.engine import Cancelled, GuestControl, Limits, Migration, MigrationResult
from host_qemu_side.migration.output import FileOutput, SocketOutput
from host_qemu_side.migration.stream import Kind, StreamError, check_header
from host_qemu_side.vhost_user import VhostUserBackend
from host_qemu_side.witness import MigrationClock, Witness
from vring.dirty import DirtyLog
from vring.dirty.software import SoftwareDirtyLog
from vring.errors import MissingFacility, PeerVanished, UsageError
from vring.memory import GuestMemory

__all__ = ["BackendHints", "GuestHandle", "Outcome", "SourceHost"]

U64 = npt.NDArray[np.uint64]
HELLO_TIMEOUT = 15.0
SILENCE = 60.0
LAST_MOMENTS = 1.5
"""Seconds in which a guest process that has begun to end is gone."""
NAP = 0.1
"""Seconds after which a wait looks around: a signal alone does not end it."""


class GuestHandle(GuestControl, Protocol):
    """A guest that was launched: frozen, thawed, watched."""

    def check_alive(self) -> None:
        """Raise `PeerVanished` if it is gone."""


class BackendHints:
    """A `host_qemu_side.migration.engine.HintPort` over a balloon device behind vhost-user."""

    def __init__(self, device: BalloonDevice, backend: VhostUserBackend) -> None:
        self._device, self._backend = device, backend

    @property
    def sink(self) -> Callable[[int, U64, U64], None] | None:
        """Who takes the hints."""
        return self._device.hint_sink

    @sink.setter
    def sink(self, sink: Callable[[int, U64, U64], None] | None) -> None:
        self._device.hint_sink = sink

    @property
    def running(self) -> bool:
        """Whether a run is requested or started."""
        return self._device.hinting.active

    def start(self) -> int | None:
        """Issue a new id and tell the driver; None if the driver is gone."""
        if not self._device.hinting_negotiated:
            return None
        command_id = self._device.start_hinting()
        self._backend.deliver()
        return command_id

    def stop(self) -> None:
        """End the run."""
        self._device.stop_hinting()
        self._backend.deliver()

    def done(self) -> None:
        """Let the guest free its pages."""
        self._device.finish_hinting()
        self._backend.deliver()

    def serve(self) -> None:
        """Serve the free page queue."""
        index = self._device.queue_number(QueueRole.FREE_PAGE)
        if index is not None:
            self._backend.process(index)


@dataclass(slots=True)
class Outcome:
    """A finished migration and what is known of the other end."""

    result: MigrationResult
    verdict: Verdict | None = None
    """None where the destination sent no digests."""
    ready: dict[str, Any] = field(default_factory=dict)
    """What the destination said when everything had arrived."""
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
        self.device.discard = self._discard
        self.backend = VhostUserBackend(self.device, self.loop)
        self.device_log: SoftwareDirtyLog | None = None
        self._migration: Migration | None = None
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
            self.backend.listen(os.path.join(self._folder, "balloon.sock"))
        return os.path.join(self._folder, "balloon.sock")

    @property
    def handed_over(self) -> bool:
        """Whether the last migration gave the guest away, also if it failed afterwards: it must not go on here."""
        return self._migration is not None and self._migration.committed

    @property
    def memory(self) -> GuestMemory | None:
        """RAM of the guest that is connected."""
        return self.backend.memory

    def _discard(self, addr: U64, length: U64) -> None:
        if self.memory is not None:
            Discarder(self.memory)(addr, length)

    def track_device_writes(self) -> SoftwareDirtyLog:
        """Return the log of what the device itself writes to guest memory."""
        assert self.memory is not None
        if self.device_log is None or self.device_log.pages != self.memory.page_span:
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
        limits: Limits = Limits(),  # noqa: B008 - frozen
        journal: Any = None,
        header: dict[str, Any] | None = None,
        hand_over: bool = True,
        on_step: Callable[[Migration, Witness], None] | None = None,
        at_pause: Callable[[], dict[str, Any]] = dict,
        report_timeout: float = 0.0,
        stop_requested: Callable[[], bool] = lambda: False,
        silence: float = SILENCE,
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
            Seconds the destination may say no hello, or take nothing of what is sent, before it counts as gone.

        Raises
        ------
        VirtioError, OSError
            As `Migration.step`.
        """
        assert self.memory is not None
        if isinstance(output, SocketOutput):
            self._wait_hello(output, guest, min(silence, HELLO_TIMEOUT), stop_requested)
        clock = MigrationClock()
        witness = Witness(self.memory, self.device, journal, clock)
        outcome = Outcome(MigrationResult())

        def state() -> dict[str, Any]:
            outcome.guest_at_pause = at_pause()
            return {"device": self.device.save(), "transport": self.backend.save()}

        refused = None
        port = BackendHints(self.device, self.backend) if hints else None
        if port is not None and not self.device.hinting_negotiated:
            port, refused = None, "the driver did not accept FREE_PAGE_HINT"
        elif port is not None and not self.backend.can_tell_config:
            port, refused = None, "the front end takes no config change notifications"
        migration = Migration(
            self.memory,
            log,
            output,
            guest,
            hints=port,
            limits=limits,
            header=header,
            state=state,
            observer=witness,
            hand_over=hand_over,
        )
        self._migration = migration
        migration.result.hints_refused = refused or migration.result.hints_refused
        outcome.result = migration.result
        watched = output.fileno() if isinstance(output, SocketOutput) else -1
        sent, sent_at = 0, time.monotonic()
        try:
            while not migration.finished:
                if stop_requested():
                    migration.cancel("cancelled by the user")
                wake = migration.step(clock())
                if on_step is not None:
                    on_step(migration, witness)
                if output.blocked:
                    self.loop.watch(watched, _nothing, WRITE)
                else:
                    self.loop.unwatch(watched)
                if not output.blocked or output.bytes_sent != sent:
                    sent, sent_at = output.bytes_sent, time.monotonic()
                elif time.monotonic() - sent_at > silence:
                    raise PeerVanished(f"the destination took nothing for {silence:g} s")
                self.loop.run_once(min(max(wake - clock(), 0.0), NAP))
                if not migration.committed:  # then it is the destination's, and this one may end
                    guest.check_alive()
        except BaseException as error:
            migration.abort(error)
            if isinstance(error, (MissingFacility, UsageError, OSError)) and not migration.committed:
                self._look_after(guest)
            raise
        finally:
            self.loop.unwatch(watched)
            witness.close()
        self._collect(outcome, migration, witness)
        outcome.oracle_seconds = clock.excluded
        if report_timeout and isinstance(output, SocketOutput):
            outcome.report = self._wait_report(output, report_timeout, stop_requested)
        return outcome

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

    def _collect(self, outcome: Outcome, migration: Migration, witness: Witness) -> None:
        outcome.judge = witness.verdict
        if migration.answers:
            outcome.ready = migration.answers[-1].json()
        sizes = [len(r.payload) // 8 for r in migration.answers if r.kind is Kind.DIGESTS]
        if sizes:
            digests, at = np.empty(sum(sizes), np.uint64), 0
            while migration.answers:  # let go of each piece: of a large guest there are many
                record = migration.answers.pop(0)
                if record.kind is Kind.DIGESTS:
                    piece = np.frombuffer(record.payload, "<u8", len(record.payload) // 8)
                    digests[at : at + len(piece)] = piece
                    at += len(piece)
            outcome.verdict = witness.verdict(digests)
        outcome.nonzero_at_start = witness.nonzero_at_start
        outcome.nonzero_outside_hints = witness.nonzero_outside_hints()
        outcome.pages_rewritten = witness.pages_rewritten()

    def _wait_hello(
        self, output: SocketOutput, guest: GuestHandle, timeout: float, stop_requested: Callable[[], bool]
    ) -> None:
        """A destination speaks first: a migration does not begin before somebody is there who understands it."""
        heard: list[dict[str, Any]] = []

        def arrived() -> bool:
            if stop_requested():
                raise Cancelled("cancelled by the user before it began")
            guest.check_alive()
            record = output.answer()
            if record is not None and record.kind is not Kind.HELLO:
                raise StreamError(f"the destination began with {record.kind.name}, not with HELLO")
            if record is not None:
                check_header(record.json())
                heard.append(record.json())
            return bool(heard)

        self.loop.run_until(arrived, timeout, "the destination to say hello (is it `balloon receive`?)")

    def _wait_report(
        self, output: SocketOutput, timeout: float, stop_requested: Callable[[], bool]
    ) -> dict[str, Any] | None:
        """Return what the destination says of the guest; None if the user would not wait."""
        found: list[dict[str, Any]] = []

        def arrived() -> bool:
            if stop_requested():
                return True
            record = output.answer()
            if record is not None:
                if record.kind is Kind.REFUSED:
                    kind = PeerVanished if record.json().get("vanished") is True else StreamError
                    raise kind(f"the guest did not go on at the destination: {record.json().get('why')}")
                found.append(record.json())
            return bool(found)

        self.loop.run_until(arrived, timeout, "the destination to report on the guest")
        return found[0] if found else None


def _nothing() -> None:
    """Being woken up is all that was wanted."""
