"""Whether a guest can have its memory and its workload, told by numbers alone: before it boots."""

from __future__ import annotations

from guest_driver.memory_manager import area_and_watermark
from guest_driver.workloads import ChurnSpec, WriterSpec, parse_workload
from vring.errors import UsageError
from vring.memory import PAGE_SIZE

__all__ = ["MAX_MEMORY", "check_memory", "check_workload"]

MAX_MEMORY = 1 << 44
"""Pages are counted in 32 bits."""


def check_memory(memory: int) -> None:
    """See that a guest can have so many bytes of RAM.

    Raises
    ------
    UsageError
        If it cannot.
    """
    if memory % PAGE_SIZE:
        down = memory // PAGE_SIZE * PAGE_SIZE
        raise UsageError(f"{memory} bytes are no whole pages of {PAGE_SIZE}: write {down} or {down + PAGE_SIZE}")
    if memory > MAX_MEMORY:
        raise UsageError(f"{memory >> 40}T is too much, a guest has at most {MAX_MEMORY >> 40}T")


def check_workload(text: str, memory: int, *, low: int = 0) -> None:
    """See that a workload has room in a guest, in the order its parts are set up.

    Parameters
    ----------
    text
        See `parse_workload`.
    memory
        Bytes of RAM, in one region.
    low
        Bytes at its beginning that the guest leaves alone.

    Raises
    ------
    UsageError
        If the text makes no sense, or a working set is larger than what can be left for it.
    """
    area, watermark = area_and_watermark(memory // PAGE_SIZE, memory, memory, low=max(low, PAGE_SIZE))
    left = memory // PAGE_SIZE - area // PAGE_SIZE - watermark
    for part in parse_workload(text):
        if isinstance(part, ChurnSpec):
            left -= int(max(left, 0) * part.share)
        elif isinstance(part, WriterSpec):
            wanted = -(-part.size // PAGE_SIZE)
            if wanted > left:
                raise UsageError(
                    f"workload {text!r}: a working set of {wanted} pages, and at most {max(left, 0)} are left for it; "
                    "make it smaller or give the guest more RAM"
                )
            left -= wanted
