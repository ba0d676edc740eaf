"""``balloon compare``: QEMU's device and migration beside ours, under the same driver, workload, seed and bandwidth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from balloon_cli.drive import DriveOptions, drive_one
from balloon_cli.migrate import MigrateOptions, Progress, migrate_python, stop_on_signal, ticker
from balloon_dev.profiles import QEMU
from guest_driver.qemu import find_qemu
from host_qemu_side.migration import Limits

__all__ = ["BYTES_LIMIT", "SECONDS_LIMIT", "CompareOptions", "compare_all"]

BYTES_LIMIT = 1.05
SECONDS_LIMIT = 1.0
FIGURES = ("bytes_sent", "total_seconds", "downtime_seconds")


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """What the command line asked for."""

    drive: DriveOptions
    repeats: int = 5

    def ours(self) -> MigrateOptions:
        """Return the same for our own device and engine."""
        o = self.drive
        return MigrateOptions(
            guest="python",
            memory=o.memory,
            workload=o.workload,
            hints=o.hints,
            to="spawn",
            limits=Limits(float(o.bandwidth), o.downtime_limit, o.max_rounds),
            free_at="done",
            dirty_log="auto",
            profile=QEMU,
            seed=o.seed,
            batch=o.batch,
            warm_up=o.warm_up,
        )


def compare_all(options: CompareOptions, progress: Progress) -> dict[str, Any]:
    """Run both by turns; return JSON values (the schema is in `docs/cli.md`).

    Raises
    ------
    VirtioError, OSError
        What went wrong.
    """
    drive = options.drive
    binary = find_qemu(drive.transport, drive.qemu)
    progress.say(f"{binary.version}, {binary.path}")
    modes = {"on": [True], "off": [False], "both": [False, True]}[drive.hints]
    runs: list[dict[str, Any]] = []
    ours = options.ours()
    with stop_on_signal() as stopped:
        tick = ticker(progress, stopped)
        for turn in range(options.repeats):
            for hints in modes:
                sides: list[tuple[str, Callable[[], dict[str, Any]]]] = [
                    ("qemu", lambda h=hints: drive_one(drive, h, progress, stopped)),  # type: ignore[misc]
                    ("ours", lambda h=hints: migrate_python(ours, h, progress, stopped)),  # type: ignore[misc]
                ]
                for name, run in sides if turn % 2 == 0 else reversed(sides):
                    progress.run_begins(hints)
                    try:
                        progress.say(f"{turn + 1} of {options.repeats}: {name}")
                        runs.append({"device": name, **run()})
                    finally:
                        progress.run_ends()
                    tick()
    return {
        "schema_version": 1,
        "qemu": binary.as_dict(),
        "transport": drive.transport,
        "memory_bytes": drive.memory,
        "workload": drive.workload,
        "seed": drive.seed,
        "bandwidth_bytes_per_second": drive.bandwidth,
        "repeats": options.repeats,
        "medians": [_medians(runs, hints) for hints in modes],
        "limits": {"bytes": BYTES_LIMIT, "seconds": SECONDS_LIMIT},
        "runs": runs,
    }


def _medians(runs: list[dict[str, Any]], hints: bool) -> dict[str, Any]:
    """Return the medians of both sides, and ours divided by QEMU's."""

    def of(device: str) -> dict[str, float]:
        mine = [run for run in runs if run["device"] == device and run["hints"] is hints]
        return {name: median(run[name] for run in mine) for name in FIGURES}

    qemu, ours = of("qemu"), of("ours")
    ratio = {name: ours[name] / qemu[name] if qemu[name] else None for name in FIGURES}
    holds = ratio["bytes_sent"] is not None and ratio["total_seconds"] is not None
    holds = holds and ratio["bytes_sent"] <= BYTES_LIMIT and ratio["total_seconds"] <= SECONDS_LIMIT  # type: ignore[operator]
    return {"hints": hints, "qemu": qemu, "ours": ours, "ratio": ratio, "holds": holds}
