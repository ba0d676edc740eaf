"""Live migration of a guest's RAM and its balloon device, in rounds, with free page hints.

`Migration` sends, `Receiver` receives, `stream` is what lies between them: the same bytes on a socket and in a file.
An emulator brings its `GuestControl` and a `vring.dirty.DirtyLog`; `DeviceHints` is the `HintPort` of its balloon. See
``examples/migrate_an_emulator.py`` and ``examples/migrate_with_hints.py``.
"""

from host_qemu_side.migration.engine import Migration
from host_qemu_side.migration.hint_port import DeviceHints
from host_qemu_side.migration.interfaces import (
    MIN_BANDWIDTH,
    Cancelled,
    GuestControl,
    HintPort,
    HintRunStats,
    Limits,
    MigrationResult,
    Observer,
    Output,
    Phase,
    Round,
)
from host_qemu_side.migration.receiver import Receiver, ReceiverState
from host_qemu_side.migration.stream import Kind, Record, StreamError, StreamReader, StreamWriter

__all__ = [
    "MIN_BANDWIDTH",
    "Cancelled",
    "DeviceHints",
    "GuestControl",
    "HintPort",
    "HintRunStats",
    "Kind",
    "Limits",
    "Migration",
    "MigrationResult",
    "Observer",
    "Output",
    "Phase",
    "Receiver",
    "ReceiverState",
    "Record",
    "Round",
    "StreamError",
    "StreamReader",
    "StreamWriter",
]
