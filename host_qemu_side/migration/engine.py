"""Live migration in rounds, as QEMU does it, with free page hints: the sending side.

`Migration` does no I/O of its own and keeps no clock: it is stepped with the time, reads the guest's memory, asks a
dirty log, writes to an `Output` and tells a `GuestControl` when to freeze. A round is: sync the dirty log, issue a new
command id, send what is dirty while hints clear bits of the *migration* bitmap, say STOP before the next sync. When
what is left fits the downtime limit the guest is frozen, the rest is sent, DONE is said, and the guest is handed over.

The order matters (see `docs/stale-hint.md`): a hint is true only of content as it was when its id was issued. So
tracking is on and synced before an id is issued, a hint never touches the log of writes since, and after STOP no hint
counts until the next id.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

from host_qemu_side import deadlines
from host_qemu_side.migration.interfaces import (
    U64,
    Cancelled,
    GuestControl,
    HintPort,
    HintRunStats,
    Limits,
    MigrationResult,
    Observer,
    Output,
    Phase,
    Round,
    TakesDigests,
)
from host_qemu_side.migration.ram import RamState
from host_qemu_side.migration.records import Cancel, End, Header, Hello, Ready, Refused, RoundEnd, State
from host_qemu_side.migration.stream import MAX_PAGES, Kind, Record, StreamError, StreamWriter
from vring.dirty import DirtyLog, DirtyLogVoid, LearnsWhatWasSent, check_covers
from vring.errors import PeerVanished, VirtioError
from vring.memory import PAGE_SIZE, GuestMemory
from vring.pages import PageSet

__all__ = ["Migration"]

log = logging.getLogger(__name__)


class Migration:
    """Sends a guest.

    Parameters
    ----------
    memory
        The guest's RAM.
    log
        Which pages it writes.
    output
        Where the stream goes.
    guest
        Freezes and thaws it.
    hints
        The balloon device's hinting, None to migrate without.
    limits
        Bandwidth, downtime, rounds.
    header
        What the destination has to know before RAM, see `host_qemu_side.migration.records.Header`: JSON values.
    state
        Called when the guest is frozen and DONE was said; returns the device state to send, JSON values.
    observer
        Watches, e.g. for an oracle.
    hand_over
        Whether the destination takes the guest (COMMIT). False: the stream ends in an image and the guest goes on here.

    Notes
    -----
    Call `step` with a monotonic time until `finished`; it returns when to call again. It raises what went wrong; the
    guest has then been given DONE and goes on, unless it is `committed`. Whoever hears later that the destination gave
    the guest back calls `take_back`.
    """

    def __init__(
        self,
        memory: GuestMemory,
        log: DirtyLog,
        output: Output,
        guest: GuestControl,
        *,
        hints: HintPort | None = None,
        limits: Limits = Limits(),
        header: dict[str, Any] | None = None,
        state: Callable[[], dict[str, Any]] = dict,
        observer: Observer | None = None,
        hand_over: bool = True,
    ) -> None:
        check_covers(log, memory)
        self.memory, self.log, self.output, self.guest, self.hints = memory, log, output, guest, hints
        self.limits, self.observer, self.hand_over = limits, observer, hand_over
        self.phase = Phase.SETUP
        self.committed = False
        """Whether COMMIT may have reached the destination: the guest is its, and does not go on here."""
        self.result = MigrationResult()
        self.ready: Ready | None = None
        """What the destination said when everything had arrived."""
        self.frozen = False
        self.awaits_launch = False
        """Whether the destination will say LAUNCHED, which is worth waiting for before the guest is frozen."""
        self._launch_until = math.inf
        if hints is not None and not log.hints_safe:
            self.hints, self.result.hints_refused = (
                None,
                f"the dirty log {log.name!r} cannot see a same-content rewrite",
            )
        self._learner = log if isinstance(log, LearnsWhatWasSent) else None
        self._header = Header.describing(((r.gpa, r.size) for r in memory.regions), hand_over, header or {})
        self._state = state
        self._heard = False
        self._digests_left = memory.size // PAGE_SIZE
        self._writer = StreamWriter()
        self._ram: RamState | None = None
        self._round = Round()
        self._run: HintRunStats | None = None
        self._run_since = 0.0
        self._now = 0.0
        self._frozen_at = 0.0
        self._frozen_until = math.inf
        self._committing = False
        self._round_since = 0.0
        self._next_send = 0.0
        self._cancel: str | None = None
        self._script: Generator[float, None, None] | None = self._migrate()

    # -- the caller's side ----------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self._script is None

    @property
    def ram(self) -> RamState | None:
        """What is left to send; None before the first step."""
        return self._ram

    @property
    def current_round(self) -> Round:
        """The round that is going on."""
        return self._round

    def step(self, now: float) -> float:
        """Do one small piece: at most 1 MiB is sent, less on a slow link. Return the time to come back at (not later).

        Raises
        ------
        Cancelled
            After `cancel`.
        VirtioError, OSError
            What went wrong. The guest is whole and goes on, unless `phase` had reached COMMITTED.
        """
        self._now = now
        if self._script is None:
            return now
        try:
            if self._cancel is not None and not self.committed:
                raise Cancelled(self._cancel)
            if now > self._frozen_until and not self.committed:
                raise PeerVanished(
                    f"the guest was frozen for {self.limits.frozen:g} s and the destination does not have it yet"
                )
            return next(self._script)
        except StopIteration:
            self._script = None
            self._enter(Phase.DONE)
            return now
        except BaseException as error:
            self._script = None
            self._give_back(error)
            raise

    @property
    def cancelled(self) -> str | None:
        """Why `cancel` was called; None if it was not."""
        return self._cancel

    def cancel(self, why: str = "cancelled") -> None:
        """Give up at the next step. Without effect once the guest was handed over."""
        self._cancel = why

    def abort(self, error: BaseException) -> None:
        """End it because of something that happened outside, such as a guest that died; no exception is raised."""
        if self._script is not None:
            self._script = None
            self._give_back(error)

    def greeted(self, hello: Hello) -> None:
        """Take the destination's HELLO, for whoever reads it before the first step; else the migration does."""
        self._heard = True
        self.awaits_launch = hello.launches and self.hand_over

    def take_back(self, why: BaseException) -> None:
        """The destination has told that the guest has not run there and never will: it is ours again, and goes on."""
        self.committed = False
        self._enter(Phase.FAILED)
        log.info("the destination gave the guest back: %s", why)
        with contextlib.suppress(VirtioError, OSError):
            self._thaw()

    def _give_back(self, error: BaseException) -> None:
        """After a failure: whatever was begun is ended, the guest gets DONE and goes on."""
        torn = self._committing and self.output.retract()
        if torn:
            self.committed = False  # a part of COMMIT never left, so nobody has got it; and no record can follow it
        self._enter(Phase.CANCELLED if isinstance(error, Cancelled) else Phase.FAILED)
        steps: list[Callable[[], object]] = [self.log.stop]
        if not self.committed:
            if self.hints is not None:
                steps += [self._forget_hints, self.hints.done]
            if self.frozen:
                steps.append(self._thaw)
            if not torn:
                steps += [lambda: self.output.send(self._writer.say(Cancel(str(error)))), self.output.flush]
        for step in steps:  # each one whatever became of those before it: a log that fails must not cost the guest
            with contextlib.suppress(VirtioError, OSError):  # the first error is the one to tell
                step()

    def _forget_hints(self) -> None:
        if self.hints is not None:
            self.hints.sink = None

    # -- the script -----------------------------------------------------------------------------------------------

    def _migrate(self) -> Generator[float, None, None]:
        started = self._now
        yield from self._setup()
        for number in range(self.limits.max_rounds):
            self._begin_round()
            yield from self._pass(limited=True)
            yield from self._launched()
            if (yield from self._between_rounds(number + 1)):
                break
        yield from self._last_round()
        for_oracle = yield from self._hand_over()
        self.result.downtime_seconds = self._now - self._frozen_at - for_oracle
        self.result.total_seconds = self._now - started - for_oracle
        if not self.hand_over:
            self._thaw()
        self.log.stop()

    def _setup(self) -> Generator[float, None, None]:
        self._queue(self._writer.say(self._header))
        yield from self._drain()
        if self.log.needs_frozen_guest:
            self._freeze()
        self.log.start()
        self._ram = RamState(self.memory)
        if self.observer is not None:
            self.observer.round_begins(0)
        if self.frozen:
            self._thaw()
        self.result.pages_hole = self._ram.holes
        yield self._now
        if self.hints is not None:
            self.hints.sink = self._hint

    def _begin_round(self) -> None:
        """Tracking is on and synced: only now may an id be issued."""
        assert self._ram is not None
        self._enter(Phase.ROUND)
        self._round = Round(pages_dirty=len(self._ram.to_send), log_voided=self._round.log_voided)
        self._round_since = self._now
        self.result.rounds.append(self._round)
        self._ram.rewind()
        command_id = self.hints.start() if self.hints is not None else None
        if command_id is not None:  # None too while the guest has unloaded its driver: this round does without
            self._run = HintRunStats(command_id)
            self._run_since = self._now
            self.result.hint_runs.append(self._run)
            if self.observer is not None:
                self.observer.id_issued(self._run.command_id)

    def _pass(self, *, limited: bool) -> Generator[float, None, None]:
        """Send what the bitmap holds, a piece at a time, serving hints in between."""
        assert self._ram is not None
        while True:
            self._serve_hints()
            if limited and self.limits.bandwidth and self._now < self._next_send:
                yield self._next_send
                continue
            if limited and self._rest_fits():
                return
            taken = self._ram.take(self._piece()) if limited else self._ram.take()
            if taken is None:
                return
            pages, contents, zeros = taken
            if len(pages):
                self._queue(self._writer.pages(pages, contents))
            if len(zeros):
                self._queue(self._writer.zeros(zeros))
            if self._learner is not None:
                self._learner.note_sent(pages, contents)
                self._learner.note_sent(zeros)
            self._round.pages_normal += len(pages)
            self._round.pages_zero += len(zeros)
            yield from self._drain()

    def _launched(self) -> Generator[float, None, None]:
        """Before the guest may be frozen: wait for a process to be there for it, which takes longer than a downtime."""
        began = self._now
        self._launch_until = min(self._launch_until, began + deadlines.LAUNCHED)  # over all rounds
        while self.awaits_launch and self._now < self._launch_until:
            self._hear()
            self._serve_hints()
            yield self._now + 0.005
        self._round_since += self._now - began  # it says nothing of the link

    def _piece(self) -> int:
        """Return how many pages are sent at a time: few on a slow link, or the destination hears nothing for long."""
        if not self.limits.bandwidth:
            return MAX_PAGES
        pages = self.limits.bandwidth * self.limits.piece / PAGE_SIZE
        return MAX_PAGES if pages >= MAX_PAGES else max(int(pages), 1)

    def _between_rounds(self, next_round: int) -> Generator[float, None, bool]:
        """STOP, then sync. Return whether the last round comes next; the guest may be frozen for it already."""
        self._enter(Phase.SYNC)
        ended = self._round
        ended.seconds = self._now - self._round_since
        if self.hints is not None:
            self.hints.stop()
            self._end_run()
            if self.observer is not None:
                self.observer.hints_end()
        self._queue(self._writer.say(RoundEnd(next_round)))
        since = self._now
        if self.log.needs_frozen_guest:
            self._freeze()
        left, voided = self._sync()
        fits = left * PAGE_SIZE <= self._fits_downtime()
        last = fits or next_round >= self.limits.max_rounds
        self.result.converged = fits
        self._round = Round(log_voided=voided)
        if not last and self.observer is not None:
            self.observer.round_begins(next_round)
        if self.frozen and not last:
            self._thaw()
            yield self._now
            ended.frozen_seconds = self._now - since
        else:
            yield self._now
        return last

    def _last_round(self) -> Generator[float, None, None]:
        assert self._ram is not None
        since = self._now
        voided = self._round.log_voided
        if not self.frozen:  # else the sync between the rounds was the last one
            self._freeze()
            _, again = self._sync()
            voided = again or voided
        self._frozen_until = self._frozen_at + self.limits.frozen
        self._enter(Phase.FROZEN)
        self._round = Round(pages_dirty=len(self._ram.to_send), log_voided=voided)
        self.result.rounds.append(self._round)
        if self.hints is not None:
            self.hints.sink = None
            self.hints.done()
        if self.observer is not None:
            self.observer.frozen()
        self._ram.rewind()
        yield from self._pass(limited=False)
        self._round.seconds = self._round.frozen_seconds = self._now - since

    def _hand_over(self) -> Generator[float, None, float]:
        """Return the seconds the destination took for digests, which only an oracle wants."""
        extra = 0.0
        self._enter(Phase.HANDOVER)
        self._queue(self._writer.say(State(self._state())))
        pages = self.result.pages()
        self._queue(self._writer.say(End(pages["normal"], pages["zero"] - self.result.pages_hole)))
        yield from self._drain()
        if self.output.two_way:
            extra = yield from self._ready()
        if not self.hand_over:
            self.output.finish()
        elif self.output.two_way:
            # From the moment these bytes may have left, the guest is no longer ours.
            self.committed = self._committing = True
            self._enter(Phase.COMMITTED)
            self._queue(self._writer.commit())
            yield from self._drain()
            self._committing = False
            self.output.finish()
        else:
            # Nobody reads a file before it is complete and has its name: until then (a full disk) the guest is ours.
            self._queue(self._writer.commit())
            yield from self._drain()
            self.output.finish()
            self.committed = True
            self._enter(Phase.COMMITTED)
        return extra

    def _ready(self) -> Generator[float, None, float]:
        """Wait for READY; return the seconds the destination says that its digests took, at most those that passed.

        The time to wait ends when it ends, whatever is said meanwhile; and nothing may be but digests, one a page.
        """
        began = self._now
        while True:
            record = self._answer()
            if record is not None and record.kind is Kind.READY:
                self.ready = Ready.of(record)
                self._check_digests()
                return min(self.ready.digest_seconds, self._now - began)
            if record is not None and not self._is_launched(record):
                self._take_digests(record)
            if self._now > began + self.limits.answer:
                raise PeerVanished(f"the destination did not confirm within {self.limits.answer:g} s")
            yield self._now + (0.002 if record is None else 0.0)

    def _take_digests(self, record: Record) -> None:
        if record.kind is not Kind.DIGESTS:
            raise self._unwelcome(record)
        digests = record.digests(self._digests_left)
        self._digests_left -= len(digests)
        if isinstance(self.observer, TakesDigests):
            self.observer.arrived(digests)

    def _check_digests(self) -> None:
        """All or none: who does not judge wants none."""
        pages = self.memory.size // PAGE_SIZE
        if 0 < self._digests_left < pages:
            raise StreamError(f"the destination sent digests of all but {self._digests_left} of {pages} pages")

    # -- parts ----------------------------------------------------------------------------------------------------

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        log.info("migration phase: %s", phase.value)

    def _freeze(self) -> None:
        self._frozen_at = self._now
        self.frozen = True  # also if it does not come about in time: it may yet, and must be thawed then
        self.guest.freeze()

    def _thaw(self) -> None:
        self.guest.thaw()
        self.frozen = False

    def _serve_hints(self) -> None:
        if self.hints is not None and self._run is not None:
            self.hints.serve()
            if not self.hints.running:
                self._end_run()

    def _end_run(self) -> None:
        if self._run is not None:
            self._run.seconds = self._now - self._run_since
            self._run = None

    def _hint(self, command_id: int, addr: U64, length: U64) -> None:
        """A hint of the current run: it clears bits of the migration bitmap, and nothing else."""
        if self._run is None or command_id != self._run.command_id or self._ram is None:
            return
        spared = self._ram.hint(addr, length)
        self._round.pages_skipped += spared
        self._run.blocks += len(addr)
        self._run.bytes += int(length.sum())
        self._run.pages_spared += spared

    def _sync(self) -> tuple[int, str | None]:
        """Fetch and clear the dirty log into the migration bitmap."""
        assert self._ram is not None
        dirty = PageSet(self.memory.page_layout)
        voided = None
        if self._learner is not None:
            self._learner.note_hinted(self._ram.skipped)
        try:
            self.log.sync(dirty)
        except DirtyLogVoid as reason:
            voided = str(reason)
        self._ram.refresh_holes(dirty if voided is None else None)
        left = self._ram.merge_dirty(dirty)
        if voided is not None:
            left += self._ram.void_hints()
        return left, voided

    def _fits_downtime(self) -> float:
        """Bytes that can be sent within the downtime limit, at the rate of this migration so far."""
        seconds = sum(r.seconds for r in self.result.rounds)
        rate = self.result.bytes_sent / seconds if seconds > 0 else 0.0
        if self.limits.bandwidth:
            # A round with little to send says little about the link.
            rate = self.limits.bandwidth if self.result.bytes_sent < 4 << 20 else min(rate, self.limits.bandwidth)
        return max(rate, 1 << 20) * self.limits.downtime

    def _rest_fits(self) -> bool:
        """Whether this round can end early, as QEMU ends its own: what is left fits the downtime limit already.

        Only on a limited link (the last round is not limited, so time is saved), when no hints are to come, and when
        the round has sent as much as is left: before that nothing is known of the link.
        """
        if not self.limits.bandwidth or self._run is not None or self.log.needs_frozen_guest:
            return False
        assert self._ram is not None
        sent, seconds = self._round.bytes_sent, self._now - self._round_since
        if sent < 4 << 20 or seconds <= 0:
            return False
        left = len(self._ram.to_send) * PAGE_SIZE
        room = min(sent / seconds, self.limits.bandwidth) * self.limits.downtime
        return left <= min(room * 0.96, sent)  # the sync that comes next finds a little more

    def _queue(self, buffers: Sequence[bytes | memoryview]) -> None:
        size = sum(len(b) for b in buffers)
        self.output.send(buffers)
        self._round.bytes_sent += size
        self.result.bytes_sent += size
        if self.limits.bandwidth:
            # At most 50 ms of unused bandwidth is made up for.
            self._next_send = max(self._next_send, self._now - 0.05) + size / self.limits.bandwidth

    def _drain(self) -> Generator[float, None, None]:
        """Wait until everything is out, serving hints meanwhile, and hear whether the destination has given up."""
        while not self.output.flush():
            self._serve_hints()
            yield self._now + 0.01
        if self.output.two_way and not self.committed:
            self._hear()
        yield self._now

    def _answer(self) -> Record | None:
        """Return what the destination says; its HELLO, if nobody has read that before, is taken first."""
        record = self.output.answer()
        if self._heard or record is None:
            return record
        self._heard = True
        if record.kind is Kind.HELLO:
            self.greeted(Hello.of(record))
            record = self.output.answer()
        return record

    def _hear(self) -> None:
        """See whether the destination has given up, or is ready to get the guest: else it has nothing to say yet."""
        if self.phase is Phase.HANDOVER:
            return
        record = self._answer()
        if record is not None and not self._is_launched(record):
            raise self._unwelcome(record)

    def _is_launched(self, record: Record) -> bool:
        if record.kind is not Kind.LAUNCHED or not self.awaits_launch:
            return False
        self.awaits_launch = False
        return True

    @staticmethod
    def _unwelcome(record: Record) -> StreamError:
        """Return the error that a record is which says no, or has no place here."""
        if record.kind is Kind.REFUSED:
            return StreamError(f"the destination refused: {Refused.of(record).why}")
        return StreamError(f"the destination sent a {record.kind.name} record in the middle of the stream")
