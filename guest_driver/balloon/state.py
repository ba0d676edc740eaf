"""What the balloon driver keeps in guest RAM, so that a guest that was migrated goes on: layout and constants."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from balloon_dev.features import ALL_BALLOON_FEATURES, RING_FEATURES
from balloon_dev.stats import ENTRY, StatTag
from guest_driver.memory_manager import HINT_ORDER
from vring.memory import PAGE_SIZE

BLOCK_BYTES = PAGE_SIZE << HINT_ORDER
"""Size of a hinted or reported block: 4 MiB."""
PFNS_PER_REQUEST = 256
"""PFNs in one inflate or deflate request, 1 MiB, as in Linux."""
REPORT_RANGES = 32
"""Blocks in one report, as in Linux (PAGE_REPORTING_CAPACITY)."""
REPORT_DELAY = 2.0
"""Seconds from one pass of reporting to the next, as in Linux."""
REPORT_SHARE = 16
"""A pass reports one part in so many of the free blocks, in whole reports, at least one."""
RETRY_DELAY = 0.2
"""Seconds until inflating is tried again when there was no memory, as in Linux."""
COMMAND_SLOTS = 256
COMMAND_TOKEN = 1 << 63
"""Token bit of a command buffer; the rest is its slot. Tokens of blocks are their guest addresses."""

DEFAULT_FEATURES = ALL_BALLOON_FEATURES | RING_FEATURES
"""What the driver accepts where it is offered."""

STAT_TAGS = (
    StatTag.FREE_MEMORY,
    StatTag.TOTAL_MEMORY,
    StatTag.AVAILABLE_MEMORY,
    StatTag.OOM_KILLS,
    StatTag.ALLOC_STALLS,
)
"""What this guest has figures for; the same in every buffer (balloon.stats.driver-8)."""

STATE = np.dtype(
    [
        ("magic", "<u8"),
        ("features", "<u8"),
        ("offered", "<u8"),
        ("received", "<u4"),  # command id last read from the config space
        ("active", "<u4"),  # id of the run this driver opened last
        ("sending", "<u4"),  # whether that run is open
        ("ready", "<u4"),  # whether the queues are set up
        ("frozen", "<u4"),  # the guest is suspended
        ("request", "<u4"),  # Request: which one the host has not answered
        ("request_pages", "<u4"),
        ("request_posted", "<u4"),  # whether it is on the ring (not, while that is full)
        ("target", "<u4"),
        ("ballooned", "<u4"),  # pages in the balloon that the host has acknowledged
        ("working", "<u4"),  # whether the target is still to be reached
        ("config_due", "<u4"),  # an interrupt came, the config space was not read since
        ("stats_due", "<u4"),  # the statistics buffer is to be filled and exposed
        ("report_blocks", "<u4"),  # blocks taken out for a report
        ("report_posted", "<u4"),
        ("report_budget", "<u4"),  # reports left in this pass
        ("retry_at", "<f8"),  # guest time of the next try to inflate
        ("report_at", "<f8"),  # guest time of the next pass of reporting
        ("runs", "<u8"),
        ("blocks", "<u8"),  # blocks hinted
        ("reclaimed", "<u8"),  # blocks the shrinker gave back
        ("done_seen", "<u8"),
        ("reported", "<u8"),  # blocks reported and acknowledged
        ("moved", "<u8"),  # pages moved by compaction
        ("oom_deflated", "<u8"),  # pages given back because memory ran out
        ("stats_sent", "<u8"),
    ]
)
MAGIC = int.from_bytes(b"VBDRIVER", "little")

PIECES = {
    "balloon": STATE.itemsize,
    "balloon.commands": COMMAND_SLOTS * 8,
    "balloon.pfns": PFNS_PER_REQUEST * 4,
    "balloon.moved": PFNS_PER_REQUEST * 4,
    "balloon.report": REPORT_RANGES * 8,
    "balloon.stats": len(STAT_TAGS) * ENTRY.itemsize,
}
"""Pieces of the kernel area, bytes by name; rings and their state come on top."""


class Request(IntEnum):
    """The inflate or deflate request on its way."""

    NONE = 0
    INFLATE = 1
    DEFLATE = 2
    MOVE_IN = 3
    """Compaction, first half: the new pages go into the balloon."""
    MOVE_OUT = 4
    """Compaction, second half: the old pages leave it."""


class FreeAt(IntEnum):
    """When the blocks of a run go back to the allocator."""

    DONE = 0
    """At DONE, as the commit says: freeing dirties memory and keeps a migration from converging."""
    STOP = 1
    """At every STOP: only to measure what that costs."""
