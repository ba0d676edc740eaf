"""QEMU migrates our guest to another QEMU: what it sends, what arrives, how the guest goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from balloon_cli.drive import DriveOptions, drive_one, go_on
from balloon_cli.migrate import Progress
from guest_driver.memory_manager import HINT_ORDER
from guest_driver.qemu import MigrationOutcome, QemuGuest, QemuMachine, QemuOptions, migrate
from guest_driver.qemu.migration import MigrationStopped

pytestmark = pytest.mark.qemu
MIB = 1 << 20
SMALL = {"memory": 128 * MIB, "bandwidth": 64 * MIB, "warm_up": 0.0}
CLI = Path(__file__).parents[1] / "docs" / "cli.md"


def drive(hints: bool, **options: object) -> dict:
    chosen = DriveOptions(**{**SMALL, "workload": "churn:15%@16M", **options})  # type: ignore[arg-type]
    return drive_one(chosen, hints, Progress(), lambda: False)


@pytest.mark.parametrize("transport", ["mmio", "pci"])
def test_hints_save_what_is_free(transport: str) -> None:
    without, with_hints = drive(False, transport=transport), drive(True, transport=transport)
    for run in (without, with_hints):
        assert run["oracle"]["pages_wrong"] == 0
        assert run["oracle"]["kept_pages"] > 4000
        resumed = run["resumed"]
        assert resumed["pages_checked"] > 4000
        assert not resumed["pages_wrong"]
        assert not resumed["pages_wrong_again"]
        assert not resumed["hinted_pages_left"]
        assert resumed["pages_written_since"] >= 4 << HINT_ORDER
    assert without["hint_runs"] == []
    hinted = sum(run["bytes"] for run in with_hints["hint_runs"])
    assert hinted == with_hints["free_in_blocks_bytes"] > 64 * MIB
    assert with_hints["bytes_sent"] < without["bytes_sent"] - 0.85 * hinted  # the first burst comes before the hints


@pytest.mark.parametrize("dirty_log", ["software", "auto"])
def test_guest_that_writes_meanwhile(dirty_log: str) -> None:
    run = drive(True, workload="churn:10%@8M+writer:16M@20M", dirty_log=dirty_log, warm_up=0.2)
    assert run["oracle"]["pages_wrong"] == 0
    assert run["resumed"]["pages_wrong"] == 0
    assert run["pages_rewritten"] > 500
    assert run["dirty_log"] == dirty_log or dirty_log == "auto"


def machines(**options: object) -> tuple[QemuMachine, QemuMachine]:
    common = {"memory": 64 * MIB, "reporting": False, "poison": False, **options}
    return QemuMachine(QemuOptions(**common)), QemuMachine(QemuOptions(incoming=True, **common))  # type: ignore[arg-type]


def test_stores_that_are_not_marked_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison has teeth: without the marks QEMU does not know what our mapping wrote."""
    source, destination = machines()
    with source, destination:
        guest = QemuGuest.boot(source, workload="writer:16M@20M")
        monkeypatch.setattr(guest, "mark", lambda: 0)
        outcome = migrate(guest, destination, bandwidth=32 * MIB)
        assert outcome.verdict.pages_wrong > 0
        assert outcome.verdict.wrong


def test_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest gets DONE, and its pages back."""
    source, destination = machines()
    with source, destination:
        guest = QemuGuest.boot(source, workload="churn:15%@4M")
        before = guest.manager.snapshot()
        with pytest.raises(MigrationStopped):
            migrate(guest, destination, bandwidth=8 * MIB, tick=lambda: guest.driver.hinted_blocks > 0)
        assert guest.manager.snapshot() == before
        assert guest.driver.statistics()["done_seen"] == 1
        source.set_balloon(100)
        guest.run_until(lambda: source.balloon_pages() == 100, 5, "the balloon")


def test_writer_faster_than_the_link_is_stopped_after_max_rounds() -> None:
    source, destination = machines()
    with source, destination:
        guest = QemuGuest.boot(source, workload="writer:24M@64M")
        outcome = migrate(guest, destination, bandwidth=8 * MIB, downtime_limit=0.001, max_rounds=2)
        assert not outcome.converged
        assert outcome.verdict.pages_wrong == 0


def test_twice(tmp_path: Path) -> None:
    """The guest goes on at the second QEMU, and from there to a third."""
    source, second = machines()
    with source, second, QemuMachine(QemuOptions(64 * MIB, reporting=False, poison=False, incoming=True)) as third:
        guest = QemuGuest.boot(source, workload="churn:15%@4M")
        outcomes: list[MigrationOutcome] = []
        for to in (second, third):
            outcomes.append(migrate(guest, to))
            guest = QemuGuest.attach(to)
            to.qmp.execute("cont")
            guest.run_until(lambda g=guest: not g.driver.hinted_blocks, 5, "DONE")  # type: ignore[misc]
        assert [o.verdict.pages_wrong for o in outcomes] == [0, 0]
        assert outcomes[1].hinted[0].blocks == outcomes[0].hinted[0].blocks > 8
        assert guest.workload is not None
        assert guest.workload.check().wrong == 0


def balloon(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "balloon_cli", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_drive_command() -> None:
    done = balloon("drive", "--memory", "128M", "--workload", "churn:15%@16M", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["schema_version"] == 1
    assert result["qemu"]["dpkg_verify_clean"] is True
    assert result["qemu"]["version"] in done.stderr
    assert result["qemu"]["path"] in done.stderr
    assert result["ratio"]["bytes"] < 0.6
    text = CLI.read_text()
    section = text[text.index("## balloon drive") :]
    names = {*result, *result["features"], *result["qemu"], *result["runs"][0], *result["runs"][0]["oracle"]}
    names |= set(result["runs"][0]["resumed"])
    assert not [name for name in names if f"`{name}`" not in text]
    assert "`inflated_pages`" in section


def test_drive_table_and_wrong_use() -> None:
    done = balloon("drive", "--memory", "64M", "--hints", "on", "--workload", "idle", "--transport", "pci")
    assert done.returncode == 0, done.stderr
    assert "dpkg -V clean" in done.stdout
    assert "with hints" in done.stdout
    for wrong in (["--memory", "8M"], ["--memory", "4G"], ["--workload", "dance"]):
        done = balloon("drive", *wrong)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1


def test_compare_command() -> None:
    done = balloon("compare", "--memory", "128M", "--workload", "churn:15%@16M", "--repeats", "1", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    (row,) = result["medians"]
    assert row["ratio"]["bytes_sent"] <= 1.05
    assert [run["device"] for run in result["runs"]] == ["qemu", "ours"]
    table = balloon("compare", "--memory", "64M", "--workload", "churn:15%@4M", "--repeats", "1")
    assert "ours / QEMU" in table.stdout


def test_go_on_needs_no_hints() -> None:
    source, destination = machines(hint=False)
    with source, destination:
        guest = QemuGuest.boot(source, workload="churn:15%@4M")
        outcome = migrate(guest, destination)
        assert outcome.hinted == []
        assert outcome.verdict.pages_skipped == 0
        assert go_on(destination, 64, False)["pages_wrong"] == 0
