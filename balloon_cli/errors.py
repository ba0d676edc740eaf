"""Exit codes, and the one place where an error becomes a message for a person."""

from __future__ import annotations

import errno
import resource

from host_qemu_side.migration import Cancelled
from vring.decode import visible
from vring.errors import NAMED_WRONG, DeviceError, DriverError, MissingFacility, PeerVanished, UsageError, VirtioError

__all__ = ["INTERRUPTED", "INVARIANT", "OK", "InvariantFailed", "exit_code", "message"]

OK, INVARIANT, USAGE, MISSING, PROTOCOL, VANISHED, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130

MOST = 8000
"""Characters of a message; what others say in it is shorter."""
_TODO = {
    errno.EMFILE: "allow more open files with ulimit -n",
    errno.ENFILE: "close some programs",
    errno.ENOMEM: "give the guest less with --memory, or raise the limit (ulimit -v, control group)",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EAGAIN: "allow more processes with ulimit -u",
    errno.ENOSYS: "take a newer kernel",
}


class InvariantFailed(VirtioError):
    """What must always hold did not: a mistake of this program."""


def exit_code(error: BaseException) -> int:
    """Return the exit code for an error: 2 usage, 3 missing, 4 protocol, 5 vanished, 130 interrupted."""
    if isinstance(error, (Cancelled, KeyboardInterrupt)):
        return INTERRUPTED
    if isinstance(error, InvariantFailed):
        return INVARIANT
    if isinstance(error, UsageError):
        return USAGE
    if isinstance(error, (MissingFacility, MemoryError)):
        return MISSING
    if isinstance(error, (PeerVanished, ConnectionError)):
        return VANISHED
    if isinstance(error, OSError):
        return USAGE if error.errno in NAMED_WRONG else MISSING
    return PROTOCOL if isinstance(error, (DriverError, DeviceError, VirtioError)) else INVARIANT


def message(error: BaseException) -> str:
    """Return an error in one line, printable, with what was noted about it on its way (`BaseException.add_note`)."""
    text = str(error)
    if isinstance(error, MemoryError):
        text = f"there is not enough memory: {_TODO[errno.ENOMEM]}"
    elif isinstance(error, OSError) and not isinstance(error, VirtioError):
        text = error.strerror or text or type(error).__name__
        if error.filename:
            text = f"{error.filename}: {text}"
        if error.errno == errno.EMFILE:
            text += f" ({resource.getrlimit(resource.RLIMIT_NOFILE)[0]} are allowed)"
        if error.errno in _TODO:
            text += f": {_TODO[error.errno]}"
    notes = [f"({note})" for note in getattr(error, "__notes__", ())]
    return visible(" ".join([text, *notes]).replace("\n", " "), MOST)
