"""Makes User-Mode Linux run on hosts with more processor state than it knows (AMX), without touching it.

The kernel up to 6.12 writes at most `KNOWN_BYTES` of a process's extended state back; a host with more takes it only
whole. ``ptrace_xstate.c``, preloaded into the kernel's program, completes such writes. It is used where the host
refuses them, which is tried and not guessed, or where it is forced.
"""

from __future__ import annotations

import os
import struct
import sys
from dataclasses import dataclass
from functools import cache as cached
from pathlib import Path

from host_qemu_side.linux_guest.work_folder import compiled
from vring.backing import close_with
from vring.errors import UsageError
from vring.programs import run_program

__all__ = ["ENVIRONMENT", "KNOWN_BYTES", "PtraceXstate", "XstateCounts", "host_takes_only_all", "wanted"]

KNOWN_BYTES = 2696
"""Size of the buffer of User-Mode Linux up to 6.12; later kernels ask the host."""
ENVIRONMENT = "BALLOON_LINUX_XSTATE"
"""Environment variable that says ``always`` or ``never`` instead of where it is needed."""

_HERE = Path(__file__).resolve().parent
_COUNTERS = struct.Struct("=QQ")


@dataclass(frozen=True, slots=True)
class XstateCounts:
    """What the preloaded function was called for."""

    calls: int
    """Calls of ptrace, all of them: 0 means that it is not in place."""
    completed: int
    """Writes of state that were too short for this host."""


@cached
def host_takes_only_all() -> bool:
    """Whether this host refuses a write of the first `KNOWN_BYTES` of a process's extended state; tried on a child."""
    program = [sys.executable, "-I", "-S", str(_HERE / "xstate_probe.py"), str(KNOWN_BYTES)]
    _, _, refused = run_program(program, 30.0).out.strip().partition(" ")
    return bool(refused) and int(refused) != 0


def wanted() -> bool:
    """Whether to put it in place: as `ENVIRONMENT` says, else where the host needs it.

    Raises
    ------
    UsageError
        If the variable has another value than ``auto``, ``always`` or ``never``.
    """
    said = os.environ.get(ENVIRONMENT, "") or "auto"
    if said not in ("auto", "always", "never"):
        raise UsageError(f"{ENVIRONMENT}={said!r} in the environment: it can be auto, always or never")
    return said == "always" or (said == "auto" and host_takes_only_all())


class PtraceXstate:
    """The preloaded function, for one program that is about to be started.

    The library and its counters are memory objects that the program inherits: no path is needed, so a folder whose name
    has spaces, or whose file system forbids execution, is no obstacle.

    Parameters
    ----------
    cache
        Folder for the compiled library.

    Raises
    ------
    MissingFacility
        If there is no C compiler.
    UsageError
        If the library in `cache` may be another user's.
    """

    def __init__(self, cache: Path) -> None:
        data = compiled(_HERE / "ptrace_xstate.c", ["-shared", "-fPIC"], cache)
        self._library = os.memfd_create("ptrace_xstate", os.MFD_CLOEXEC)
        try:
            self._counters = os.memfd_create("ptrace_xstate counters", os.MFD_CLOEXEC)
        except OSError:
            os.close(self._library)
            raise
        self.close = close_with(self, self.fds)
        """Closes the descriptors; may be called more than once."""
        os.truncate(self._counters, _COUNTERS.size)
        with open(self._library, "wb", closefd=False) as stream:
            stream.write(data)

    @property
    def fds(self) -> tuple[int, int]:
        """Descriptors that the program must inherit under the same numbers."""
        return self._library, self._counters

    @property
    def environment(self) -> dict[str, str]:
        """Variables for the program's environment."""
        return {"LD_PRELOAD": f"/proc/self/fd/{self._library}", "PTRACE_XSTATE_COUNTERS": str(self._counters)}

    @property
    def counts(self) -> XstateCounts:
        """What it was called for so far."""
        return XstateCounts(*_COUNTERS.unpack(os.pread(self._counters, _COUNTERS.size, 0)))
