"""A split ring in words, for people who look for a fault. Reads only, believes nothing, and always ends."""

from __future__ import annotations

from typing import Any

import numpy as np

from vring.errors import VirtioError
from vring.layout import DESC, USED_ELEM, QueueLayout
from vring.memory import GuestMemory

__all__ = ["dump_queue"]

_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_FLAGS = ((_NEXT, "next"), (_WRITE, "write"), (_INDIRECT, "indirect"))
_LONGEST = 16  # descriptors shown of one chain


def _flags(value: int) -> str:
    names = [name for bit, name in _FLAGS if value & bit]
    rest = value & ~(_NEXT | _WRITE | _INDIRECT)
    return "+".join(names + ([f"{rest:#x}"] if rest else [])) or "read"


def _chain(memory: GuestMemory, table: Any, head: int, indent: str, seen_table: bool = False) -> list[str]:
    """Describe a chain: at most `_LONGEST` lines and one level of tables, whatever its fields say."""
    lines: list[str] = []
    index = head
    while True:
        if index >= len(table):
            return [*lines, f"{indent}[{index}] is outside the table of {len(table)}"]
        if len(lines) >= _LONGEST:
            return [*lines, f"{indent}... and on, perhaps in a circle"]
        addr, length, flags, follow = (int(v) for v in table[index].tolist())
        where = "" if memory.covers(addr, length) else "  NOT IN RAM"
        lines.append(f"{indent}[{index}] {addr:#x} +{length:#x} {_flags(flags)}{where}")
        if flags & _INDIRECT:
            if seen_table:
                return [*lines, f"{indent}  a table inside a table"]
            try:
                # A copy: what is shown is one state of it, even if the other side writes.
                inner = np.frombuffer(memory.read(addr, min(length, _LONGEST * 16) // 16 * 16), dtype=DESC)
            except VirtioError:
                return lines
            return lines + _chain(memory, inner, 0, indent + "  ", seen_table=True)
        if not flags & _NEXT:
            return lines
        index = follow


def dump_queue(
    memory: GuestMemory,
    layout: QueueLayout,
    *,
    next_avail: int | None = None,
    next_used: int | None = None,
    around: int = 4,
    index: int = 0,
) -> str:
    """Describe a ring: sizes, indices, flags, the entries around the indices, and the chains they name.

    Parameters
    ----------
    memory, layout
        Where the ring lies. Parts that are not in memory are said to be so.
    next_avail, next_used
        Positions of the half that asks (``DeviceQueue.next_avail``, ``DriverQueue.used_idx``): the entries around them
        are shown; without them, the entries before the shared indices.
    around
        Entries shown on each side.
    index
        Number of the queue, for the headline.

    Returns
    -------
    str
        Several lines. The ring may be changing meanwhile: lines need not fit each other.
    """
    size = layout.size
    lines = [f"queue {index}: size {size}, desc {layout.desc:#x}, avail {layout.avail:#x}, used {layout.used:#x}"]
    if not layout.desc_bytes:
        return f"{lines[0]}\n  the size is no power of two from 1 to 32768"
    try:
        desc = np.frombuffer(memory.read(layout.desc, layout.desc_bytes), dtype=DESC)
        avail = np.frombuffer(memory.read(layout.avail, layout.avail_bytes), dtype="<u2")
        used = memory.read(layout.used, layout.used_bytes)
    except VirtioError as error:
        return f"{lines[0]}\n  {error}"
    used_flags, used_idx = (int(v) for v in np.frombuffer(used[:4], dtype="<u2"))
    elements = np.frombuffer(used[4 : 4 + 8 * size], dtype=USED_ELEM)
    avail_event = int.from_bytes(used[4 + 8 * size :], "little")
    avail_flags, avail_idx, used_event = int(avail[0]), int(avail[1]), int(avail[-1])

    ahead = (avail_idx - used_idx) & 0xFFFF
    note = f", {ahead} not yet used" if ahead <= size else f", {ahead} APART: MORE THAN THE QUEUE HOLDS"
    lines.append(f"  avail idx {avail_idx}, used idx {used_idx}{note}")
    if next_avail is not None:
        waiting = (avail_idx - next_avail) & 0xFFFF
        lines.append(f"  device pops next at {next_avail}: {waiting} waiting")
    if next_used is not None:
        waiting = (used_idx - next_used) & 0xFFFF
        lines.append(f"  driver collects next at {next_used}: {waiting} waiting")
    quiet = {0: "notify", 1: "no interrupt please"}
    lines.append(f"  avail flags {avail_flags} ({quiet.get(avail_flags, 'UNKNOWN')}), used_event {used_event}")
    quiet[1] = "no kick please"
    lines.append(f"  used flags {used_flags} ({quiet.get(used_flags, 'UNKNOWN')}), avail_event {avail_event}")

    spread = min(2 * around, size)
    start = (avail_idx if next_avail is None else next_avail + spread // 2) - spread
    lines.append("  avail ring:")
    for at in range(start, start + spread):
        position = at & 0xFFFF
        head = int(avail[2 + position % size])
        pending = (avail_idx - position - 1) & 0xFFFF < size
        lines.append(f"    {position:5} {'*' if pending else ' '} head {head}")
        if pending:
            lines += _chain(memory, desc, head, "          ")
    start = (used_idx if next_used is None else next_used + spread // 2) - spread
    lines.append("  used ring:")
    for at in range(start, start + spread):
        position = at & 0xFFFF
        element = elements[position % size]
        valid = (used_idx - position - 1) & 0xFFFF < size
        lines.append(f"    {position:5} {'*' if valid else ' '} id {int(element['id'])} len {int(element['len'])}")
    return "\n".join(lines)
