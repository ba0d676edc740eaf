"""Sizes and times as people write them: ``4G``, ``512M``, ``64K``; ``0.3``."""

from __future__ import annotations

import re
from fractions import Fraction

from vring.errors import UsageError, quoted

__all__ = ["MAX_SECONDS", "MAX_SIZE", "format_size", "parse_seconds", "parse_size"]

MAX_SIZE = (1 << 63) - 1
"""No file, and no guest, is larger."""
MAX_SECONDS = 1e7
"""Some months; waits of the system end not far beyond."""

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_FORM = re.compile(r"([0-9]{1,40}(?:\.[0-9]{1,40})?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """Return bytes for text such as ``4G``, ``1.5G``, ``512MiB`` or ``4096``.

    Raises
    ------
    UsageError
        If it is no size, or larger than `MAX_SIZE`.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{quoted(text)} is no size; write it as 4096, 64K, 512M or 4G")
    size = int(Fraction(match[1]) * _UNITS[match[2].upper()])
    if size > MAX_SIZE:
        raise UsageError(f"{quoted(text)} is too large a size; nothing has more than {MAX_SIZE >> 40}T")
    return size


def parse_seconds(text: str) -> float:
    """Return seconds for text such as ``0.3`` or ``10``.

    Raises
    ------
    UsageError
        If it is no time, negative, or longer than `MAX_SECONDS`.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MAX_SECONDS:
        raise UsageError(f"{quoted(text)} is no time in seconds; write it as 0.3 or 10")
    return seconds


def format_size(size: float) -> str:
    """Return a size for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
