"""Feature bits of the traditional memory balloon (VIRTIO 5.5.3), and its queues (5.5.2)."""

from __future__ import annotations

from enum import Enum, IntFlag

from vring.errors import UsageError, quoted
from vring.features import CommonFeature

__all__ = [
    "ALL_BALLOON_FEATURES",
    "FEATURE_NAMES",
    "RING_FEATURES",
    "BalloonFeature",
    "QueueRole",
    "feature_names",
    "parse_features",
    "role_feature",
]

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


ALL_BALLOON_FEATURES = int(sum(BalloonFeature))
"""All six."""
RING_FEATURES = int(CommonFeature.VERSION_1 | CommonFeature.EVENT_IDX | CommonFeature.INDIRECT_DESC)
"""What the split ring of this project can do; offered and accepted unless one says otherwise."""
FEATURE_NAMES = {
    "must-tell-host": BalloonFeature.MUST_TELL_HOST,
    "stats": BalloonFeature.STATS_VQ,
    "deflate-on-oom": BalloonFeature.DEFLATE_ON_OOM,
    "hint": BalloonFeature.FREE_PAGE_HINT,
    "poison": BalloonFeature.PAGE_POISON,
    "reporting": BalloonFeature.REPORTING,
}
"""Names for a command line."""


def parse_features(text: str) -> int:
    """Return feature bits for what a user wrote.

    Parameters
    ----------
    text
        Names of `FEATURE_NAMES` with commas between (``hint,stats``), ``all``, ``none``, or a number with all bits,
        ring features included. A name after a minus sign is taken away again: ``all,-reporting``.

    Returns
    -------
    int
        For names, with `RING_FEATURES`.

    Raises
    ------
    UsageError
        If a name is unknown; the message lists them.
    """
    try:
        number = int(text, 0)
    except ValueError:
        pass
    else:
        if not 0 <= number < 1 << 64:
            raise UsageError(f"{quoted(text)} is no set of features: they are 64 bits")
        return number
    bits = 0
    for word in text.lower().replace("_", "-").split(","):
        name = word.strip()
        if name == "all":
            bits = ALL_BALLOON_FEATURES
        elif name.removeprefix("-") in FEATURE_NAMES:
            bit = int(FEATURE_NAMES[name.removeprefix("-")])
            bits = bits & ~bit if name.startswith("-") else bits | bit
        elif name != "none":
            raise UsageError(
                f"no feature {quoted(name)}; there are {', '.join(FEATURE_NAMES)}, all, none, a minus sign before a "
                "name, or a number"
            )
    return bits | RING_FEATURES


def feature_names(bits: int) -> list[str]:
    """Return the names of the balloon features among `bits`."""
    return [name for name, bit in FEATURE_NAMES.items() if bits & bit]


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
