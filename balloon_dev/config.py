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
_DRIVER_MAY_WRITE = ((ACTUAL, ACTUAL + 4), (POISON_VAL, POISON_VAL + 4))


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

    def write(self, offset: int, data: bytes) -> list[int]:
        """Store what the driver may write: actual and poison_val. Return the offsets of the fields touched."""
        touched = []
        for start, end in _DRIVER_MAY_WRITE:
            if start >= self.size:
                continue
            a, b = max(start, offset), min(end, offset + len(data))
            if a < b:
                self._bytes[a:b] = data[a - offset : b - offset]
                touched.append(start)
        return touched
