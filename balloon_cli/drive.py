"""``balloon drive``: the embedded guest drives an unmodified QEMU and is migrated to a second one.

Only what is asked for and what came of it: the work is in `guest_driver.qemu`, the tables in `report`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from balloon_cli.migrate import Progress, stop_on_signal, ticker
from balloon_dev.features import BalloonFeature
from guest_driver.memory_manager import HINT_ORDER, Alloc, Owner
from guest_driver.qemu import MigrationOutcome, QemuGuest, QemuMachine, QemuOptions, find_qemu, migrate
from guest_driver.qemu.exercise import Exercise, exercise
from guest_driver.qemu.migration import MigrationStopped, hinted_pages
from host_qemu_side.migration import Cancelled
from vring import bitmap
from vring.contents import digests_of
from vring.programs import Origin
from vring.sizes import format_size

__all__ = ["DriveOptions", "drive_all", "drive_findings", "drive_one", "drive_summary"]

EXERCISE_MEMORY = 128 << 20
AFTER_PAGES = 4096
"""Size of the balloon that the guest fills at the destination."""
TIMEOUT = 20.0


@dataclass(frozen=True, slots=True)
class DriveOptions:
    """What the command line asked for."""

    memory: int = 1 << 30
    workload: str = "churn:20%@32M"
    hints: str = "both"
    transport: str = "mmio"
    bandwidth: int = 128 << 20
    downtime_limit: float = 0.3
    max_rounds: int = 30
    dirty_log: str = "auto"
    seed: int = 1
    batch: int = 64
    warm_up: float = 0.2
    qemu: str = ""
    """QEMU's program or its folder, where it is not the installed one."""

    def machine(self, hints: bool, *, incoming: bool = False) -> QemuOptions:
        """Return how QEMU is started for a migration.

        Reporting is left out: what is reported is dropped, and would be gone from what hints are compared by; and no
        guest that fills freed pages with a poison value has junk in them.
        """
        return QemuOptions(
            self.memory,
            self.transport,
            hint=hints,
            reporting=False,
            poison=False,
            incoming=incoming,
            qemu=self.qemu,
        )


def drive_all(options: DriveOptions, progress: Progress) -> dict[str, Any]:
    """Use every feature, then migrate as asked for; return JSON values (the schema is in `docs/cli.md`).

    Raises
    ------
    VirtioError, OSError
        What went wrong.
    """
    binary = find_qemu(options.transport, options.qemu)
    progress.say(f"{binary.version}, {binary.path}")
    runs = []
    with stop_on_signal() as stopped:
        progress.say("every feature once")
        features = exercise_features(options)
        for hints in {"on": [True], "off": [False], "both": [False, True]}[options.hints]:
            progress.run_begins(hints)
            try:
                runs.append(drive_one(options, hints, progress, stopped))
            finally:
                progress.run_ends()
    result: dict[str, Any] = {
        "schema_version": 1,
        "guest": "python",
        "hypervisor": "qemu",
        "qemu": binary.as_dict(),
        "transport": options.transport,
        "memory_bytes": options.memory,
        "workload": options.workload,
        "seed": options.seed,
        "profile": "qemu",
        "free_at": "done",
        "to": "spawn",
        "batch": options.batch,
        "warm_up_seconds": options.warm_up,
        "bandwidth_bytes_per_second": options.bandwidth,
        "downtime_limit_seconds": options.downtime_limit,
        "max_rounds": options.max_rounds,
        "features": features.as_dict(),
        "runs": runs,
        "ratio": None,
    }
    if len(runs) == 2:
        result["ratio"] = {
            "bytes": runs[1]["bytes_sent"] / runs[0]["bytes_sent"],
            "seconds": runs[1]["total_seconds"] / runs[0]["total_seconds"],
        }
    return result


def exercise_features(options: DriveOptions) -> Exercise:
    """Have a small guest use every feature QEMU offers."""
    with QemuMachine(QemuOptions(EXERCISE_MEMORY, options.transport, qemu=options.qemu)) as machine:
        return exercise(QemuGuest.boot(machine, seed=options.seed, poison=0))


def drive_one(options: DriveOptions, hints: bool, progress: Progress, stopped: Callable[[], bool]) -> dict[str, Any]:
    """Migrate one guest from one QEMU to another and go on with it there; return one run's JSON values."""
    tick = ticker(progress, stopped)

    def watch() -> bool:
        progress.tick()
        return stopped()

    with (
        QemuMachine(options.machine(hints)) as source,
        QemuMachine(options.machine(hints, incoming=True)) as destination,
    ):
        progress.say("QEMU runs; the guest sets up its workload")
        guest = QemuGuest.boot(source, workload=options.workload, seed=options.seed, batch=options.batch)
        free = guest.manager.free_blocks(HINT_ORDER) << HINT_ORDER
        guest.run_for(options.warm_up)
        tick()
        nonzero = int(np.count_nonzero(digests_of(source.memory)))
        try:
            outcome = migrate(
                guest,
                destination,
                bandwidth=options.bandwidth,
                downtime_limit=options.downtime_limit,
                max_rounds=options.max_rounds,
                dirty_log=options.dirty_log,
                tick=watch,
            )
        except MigrationStopped as error:
            found = guest.workload.check() if guest.workload else None
            wrong = found.wrong if found else 0
            raise Cancelled(f"{error}: the guest has its pages back at the source, {wrong} wrong") from error
        progress.say(f"QEMU sent {format_size(outcome.bytes_sent)}; the guest goes on at the second QEMU")
        by_number = bitmap.to_bools(guest.manager.bitmap(Owner.HINT), source.memory.page_span)
        hinted = source.memory.page_layout.pick(by_number)
        outside = int(np.count_nonzero((digests_of(source.memory) != 0) & ~hinted))
        resumed = go_on(destination, options.batch, bool(outcome.hinted))
    run = run_as_json(outcome, hints)
    run.update(
        free_in_blocks_bytes=free * 4096,
        nonzero_pages_at_start=nonzero,
        nonzero_pages_outside_hints=outside,
        resumed=resumed,
    )
    return run


def go_on(machine: QemuMachine, batch: int, hinted: bool) -> dict[str, Any]:
    """Go on with the guest in the QEMU it was migrated to, without a reset: check, allocate, write, inflate."""
    guest = QemuGuest.attach(machine, batch=batch)
    machine.qmp.execute("cont")
    assert guest.workload is not None
    manager, workload = guest.manager, guest.workload
    arrived = guest.status()
    if hinted:
        guest.run_until(lambda: not guest.driver.hinted_blocks, TIMEOUT, "DONE at the destination")
    after_done = guest.status()["hinted_pages"]
    first = workload.check()
    blocks = manager.alloc_pages_bulk(HINT_ORDER, 4, Owner.KERNEL, Alloc.NORETRY)
    wrote = manager.write(blocks, HINT_ORDER)
    manager.free_bulk(blocks.copy(), HINT_ORDER)
    pages = min(AFTER_PAGES, manager.free_pages // 2)
    features = guest.driver.features
    for target in (pages, 0):
        machine.set_balloon(target)
        guest.run_until(lambda t=target: machine.balloon_pages() == t, TIMEOUT, "the balloon")  # type: ignore[misc]
    if features & BalloonFeature.STATS_VQ:
        before = guest.driver.statistics()["stats_sent"]
        machine.ask_for_statistics()
        guest.run_until(lambda: guest.driver.statistics()["stats_sent"] > before, TIMEOUT, "statistics")
    manager.verify()
    again = workload.check()
    return {
        "pages_checked": first.pages,
        "pages_wrong": first.wrong,
        "allocated_pages": arrived["allocated_pages"],
        "hinted_pages_after_done": after_done,
        "pages_checked_again": again.pages,
        "pages_wrong_again": again.wrong,
        "pages_written_since": wrote + guest.status()["pages_written"] - arrived["pages_written"],
        "inflated_pages": pages,
        "hinted_pages_left": guest.status()["hinted_pages"],
    }


def run_as_json(outcome: MigrationOutcome, hints: bool) -> dict[str, Any]:
    """Return one run as in the documented schema; what QEMU does not tell is null or empty."""
    ram = outcome.info["ram"]
    return {
        "hints": hints,
        "hints_refused": None if outcome.hinted or not hints else "QEMU asked for none before it was done",
        "total_seconds": outcome.total_seconds,
        "downtime_seconds": outcome.downtime_seconds,
        "frozen_seconds": outcome.frozen_seconds,
        "oracle_seconds": 0.0,
        "bytes_sent": outcome.bytes_sent,
        "converged": outcome.converged,
        "pages": {"normal": ram["normal"], "zero": ram["duplicate"], "skipped": hinted_pages(outcome)},
        "dirty_sync_count": ram["dirty-sync-count"],
        "rounds": [
            {
                "bytes_sent": p.bytes_sent,
                "pages_dirty": p.pages_normal + p.pages_zero + p.pages_left,
                "pages_normal": p.pages_normal,
                "pages_zero": p.pages_zero,
                "pages_skipped": 0,
                "seconds": p.seconds,
                "frozen_seconds": outcome.frozen_seconds if p is outcome.passes[-1] else 0.0,
                "log_voided": None,
            }
            for p in outcome.passes
        ],
        "hint_runs": [
            {
                "command_id": h.command_id,
                "blocks": h.blocks,
                "bytes": h.blocks * 4096 << HINT_ORDER,
                "pages_spared": h.blocks << HINT_ORDER,
                "seconds": h.seconds,
            }
            for h in outcome.hinted
        ],
        "nonzero_pages_at_start": 0,
        "nonzero_pages_outside_hints": 0,
        "pages_rewritten": outcome.pages_marked,
        "pages_marked_at_freeze": outcome.marked_at_freeze,
        "guest_at_pause": outcome.guest_at_pause,
        "oracle": outcome.verdict.as_dict(),
        "resumed": None,
        "dirty_log": outcome.dirty_log,
    }


def drive_summary(result: dict[str, Any]) -> list[str]:
    """Return what is to be said of QEMU and of the features used, in words, one line each."""
    qemu, used = result["qemu"], result["features"]
    return [
        f"{qemu['version']}, {qemu['path']}, {Origin(qemu['package'], qemu['dpkg_verify_clean'])}",
        f"virtio-{result['transport']}, features used: {', '.join([*used['features'], *used['ring_features']])}",
        f"inflated {used['inflated_pages']:,} pages, QEMU dropped {used['dropped_pages']:,}; "
        f"reported {used['reported_pages']:,}, dropped {used['reported_dropped_pages']:,}; "
        f"{used['oom_deflated_pages']:,} came back out of memory; statistics "
        f"{'agree' if used['statistics_match'] else 'DIFFER'}",
    ]


def drive_findings(result: dict[str, Any]) -> list[str]:
    """Return what is wrong beyond what `report.findings` sees."""
    found = Exercise(**result["features"]).findings()
    if result["qemu"]["dpkg_verify_clean"] is False:
        found.append(f"{result['qemu']['package']} is not as Debian shipped it: see dpkg -V")
    return found
