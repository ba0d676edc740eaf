"""The balloon's config space (VIRTIO 5.5.4): four little-endian 32-bit fields and a generation count."""

from __future__ import annotations

import struct

from balloon_dev.features import BalloonFeature

__all__ = ["ACTUAL", "CMD_ID", "CONFIG_BYTES", "NUM_PAGES", "POISON_VAL", "BalloonConfig"]

NUM_PAGES = 0
"""Offset of num_pages: the size the host asks for, pages of 4096 bytes."""
ACTUAL = 4
"""Offset of actual: the size the driver has reached, pages of 4096 bytes."""
CMD_ID = 8
"""Offset of free_page_hint_cmd_id, there if FREE_PAGE_HINT is offered."""
POISON_VAL = 12
"""Offset of poison_val, there if PAGE_POISON is offered."""
CONFIG_BYTES = 16
"""Bytes of the config space with all of its fields."""

_FIELD = struct.Struct("<I")
_DRIVER_MAY_WRITE = (ACTUAL, POISON_VAL)


def config_size(offered: int) -> int:
    """Return the bytes of config space under the offered features: 8, 12 or 16."""
    if offered & BalloonFeature.PAGE_POISON:
        return CONFIG_BYTES
    return 12 if offered & BalloonFeature.FREE_PAGE_HINT else 8


class BalloonConfig:
    """The bytes behind config reads and writes.

    Parameters
    ----------
    offered
        Offered features; they decide the size.
    """

    def __init__(self, offered: int) -> None:
        self.size = config_size(offered)
        self._bytes = bytearray(CONFIG_BYTES)
        self.generation = 0
        """Counts changes by the device, so that a driver can tell a torn read (basic.config.driver-2)."""

    def __getitem__(self, offset: int) -> int:
        """Return the field at `offset`."""
        return int(_FIELD.unpack_from(self._bytes, offset)[0])

    def __setitem__(self, offset: int, value: int) -> None:
        """Set the field at `offset` from the device's side; a changed value moves the generation on."""
        if self[offset] != value & 0xFFFFFFFF:
            _FIELD.pack_into(self._bytes, offset, value & 0xFFFFFFFF)
            self.generation = (self.generation + 1) & 0xFFFFFFFF

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes as the driver reads them; past the end they are 0."""
        if offset < 0 or length < 0:
            return bytes(max(length, 0))
        return bytes(self._bytes[offset : min(offset + length, self.size)]).ljust(length, b"\0")

    def write(self, offset: int, data: bytes) -> list[int] | None:
        """Store what the driver may write: actual and poison_val.

        A transport may send more of the config space than the driver wrote (QEMU in front of a vhost-user device sends
        all of it, from a cache that may be old): then what differs from what is shown was written, and no more.

        Returns
        -------
        list of int or None
            Offsets of the fields that were written; None if there is none that the driver may write.
        """
        end = min(offset + len(data), self.size)
        one_field = offset // _FIELD.size == (offset + len(data) - 1) // _FIELD.size
        theirs = [field for field in _DRIVER_MAY_WRITE if max(field, offset) < min(field + _FIELD.size, end)]
        written = []
        for field in theirs:
            a, b = max(field, offset), min(field + _FIELD.size, end)
            new = data[a - offset : b - offset]
            if one_field or self._bytes[a:b] != new:
                self._bytes[a:b] = new
                written.append(field)
        return written if theirs else None
