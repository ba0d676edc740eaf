"""What this process has of the machine: mounted file systems, and memory, with the limits that are closer.

Reads ``/proc`` and the control groups named there; starts nothing.
"""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MemoryRoom", "Mount", "address_room", "memory_room", "mounts"]

UNLIMITED = 1 << 60
"""What version 1 writes for "no limit" is a little less than 2 to the 63."""


@dataclass(frozen=True, slots=True)
class MemoryRoom:
    """Memory that can be had."""

    available: int
    """Bytes this process and its children can still take."""
    total: int
    """Bytes of what is named in `limit`, taken or not."""
    limit: str
    """What sets the bound, such as ``this machine`` or ``control group /user.slice``."""


def memory_room(proc: Path = Path("/proc")) -> MemoryRoom:
    """Return the closest bound: of the machine, or of a control group above this process.

    Parameters
    ----------
    proc
        Where the process file system is.
    """
    facts = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    total, available, swap, unused = (
        int(facts.get(name, "0").split()[0]) << 10 for name in ("MemTotal", "MemAvailable", "SwapTotal", "SwapFree")
    )
    total, available = total + swap, available + unused
    found = [MemoryRoom(available, total, "this machine"), *_groups(proc)]
    return min(found, key=lambda room: room.available)


def address_room(proc: Path = Path("/proc")) -> MemoryRoom | None:
    """Return what this process can still map, used or not, if that is limited; each process has as much for itself.

    Parameters
    ----------
    proc
        Where the process file system is.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return None
    taken = int((proc / "self/statm").read_text().split()[0]) * resource.getpagesize()
    return MemoryRoom(max(0, soft - taken), soft, "the limit of address space (ulimit -v)")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of the mount table."""

    place: str
    """Where it is mounted."""
    root: str
    """Which part of the file system is."""
    kind: str
    """Type of the file system, such as ``ext4``."""
    options: tuple[str, ...]
    """Options of the file system, not of this mount."""


def mounts(proc: Path = Path("/proc")) -> Iterator[Mount]:
    """Return what is mounted for this process, in the order of the table; lines that make no sense are left out.

    Parameters
    ----------
    proc
        Where the process file system is.
    """

    def unescaped(name: str) -> str:
        """White space and backslashes stand as three octal digits."""
        return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), name)

    for line in _lines(proc / "self/mountinfo"):
        before, _, after = (part.split() for part in line.partition(" - "))
        if len(before) >= 5 and len(after) >= 3:
            yield Mount(unescaped(before[4]), unescaped(before[3]), after[0], tuple(after[2].split(",")))


def _groups(proc: Path) -> Iterator[MemoryRoom]:
    """Return the bound of each control group that this process is in, of version 1 or 2, up to the root."""
    memberships: dict[str, str] = {}
    for fields in (line.split(":", 2) for line in _lines(proc / "self/cgroup")):
        if len(fields) == 3 and (not fields[1] or "memory" in fields[1].split(",")):
            memberships["cgroup" if fields[1] else "cgroup2"] = fields[2]
    for mount in mounts(proc):
        if mount.kind not in memberships or (mount.kind == "cgroup" and "memory" not in mount.options):
            continue
        path, root, mounted = memberships[mount.kind], mount.root, Path(mount.place)
        # In a container the mount shows a part of the tree, whose root the process's own path begins with.
        inside = path[len(root) :] if root != "/" and f"{path}/".startswith(f"{root}/") else path
        folder = mounted / inside.lstrip("/")
        while folder.is_relative_to(mounted):
            with contextlib.suppress(OSError, ValueError, KeyError):
                room = (_version_1 if mount.kind == "cgroup" else _version_2)(folder)
                if room is not None:
                    name = f"/{folder.relative_to(mounted)}".replace("/.", "/")
                    yield MemoryRoom(max(0, room[0]), room[1], f"control group {name}")
            folder = folder.parent


def _lines(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return path.read_text(errors="surrogateescape").splitlines()
    return []


def _numbers(path: Path) -> dict[str, int]:
    return {name: int(value) for name, value in (line.split() for line in path.read_text().splitlines())}


def _version_1(folder: Path) -> tuple[int, int] | None:
    limit = int((folder / "memory.limit_in_bytes").read_text())
    taken = int((folder / "memory.usage_in_bytes").read_text())
    cache = _numbers(folder / "memory.stat")["total_inactive_file"]
    return None if limit >= UNLIMITED else (limit - taken + cache, limit)


def _version_2(folder: Path) -> tuple[int, int] | None:
    # Above "high" processes are slowed down until hardly anything goes on; "max" kills.
    texts = [(folder / f"memory.{name}").read_text().strip() for name in ("max", "high")]
    limits = [int(text) for text in texts if text != "max"]
    taken = int((folder / "memory.current").read_text())
    cache = _numbers(folder / "memory.stat")["inactive_file"]  # given back when memory is wanted
    return (min(limits) - taken + cache, min(limits)) if limits else None
