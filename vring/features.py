"""Feature bits and device status bits that every virtio device shares (VIRTIO chapter 6 and section 2.1)."""

from __future__ import annotations

from enum import IntFlag

__all__ = ["CommonFeature", "Status"]


class CommonFeature(IntFlag):
    """Reserved feature bits, chapter 6."""

    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    NOTIFICATION_DATA = 1 << 38
    RING_RESET = 1 << 40
    SUSPEND = 1 << 43


class Status(IntFlag):
    """Device status field, section 2.1."""

    RESET = 0
    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    SUSPEND = 16
    DEVICE_NEEDS_RESET = 64
    FAILED = 128
