"""Commands for the size of the balloon and the guest's statistics, as QEMU names them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from balloon_dev.features import BalloonFeature
from host_qemu_side.monitor.dispatch import Command, Param
from host_qemu_side.monitor.framing import QmpError
from host_qemu_side.monitor.host import IDLE, Host
from vring.memory import PAGE_SHIFT

__all__ = ["STATS", "BalloonCommands", "HasStats"]

PATHS = ("/machine/peripheral/balloon0", "balloon0")
EVENT_PERIOD = 0.2
"""Seconds between two BALLOON_CHANGE events; only the latest size is told (QEMU: 1 s)."""
MAX_INTERVAL = 0xFFFFFFFF
STATS = (
    "stat-swap-in",
    "stat-swap-out",
    "stat-major-faults",
    "stat-minor-faults",
    "stat-free-memory",
    "stat-total-memory",
    "stat-available-memory",
    "stat-disk-caches",
    "stat-htlb-pgalloc",
    "stat-htlb-pgfail",
)
"""What QEMU always lists; -1 where the guest did not say. Others are listed if they came."""


class _Figures(Protocol):
    """The statistics a guest has sent last."""

    values: Mapping[str, int]
    """By name, such as ``stat-free-memory``."""
    updates: int
    """How many buffers of them came."""


@runtime_checkable
class HasStats(Protocol):
    """What a device with a statistics queue offers."""

    stats: _Figures
    """What the guest has sent last."""

    def request_stats(self) -> bool:
        """Ask the driver for fresh values; False if it has not left its buffer for that."""


class BalloonCommands:
    """The group.

    Parameters
    ----------
    host
        The device.
    target
        Bytes the guest is to have, from the start; None: all it has.
    """

    def __init__(self, host: Host, target: int | None = None) -> None:
        self._host = host
        self._target = target
        self._told = 0
        self._next_event = 0.0
        self._interval = 0
        self._next_poll = 0.0
        self._updates = 0
        self._updated_at = 0

    def commands(self) -> list[Command]:
        """Return the commands."""
        qom = {
            "path": Param("str", help=f"{PATHS[0]}, the only object there is"),
            "property": Param("str", help="guest-stats or guest-stats-polling-interval"),
        }
        value = Param("int", help="bytes the guest is to have; the balloon takes the rest")
        return [
            Command("balloon", self.balloon, "set the size the guest is to have", {"value": value}),
            Command("query-balloon", self.query, "the size the guest has, in bytes"),
            Command("qom-get", self.qom_get, "read a property: the guest's statistics", qom),
            Command("qom-set", self.qom_set, "set a property", {**qom, "value": Param("any", help="its new value")}),
        ]

    # -- size -----------------------------------------------------------------------------------------------------

    def balloon(self, value: int) -> None:
        """Ask for a balloon that leaves the guest `value` bytes."""
        if value <= 0:
            raise QmpError("Parameter 'value' expects a size")
        self._host.memory()
        self._target = value
        self.apply()
        self._host.backend.deliver()

    def apply(self) -> None:
        """Hold the size wanted against the RAM there is; also called when a front end brings its memory."""
        memory = self._host.backend.memory
        if memory is None or self._target is None:
            return
        self._host.device.set_target(max(memory.size - self._target, 0) >> PAGE_SHIFT)

    def _actual(self) -> int:
        return max(self._host.memory().size - (self._host.device.actual << PAGE_SHIFT), 0)

    def query(self) -> dict[str, Any]:
        """Return the size the guest has, by its own word."""
        return {"actual": self._actual(), **self._host.at_rest()}

    # -- statistics -----------------------------------------------------------------------------------------------

    def _check(self, path: str, name: str) -> None:
        if path not in PATHS:
            raise QmpError(f"Device '{path}' not found", "DeviceNotFound")
        if name not in ("guest-stats", "guest-stats-polling-interval"):
            raise QmpError(f"Property 'virtio-balloon-device.{name}' not found")

    def _stats(self) -> HasStats:
        device = self._device()
        if device is None:
            raise QmpError("the device has no statistics queue (VIRTIO_BALLOON_F_STATS_VQ is not offered)")
        return device

    def _device(self) -> HasStats | None:
        device: object = self._host.device
        offered = self._host.device.offered_features & BalloonFeature.STATS_VQ
        return device if offered and isinstance(device, HasStats) else None

    def qom_get(self, path: str, property: str) -> Any:
        """Return the statistics, or how often they are asked for."""
        self._check(path, property)
        if property == "guest-stats-polling-interval":
            return self._interval
        device = self._stats()
        values = {name: int(value) for name, value in device.stats.values.items()}
        return {
            "stats": {**dict.fromkeys(STATS, -1), **values},
            "last-update": self._updated_at,
            **self._host.at_rest(),
        }

    def qom_set(self, path: str, property: str, value: Any) -> None:
        """Set the polling interval in seconds; 0 ends polling."""
        self._check(path, property)
        if property == "guest-stats":
            raise QmpError("Property 'virtio-balloon-device.guest-stats' is not writable")
        Param("int").check("value", value)
        if not 0 <= value <= MAX_INTERVAL:
            raise QmpError("timer value must be from 0 to 4294967295 seconds")
        if value:
            self._stats()
        self._interval, self._next_poll = value, 0.0

    # -- between commands -----------------------------------------------------------------------------------------

    def _tick_stats(self, now: float) -> float:
        device = self._device()
        if device is None:
            return IDLE
        if device.stats.updates != self._updates:
            self._updates = device.stats.updates
            self._updated_at = int(time.time()) if self._updates else 0  # a reset has forgotten them
        guest = self._host.guest
        if not self._interval or (guest is not None and guest.paused):
            return IDLE  # a paused guest's memory may have been sent already: not one used buffer may be added
        if now >= self._next_poll:
            self._next_poll = now + self._interval
            device.request_stats()
            self._host.backend.deliver()
        return self._next_poll - now

    def tick(self, now: float) -> float:
        """Tell of a balloon that changed its size; poll the statistics."""
        wait = self._tick_stats(now)
        if self._host.backend.memory is None:
            self._told = 0
            return wait
        if self._host.device.actual != self._told:
            if now < self._next_event:
                return min(wait, self._next_event - now)
            self._told, self._next_event = self._host.device.actual, now + EVENT_PERIOD
            self._host.emit("BALLOON_CHANGE", self.query())
        return wait
