"""Named sets of the choices in which real balloon devices differ.

A difference between peers is a field here, not an ``if`` in the device. `SPEC` follows the text of the standard,
`QEMU` what QEMU 7.2 to 10.2 does, `LINUX` what the Linux driver expects behind vhost-user.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from balloon_dev.features import QueueRole, role_feature
from vring.errors import UsageError

__all__ = ["LINUX", "PROFILES", "QEMU", "SPEC", "Profile", "QueueNumbering", "profile_named"]


class QueueNumbering(Enum):
    """How the queues of section 5.5.2 get their numbers (the standard's fixed ones are obeyed by few)."""

    FIXED = "fixed"
    """inflate 0, deflate 1, stats 2, hinting 3, reporting 4; absent ones leave a gap (the standard)."""
    DENSE_OFFERED = "dense-offered"
    """Counted over the queues of offered features (QEMU, Firecracker, crosvm)."""
    DENSE_NEGOTIATED = "dense-negotiated"
    """Counted over the queues of negotiated features (the Linux driver)."""

    def number(self, role: QueueRole, offered: int, negotiated: int) -> int | None:
        """Return the number of a queue, or None if it does not exist under these features."""
        wanted = role_feature(role)
        if wanted & ~negotiated:
            return None
        roles = list(QueueRole)
        if self is QueueNumbering.FIXED:
            return roles.index(role)
        basis = offered if self is QueueNumbering.DENSE_OFFERED else negotiated
        return [r for r in roles if not role_feature(r) & ~basis].index(role)


@dataclass(frozen=True, slots=True)
class Profile:
    """One device's habits."""

    name: str
    numbering: QueueNumbering
    config_shows_id_while_running: bool
    """In state START the config field reads the id (True) or 0 (False, as QEMU: then an unrelated config interrupt
    makes Linux end the round)."""
    id_min: int = 0x80000000
    """Where the ids go on after `id_max`."""
    id_max: int = 0xFFFFFFFF
    id_initial: int = 0x80000000
    """Counter before the first run; it is incremented first, so the first id is one more."""
    queue_sizes: tuple[int, int, int, int, int] = (128, 128, 128, 1024, 32)
    """Largest sizes of inflate, deflate, stats, hinting and reporting queue."""


SPEC = Profile("spec", QueueNumbering.FIXED, config_shows_id_while_running=True)
QEMU = Profile("qemu", QueueNumbering.DENSE_OFFERED, config_shows_id_while_running=False)
LINUX = Profile(
    "linux", QueueNumbering.DENSE_NEGOTIATED, config_shows_id_while_running=True, queue_sizes=(256, 256, 256, 256, 256)
)

PROFILES = {profile.name: profile for profile in (SPEC, QEMU, LINUX)}


def profile_named(name: str) -> Profile:
    """Return the profile of that name.

    Raises
    ------
    UsageError
        If there is none; the message lists them.
    """
    try:
        return PROFILES[name]
    except KeyError:
        raise UsageError(f"no profile {name!r}; there are {', '.join(PROFILES)}") from None
