"""``balloon migrate``: one guest, one destination, with and without hints. No printing here: that is `report`."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from balloon_cli.errors import MISSING, InvariantFailed
from balloon_cli.read_back import read_back
from balloon_cli.signals import next_one_kills
from balloon_dev.profiles import Profile
from host_qemu_side import deadlines
from host_qemu_side.migration import Cancelled, Limits, Migration
from host_qemu_side.migration.connecting import connect
from host_qemu_side.migration.output import FileOutput, SocketOutput
from host_qemu_side.python_guest import PythonGuest
from host_qemu_side.source import Outcome, SourceHost
from host_qemu_side.witness import Witness
from vring.errors import MissingFacility, PeerVanished, VirtioError

__all__ = ["MigrateOptions", "Progress", "migrate_all", "places", "spawn_receiver"]


@dataclass(frozen=True, slots=True)
class MigrateOptions:
    """What the command line asked for."""

    guest: str
    memory: int
    workload: str
    hints: str
    to: str
    limits: Limits
    free_at: str
    dirty_log: str
    profile: Profile
    seed: int
    batch: int = 64
    work_dir: str = ""
    """Folder for the Linux guest's RAM file and what is built for it."""
    linux: str = ""
    """The Linux guest's kernel, where it is not the installed one."""
    modules: str = ""
    """Folder of its modules."""
    guest_arguments: tuple[str, ...] = ()
    """More arguments of the embedded guest, for experiments."""
    warm_up: float = 1.0
    """Seconds the guest runs with its workload before the migration."""
    verbose: bool = False


class Progress:
    """Told what goes on; does nothing itself."""

    def say(self, text: str) -> None:
        """Tell something in one line."""

    def run_begins(self, hints: bool) -> None:
        """A run begins: first the guest boots."""

    def tick(self) -> None:
        """Time passes; called at least ten times per second while something is waited for."""

    def step(self, migration: Migration, witness: Witness, host: SourceHost) -> None:
        """A step of the migration was done."""

    def run_ends(self) -> None:
        """The migration is over."""


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Within the block the first Ctrl-C, SIGTERM or closed terminal asks to stop, and the second kills."""
    asked: list[int] = []
    # Whoever started this may have had SIGHUP ignored, as nohup does: so it stays.
    hang_up = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    signals = (signal.SIGINT, signal.SIGTERM, *hang_up)

    def first(number: int, frame: object) -> None:
        asked.append(number)
        next_one_kills(signals)

    old = {which: signal.signal(which, first) for which in signals}
    try:
        yield lambda: bool(asked)
    finally:
        for which, handler in old.items():
            signal.signal(which, handler)


def ticker(progress: Progress, stopped: Callable[[], bool]) -> Callable[[], None]:
    """Return what is to be called while something is waited for: it shows progress, and ends the wait on Ctrl-C."""

    def tick() -> None:
        progress.tick()
        if stopped():
            raise Cancelled("interrupted")

    return tick


@contextlib.contextmanager
def spawn_receiver(*arguments: str) -> Iterator[tuple[SocketOutput, subprocess.Popen[bytes]]]:
    """Run ``balloon receive`` as a process of its own at the other end of a socket pair."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    command = [
        sys.executable,
        "-m",
        "balloon_cli",
        "receive",
        f"fd:{theirs.fileno()}",
        "--quiet",
        "--die-with-parent",
        *arguments,
    ]
    with theirs:
        process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is for the source: it decides what becomes of the guest
        )
    output = SocketOutput(mine)
    patience = 0.5  # after a failure the source's guest is not served while this waits
    try:
        yield output, process
        patience = 5.0
    finally:
        output.close()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def migrate_all(options: MigrateOptions, progress: Progress) -> dict[str, Any]:
    """Do the migrations asked for; return the result as JSON values (the schema is in `docs/cli.md`).

    Raises
    ------
    VirtioError, OSError
        What went wrong.
    """
    parse = {"on": [True], "off": [False], "both": [False, True]}[options.hints]
    if options.guest == "linux":
        from balloon_cli.migrate_linux import migrate_linux as migrate_one
    else:
        migrate_one = migrate_python
    runs = []
    with stop_on_signal() as stopped:
        for hints in parse:
            progress.run_begins(hints)
            try:
                runs.append(migrate_one(options, hints, progress, stopped))
            finally:
                progress.run_ends()
            if stopped():
                raise Cancelled("interrupted when the migration was over")
    result: dict[str, Any] = {
        "schema_version": 1,
        "guest": options.guest,
        "memory_bytes": options.memory,
        "workload": options.workload,
        "seed": options.seed,
        "profile": options.profile.name,
        "free_at": options.free_at,
        "to": options.to,
        "batch": options.batch,
        "warm_up_seconds": options.warm_up,
        "bandwidth_bytes_per_second": options.limits.bandwidth,
        "downtime_limit_seconds": options.limits.downtime,
        "max_rounds": options.limits.max_rounds,
        "runs": runs,
        "ratio": None,
    }
    if len(runs) == 2:
        off, on = runs
        result["ratio"] = {
            "bytes": on["bytes_sent"] / off["bytes_sent"],
            "seconds": on["total_seconds"] / off["total_seconds"],
        }
    return result


def places(to: str, hints: str) -> dict[bool, str]:
    """Return the destination of the run without hints (False) and of that with (True); two files, if it is one."""
    if hints == "both" and to.startswith("file:"):
        return {on: f"{to}.hints-{'on' if on else 'off'}" for on in (False, True)}
    return {False: to, True: to}


@contextlib.contextmanager
def destination(
    options: MigrateOptions, hints: bool, wait: Callable[[float], None]
) -> Iterator[SocketOutput | FileOutput]:
    """Open where the stream of one run goes; `wait` serves the guest until somebody is there."""
    if options.to == "spawn":
        with spawn_receiver() as (output, process):
            try:
                yield output
            except PeerVanished as error:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
                code = process.poll()
                if code:
                    how = f"signal {-code}" if code < 0 else f"exit code {code}"
                    kind = MissingFacility if code == MISSING else PeerVanished
                    raise kind(f"{error} (the receiver ended with {how})") from error
                raise
        return
    out = connect(places(options.to, options.hints)[hints], wait)
    try:
        yield out
    finally:
        out.close()


def migrate_python(
    options: MigrateOptions, hints: bool, progress: Progress, stopped: Callable[[], bool]
) -> dict[str, Any]:
    """Migrate one embedded Python guest; return one run's JSON values."""
    resume = {
        "profile": options.profile.name,
        "batch": options.batch,
        "free_at": options.free_at,
        "dirty_log": options.dirty_log,
    }
    arguments = [
        *("--memory", str(options.memory), "--workload", options.workload, "--seed", str(options.seed)),
        *(text for name, value in resume.items() for text in (f"--{name.replace('_', '-')}", str(value))),
        *options.guest_arguments,
    ]
    with SourceHost(profile=options.profile) as host:
        guest = PythonGuest(host.loop, host.backend, None, arguments)
        host.loop.tick = ticker(progress, stopped)
        try:
            progress.say("the guest boots and sets up its workload")
            guest.wait_ready()
            guest.run_for(options.warm_up)
            host.loop.tick = progress.tick  # from here on the migration itself asks whether to stop
            log = guest.dirty_log(options.dirty_log, host.track_device_writes())
            try:
                with destination(options, hints, host.loop.run_once) as output:
                    outcome = host.migrate(
                        guest,
                        log,
                        output,
                        hints=hints,
                        limits=options.limits,
                        journal=guest.journal,
                        header={"guest": "python", "resume": resume},
                        on_step=lambda m, w: progress.step(m, w, host),
                        at_pause=lambda: guest.status,
                        report_timeout=deadlines.REPORT,
                        stop_requested=stopped,
                    )
            except (VirtioError, OSError, MemoryError) as error:
                error.add_note(host.whereabouts or _whole_again(guest, progress))
                raise
            if isinstance(output, FileOutput):
                progress.say("another process reads the file back and goes on with the guest")
                judge_file(outcome, output.path, ticker(progress, stopped))
        finally:
            host.loop.tick = None
            guest.close()
    run = run_as_json(outcome, hints)
    run["dirty_log"] = log.name
    return run


def _whole_again(guest: PythonGuest, progress: Progress) -> str:
    """After a failed migration: see that the guest goes on and that its allocator is whole; say so in words.

    Raises
    ------
    InvariantFailed
        If it is not.
    """
    try:
        guest.check_alive()
    except VirtioError:
        return "there is no guest to go on with"
    try:
        guest.loop.run_until(lambda: _hints_freed(guest), 5.0, "the guest to free its hinted pages")
        checked = guest.check()
    except (VirtioError, OSError) as error:
        raise InvariantFailed(f"the migration failed and the source's guest is not whole: {error}") from error
    text = (
        f"the source's guest goes on: {checked['pages']} allocated pages checked, "
        f"{checked['wrong']} wrong, no page held for hints"
    )
    if checked["wrong"]:
        raise InvariantFailed(f"the migration failed and {text}")
    progress.say(text)
    return text


def _hints_freed(guest: PythonGuest) -> bool:
    return int(guest.ask("status", 5.0)["hinted_pages"]) == 0


def judge_file(outcome: Outcome, path: str, tick: Callable[[], None]) -> dict[str, Any]:
    """Have another process read the file back, and hold what it found against the source; return what it said."""
    digests, facts = read_back(path, tick)
    if outcome.judge is not None:
        outcome.verdict = outcome.judge(digests)
    outcome.report = facts["resumed"]
    return facts


def run_as_json(outcome: Outcome, hints: bool) -> dict[str, Any]:
    """Return one run as in the documented schema."""
    result = outcome.result
    guest = outcome.guest_at_pause
    resumed = None
    if outcome.report is not None:
        resumed = {**outcome.report}
    return {
        "hints": hints,
        "hints_refused": result.hints_refused,
        "total_seconds": result.total_seconds,
        "downtime_seconds": result.downtime_seconds,
        "oracle_seconds": outcome.oracle_seconds,
        "bytes_sent": result.bytes_sent,
        "converged": result.converged,
        "pages": result.pages(),
        "rounds": [
            {
                "bytes_sent": r.bytes_sent,
                "pages_dirty": r.pages_dirty,
                "pages_normal": r.pages_normal,
                "pages_zero": r.pages_zero,
                "pages_skipped": r.pages_skipped,
                "seconds": r.seconds,
                "frozen_seconds": r.frozen_seconds,
                "log_voided": r.log_voided,
            }
            for r in result.rounds
        ],
        "hint_runs": [
            {
                "command_id": h.command_id,
                "blocks": h.blocks,
                "bytes": h.bytes,
                "pages_spared": h.pages_spared,
                "seconds": h.seconds,
            }
            for h in result.hint_runs
        ],
        "nonzero_pages_at_start": outcome.nonzero_at_start,
        "nonzero_pages_outside_hints": outcome.nonzero_outside_hints,
        "pages_rewritten": outcome.pages_rewritten,
        "guest_at_pause": guest,
        "oracle": None if outcome.verdict is None else outcome.verdict.as_dict(),
        "resumed": resumed,
    }
