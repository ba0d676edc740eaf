"""What it costs to free hinted blocks at STOP instead of at DONE: the reason commit 86a559787e6 gives for DONE.

``python benchmarks/free_at.py [--memory 1G] [--repeats 3]``: migrations by turns, medians. A short downtime limit makes
several rounds, hence several STOPs.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from balloon_cli.migrate import MigrateOptions, Progress, migrate_all
from balloon_dev.profiles import SPEC
from host_qemu_side.migration import Limits
from vring.sizes import parse_size

WORKLOADS = ("churn", "writer:256M@50M", "churn+writer:64M@30M", "churn+build")
POISON = ("--features", "all", "--poison", "0xaaaaaaaa")
"""A guest that fills pages when it frees them, as with init_on_free: then freeing writes the pages themselves."""


def run(workload: str, free_at: str, memory: int, seed: int, arguments: tuple[str, ...]) -> dict[str, Any]:
    """Migrate once with hints."""
    options = MigrateOptions(
        guest="python",
        memory=memory,
        workload=workload,
        hints="on",
        to="spawn",
        limits=Limits(downtime=0.02, max_rounds=12),
        free_at=free_at,
        dirty_log="auto",
        profile=SPEC,
        seed=seed,
        guest_arguments=arguments,
    )
    result: dict[str, Any] = migrate_all(options, Progress())["runs"][0]
    return result


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", type=parse_size, default=1 << 30)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print("| workload | freed at | pages dirtied after round 1 | rounds | blocks hinted | MB sent | total s |")
    print("|---|---|---|---|---|---|---|")
    cases: list[tuple[str, tuple[str, ...]]] = [(workload, ()) for workload in WORKLOADS]
    cases.append(("churn+writer:64M@30M", POISON))
    for workload, poison in cases:
        name = f"{workload}, poisoned" if poison else workload
        runs: dict[str, list[dict[str, Any]]] = {"done": [], "stop": []}
        for seed in range(1, args.repeats + 1):
            for free_at, found in runs.items():
                found.append(run(workload, free_at, args.memory, seed, poison))
        for free_at, found in runs.items():
            assert all(r["oracle"]["pages_wrong"] == 0 for r in found)
            columns = (
                statistics.median(sum(x["pages_dirty"] for x in r["rounds"][1:]) for r in found),
                statistics.median(len(r["rounds"]) for r in found),
                statistics.median(sum(h["blocks"] for h in r["hint_runs"]) for r in found),
                statistics.median(r["bytes_sent"] / 1e6 for r in found),
                statistics.median(r["total_seconds"] for r in found),
            )
            print(f"| {name} | {free_at} | " + " | ".join(f"{c:.4g}" for c in columns) + " |", flush=True)


if __name__ == "__main__":
    main()
