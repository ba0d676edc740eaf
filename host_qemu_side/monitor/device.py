"""Commands that look at the device: features, queues, refused requests, and the program's own state."""

from __future__ import annotations

from typing import Any

from balloon_dev.config import ACTUAL, CMD_ID, NUM_PAGES, POISON_VAL
from balloon_dev.features import BalloonFeature, QueueRole
from balloon_dev.rules import as_json
from host_qemu_side.monitor.dispatch import Command
from host_qemu_side.monitor.host import IDLE, Host
from vring.dump import dump_queue
from vring.errors import VirtioError
from vring.features import CommonFeature

__all__ = ["DeviceCommands", "feature_names"]


def feature_names(features: int) -> list[str]:
    """Return the names of feature bits, those without one as ``bit N``."""
    names = []
    for bit in range(64):
        if features >> bit & 1:
            known = [kind(1 << bit).name for kind in (BalloonFeature, CommonFeature) if 1 << bit in list(kind)]
            names.append(known[0] or "" if known else f"bit {bit}")
    return names


class DeviceCommands:
    """The group.

    Parameters
    ----------
    host
        The device.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self.quit_asked = False

    def commands(self) -> list[Command]:
        """Return the commands."""
        return [
            Command("query-status", self.status, "whether the guest runs"),
            Command("query-device", self.query, "features, queues and refused requests of the device"),
            Command("query-queues", self.queues, "the queues in words, for people who look for a fault"),
            Command("quit", self.quit, "end this program, and the guest if it started one"),
        ]

    def quit(self) -> None:
        """Ask the program to end after the reply."""
        self.quit_asked = True

    def status(self) -> dict[str, Any]:
        """Return QEMU's run state."""
        state = self._host.run_state()
        return {"status": state, "running": state == "running", **self._host.at_rest()}

    def query(self) -> dict[str, Any]:
        """Return what is known of the device and its front end."""
        device, backend = self._host.device, self._host.backend
        return {
            "profile": device.profile.name,
            "features": {
                "offered": feature_names(device.offered_features),
                "negotiated": feature_names(device.negotiated),
            },
            "front-end": {
                "connected": backend.connected,
                "connections": backend.connections,
                "memory": backend.memory.size if backend.memory is not None else 0,
                "config-notifications": backend.can_tell_config,
                "rings": "running" if backend.running else "stopped",
                "last-error": backend.last_error,
            },
            "config": {
                "num-pages": device.config[NUM_PAGES],
                "actual-pages": device.config[ACTUAL],
                "free-page-hint-cmd-id": device.config[CMD_ID],
                "poison-val": device.config[POISON_VAL],
                "generation": device.config_generation,
            },
            "balloon-pages": device.ballooned_pages,
            "queues": [self._queue(role) for role in QueueRole if device.queue_number(role) is not None],
            **as_json(device.bad_requests, device.late),
        }

    def _queue(self, role: QueueRole) -> dict[str, Any]:
        queue, number = self._host.device.queue(role), self._host.device.queue_number(role)
        facts: dict[str, Any] = {"name": role.value, "number": number, "live": queue is not None}
        if queue is None:
            return facts | (self._host.backend.at_rest(number) if number is not None else {})
        facts |= {"size": queue.size, "next-avail": queue.next_avail, "used-idx": queue.used_idx}
        facts |= {"in-flight": queue.in_flight, "broken": queue.broken}
        try:
            raw = queue.memory.read(queue.layout.avail + 2, 2)
        except VirtioError:
            return facts
        avail = int.from_bytes(raw, "little")
        return {**facts, "avail-idx": avail, "waiting": (avail - queue.next_avail) & 0xFFFF}

    def queues(self) -> dict[str, str]:
        """Return a dump of all queues that are live, and what the others wait for."""
        device, texts = self._host.device, []
        for role in QueueRole:
            queue, number = device.queue(role), device.queue_number(role)
            if queue is not None and number is not None:
                dump = dump_queue(queue.memory, queue.layout, next_avail=queue.next_avail, index=number)
                texts.append(f"{role.value}, {dump}")
            elif number is not None and self._host.backend.memory is not None:
                rest = self._host.backend.at_rest(number)
                texts.append(f"{role.value}, stopped at {rest['next-avail']}: needs {', '.join(rest['needs'])}")
        return {"human-readable-text": "\n".join(texts) or "no queue is live"}

    def tick(self, now: float) -> float:
        """Nothing happens by itself."""
        return IDLE
