"""Exit codes, and the one place where an error becomes a message for a person."""

from __future__ import annotations

from host_qemu_side.migration import Cancelled
from vring.errors import DeviceError, DriverError, MissingFacility, PeerVanished, UsageError, VirtioError

__all__ = ["INTERRUPTED", "INVARIANT", "OK", "InvariantFailed", "exit_code"]

OK, INVARIANT, USAGE, MISSING, PROTOCOL, VANISHED, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130


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
    if isinstance(error, MissingFacility):
        return MISSING
    if isinstance(error, PeerVanished):
        return VANISHED
    if isinstance(error, (DriverError, DeviceError, VirtioError)):
        return PROTOCOL
    return VANISHED if isinstance(error, ConnectionError) else INVARIANT
