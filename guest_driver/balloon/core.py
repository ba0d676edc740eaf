"""What all parts of the balloon driver share: its state in guest RAM, its queues, the time."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from balloon_dev.features import QueueRole
from balloon_dev.profiles import Profile
from guest_driver.balloon.state import (
    COMMAND_SLOTS,
    PFNS_PER_REQUEST,
    PIECES,
    REPORT_RANGES,
    STAT_TAGS,
    STATE,
    FreeAt,
)
from guest_driver.memory_manager import MemoryManager
from guest_driver.transport import CanWait, Transport
from vring.errors import VirtioError
from vring.split import DriverQueue, QueueLayout

__all__ = ["DriverCore"]


class DriverCore:
    """State and queues; the work is done by the classes built on this one."""

    manager: MemoryManager
    transport: Transport
    profile: Profile
    batch: int
    free_at: FreeAt
    _wanted: int
    _now: float
    _queues: dict[QueueRole, DriverQueue]
    _record: npt.NDArray[Any]
    _state: Any

    # -- state in guest RAM ---------------------------------------------------------------------------------------

    def _reserve(self) -> None:
        kernel = self.manager.kernel
        for name, size in PIECES.items():
            if kernel.find(name) is None:
                kernel.reserve(name, size, 64)

    def _map_state(self) -> None:
        kernel, memory = self.manager.kernel, self.manager.memory
        where = {}
        for name, size in PIECES.items():
            where[name], room = kernel.pieces.get(name, (0, 0))
            if room < size or where[name] % 8:
                raise VirtioError(f"the kernel area of this RAM has no piece {name!r} of {size} bytes: it is damaged")
        self._record = memory.array(where["balloon"], 1, STATE)
        self._state = self._record[0]
        self._commands_gpa, self._pfns_gpa = where["balloon.commands"], where["balloon.pfns"]
        self._moved_gpa, self._stats_gpa = where["balloon.moved"], where["balloon.stats"]
        self._ids = memory.array(self._commands_gpa, COMMAND_SLOTS, "<u4")
        self._busy = memory.array(self._commands_gpa + COMMAND_SLOTS * 4, COMMAND_SLOTS, "<u4")
        self._pfns = memory.array(self._pfns_gpa, PFNS_PER_REQUEST, "<u4")
        self._moved = memory.array(self._moved_gpa, PFNS_PER_REQUEST, "<u4")
        self._report_pfns = memory.array(where["balloon.report"], REPORT_RANGES, "<u8")
        self._stats_bytes = memory.array(self._stats_gpa, PIECES["balloon.stats"])
        assert len(self._stats_bytes) == len(STAT_TAGS) * 10

    def _number(self, name: str, most: int) -> int:
        """Return a number of the state if it can be: whoever shares the RAM may have written another one there."""
        value = int(self._state[name])
        if value > most:
            raise VirtioError(
                f"the balloon driver's state in guest RAM is damaged: {name} reads {value}, not 0 to {most}"
            )
        return value

    @property
    def features(self) -> int:
        """Negotiated feature bits."""
        return int(self._state["features"])

    # -- queues ---------------------------------------------------------------------------------------------------

    def _roles(self) -> list[tuple[QueueRole, int]]:
        """Queues this driver uses and their numbers."""
        offered = int(self._state["offered"])
        numbered = [(role, self.profile.numbering.number(role, offered, self.features)) for role in QueueRole]
        return [(role, index) for role, index in numbered if index is not None]

    def _ring(self, role: QueueRole, largest: int) -> tuple[QueueLayout, int]:
        """Return where the ring of a queue lies and the address of its private state.

        Memory of a ring set up before is used again, with fewer entries if it does not hold more.
        """
        kernel = self.manager.kernel
        size, ring_name, state_name = largest, f"{role.value}.ring", f"{role.value}.state"
        if kernel.find(ring_name) is None:
            kernel.reserve(ring_name, QueueLayout.place(0, size).bytes, 64)
            kernel.reserve(state_name, DriverQueue.state_bytes(size), 64)
        (ring, ring_room), (state, state_room) = kernel.pieces[ring_name], kernel.pieces[state_name]
        while QueueLayout.place(0, size).bytes > ring_room or DriverQueue.state_bytes(size) > state_room:
            size //= 2
        return QueueLayout.place(ring, size), state

    def _post(self, queue: DriverQueue, segments: npt.NDArray[Any], token: int = 0) -> bool:
        """Expose one buffer and ask for an interrupt when it has been used. False if the ring is full."""
        if queue.add(segments, [token], [len(segments)]) != 1:
            return False
        queue.enable_callbacks()
        if queue.publish():
            self.transport.kick(queue.index)
        return True

    def _wait(self, index: int) -> bool:
        """Wait a bounded time for the device to use something on a queue; False if there is no point in more of it."""
        return isinstance(self.transport, CanWait) and self.transport.wait(index)
