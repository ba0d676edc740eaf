"""A stream as a real source writes it, taken apart: all kinds of records, the state of a device and its transports.

It comes out of a migration of a guest with a balloon; `join` makes a stream again of records that somebody changed,
with checksums and sequence numbers that are right, so that what is wrong with them is left to whoever understands them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from balloon_dev.device import SUPPORTED_FEATURES, BalloonDevice
from balloon_dev.saved import SavedDevice
from host_qemu_side.migration import Kind, Limits, Migration, Record, StreamReader, StreamWriter
from host_qemu_side.saved import SavedGuest, SavedRing, SavedTransport
from vring.dirty.software import SoftwareDirtyLog
from vring.features import CommonFeature
from vring.memory import PAGE_SIZE, GuestMemory
from vring.mmio import MmioDevice
from vring.mmio_registers import Register
from vring.split import QueueLayout

MIB = 1 << 20
FEATURES = SUPPORTED_FEATURES
HEADER = {"guest": "python", "resume": {"profile": "spec", "batch": 64, "free_at": "done", "dirty_log": "auto"}}

Parts = list[tuple[int, bytes]]


class Collecting:
    """An output that keeps what is sent; nobody answers."""

    two_way = False

    def __init__(self) -> None:
        self.data = bytearray()

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        for buffer in buffers:
            self.data += buffer

    def flush(self) -> bool:
        return True

    def answer(self) -> Record | None:
        return None

    def finish(self) -> None:
        pass


class Still:
    """A guest that is stopped and started, and writes only what the test does."""

    def freeze(self) -> None:
        pass

    def thaw(self) -> None:
        pass


def live_device(memory: GuestMemory) -> tuple[BalloonDevice, MmioDevice]:
    """Return a device whose driver has set up all five queues."""
    device = BalloonDevice(FEATURES)
    mmio = MmioDevice(device, memory)
    for word in range(2):
        mmio.write(Register.DriverFeaturesSel, 4, word)
        mmio.write(Register.DriverFeatures, 4, (FEATURES | CommonFeature.VERSION_1) >> 32 * word & 0xFFFFFFFF)
    mmio.write(Register.Status, 4, 11)
    for index in range(5):
        layout = QueueLayout.place(0x8000 + 0x1000 * index, 16)
        mmio.write(Register.QueueSel, 4, index)
        mmio.write(Register.QueueSize, 4, layout.size)
        mmio.write(Register.QueueDescLow, 4, layout.desc)
        mmio.write(Register.QueueDriverLow, 4, layout.avail)
        mmio.write(Register.QueueDeviceLow, 4, layout.used)
        mmio.write(Register.QueueReady, 4, 1)
    mmio.write(Register.Status, 4, 15)
    device.stats.take(b"\x04\x00" + (7 * PAGE_SIZE).to_bytes(8, "little"))
    device.set_target(300)
    device.start_hinting()
    return device, mmio


def real_stream() -> Parts:
    """Migrate a small guest into memory; return its records as (kind, payload)."""
    output = Collecting()
    with GuestMemory.create(MIB) as memory:
        memory.write(0x3000, b"\x01" * 5 * PAGE_SIZE)
        log = SoftwareDirtyLog.for_memory(memory)
        device, mmio = live_device(memory)
        mmio.hold()
        balloon = {**device.save(), "ballooned": [[64, 16], [100, 1], [200, 40]]}
        rings = tuple(SavedRing(index, 16, 0) for index in range(5))
        guest = SavedGuest(SavedDevice.from_json(balloon), SavedTransport(FEATURES, rings))
        state: dict[str, Any] = {**guest.to_json(), "mmio": mmio.save()}
        migration = Migration(
            memory,
            log,
            output,
            Still(),
            limits=Limits(bandwidth=0, downtime=0.0, max_rounds=3),
            header=HEADER,
            state=lambda: state,
        )
        now = 0.0
        while not migration.finished:
            now = max(migration.step(now), now + 0.001)
            if len(migration.result.rounds) < 3:
                memory.write(0x5000, bytes(PAGE_SIZE) if now % 2 else b"\x02" * PAGE_SIZE)
                log.mark(5, 2)
    reader = StreamReader()
    reader.feed(output.data)
    parts = []
    while (record := reader.next()) is not None:
        parts.append((int(record.kind), bytes(record.payload)))
    return parts


def join(parts: Iterable[tuple[int, bytes]]) -> bytes:
    """Return the stream of these records."""
    writer = StreamWriter()
    return b"".join(bytes(piece) for kind, payload in parts for piece in writer._record(Kind(kind), payload))
