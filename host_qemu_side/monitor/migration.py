"""Commands for live migration, as QEMU names them, of a guest that can be paused and tracked."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from host_qemu_side import deadlines
from host_qemu_side.migration import MIN_BANDWIDTH, Cancelled, HintRunStats, Limits, MigrationResult, Phase
from host_qemu_side.migration.address import parse_address
from host_qemu_side.migration.connecting import Connecting
from host_qemu_side.migration.output import FileOutput, SocketOutput
from host_qemu_side.monitor.dispatch import Command, Param
from host_qemu_side.monitor.framing import QmpError
from host_qemu_side.monitor.host import IDLE, Host, OwnGuest
from host_qemu_side.runner import MigrationRunner, RunnerPhase
from vring.dirty.software import SoftwareDirtyLog
from vring.errors import MissingFacility, PeerVanished, UsageError, VirtioError
from vring.memory import PAGE_SIZE

__all__ = ["MigrationCommands"]

CONNECT_POLL = 0.02
MAX_DOWNTIME_MS = 2000 * 1000


def _kind_of(error: BaseException) -> str:
    """Return whose matter an error is: ``usage``, ``missing``, ``vanished`` or ``protocol``."""
    if isinstance(error, UsageError):
        return "usage"
    if isinstance(error, (PeerVanished, ConnectionError)):
        return "vanished"
    return "missing" if isinstance(error, (MissingFacility, OSError)) else "protocol"


class MigrationCommands:
    """The group.

    Parameters
    ----------
    host
        The device and the guest.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self.status = "none"
        self._limits = Limits()
        self._connecting: Connecting | None = None
        self._output: SocketOutput | FileOutput | None = None
        self._runner: MigrationRunner | None = None
        self._wanted = {"hints": True, "verify": False}
        self._error: str | None = None
        self._error_kind = ""
        self._began = 0.0
        self._setup_ms = 0
        self._total_ms = 0
        self._device_log: SoftwareDirtyLog | None = None

    def commands(self) -> list[Command]:
        """Return the commands."""
        migrate = {
            "uri": Param("str", help="unix:PATH, tcp:HOST:PORT or file:PATH"),
            "hints": Param("bool", required=False, help="ask for free page hints (default: true)"),
            "verify": Param("bool", required=False, help="judge every page of the destination by an oracle"),
            "detach": Param("bool", required=False, help="ignored, as in QEMU"),
        }
        limits = {
            "max-bandwidth": Param("int", required=False, help="bytes per second, 0 for no limit"),
            "downtime-limit": Param("int", required=False, help="milliseconds"),
        }
        forced = {
            "force": Param("bool", required=False, help="also a guest that was migrated: say so only if you know")
        }
        return [
            Command("migrate", self.migrate, "migrate the guest to `balloon receive`, or into a file", migrate),
            Command("query-migrate", self.query, "how the migration goes"),
            Command("migrate_cancel", self.cancel, "cancel it; the guest goes on here"),
            Command("migrate-set-parameters", self.set_parameters, "also while a migration runs", limits),
            Command("query-migrate-parameters", self.parameters, "the limits that hold"),
            Command("stop", self.stop, "pause the guest"),
            Command("cont", self.cont, "let it go on", forced),
        ]

    # -- commands -------------------------------------------------------------------------------------------------

    def _guest(self) -> OwnGuest:
        """Return the guest, or say what is missing."""
        if self._host.guest is None:
            raise QmpError(
                "this guest was started by somebody else: there is no freeze control to pause it with and no dirty "
                "log of its writes; let `balloon serve --guest python` start the guest, or migrate an unmodified "
                "Linux kernel by `balloon migrate --guest linux`"
            )
        return self._host.guest

    def stop(self) -> Any:
        """Pause the guest."""
        return self._guest().stop()

    def cont(self, force: bool = False) -> None:
        """Let the guest go on; `force`: also one that a destination might have."""
        if force and self._runner is not None and not self._runner.finished:
            raise QmpError("the destination may report on the guest yet; try again, or migrate_cancel")
        self._guest().cont(force)

    @property
    def active(self) -> bool:
        """Whether a migration is going on."""
        return self.status in ("setup", "active", "cancelling")

    def hint_run(self) -> HintRunStats | None:
        """Return the last run of hints, for query-hint."""
        runs = self._runner.migration.result.hint_runs if self._runner is not None else []
        return runs[-1] if runs else None

    def migrate(self, uri: str, hints: bool = True, verify: bool = False, detach: bool = True) -> None:
        """Begin a migration; how it goes is told by query-migrate and MIGRATION events."""
        del detach
        guest = self._guest()
        if guest.handed_over:
            raise QmpError("the guest was migrated already: it is at the destination, or may be")
        if self.active:
            raise QmpError("There's a migration process in progress")
        if not guest.ready:
            raise QmpError("the guest has not started yet")
        if self._host.device.hinting.active:
            raise QmpError("a run of hints is going on (query-hint); end it by hint-stop or hint-done first")
        self._close()
        address = parse_address(uri)
        if address.kind == "fd":
            raise QmpError(f"{uri!r}: no descriptors here; write unix:PATH, tcp:HOST:PORT or file:PATH")
        self._connecting = Connecting(address)
        self._wanted = {"hints": hints, "verify": verify}
        self._runner, self._error, self._began = None, None, time.monotonic()
        self._setup_ms = self._total_ms = 0
        self._become("setup")

    def cancel(self) -> None:
        """Give up, unless the guest was handed over."""
        if not self.active:
            return
        if self._connecting is not None:
            self._end(Cancelled("cancelled by a client"))
        elif self._runner is not None:
            self._runner.cancel("cancelled by a client")
            self._become("cancelling")

    def set_parameters(self, **wanted: int) -> None:
        """Set limits, also of a migration that is going on."""
        bandwidth, downtime = wanted.get("max_bandwidth"), wanted.get("downtime_limit")
        if bandwidth is not None and not (bandwidth == 0 or MIN_BANDWIDTH <= bandwidth < 2**63):
            raise QmpError(
                f"Parameter 'max-bandwidth' expects 0 or an integer in the range of {MIN_BANDWIDTH} to 2^63 - 1 "
                "bytes/second"
            )
        if downtime is not None and not 0 <= downtime <= MAX_DOWNTIME_MS:
            raise QmpError(f"Parameter 'downtime-limit' expects an integer in the range of 0 to {MAX_DOWNTIME_MS} ms")
        if bandwidth is not None:
            self._limits = replace(self._limits, bandwidth=float(bandwidth))
        if downtime is not None:
            self._limits = replace(self._limits, downtime=downtime / 1000)
        if self._runner is not None:
            self._runner.migration.limits = self._limits

    def parameters(self) -> dict[str, int]:
        """Return the limits."""
        return {"max-bandwidth": int(self._limits.bandwidth), "downtime-limit": round(self._limits.downtime * 1000)}

    def query(self) -> dict[str, Any]:
        """Return how it goes, with QEMU's names; ``hints`` and ``verify`` are our own."""
        answer: dict[str, Any] = {"status": self.status}
        if self._error is not None:
            answer["error-desc"], answer["error-kind"] = self._error, self._error_kind
        if self.status == "none":
            return answer
        answer["total-time"] = self._total_ms or round((time.monotonic() - self._began) * 1000)
        answer["setup-time"] = self._setup_ms
        if self._runner is None:
            return answer
        migration = self._runner.migration
        result = migration.result
        if self.status == "completed":
            answer["downtime"] = round(result.downtime_seconds * 1000)
        else:
            answer["expected-downtime"] = round(self._limits.downtime * 1000)
        answer["ram"] = self._ram(result)
        answer["hints"] = self._hints(result)
        if self._runner.outcome.verdict is not None:
            answer["verify"] = self._runner.outcome.verdict.as_dict()
        if self._runner.outcome.report is not None:
            answer["destination"] = self._runner.outcome.report
        return answer

    def _ram(self, result: MigrationResult) -> dict[str, Any]:
        assert self._runner is not None
        migration, pages = self._runner.migration, result.pages()
        left = 0
        if self.status != "completed" and migration.ram is not None:
            left = len(migration.ram.to_send) * PAGE_SIZE
        seconds = sum(r.seconds for r in result.rounds)
        return {
            "transferred": result.bytes_sent,
            "remaining": left,
            "total": migration.memory.size,
            "duplicate": pages["zero"],
            "skipped": 0,
            "normal": pages["normal"],
            "normal-bytes": pages["normal"] * PAGE_SIZE,
            "dirty-sync-count": len(result.rounds),
            "mbps": round(result.bytes_sent * 8 / seconds / 1e6, 3) if seconds > 0 else 0.0,
            "page-size": PAGE_SIZE,
        }

    @staticmethod
    def _hints(result: MigrationResult) -> dict[str, Any]:
        return {
            "refused": result.hints_refused,
            "runs": len(result.hint_runs),
            "blocks": sum(run.blocks for run in result.hint_runs),
            "bytes": sum(run.bytes for run in result.hint_runs),
            "pages-spared": sum(run.pages_spared for run in result.hint_runs),
        }

    # -- between commands -----------------------------------------------------------------------------------------

    def _become(self, status: str) -> None:
        if status != self.status:
            self.status = status
            self._host.emit("MIGRATION", {"status": status})

    def tick(self, now: float) -> float:
        """Do one small piece of the migration; return the seconds until the next."""
        try:
            if self._connecting is not None:
                self._output = self._connecting.poll()
                if self._output is None:
                    return CONNECT_POLL
                self._connecting = None
                self._runner = self._start(self._output)
            if self._runner is None or self._runner.finished:
                return IDLE
            return self._step(self._runner)
        except (VirtioError, OSError) as error:
            self._end(error)
            return 0.0
        except MemoryError:
            self._end(MissingFacility("there is not enough memory for a migration"))
            return 0.0

    def _start(self, output: SocketOutput | FileOutput) -> MigrationRunner:
        guest, host = self._guest(), self._host
        memory = host.memory()
        if self._device_log is None or self._device_log.layout != memory.page_layout:
            self._device_log = host.device.dirty_log = SoftwareDirtyLog.for_memory(memory)
        return MigrationRunner(
            host.device,
            host.backend,
            guest,
            guest.guest.dirty_log("auto", self._device_log),
            output,
            hints=self._wanted["hints"],
            oracle=self._wanted["verify"],
            limits=self._limits,
            journal=guest.guest.journal,
            header=guest.header,
            at_pause=lambda: guest.guest.status,
            running=guest.depart,
            report_timeout=deadlines.REPORT,
        )

    def _step(self, runner: MigrationRunner) -> float:
        reporting = runner.phase is RunnerPhase.REPORT
        wait = runner.step()
        if reporting:
            if runner.finished:
                self._close()
                self._host.emit("MIGRATION_REPORT", runner.outcome.report)
            return wait
        if runner.migration.finished:
            assert self._host.guest is not None
            self._host.guest.handed_over = True
            self._total_ms = max(round((time.monotonic() - self._began) * 1000), 1)
            self._become("completed")
            if runner.finished:
                self._close()
        elif runner.migration.phase is not Phase.SETUP and self.status == "setup":
            self._setup_ms = round((time.monotonic() - self._began) * 1000)
            self._become("active")
        return wait

    def _end(self, error: BaseException) -> None:
        """The migration failed; or it had succeeded and only the destination's report did not come, or says that the
        guest is given back.
        """
        runner, guest, was = self._runner, self._host.guest, self.status
        self._close()
        where = runner.whereabouts if runner is not None else None
        if guest is not None:
            guest.handed_over = where is not None
        cancelled = isinstance(error, Cancelled) and where is None
        self._error_kind = _kind_of(error)
        self._error = None if cancelled else f"{error}; {where}" if where else str(error)
        if was == "completed" and where:
            self._host.emit("MIGRATION_REPORT", {"error": self._error})
            return
        self._total_ms = max(round((time.monotonic() - self._began) * 1000), 1)
        self._become("cancelled" if cancelled else "failed")

    def _close(self) -> None:
        if self._connecting is not None:
            self._connecting.close()
            self._connecting = None
        if self._output is not None:
            self._output.close()
            self._output = None

    def close(self) -> None:
        """End what is going on, at once."""
        if self._runner is not None and not self._runner.finished:
            self._runner.abort(Cancelled("the source ends"))
        self._close()
