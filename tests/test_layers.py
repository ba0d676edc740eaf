"""Which room may import which: see the table in docs; guest and host meet through memory and messages only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "vring": set(),
    "balloon_dev": {"vring"},
    "guest_driver": {"vring", "balloon_dev"},
    "host_qemu_side": {"vring", "balloon_dev"},
    "balloon_cli": {"vring", "balloon_dev", "guest_driver", "host_qemu_side"},
}
NO_IO = {"socket", "select", "selectors", "threading", "time", "asyncio", "subprocess", "multiprocessing", "signal"}


def imports(path: Path) -> set[str]:
    """First names of all modules a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


FILES = [
    pytest.param(room, path, id=str(path.relative_to(ROOT)))
    for room in ROOMS
    for path in sorted((ROOT / room).rglob("*.py"))
    if path.name != "_build.py"
]


@pytest.mark.parametrize(("room", "path"), FILES)
def test_imports(room, path):
    others = imports(path) & ROOMS.keys() - {room}
    assert others <= ROOMS[room], f"{path.name} imports {sorted(others - ROOMS[room])}"


@pytest.mark.parametrize(("room", "path"), [p for p in FILES if p.values[0] == "balloon_dev"])
def test_device_type_does_no_io(room, path):
    """No I/O, no threads, no clock in the device's core (the journal is shared memory and holds a lock as a fence)."""
    allowed = {"threading"} if path.name == "journal.py" else set()
    assert not (imports(path) & NO_IO) - allowed


@pytest.mark.parametrize(
    "name",
    [*(f"guest_driver/balloon/{part}.py" for part in ("core", "driver", "hinting", "inflate", "reporting", "stats")),
     *(f"guest_driver/{part}.py" for part in ("transport", "registers", "mmio", "pci")),
     "guest_driver/memory_manager.py", "guest_driver/zone.py",
     "host_qemu_side/migration/engine.py", "host_qemu_side/migration/stream.py", "host_qemu_side/migration/ram.py"],
)  # fmt: skip
def test_cores_do_no_io(name):
    """Driver, allocator and migration engine are cores: time is an argument, and the order is the caller's."""
    assert not imports(ROOT / name) & NO_IO


def test_every_room_is_there():
    assert all((ROOT / room / "__init__.py").exists() for room in ROOMS)
