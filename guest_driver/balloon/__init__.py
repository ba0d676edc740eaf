"""The balloon driver, a core without threads: it is told of interrupts and of the time, and does one small step then.

`driver` holds the life cycle, `hinting`, `inflate`, `reporting` and `stats` what it does on each queue, `core` what
they share, and `state` what of it lies in guest RAM.
"""

from guest_driver.balloon.driver import BalloonDriver
from guest_driver.balloon.state import BLOCK_BYTES, COMMAND_TOKEN, DEFAULT_FEATURES, PFNS_PER_REQUEST, FreeAt, Request

__all__ = [
    "BLOCK_BYTES",
    "COMMAND_TOKEN",
    "DEFAULT_FEATURES",
    "PFNS_PER_REQUEST",
    "BalloonDriver",
    "FreeAt",
    "Request",
]
