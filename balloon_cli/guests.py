"""Whether a guest can be had: sizes and workloads that cannot work, and memory that is not there.

All of this is known before a guest boots. What a guest's workload will take is an estimate from below.
"""

from __future__ import annotations

import resource

from balloon_cli.machine import address_room, memory_room
from balloon_cli.options import naming
from guest_driver.fitting import check_memory, check_workload
from guest_driver.workloads import FORMS, ChurnSpec, WriterSpec, parse_workload
from vring.errors import MissingFacility, UsageError
from vring.sizes import format_size

__all__ = ["check_linux_guest", "check_python_guest", "require_descriptors", "require_memory", "require_room"]

MIN_MEMORY = 16 << 20
DESCRIPTORS = 64
"""More than any command needs: rings and doorbells, memory, sockets, monitor clients."""
LINUX_KERNEL = 32 << 20
"""What a Linux guest needs for itself, at the very least."""
BOOKKEEPING = 64
"""The part of a guest's memory that bitmaps, digests and its own mem_map take at least (measured: a fortieth)."""


def require_descriptors() -> None:
    """See that enough files may be open: in the middle of a conversation with a guest each refusal has another face.

    Raises
    ------
    MissingFacility
        If not.
    """
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= most < DESCRIPTORS:
        raise MissingFacility(
            f"too few files may be open, {most}, and {DESCRIPTORS} are needed: allow more with ulimit -n {DESCRIPTORS}"
        )


def _parsed(workload: str) -> None:
    try:
        parse_workload(workload)
    except UsageError as error:
        raise error if FORMS in str(error) else UsageError(f"{error}; valid are: {FORMS}") from error


def check_python_guest(memory: int, workload: str, *, least: int = MIN_MEMORY, low: int = 0) -> None:
    """See that an embedded guest can have this memory, and this workload in it.

    Parameters
    ----------
    memory
        Bytes of RAM.
    workload
        See `guest_driver.workloads.parse_workload`.
    least
        Bytes of RAM below which there is no use in it.
    low
        Bytes at its beginning that the guest leaves alone.

    Raises
    ------
    click.BadParameter
        If it cannot; the message names the option.
    """
    with naming("--memory"):
        if memory < least:
            raise UsageError(f"{format_size(memory)} is too little, at least {least >> 20}M")
        check_memory(memory)
    with naming("--workload"):
        _parsed(workload)
        check_workload(workload, memory, low=low)


def check_linux_guest(memory: int, workload: str) -> None:
    """See the same of a Linux guest; arguments and errors as for `check_python_guest`."""
    from balloon_cli.migrate_linux import tool_commands
    from host_qemu_side.linux_guest.launch import check_memory as check_linux_memory

    with naming("--memory"):
        check_linux_memory(memory)
    with naming("--workload"):
        _parsed(workload)
        tool_commands(workload, 1)
        room, sets = memory - LINUX_KERNEL, _written(workload, memory)[2]
        if sets > room:
            raise UsageError(
                f"workload {workload!r} needs {format_size(sets)} for its working sets, and a Linux guest of "
                f"{format_size(memory)} has less than {format_size(room)} for them"
            )


def _written(workload: str, memory: int) -> tuple[int, int, int]:
    """Return how much of its memory a guest with this workload writes, how much of that stays in use, and how much of
    that are working sets.
    """
    parts = parse_workload(workload)
    sets = sum(part.size for part in parts if isinstance(part, WriterSpec))
    shares = [part.share for part in parts if isinstance(part, ChurnSpec)]
    if shares:
        return memory, min(memory, sets + int(max(shares) * memory)), sets
    return sets, sets, sets  # how much `build` comes to write is a matter of time


def require_memory(memory: int, workload: str, *, linux: bool = False, hints: bool = False, here: bool = True) -> None:
    """See that this machine has the memory for a migration, as far as that can be known.

    Parameters
    ----------
    memory
        Bytes of the guest's RAM.
    workload
        What it does with it.
    linux
        Whether it is a Linux guest, whose RAM is a file and can be written out.
    hints
        Whether it is only migrated with hints: then what is free need not arrive.
    here
        Whether its destination is a process of this machine, too, and holds the content again.

    Raises
    ------
    MissingFacility
        If not; the message says what sets the bound.
    """
    written, kept, _ = _written(workload, memory)
    needed = memory // BOOKKEEPING + (0 if linux else written)
    if here:
        needed += kept if hints else written
    room = memory_room()
    if needed > room.available:
        raise MissingFacility(
            f"a guest with {format_size(memory)} and the workload {workload} needs {format_size(needed)} of memory"
            f"{' with its destination' if here else ''}, and {room.limit} has {format_size(room.available)} left: "
            "give it less with --memory"
        )
    _require_space(memory, memory * (2 if here and not linux else 1))  # of a destination by receiver and device


def require_room(memory: int) -> None:
    """See that a guest of this size can be received at all; how much of its RAM holds something is not known.

    Raises
    ------
    MissingFacility
        If not; the message says what sets the bound.
    """
    room = memory_room()
    if memory // BOOKKEEPING > room.available:
        raise MissingFacility(
            f"a guest with {format_size(memory)} needs {format_size(memory // BOOKKEEPING)} for bookkeeping alone, and "
            f"{room.limit} has {format_size(room.available)} left"
        )
    _require_space(memory, memory)


def _require_space(memory: int, mapped: int) -> None:
    space = address_room()
    if space is not None and mapped > space.available:
        raise MissingFacility(
            f"a guest with {format_size(memory)} needs {format_size(mapped)} of address space, and "
            f"{space.limit} leaves {format_size(space.available)}: raise it, or give the guest less with --memory"
        )
