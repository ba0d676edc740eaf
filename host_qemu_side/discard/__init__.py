"""Giving guest memory back to the host, and seeing that it really went: see ``docs/discard.md``.

Discards pages the guest gave to the balloon. There is no discard of hinted pages here: while a guest runs it is never
safe.
"""

from __future__ import annotations

from host_qemu_side.discard.calls import punch_hole
from host_qemu_side.discard.discarder import Discarder, OnDeflate
from host_qemu_side.discard.partial import PartialPages
from host_qemu_side.discard.pieces import DiscardFailed, DiscardRefused, DiscardStats, Piece, Refusal
from host_qemu_side.discard.residency import Residency, reads_zero, residency

__all__ = [
    "DiscardFailed",
    "DiscardRefused",
    "DiscardStats",
    "Discarder",
    "OnDeflate",
    "PartialPages",
    "Piece",
    "Refusal",
    "Residency",
    "punch_hole",
    "reads_zero",
    "residency",
]
