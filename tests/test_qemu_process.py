"""QEMU as a process: found, started, spoken to, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from guest_driver.qemu import QemuMachine, QemuOptions, QmpError, find_qemu
from guest_driver.qemu.package import QEMU_ENVIRONMENT
from guest_driver.qemu.remark import marks
from vring.errors import DeviceError, MissingFacility, PeerVanished, UsageError
from vring.memory import PAGE_SIZE, GuestMemory
from vring.split import QueueLayout

MIB = 1 << 20


def test_marks_leave_used_rings_alone() -> None:
    """A page with a used ring is marked elsewhere; one that is all used ring is not marked at all."""
    with GuestMemory.create(MIB) as memory:
        memory.write(0, bytes(range(256)) * (MIB // 256))
        small = QueueLayout(8, 0x10000, 0x10100, 0x11000)
        large = QueueLayout(1024, 0x20000, 0x24000, 0x26FFC)
        found = dict.fromkeys(a for a, _ in marks(memory, [0x10, 0x11, 0x26, 0x27, 0x28, 0x29, 0x30], [small, large]))
        pages = {address // PAGE_SIZE for address in found}
        assert pages == {0x10, 0x11, 0x26, 0x29, 0x30}
        for address, byte in marks(memory, [0x10, 0x11, 0x26, 0x29], [small, large]):
            assert byte == address & 0xFF
            for layout in (small, large):
                assert not layout.used <= address < layout.used + layout.used_bytes


@pytest.mark.parametrize("options", [{"memory": 3 * MIB}, {"memory": 64 * MIB + 1}, {"transport": "ccw"}])
def test_options_that_cannot_be(options: dict) -> None:
    with pytest.raises(UsageError):
        QemuOptions(**options)


def test_missing_qemu_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(QEMU_ENVIRONMENT, raising=False)
    with pytest.raises(MissingFacility, match="apt install --no-install-recommends qemu-system-x86"):
        find_qemu("mmio")
    command = [sys.executable, "-m", "balloon_cli", "drive", "--memory", "64M"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ}, timeout=60, check=False)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1


@pytest.mark.qemu
def test_qemu_that_does_not_start_says_why() -> None:
    with pytest.raises(PeerVanished, match="no-such-option"):
        QemuMachine(QemuOptions(64 * MIB, extra=("--no-such-option",)))


@pytest.mark.qemu
def test_clients() -> None:
    with QemuMachine(QemuOptions(64 * MIB)) as machine:
        assert machine.qmp.version["qemu"]["major"] >= 7
        with pytest.raises(QmpError, match="no-such-command"):
            machine.qmp.execute("no-such-command")
        with pytest.raises(DeviceError, match="nonsense"):
            machine.qtest.command("nonsense")
        for size, value in ((1, 0x12), (2, 0x1234), (4, 0x12345678), (8, 0x123456789ABCDEF0)):
            machine.qtest.write(0x200000, size, value)
            assert machine.qtest.read(0x200000, size) == value
            assert machine.memory.read(0x200000, size) == value.to_bytes(size, "little")
        machine.qtest.write_bytes([(0x300000 + i, i & 0xFF) for i in range(1000)])
        assert machine.memory.read(0x300000, 1000) == bytes(i & 0xFF for i in range(1000))


@pytest.mark.qemu
def test_qemu_that_dies_is_noticed() -> None:
    with QemuMachine(QemuOptions(64 * MIB)) as machine:
        machine.process.process.kill()
        with pytest.raises(PeerVanished):
            machine.qtest.read(0, 4)
        with pytest.raises(PeerVanished):
            machine.qmp.execute("query-status")


@pytest.mark.qemu
def test_qemu_does_not_outlive_its_parent() -> None:
    program = (
        "import time\nfrom guest_driver.qemu import QemuMachine, QemuOptions\n"
        "machine = QemuMachine(QemuOptions(64 << 20))\nprint(machine.process.pid, flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        qemu = int(parent.stdout.readline())
        assert Path(f"/proc/{qemu}/status").exists()
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{qemu}/cmdline").exists() and Path(f"/proc/{qemu}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "QEMU outlived its parent"
        time.sleep(0.02)
