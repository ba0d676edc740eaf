"""One running QEMU, its RAM as this process has it mapped, and the transport to its balloon."""

from __future__ import annotations

import os
import time
from typing import Any

from balloon_dev.features import DEVICE_ID
from guest_driver.mmio import MmioTransport
from guest_driver.pci import PciTransport
from guest_driver.qemu.launch import QemuOptions, QemuProcess
from guest_driver.qemu.qtest import MemoryBus, QtestClient
from vring.errors import DeviceError
from vring.memory import GuestMemory, Region

__all__ = ["BALLOON", "LOW_MEMORY", "QemuMachine", "QtestPci"]

LOW_MEMORY = 1 << 20
"""Below this address the machines have ROM in places: a write there through QEMU is lost."""
BALLOON = "/machine/peripheral/balloon0"
MMIO_BASE, MMIO_SLOT, MMIO_SLOTS = 0xFEB00000, 512, 24
PCI_ADDRESS, PCI_DATA = 0xCF8, 0xCFC
PCI_WINDOW, PCI_BAR_ROOM = 0xE0000000, 1 << 20
VIRTIO_BALLOON = 0x10451AF4
PAUSE = 0.0005


class QtestPci:
    """A PCI function on bus 0 through the ports 0xcf8 and 0xcfc.

    Parameters
    ----------
    qtest
        The machine.
    device
        Number of the device on its bus; function 0.
    """

    def __init__(self, qtest: QtestClient, device: int) -> None:
        self.qtest = qtest
        self.device = device

    def _select(self, offset: int) -> None:
        self.qtest.write_port(PCI_ADDRESS, 4, 1 << 31 | self.device << 11 | offset & 0xFC)

    def config_read(self, offset: int, size: int) -> int:
        """Read config space."""
        self._select(offset)
        return self.qtest.read_port(PCI_DATA + offset % 4, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Write config space."""
        self._select(offset)
        self.qtest.write_port(PCI_DATA + offset % 4, size, value)

    def read(self, address: int, size: int) -> int:
        """Read memory space."""
        return self.qtest.read(address, size)

    def write(self, address: int, size: int, value: int) -> None:
        """Write memory space."""
        self.qtest.write(address, size, value)

    def assign_bars(self) -> None:
        """Give each memory BAR an address, as firmware does."""
        free, bar = PCI_WINDOW, 0
        while bar < 6:
            at = 0x10 + 4 * bar
            kind = self.config_read(at, 4)
            wide = kind & 1 == 0 and kind & 6 == 4
            self.config_write(at, 4, 0xFFFFFFFF)
            mask = self.config_read(at, 4)
            if mask and not kind & 1:
                self.config_write(at, 4, free)
                if wide:
                    self.config_write(at + 4, 4, 0)
                free += PCI_BAR_ROOM
            bar += 2 if wide else 1


class QemuMachine:
    """A QEMU that runs with a balloon. A context manager: QEMU is gone at the end.

    Parameters
    ----------
    options
        What to start.

    Raises
    ------
    MissingFacility
        If QEMU is not installed.
    PeerVanished
        If it does not start.
    """

    def __init__(self, options: QemuOptions | None = None) -> None:
        self.options = options or QemuOptions()
        fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, self.options.memory)
            self.process = QemuProcess(self.options, fd)
            self.memory = GuestMemory.from_fds([Region(0, self.options.memory, fd)])
        finally:
            os.close(fd)
        self.binary = self.process.binary
        self.qtest, self.qmp = self.process.qtest, self.process.qmp
        self.qtest.intercept("/machine/ioapic" if self.options.transport == "mmio" else "ioapic")

    def __enter__(self) -> QemuMachine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- the balloon ----------------------------------------------------------------------------------------------

    def bus(self) -> MemoryBus:
        """Return the register window of the balloon on virtio-mmio.

        Raises
        ------
        DeviceError
            If no slot holds it.
        """
        for slot in range(MMIO_SLOTS):
            bus = MemoryBus(self.qtest, MMIO_BASE + slot * MMIO_SLOT)
            found = MmioTransport.find(bus)
            if found is not None and found.device_id == DEVICE_ID:
                return bus
        raise DeviceError("no balloon in QEMU's virtio-mmio slots")

    def pci(self) -> QtestPci:
        """Return the balloon's PCI function.

        Raises
        ------
        DeviceError
            If there is none on bus 0.
        """
        for device in range(32):
            function = QtestPci(self.qtest, device)
            if function.config_read(0, 4) == VIRTIO_BALLOON:
                return function
        raise DeviceError("no virtio balloon on QEMU's PCI bus 0")

    def transport(self, *, running: bool = False) -> MmioTransport | PciTransport:
        """Return a transport to the balloon; with `running` to one that took over the state of another."""

        def pause() -> None:
            time.sleep(PAUSE)

        if self.options.transport == "mmio":
            return MmioTransport(self.bus(), running=running, pause=pause)
        function = self.pci()
        if not running:
            function.assign_bars()
        return PciTransport(function, running=running, pause=pause)

    @property
    def interrupted(self) -> bool:
        """Whether an interrupt line is up. The balloon is the only device that a driver serves."""
        self.qtest.look()
        return self.qtest.any_high

    # -- the monitor ----------------------------------------------------------------------------------------------

    def set_balloon(self, pages: int) -> None:
        """Ask for a balloon of `pages` pages of 4096 bytes."""
        self.qmp.execute("balloon", value=self.options.memory - pages * 4096)

    def balloon_pages(self) -> int:
        """Return the size of the balloon in pages, as the driver told the device."""
        actual = int(self.qmp.execute("query-balloon")["actual"])
        return (self.options.memory - actual) // 4096

    def ask_for_statistics(self, seconds: int = 1) -> None:
        """Have the device ask for statistics at once and then in every interval; 0 ends that."""
        self.qmp.execute("qom-set", path=BALLOON, property="guest-stats-polling-interval", value=seconds)

    def statistics(self) -> dict[str, Any]:
        """Return the guest's statistics: ``last-update`` (0: never) and ``stats``."""
        result = self.qmp.execute("qom-get", path=BALLOON, property="guest-stats")
        assert isinstance(result, dict)
        return result

    # -- end ------------------------------------------------------------------------------------------------------

    def close(self) -> str:
        """End QEMU; return what it wrote to its standard error."""
        said = self.process.close()
        self.memory.close()
        return said
