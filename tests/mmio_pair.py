"""A balloon driver and a balloon device joined by virtio-mmio registers, and a bus that watches the driver."""

from __future__ import annotations

from balloon_dev.device import BalloonDevice
from balloon_dev.features import ALL_BALLOON_FEATURES, RING_FEATURES
from balloon_dev.profiles import SPEC
from guest_driver.balloon import BalloonDriver
from guest_driver.memory_manager import MemoryManager, Owner
from guest_driver.mmio import MmioTransport
from vring.features import CommonFeature, Status
from vring.memory import GuestMemory
from vring.mmio import MmioDevice
from vring.mmio_registers import CONFIG_OFFSET, QUEUE_SETTINGS, READABLE, WRITABLE, Register

MIB = 1 << 20
ALL = int(ALL_BALLOON_FEATURES | RING_FEATURES | CommonFeature.RING_RESET)
R = Register


class ClauseBus:
    """Lets accesses through to a device and holds the driver to the clauses; `log` has all of them.

    `before_read` is called with the offset before each read, for what happens on the other side meanwhile.
    """

    def __init__(self, device):
        self.device = device
        self.log = []
        self.before_read = None
        self._forget()

    def _forget(self):
        self.selected = {}
        self.ready = set()
        self.unread = set()
        self.status = 0
        self.raised = None

    def read(self, offset, size):
        if self.before_read is not None:
            self.before_read(offset)
        value = self.device.read(offset, size)
        self.log.append(("read", offset, size, value))
        if offset >= CONFIG_OFFSET:
            self._config(offset, size)
            return value
        assert size == 4, "mmio.regs.driver-4"
        assert offset in READABLE, "mmio.regs.driver-1 and -3"
        if offset == R.DeviceFeatures:
            assert R.DeviceFeaturesSel in self.selected, "mmio.regs.driver-12"
        if offset == R.QueueReady:
            self.unread.discard(self.selected[R.QueueSel])  # mmio.regs.driver-17
        if offset == R.InterruptStatus:
            self.raised = value
        if offset == R.Status:
            self.status = value
        assert not R.SHMSel <= offset <= R.SHMBaseHigh, "mmio.init.driver-5"
        return value

    def write(self, offset, size, value):
        self.log.append(("write", offset, size, value))
        if offset >= CONFIG_OFFSET:
            self._config(offset, size)
            assert self.status & Status.FEATURES_OK, "basic.init.driver-3"
            self.device.write(offset, size, value)
            return
        assert size == 4, "mmio.regs.driver-4"
        assert 0 <= value < 1 << 32
        assert offset in WRITABLE, "mmio.regs.driver-1 and -2"
        queue = self.selected.get(R.QueueSel)
        if offset in (R.DeviceFeaturesSel, R.DriverFeaturesSel, R.QueueSel):
            self.selected[offset] = value
        elif offset == R.DriverFeatures:
            assert R.DriverFeaturesSel in self.selected, "mmio.regs.driver-13"
            assert not self.status & Status.FEATURES_OK, "basic.init.driver-4"
        elif offset in QUEUE_SETTINGS:
            assert queue not in self.ready | self.unread, "mmio.regs.driver-15 and -17"
            if offset == R.QueueSize:
                assert value <= self.device.read(R.QueueSizeMax, 4), "mmio.regs.driver-14"
        elif offset == R.QueueReady:
            (self.ready.add if value else self.ready.discard)(queue)
            if not value:
                self.unread.add(queue)
        elif offset == R.QueueReset:
            self.ready.discard(queue)
        elif offset == R.QueueNotify:
            assert self.status & Status.DRIVER_OK, "basic.init.driver-7"
            assert value in self.ready
        elif offset == R.InterruptACK:
            assert not value & ~3, "mmio.regs.driver-20"
            assert value & ~(self.raised or 0) == 0, "mmio.irq.driver-1: only what was read is acknowledged"
        elif offset == R.Status:
            assert value == 0 or not self.status & ~value & ~Status.DEVICE_NEEDS_RESET, "basic.status.driver-2"
            if value == 0:
                self._forget()
            self.status = value
        self.device.write(offset, size, value)

    @staticmethod
    def _config(offset, size):
        assert size in (1, 2, 4), "mmio.regs.driver-5"
        assert offset % size == 0, "mmio.regs.driver-5"
        assert offset + size <= CONFIG_OFFSET + 16, "mmio.regs.driver-1"

    def names(self, start=0):
        """The accesses in words: ``rStatus``, ``wQueueSel``."""
        return [kind[0] + (R(o).name if o < CONFIG_OFFSET else "config") for kind, o, _, _ in self.log[start:]]


class MmioPair:
    """A guest and its device with registers between; nothing happens unless it is asked for."""

    def __init__(self, features=ALL, *, accept=ALL, mib=64, profile=SPEC, poison=None, probe=True, **options):
        self.memory = GuestMemory.create(mib * MIB)
        self.levels = []
        self.device = BalloonDevice(features & ~int(CommonFeature.RING_RESET), profile=profile)
        self.mmio = MmioDevice(self.device, self.memory, irq=self.levels.append, **options)
        self.bus = ClauseBus(self.mmio)
        self.transport = MmioTransport(self.bus, polls=20)
        self.manager = MemoryManager.create(self.memory, watermark=0)
        if poison is not None:
            self.manager.poison = poison
            self.manager.poison_free_pages()
        self.driver = BalloonDriver(self.manager, self.transport, features=accept, profile=profile, batch=4)
        self.before = self.manager.snapshot()
        if probe:
            self.driver.probe()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.memory.close()

    def settle(self, now=None, limit=5000):
        """Both sides work until they rest."""
        self.mmio.deliver()
        for _ in range(limit):
            if self.mmio.irq_level:
                self.driver.interrupt(self.transport.interrupts())
            more = self.driver.step(now)
            self.mmio.poll()
            if not more and not self.mmio.irq_level:
                return
        raise AssertionError("driver and device never come to rest")

    def target(self, pages, now=None):
        self.device.set_target(pages)
        self.settle(now)

    def ballooned(self):
        """The balloon's size by both sides, which agree."""
        mine = self.manager.pages_by_owner().get(int(Owner.BALLOON), 0)
        assert mine == self.device.actual == self.device.ballooned_pages
        self.manager.verify()
        return mine

    def hint_run(self):
        self.device.start_hinting()
        self.settle()
        blocks = self.driver.hinted_blocks
        self.device.finish_hinting()
        self.settle()
        return blocks

    def unchanged(self):
        self.manager.verify()
        assert self.before.difference(self.manager.snapshot()) == []


class Raw:
    """A driver that writes what it likes."""

    def __init__(self, mmio):
        self.mmio = mmio

    def __getitem__(self, register):
        return self.mmio.read(register, 4)

    def __setitem__(self, register, value):
        self.mmio.write(register, 4, value)

    def negotiate(self, features=None):
        features = self.mmio.offered_features if features is None else features
        self[R.Status] = 1
        self[R.Status] = 3
        for word in range(2):
            self[R.DriverFeaturesSel] = word
            self[R.DriverFeatures] = features >> 32 * word & 0xFFFFFFFF
        self[R.Status] = 11
        return bool(self[R.Status] & Status.FEATURES_OK)

    def queue(self, index, layout, *, ready=1):
        self[R.QueueSel] = index
        for register, (name, shift) in QUEUE_SETTINGS.items():
            self[register] = getattr(layout, name) >> shift & 0xFFFFFFFF
        self[R.QueueReady] = ready
