"""The register map of virtio-mmio (VIRTIO 4.2.2, table 4.1) as data; the device and the driver both read it.

Nothing here does anything: what a register means to a device is in `vring.mmio`.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final

__all__ = [
    "CONFIG_OFFSET",
    "MAGIC",
    "QUEUE_SETTINGS",
    "READABLE",
    "REGISTER_BYTES",
    "VERSION",
    "VERSIONS",
    "WRITABLE",
    "Interrupt",
    "Register",
    "register_name",
]

MAGIC: Final = 0x74726976
"""What MagicValue reads, ``virt`` (mmio.regs.device-1)."""
VERSION: Final = 2
"""What Version reads unless something else is asked for; 1 is the legacy layout (mmio.regs.device-2)."""
VERSIONS: Final = (2, 3)
"""Versions that are known here. 3 is to come with VIRTIO 1.5 and is in Linux 7.3: a reset need not be over when the
write of 0 to Status is, so the driver waits until Status reads 0; all else is as in 2."""
REGISTER_BYTES: Final = 4
"""Width of every register (mmio.regs.driver-4)."""
CONFIG_OFFSET: Final = 0x100
"""Where the device's config space starts."""


class Register(IntEnum):
    """Offsets of the registers in the window, bytes."""

    MagicValue = 0x000
    Version = 0x004
    DeviceID = 0x008
    VendorID = 0x00C
    DeviceFeatures = 0x010
    DeviceFeaturesSel = 0x014
    DriverFeatures = 0x020
    DriverFeaturesSel = 0x024
    QueueSel = 0x030
    QueueSizeMax = 0x034
    QueueSize = 0x038
    QueueReady = 0x044
    QueueNotify = 0x050
    InterruptStatus = 0x060
    InterruptACK = 0x064
    Status = 0x070
    QueueDescLow = 0x080
    QueueDescHigh = 0x084
    QueueDriverLow = 0x090
    QueueDriverHigh = 0x094
    QueueDeviceLow = 0x0A0
    QueueDeviceHigh = 0x0A4
    SHMSel = 0x0AC
    SHMLenLow = 0x0B0
    SHMLenHigh = 0x0B4
    SHMBaseLow = 0x0B8
    SHMBaseHigh = 0x0BC
    QueueReset = 0x0C0
    ConfigGeneration = 0x0FC


class Interrupt(IntFlag):
    """Bits of InterruptStatus and InterruptACK; the others are undefined (mmio.regs.driver-18 and -20)."""

    USED_BUFFER = 1
    CONFIG_CHANGE = 2


BOTH: Final = frozenset({Register.QueueReady, Register.QueueReset, Register.Status})
WRITE_ONLY: Final = frozenset(
    {
        Register.DeviceFeaturesSel,
        Register.DriverFeatures,
        Register.DriverFeaturesSel,
        Register.QueueSel,
        Register.QueueSize,
        Register.QueueNotify,
        Register.InterruptACK,
        Register.QueueDescLow,
        Register.QueueDescHigh,
        Register.QueueDriverLow,
        Register.QueueDriverHigh,
        Register.QueueDeviceLow,
        Register.QueueDeviceHigh,
        Register.SHMSel,
    }
)
READABLE: Final = frozenset(Register) - WRITE_ONLY
"""Registers a driver may read (mmio.regs.driver-3)."""
WRITABLE: Final = WRITE_ONLY | BOTH
"""Registers a driver may write (mmio.regs.driver-2)."""
QUEUE_SETTINGS: Final = {
    Register.QueueSize: ("size", 0),
    Register.QueueDescLow: ("desc", 0),
    Register.QueueDescHigh: ("desc", 32),
    Register.QueueDriverLow: ("avail", 0),
    Register.QueueDriverHigh: ("avail", 32),
    Register.QueueDeviceLow: ("used", 0),
    Register.QueueDeviceHigh: ("used", 32),
}
"""Registers that must not be touched while the queue is ready (mmio.regs.driver-15): which number of a
`vring.split.QueueLayout` each holds, and from which bit on."""


def register_name(offset: int) -> str:
    """Return the name of what is at an offset, for messages."""
    if offset >= CONFIG_OFFSET:
        return f"config+{offset - CONFIG_OFFSET:#x}"
    try:
        return Register(offset).name
    except ValueError:
        return f"offset {offset:#x}"
