"""What a stream's header and STATE say of a guest that this project started, checked: its options, device and rings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Self

from balloon_dev.features import QueueRole
from balloon_dev.profiles import PROFILES
from balloon_dev.saved import SavedDevice
from host_qemu_side.migration.records import Header
from host_qemu_side.migration.stream import StreamError
from vring.decode import U16, Fields, Refusal
from vring.errors import quoted

__all__ = ["SavedGuest", "SavedRing", "SavedTransport", "resume_arguments"]

RESUME_OPTIONS = {
    "profile": re.compile(r"[a-z]+"),
    "batch": re.compile(r"[1-9][0-9]{0,3}"),
    "free_at": re.compile(r"done|stop"),
    "dirty_log": re.compile(r"auto|wp-async|software"),
}
"""Options of the guest that a stream's header carries, and what they may say."""

MAX_SIZE = 1 << 15
"""Entries that a split virtqueue can have."""


@dataclass(frozen=True, slots=True)
class SavedRing:
    """A ring that ran at the pause."""

    index: int
    """Number of the queue."""
    size: int
    """Entries."""
    base: int
    """Avail index to go on from."""

    @classmethod
    def take(cls, said: Fields) -> Self:
        """Return the value of a JSON object."""
        return cls(
            said.integer("index", 0, len(QueueRole) - 1),
            said.integer("size", 1, MAX_SIZE),
            said.integer("base", 0, U16),
        )

    def to_json(self) -> dict[str, int]:
        """Return it as JSON values."""
        return {"index": self.index, "size": self.size, "base": self.base}


@dataclass(frozen=True, slots=True)
class SavedTransport:
    """State of a `host_qemu_side.vhost_user.VhostUserBackend`."""

    features: int
    """Feature bits that the driver took."""
    rings: tuple[SavedRing, ...]

    @classmethod
    def take(cls, said: Fields) -> Self:
        """Return the value of a JSON object."""
        rings = tuple(SavedRing.take(ring) for ring in said.objects("rings", len(QueueRole)))
        if len({ring.index for ring in rings}) != len(rings):
            raise said.refusal(f"{said.what}: two rings are of the same queue")
        return cls(said.integer("features"), rings)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"features": self.features, "rings": [ring.to_json() for ring in self.rings]}


@dataclass(frozen=True, slots=True)
class SavedGuest:
    """All of it."""

    device: SavedDevice
    transport: SavedTransport
    running: bool = True
    """Whether it ran, or was stopped by somebody."""

    @classmethod
    def from_json(cls, value: Any, refusal: Refusal = StreamError) -> Self:
        """Check what `to_json` returned.

        Raises
        ------
        VirtioError
            What `refusal` makes, if it is malformed.
        """
        said = Fields(value, "saved guest", refusal)
        device = SavedDevice.from_json(said.any("device"), refusal)
        if device.profile not in PROFILES:
            raise refusal(f"{said.what}: its device has a profile {quoted(device.profile)}, unknown here")
        transport = SavedTransport.take(said.members("transport"))
        number = PROFILES[device.profile].numbering.number
        queues = {number(role, device.offered, device.negotiated) for role in QueueRole} - {None}
        if {ring.index for ring in transport.rings} != queues:
            # Without its base a ring would be begun anew, and what was inflated long ago be dropped again.
            raise refusal(
                f"{said.what}: the rings of queues {sorted(ring.index for ring in transport.rings)} ran at the pause, "
                f"the driver has queues {sorted(number for number in queues if number is not None)}"
            )
        return cls(device, transport, said.boolean("running", default=True))

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"device": self.device.to_json(), "transport": self.transport.to_json(), "running": self.running}


def resume_arguments(header: Header) -> list[str]:
    """Return the command line to go on with a guest; of what the header asks only what is known here passes.

    Raises
    ------
    StreamError
        If the guest is none of this project's, or asks for what is unknown.
    """
    if header.guest != "python":
        raise StreamError(f"the header is of a {quoted(header.guest)} guest, only 'python' can go on here")
    if len(header.regions) != 1 or header.regions[0][0]:
        raise StreamError("the header is of a Python guest, whose RAM is one region from 0, and says otherwise")
    found = []
    for name, value in header.resume.items():
        if name not in RESUME_OPTIONS or RESUME_OPTIONS[name].fullmatch(value) is None:
            raise StreamError(f"the header asks for a guest with {quoted(name, 40)} {quoted(value, 40)}, unknown here")
        found += [f"--{name.replace('_', '-')}", value]
    return found
