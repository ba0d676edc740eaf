"""What the tests of the command line share: how it is run, the schemas of its JSON, what is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BALLOON = [sys.executable, "-m", "balloon_cli"]
MIGRATE = [*BALLOON, "migrate", "--memory", "64M", "--warm-up", "0"]
NUMBER = (int, float)

RUN = {
    "hints": bool,
    "hints_refused": (str, type(None)),
    "total_seconds": NUMBER,
    "downtime_seconds": NUMBER,
    "oracle_seconds": NUMBER,
    "bytes_sent": int,
    "converged": bool,
    "pages": dict,
    "rounds": list,
    "hint_runs": list,
    "nonzero_pages_at_start": int,
    "nonzero_pages_outside_hints": int,
    "pages_rewritten": int,
    "guest_at_pause": dict,
    "oracle": dict,
    "resumed": dict,
    "dirty_log": str,
}
RESULT = {
    "schema_version": int,
    "guest": str,
    "memory_bytes": int,
    "workload": str,
    "seed": int,
    "profile": str,
    "free_at": str,
    "to": str,
    "batch": int,
    "warm_up_seconds": NUMBER,
    "bandwidth_bytes_per_second": NUMBER,
    "downtime_limit_seconds": NUMBER,
    "max_rounds": int,
    "runs": list,
    "ratio": (dict, type(None)),
}
ROUND = {
    "bytes_sent": int,
    "pages_dirty": int,
    "pages_normal": int,
    "pages_zero": int,
    "pages_skipped": int,
    "seconds": NUMBER,
    "frozen_seconds": NUMBER,
    "log_voided": (str, type(None)),
}
HINT_RUN = {"command_id": int, "blocks": int, "bytes": int, "pages_spared": int, "seconds": NUMBER}
ORACLE = {"pages_checked": int, "pages_wrong": int, "pages_skipped": int, "wrong": list}
RESUMED = {
    "running": bool,
    "pages_checked": int,
    "pages_wrong": int,
    "allocated_pages": int,
    "hinted_pages_after_done": int,
    "hint_run": dict,
    "pages_checked_again": int,
    "pages_wrong_again": int,
    "pages_written_since": int,
    "hinted_pages_left": int,
}
RECEIVED = {
    "schema_version": int,
    "from": str,
    "state": str,
    "guest": str,
    "memory_bytes": int,
    "pages_received": int,
    "zero_pages_received": int,
    "rounds": int,
    "resumed": (dict, type(None)),
}


def has_schema(value: dict[str, Any], schema: dict[str, Any]) -> None:
    assert set(value) == set(schema)
    for key, kind in schema.items():
        assert isinstance(value[key], kind), key


def run(*arguments: str, timeout: float = 60, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*BALLOON, *arguments], capture_output=True, text=True, timeout=timeout, **more)


def script(path: Path, text: str) -> Path:
    """Make a program of the shell's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def descendants(pid: int) -> set[int]:
    """Return all processes below `pid`, from /proc."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found, size = {pid}, 0
    while size != len(found):
        size = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found - {pid}


def all_gone(pids: set[int], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(os.path.exists(f"/proc/{pid}") for pid in pids):
            return True
        time.sleep(0.05)
    return False
