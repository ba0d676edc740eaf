"""The one place where an error code of ``csrc/vring`` becomes an exception."""

from __future__ import annotations

from typing import Literal

from vring._vring import ffi
from vring.errors import DeviceError, DriverError, UsageError, VirtioError

__all__ = ["CODES", "code_name", "error_for"]

Blame = Literal["driver", "device", "caller", "peer", "setup"]

CODES: dict[str, tuple[Blame, str, str | None]] = {
    "VQ_ESIZE": ("setup", "queue size must be a power of two from 1 to 32768", "ring.size-1"),
    "VQ_EALIGN": (
        "setup",
        "descriptor table, avail ring and used ring must be aligned to 16, 2 and 4 bytes",
        "split.layout.driver-1",
    ),
    "VQ_ERANGE_RING": ("setup", "a part of the ring is not inside one region of guest memory", None),
    "VQ_EBROKEN": ("peer", "the queue broke earlier; reset the device", None),
    "VQ_EINVAL": (
        "caller",
        "argument out of range (a used length over the writable bytes, unknown flags, no room)",
        None,
    ),
    "VQ_ENOTHELD": ("caller", "head given back that is not held, or not in the order it was popped", None),
    "VQ_ESTATE": ("caller", "saved driver state does not belong to a queue, or is damaged", None),
    "VQ_ECLOSED": ("caller", "the guest memory with the ring was closed", None),
    "VQ_EAVAIL_AHEAD": (
        "driver",
        "avail idx is ahead by more than the queue holds, or was moved back",
        "split.avail.driver-1",
    ),
    "VQ_EHEAD": ("driver", "avail ring names a descriptor outside the table", "ring.size-1"),
    "VQ_ENEXT": ("driver", "next field points outside the table", "ring.size-1"),
    "VQ_ELOOP": ("driver", "chain is longer than the queue size: it loops", "split.desc.driver-1"),
    "VQ_EORDER": ("driver", "device-readable descriptor after a device-writable one", "split.framing.driver-1"),
    "VQ_EZERO": ("driver", "descriptor of length 0", None),
    "VQ_EADDR": ("driver", "buffer or indirect table is not inside guest memory", None),
    "VQ_ETOTAL": ("driver", "chain of more than 2^32 bytes", "split.desc.driver-1"),
    "VQ_EINDIRECT": (
        "driver",
        "INDIRECT descriptor although INDIRECT_DESC was not negotiated",
        "split.indirect.driver-1",
    ),
    "VQ_EINDIRECT_NEST": ("driver", "indirect table inside an indirect table", "split.indirect.driver-2"),
    "VQ_EINDIRECT_NEXT": ("driver", "INDIRECT together with NEXT", "split.indirect.driver-4"),
    "VQ_EINDIRECT_SIZE": ("driver", "indirect table is empty, or no multiple of 16 bytes", None),
    "VQ_ESEGS": ("caller", "segment array cannot hold the next chain; make it as long as the queue size", None),
    "VQ_EINUSE": ("driver", "buffer made available again before it was used", None),
    "VQ_EUSED_AHEAD": ("device", "used idx is ahead of the buffers made available, or was moved back", "ring.size-1"),
    "VQ_EUSED_ID": ("device", "used element names no buffer the device has", None),
    "VQ_EUSED_LEN": ("device", "used length is over the writable part of the buffer", "split.used.device-2"),
    "VQ_ETOOLONG": ("caller", "chain of no segment, or of more than the queue size", "split.indirect.driver-3"),
    "VQ_EBADSEG": (
        "caller",
        "segment of length 0 or with unknown flags, or chain of more than 2^32 bytes",
        "split.desc.driver-1",
    ),
    "VQ_EBADORDER": ("caller", "device-readable segment after a device-writable one", "split.framing.driver-1"),
}
"""Each code: whose fault it is, what happened, which clause says so.

``peer`` is whoever is on the other side; ``setup`` is the driver's fault when the device half finds it and the
caller's when the driver half does.
"""

_NAMES: dict[int, str] = dict(ffi.typeof("enum vq_error").elements)
_CLASSES: dict[Blame, type[VirtioError]] = {"driver": DriverError, "device": DeviceError, "caller": UsageError}


def code_name(code: int) -> str:
    """Return the C name of an error code, such as ``VQ_ELOOP``."""
    return _NAMES.get(code, f"error {code}")


def error_for(
    code: int,
    half: Literal["driver", "device"],
    *,
    queue: int | None = None,
    index: int | None = None,
    detail: str = "",
) -> VirtioError:
    """Make the exception for a negative return value.

    Parameters
    ----------
    code
        What the C function returned.
    half
        Which half called it.
    queue, index
        Where it happened.
    detail
        Said after the message.

    Returns
    -------
    VirtioError
        `DriverError`, `DeviceError` or `UsageError`, with an attribute ``code`` (the C name).
    """
    name = code_name(code)
    blame, message, clause = CODES.get(name, ("peer", "the queue says what it has no words for", None))
    if blame == "peer":
        blame = "device" if half == "driver" else "driver"
    elif blame == "setup":
        blame = "caller" if half == "driver" else "driver"
    error = _CLASSES[blame](f"{message}{detail} ({name})", queue=queue, index=index, clause=clause)
    error.code = name
    return error
