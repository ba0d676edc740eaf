"""What lies between the two sides in a test: a transport straight onto a device, and a destination in this process."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from balloon_dev.config import CMD_ID
from balloon_dev.device import BalloonDevice
from guest_driver.transport import Interrupts
from host_qemu_side.migration.receiver import Receiver, ReceiverState
from host_qemu_side.migration.stream import Kind, Record, StreamReader
from vring.errors import DeviceError, PeerVanished
from vring.features import CommonFeature
from vring.memory import GuestMemory
from vring.split import DeviceQueue, QueueLayout


class MemoryTransport:
    """A `guest_driver.transport.Transport` straight onto a device. Kicks and interrupts stay flags until delivered."""

    def __init__(self, device: BalloonDevice, memory: GuestMemory, model: Any = None) -> None:
        self.device, self.memory, self.model = device, memory, model
        self.pending = False
        self.kicked: set[int] = set()
        self.queues: dict[int, DeviceQueue] = {}
        self.id_read = 0
        """What the driver last read as its command id."""
        self._raised = Interrupts()

    @property
    def quiet(self) -> bool:
        """Whether nothing is on its way in either direction."""
        return not self.pending and not self.kicked

    def collect(self) -> None:
        """Note what the device has to say; the guest hears of it when the test delivers it."""
        self._raised.config |= self.device.take_config_change()
        self._raised.queues |= set(self.device.take_calls())
        self.pending = self._raised.config or bool(self._raised.queues)

    def device_features(self) -> int:
        return self.device.offered_features

    def set_driver_features(self, features: int) -> None:
        if not self.device.set_features(features):
            raise DeviceError(f"the device does not take features {features:#x}")

    def read_config(self, offset: int, length: int) -> bytes:
        data = self.device.read_config(offset, length)
        if offset == CMD_ID:
            self.id_read = int.from_bytes(data, "little")
        return data

    def write_config(self, offset: int, data: bytes) -> None:
        self.device.write_config(offset, data)

    def queue_size_max(self, index: int) -> int:
        sizes = self.device.queue_sizes
        return sizes[index] if index < len(sizes) else 0

    def setup_queue(self, index: int, layout: QueueLayout, *, base: int = 0) -> None:
        self.queues[index] = DeviceQueue(
            self.memory,
            layout,
            base=base,
            event_idx=bool(self.device.negotiated & CommonFeature.EVENT_IDX),
            indirect=bool(self.device.negotiated & CommonFeature.INDIRECT_DESC),
            index=index,
        )

    def driver_ok(self) -> None:
        for index, queue in self.queues.items():
            self.device.attach_queue(index, queue)

    def kick(self, index: int) -> None:
        self.kicked.add(index)

    def interrupts(self) -> Interrupts:
        raised, self._raised = self._raised, Interrupts()
        self.pending = False
        return raised

    def filenos(self) -> list[int]:
        return []

    def reset(self) -> None:
        self.device.reset()
        if self.model is not None:
            self.model.reset()
        self.queues.clear()
        self.kicked.clear()
        self._raised = Interrupts()
        self.pending = False

    def close(self) -> None:
        pass


class Destination:
    """An `Output` with the receiver behind it. It takes as much as the test lets it, and can vanish at any record.

    Parameters
    ----------
    two_way
        False: like a file, read when it is complete.
    """

    def __init__(self, *, two_way: bool = True) -> None:
        self.two_way = two_way
        self.receiver = Receiver(digests=two_way, clock=lambda: 0.0)
        self.room: int | None = None
        """Bytes it still takes; None: any number."""
        self.vanish_at: Kind | None = None
        """The record at which the connection is lost."""
        self.refuses = False
        self.commit_sent = False
        self.kinds: list[Kind] = []
        self._reader, self._answers = StreamReader(), StreamReader()
        self._pending: deque[memoryview] = deque()
        self._file = bytearray()

    @property
    def blocked(self) -> bool:
        return bool(self._pending)

    @property
    def receiver_owns_guest(self) -> bool:
        return self.receiver.state is ReceiverState.COMMITTED

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        for buffer in buffers:
            if self.vanish_at is not None and self._begins(buffer, self.vanish_at):
                raise PeerVanished("the destination is gone")
            self.commit_sent = self.commit_sent or self._begins(buffer, Kind.COMMIT)
            if len(buffer):
                self._pending.append(memoryview(buffer).cast("B"))

    @staticmethod
    def _begins(buffer: bytes | memoryview, kind: Kind) -> bool:
        return isinstance(buffer, bytes) and len(buffer) == 24 and int.from_bytes(buffer[:2], "little") == kind

    def flush(self) -> bool:
        while self._pending:
            buffer = self._pending.popleft()
            n = len(buffer) if self.room is None else min(self.room, len(buffer))
            if self.room is not None:
                self.room -= n
            self._take(buffer[:n])
            if n < len(buffer):
                self._pending.appendleft(buffer[n:])
                return False
        return True

    def _take(self, data: memoryview) -> None:
        if not self.two_way:
            self._file += data
            return
        self._reader.feed(data)
        self._read()

    def _read(self) -> None:
        while (record := self._reader.next()) is not None:
            self.kinds.append(record.kind)
            refused = self.refuses and self.two_way and record.kind is not Kind.COMMIT
            answer = self.receiver.refuse("no") if refused else self.receiver.handle(record)
            for part in answer:
                self._answers.feed(part)

    def answer(self) -> Record | None:
        return self._answers.next()

    def retract(self) -> bool:
        """Drop what was not taken."""
        left = bool(self._pending)
        self.commit_sent = self.commit_sent and not left
        self._pending.clear()
        return left

    def finish(self) -> None:
        """A file is complete: read it from the beginning."""
        if not self.two_way and self._file:
            self._reader.feed(self._file)
            self._file = bytearray()
            self._read()
