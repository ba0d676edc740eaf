"""The text form of workloads, such as ``churn:10%@16M`` or ``churn+writer:64M@20M``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vring.errors import UsageError, quoted
from vring.memory import PAGE_SIZE
from vring.sizes import parse_size

__all__ = ["FORMS", "BuildSpec", "ChurnSpec", "IdleSpec", "PartSpec", "WriterSpec", "parse_workload"]

FORMS = (
    "idle, churn[:SHARE%[@EXTENT]], writer:SET@RATE, build[:RATE], joined by '+'; "
    "sizes such as 64M, rates such as 50M/s"
)
MAX_PARTS = 4

_SHARE = re.compile(r"([0-9]{1,40}(?:\.[0-9]{1,40})?)%")


@dataclass(frozen=True, slots=True)
class IdleSpec:
    """Does nothing."""


@dataclass(frozen=True, slots=True)
class ChurnSpec:
    """Fill all memory, then free all but a share of it."""

    share: float = 0.10
    """Part of the pages that stays, 0 to 1."""
    extent: int = 16 << 20
    """Mean bytes of the pieces that stay."""


@dataclass(frozen=True, slots=True)
class WriterSpec:
    """Rewrite random pages of a working set."""

    size: int
    """Bytes of the set."""
    rate: int
    """Bytes per second."""


@dataclass(frozen=True, slots=True)
class BuildSpec:
    """Allocate, write and free small blocks, with a page cache that grows to half of memory."""

    rate: int = 64 << 20
    """Bytes per second written into short-lived blocks."""


PartSpec = IdleSpec | ChurnSpec | WriterSpec | BuildSpec


def _size(text: str, what: str, whole: str) -> int:
    try:
        size = parse_size(text)
    except UsageError:
        size = 0
    if size < PAGE_SIZE:
        raise UsageError(
            f"workload {whole!r}: {text!r} is no {what}; "
            f"write a size of at least {PAGE_SIZE} bytes, such as 16M (K, M, G, T)"
        )
    return size


def _rate(text: str, whole: str) -> int:
    return _size(text.strip().removesuffix("/s"), "rate", whole)


def _part(text: str, whole: str) -> PartSpec:
    name, colon, rest = text.partition(":")
    if colon and not rest:
        raise UsageError(f"workload {whole!r}: nothing follows the colon of {text!r}; valid are: {FORMS}")
    if name == "idle" and not colon:
        return IdleSpec()
    if name == "churn":
        if not colon:
            return ChurnSpec()
        share, at, extent = rest.partition("@")
        match = _SHARE.fullmatch(share.strip())
        if match is None or float(match[1]) > 100:
            raise UsageError(
                f"workload {whole!r}: {share!r} is no share of memory; write 0% to 100%, as in churn:10%@16M"
            )
        size = _size(extent, "mean extent", whole) if at else ChurnSpec().extent
        return ChurnSpec(float(match[1]) / 100, size)
    if name == "writer":
        size_text, at, rate_text = rest.partition("@")
        if not at:
            raise UsageError(f"workload {whole!r}: writer needs a working set and a rate, as in writer:256M@50M")
        return WriterSpec(_size(size_text, "working set", whole), _rate(rate_text, whole))
    if name == "build":
        return BuildSpec(_rate(rest, whole)) if colon else BuildSpec()
    raise UsageError(f"workload {whole!r}: {text!r} is not known; valid are: {FORMS}")


def parse_workload(text: str) -> tuple[PartSpec, ...]:
    """Return the parts of a workload given as text.

    Raises
    ------
    UsageError
        If it makes no sense; the message says what does.
    """
    if not text.isascii():
        raise UsageError(f"workload {quoted(text)}: only ASCII makes sense here")
    if len(text) > 200:
        raise UsageError(f"a workload of {len(text)} characters is too long, at most 200 are kept in guest RAM")
    parts = tuple(_part(part.strip(), text) for part in text.split("+"))
    if len(parts) > MAX_PARTS:
        raise UsageError(f"workload {text!r}: {len(parts)} parts, at most {MAX_PARTS} can be joined")
    return parts
