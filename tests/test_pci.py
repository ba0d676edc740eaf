"""The driver's side of virtio-pci against a config space made by hand: what is no device of ours is refused."""

from __future__ import annotations

import struct

import pytest

from guest_driver.pci import PciTransport
from vring.errors import DeviceError, UsageError

BAR = 0xE0000000


class Function:
    """A PCI function whose registers are bytes; memory space reads back what was written."""

    def __init__(self, *, vendor: int = 0x1AF4, device: int = 0x1045) -> None:
        self.config = bytearray(256)
        struct.pack_into("<HHHH", self.config, 0, vendor, device, 0, 0x10)
        struct.pack_into("<II", self.config, 0x20, BAR | 4, 0)
        self.memory: dict[int, int] = {}
        self.writes: list[tuple[int, int, int]] = []
        self.last = 0x34

    def capability(self, at: int, kind: int, offset: int, *, bar: int = 4, cap: int = 9, more: int = 0) -> None:
        self.config[self.last] = at
        self.last = at + 1
        struct.pack_into("<BBBBBxxxIII", self.config, at, cap, 0, 20, kind, bar, offset, 0x1000, more)

    def config_read(self, offset: int, size: int) -> int:
        return int.from_bytes(self.config[offset : offset + size], "little")

    def config_write(self, offset: int, size: int, value: int) -> None:
        self.config[offset : offset + size] = value.to_bytes(size, "little")

    def read(self, address: int, size: int) -> int:
        return int.from_bytes(bytes(self.memory.get(address + i, 0) for i in range(size)), "little")

    def write(self, address: int, size: int, value: int) -> None:
        self.writes.append((address, size, value))
        for i, byte in enumerate(value.to_bytes(size, "little")):
            self.memory[address + i] = byte


def whole() -> Function:
    function = Function()
    for at, kind, offset in ((0x40, 1, 0), (0x58, 3, 0x1000), (0x70, 4, 0x2000), (0x88, 2, 0x3000)):
        function.capability(at, kind, offset, more=4)
    return function


def test_not_a_modern_virtio_device() -> None:
    for function in (Function(vendor=0x8086), Function(device=0x1002)):
        with pytest.raises(DeviceError, match="no modern virtio device"):
            PciTransport(function)


def test_missing_structures_are_named() -> None:
    function = Function()
    function.capability(0x40, 1, 0)
    with pytest.raises(DeviceError, match="NOTIFY, ISR"):
        PciTransport(function)


def test_capabilities_in_a_ring_end() -> None:
    function = whole()
    function.config[function.last] = 0x40
    assert PciTransport(function).device_id == 5


def test_foreign_and_unknown_capabilities_are_passed_over() -> None:
    function = Function()
    function.capability(0x40, 1, 0, cap=0x11)  # MSI-X
    function.capability(0x58, 99, 0)
    function.capability(0x70, 1, 0, bar=7)
    for at, kind in ((0x88, 1), (0xA0, 2), (0xB8, 3)):
        function.capability(at, kind, kind * 0x1000, more=4)
    transport = PciTransport(function)
    assert transport.queue_size_max(0) == 0
    with pytest.raises(DeviceError, match="no device configuration"):
        transport.read_config(0, 4)


def test_bus_mastering_is_on_and_intx_not_off() -> None:
    function = whole()
    function.config_write(4, 2, 1 << 10)
    PciTransport(function)
    assert function.config_read(4, 2) == 0x6


def test_features_not_offered_and_a_kick_too_early() -> None:
    transport = PciTransport(whole())
    with pytest.raises(UsageError, match="not offered"):
        transport.set_driver_features(1)
    with pytest.raises(UsageError, match="DRIVER_OK"):
        transport.kick(0)


def test_device_that_forgets_features_ok() -> None:
    function = whole()
    transport = PciTransport(function)
    assert transport.device_features() == 0
    remembered = function.write

    def forgetful(address: int, size: int, value: int) -> None:
        remembered(address, size, value & ~8 if address == BAR + 20 else value)

    function.write = forgetful  # type: ignore[method-assign]
    with pytest.raises(DeviceError, match="refuses features"):
        transport.set_driver_features(0)
    assert function.read(BAR + 20, 1) & 128  # FAILED


def test_status_that_never_clears() -> None:
    function = whole()
    transport = PciTransport(function, polls=3)
    function.write = lambda address, size, value: None  # type: ignore[method-assign]
    function.memory[BAR + 20] = 4
    with pytest.raises(DeviceError, match="reset"):
        transport.reset()


def test_migrated_device_that_took_nothing_over() -> None:
    transport = PciTransport(whole(), running=True)
    transport.device_features()
    with pytest.raises(DeviceError):
        transport.set_driver_features(0)
    with pytest.raises(DeviceError, match="not taken over"):
        transport.driver_ok()
