"""The same promises for an unmodified Linux guest: its own numbers, tagged pages, and a host that interferes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from linux_pair import BUILT

from host_qemu_side.linux_guest import initramfs
from vring.errors import MissingFacility

pytestmark = [pytest.mark.uml, pytest.mark.slow]

BLOCK = 4 << 20
LINUX = [sys.executable, "-m", "balloon_cli", "migrate", "--guest", "linux", "--json"]


@pytest.fixture(scope="module")
def disk() -> Iterator[Path]:
    """A work folder on a disk, with the guest's first file system built."""
    with tempfile.TemporaryDirectory(prefix="e2e-", dir="/var/tmp") as folder:
        try:
            initramfs.build(Path(folder))
        except MissingFacility as missing:
            pytest.skip(str(missing))
        yield Path(folder)


def migrate(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    command = [*LINUX, "--work-dir", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in folder.iterdir() if not p.name.startswith(BUILT)] == []
    return json.loads(done.stdout), done.stderr


def assert_correct(run: dict[str, Any]) -> None:
    assert run["oracle"]["pages_wrong"] == 0
    assert run["oracle"]["pages_checked"] > 0
    tags = run["linux"]["tags"]
    assert tags["ok"]
    assert tags["found"] == tags["pages"] == 1024
    assert run["linux"]["alive_after"]


def test_churn(disk: Path) -> None:
    """A gigabyte, without and with hints; the guest's own MemFree falls by what it hinted and comes back."""
    for _ in range(3):
        result, _ = migrate(disk, "--memory", "1G")  # at the default bandwidth, for which the limit of bytes is stated
        for run in result["runs"]:
            assert_correct(run)
        on = result["runs"][1]
        if not any(r["log_voided"] for r in on["rounds"]):
            break  # else the kernel's own flusher came in between: all is right, and hints were void
    assert on["hints_refused"] is None
    free = on["linux"]["mem_free_bytes"]
    fell = free["before"] - free["after_pass"]
    # MemFree is read when the first pass is over: its blocks, not those of later rounds
    hinted = on["hint_runs"][0]["blocks"] * BLOCK
    assert hinted > 64 * BLOCK
    assert fell == pytest.approx(hinted, rel=0.05)
    assert free["after_done"] > free["before"] - 8 * BLOCK
    assert result["ratio"]["bytes"] <= 0.20


def test_a_sync_on_the_host_in_mid_round(disk: Path) -> None:
    """It cleans pages behind the dirty log's back. The log notices, and what was hinted is sent after all."""
    over = threading.Event()

    def interfere() -> None:
        while not over.wait(0.15):
            os.sync()

    thread = threading.Thread(target=interfere)
    thread.start()
    try:
        result, _ = migrate(
            disk, *("--memory", "256M", "--bandwidth", "64M", "--hints", "on", "--workload", "churn+writer:16M@8M")
        )
    finally:
        over.set()
        thread.join()
    assert_correct(result["runs"][0])


def test_memory_in_memory(disk: Path) -> None:
    """On tmpfs no page is ever seen dirty: hints are refused, and the migration is right without."""
    if not os.path.isdir("/dev/shm") or os.statvfs("/dev/shm").f_bavail * 4096 < 1 << 29:
        pytest.skip("no tmpfs with room at /dev/shm")
    with tempfile.TemporaryDirectory(prefix="e2e-", dir="/dev/shm") as folder:
        for built in disk.iterdir():
            with contextlib.suppress(OSError):
                (Path(folder) / built.name).write_bytes(built.read_bytes())
                (Path(folder) / built.name).chmod(0o755)
        result, err = migrate(Path(folder), "--memory", "256M", "--bandwidth", "256M", "--hints", "on")
    run = result["runs"][0]
    assert_correct(run)
    assert run["hints_refused"]
    assert not run["hint_runs"]
    assert "hints refused" in err
    assert run["dirty_log"] == "digest"
