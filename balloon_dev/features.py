"""Feature bits of the traditional memory balloon (VIRTIO 5.5.3), and its queues (5.5.2)."""

from __future__ import annotations

from enum import Enum, IntFlag

__all__ = ["BalloonFeature", "QueueRole", "role_feature"]

DEVICE_ID = 5
"""Virtio device type of the traditional memory balloon."""


class BalloonFeature(IntFlag):
    """The six feature bits of section 5.5.3. Bits above 5 are claimed by several proposals and are not modelled."""

    MUST_TELL_HOST = 1 << 0
    STATS_VQ = 1 << 1
    DEFLATE_ON_OOM = 1 << 2
    FREE_PAGE_HINT = 1 << 3
    PAGE_POISON = 1 << 4
    REPORTING = 1 << 5


class QueueRole(Enum):
    """What a queue is for; which number it has is a matter of the profile."""

    INFLATE = "inflateq"
    DEFLATE = "deflateq"
    STATS = "statsq"
    FREE_PAGE = "free_page_vq"
    REPORTING = "reporting_vq"


_ROLE_FEATURE = {
    QueueRole.STATS: BalloonFeature.STATS_VQ,
    QueueRole.FREE_PAGE: BalloonFeature.FREE_PAGE_HINT,
    QueueRole.REPORTING: BalloonFeature.REPORTING,
}


def role_feature(role: QueueRole) -> int:
    """Return the feature bit a queue depends on, 0 for the two that are always there."""
    return int(_ROLE_FEATURE.get(role, 0))
