"""Driver and device joined by virtio-mmio registers in one process: what they do with each other."""

from __future__ import annotations

import pytest
from mmio_pair import ALL, MIB, ClauseBus, MmioPair, R

from balloon_dev.config import ACTUAL, CMD_ID, NUM_PAGES
from balloon_dev.device import BalloonDevice
from balloon_dev.features import ALL_BALLOON_FEATURES, RING_FEATURES, BalloonFeature, QueueRole
from balloon_dev.profiles import LINUX, QEMU, SPEC
from guest_driver.mmio import MmioTransport, NoDeviceError
from vring.errors import DeviceError, UsageError
from vring.features import CommonFeature, Status
from vring.memory import GuestMemory
from vring.mmio import MmioDevice
from vring.split import QueueLayout

POISON = 0xAAAAAAAA


# -- the balloon over registers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", [SPEC, QEMU, LINUX], ids=lambda p: p.name)
@pytest.mark.parametrize("on_notify", [True, False])
def test_all_features(profile, on_notify):
    with MmioPair(profile=profile, poison=POISON, on_notify=on_notify) as pair:
        assert pair.device.negotiated == ALL_BALLOON_FEATURES | RING_FEATURES
        pair.target(700, now=0.0)
        assert pair.ballooned() == 700
        pair.target(100)
        assert pair.ballooned() == 100
        assert pair.device.request_stats()
        pair.settle()
        assert pair.device.stats.updates == 2
        pair.settle(now=10.0)
        assert pair.manager.reported_blocks
        assert pair.hint_run() > 5
        assert pair.hint_run() > 5
        assert not pair.mmio.bad_accesses
        assert not pair.device.bad_requests
        pair.driver.remove()
        pair.unchanged()
        pair.driver.probe()
        pair.target(10)
        assert pair.ballooned() == 10
        assert pair.levels[:4] == [1, 0, 1, 0]


@pytest.mark.parametrize("bits", range(64))
def test_each_subset_offered(bits):
    """Agree to any legal subset (basic.features.device-2); what was agreed once is again (basic.features.device-5)."""
    poison = POISON if bits & BalloonFeature.PAGE_POISON else None
    with MmioPair(bits | RING_FEATURES, poison=poison, mib=32) as pair:
        for _ in range(2):
            assert pair.device.negotiated == bits | RING_FEATURES
            pair.target(50)
            assert pair.ballooned() == 50
            if bits & BalloonFeature.FREE_PAGE_HINT:
                assert pair.hint_run()
            pair.driver.remove()
            pair.unchanged()
            pair.driver.probe()
        assert not pair.mmio.bad_accesses


@pytest.mark.parametrize("ring", [1 << 32, 1 << 32 | 1 << 29, 1 << 32 | 1 << 28])
def test_without_some_ring_features(ring):
    with MmioPair(accept=ALL_BALLOON_FEATURES | ring) as pair:
        pair.target(300)
        assert pair.ballooned() == 300
        assert pair.hint_run()


# -- initialisation -----------------------------------------------------------------------------------------------


class Window:
    """Registers that read what one says; nothing else may be touched."""

    def __init__(self, magic=0x74726976, version=2, device=5):
        self.values = {R.MagicValue: magic, R.Version: version, R.DeviceID: device}
        self.touched = []

    def read(self, offset, size):
        self.touched.append(R(offset).name)
        return self.values[offset]

    def write(self, offset, size, value):
        raise AssertionError("written")


@pytest.mark.parametrize(
    ("window", "touched", "clause"),
    [
        (Window(magic=0), ["MagicValue"], "mmio.regs.driver-6"),
        (Window(version=1), ["MagicValue", "Version"], "mmio.regs.driver-8"),
        (Window(device=0), ["MagicValue", "Version", "DeviceID"], "mmio.regs.driver-10"),
    ],
)
def test_windows_without_a_device(window, touched, clause):
    """mmio.regs.driver-6, mmio.regs.driver-8 and mmio.regs.driver-10: ignored; mmio.regs.driver-7 and
    mmio.regs.driver-9: may be reported; mmio.regs.driver-11: silently if one looks for devices; mmio.init.driver-1,
    mmio.init.driver-2, mmio.init.driver-3, mmio.init.driver-4: in this order, and nothing else is touched.
    """
    assert MmioTransport.find(window) is None
    assert window.touched == touched
    with pytest.raises(NoDeviceError) as caught:
        MmioTransport(window)
    assert caught.value.clause == clause


def test_a_device_is_found():
    transport = MmioTransport.find(Window())
    assert transport is not None
    assert transport.device_id == 5
    assert transport.filenos() == []
    transport.close()


def test_order_of_initialisation():
    """mmio.init.driver-6 and basic.init.driver-1: the eight steps; mmio.regs.driver-12 and -13: words are selected
    first; mmio.regs.driver-14: the largest size is known before one is set; mmio.init.driver-5: no shared memory
    register is touched.

    mmio.regs.driver-1, mmio.regs.driver-2, mmio.regs.driver-3, mmio.regs.driver-4, mmio.regs.driver-5,
    mmio.regs.driver-13, mmio.regs.driver-15 and mmio.regs.driver-20 are watched by `ClauseBus` in every test here.
    """
    with MmioPair(accept=RING_FEATURES) as pair:
        names = pair.bus.names()
        assert names[:5] == ["rMagicValue", "rVersion", "rDeviceID", "wStatus", "rStatus"]
        states = [value for kind, offset, _, value in pair.bus.log if (kind, offset) == ("write", R.Status)]
        assert states == [0, 1, 3, 11, 15]
        features = names.index("wDriverFeatures")
        words = ["wDeviceFeaturesSel", "rDeviceFeatures"] * 2 + ["wDriverFeaturesSel"]
        assert names[features - 5 : features] == words
        first = names.index("wQueueSel")
        assert names[first : first + 4] == ["wQueueSel", "rQueueSizeMax", "wQueueSel", "rQueueSizeMax"]
        assert names.index("wQueueReady") > max(i for i, n in enumerate(names[: first + 14]) if n == "wQueueDescLow")
        assert not any(name.startswith("rSHM") or name == "wSHMSel" for name in names)


def test_the_watching_bus_sees_faults():
    """The bus that the other tests rely on is itself red when a driver does wrong."""
    with GuestMemory.create(MIB) as memory:
        for access in [
            lambda bus: bus.read(R.QueueNotify, 4),
            lambda bus: bus.read(R.DeviceFeatures, 4),
            lambda bus: bus.read(R.Status, 2),
            lambda bus: bus.read(0x40, 4),
            lambda bus: bus.read(0x102, 4),
            lambda bus: bus.write(R.Version, 4, 0),
            lambda bus: bus.write(R.InterruptACK, 4, 4),
            lambda bus: bus.write(R.QueueNotify, 4, 0),
            lambda bus: bus.write(R.DriverFeatures, 4, 0),
            lambda bus: bus.write(0x104, 4, 0),
        ]:
            with pytest.raises(AssertionError):
                access(ClauseBus(MmioDevice(BalloonDevice(), memory)))


def test_features_that_were_not_offered():
    with MmioPair(RING_FEATURES, probe=False) as pair:
        offered = pair.transport.device_features()
        assert offered == RING_FEATURES | CommonFeature.RING_RESET
        with pytest.raises(UsageError, match=r"basic\.features\.driver-1"):
            pair.transport.set_driver_features(offered | 1)
        with pytest.raises(UsageError, match=r"basic\.init\.driver-3"):
            pair.transport.write_config(ACTUAL, bytes(4))
        with pytest.raises(UsageError, match=r"basic\.init\.driver-7"):
            pair.transport.kick(0)


def test_refused_features(monkeypatch):
    """basic.features.device-3: FEATURES_OK stays clear; the driver says FAILED (basic.init.driver-5), and a reset
    makes another attempt possible (basic.status.driver-3).
    """
    with MmioPair(probe=False) as pair:
        with monkeypatch.context() as patch:
            patch.setattr(pair.device, "set_features", lambda features: False)
            with pytest.raises(DeviceError, match="refuses features"):
                pair.driver.probe()
            assert pair.mmio.status == 0  # the driver reset it
        states = [value for kind, offset, _, value in pair.bus.log if (kind, offset) == ("write", R.Status)]
        assert states == [0, 1, 3, 11, 3 | Status.FAILED, 0]
        pair.driver.probe()
        pair.target(5)
        assert pair.ballooned() == 5


def test_notification_data_is_not_taken():
    """basic.features.driver-4: a bit this transport does not know is left out."""
    features = CommonFeature.NOTIFICATION_DATA | CommonFeature.RING_RESET
    with MmioPair(features=ALL, accept=ALL | features) as pair:
        other = MmioDevice(BalloonDevice(), pair.memory, features=features)
        assert not MmioTransport(other).device_features() & CommonFeature.NOTIFICATION_DATA
        assert other.offered_features & CommonFeature.NOTIFICATION_DATA


# -- config -------------------------------------------------------------------------------------------------------


def test_a_torn_config_read_is_repeated():
    """mmio.regs.device-6 and basic.config.driver-2: the generation tells, and the driver reads again."""
    with MmioPair() as pair:
        pair.device.set_target(0x11111111)
        changes = iter([0x22222222, 0x33333333])

        def change(offset):
            if offset == 0x100 + CMD_ID:
                target = next(changes, None)
                if target is not None:
                    pair.device.set_target(target)

        pair.bus.before_read = change
        data = pair.transport.read_config(NUM_PAGES, 12)
        assert data[:4] == b"\x33" * 4
        pair.bus.before_read = lambda offset: pair.device.set_target(pair.device.config[NUM_PAGES] + 1)
        with pytest.raises(DeviceError, match=r"mmio\.regs\.device-6"):
            pair.transport.read_config(NUM_PAGES, 12)


def test_widths_of_config_accesses():
    """mmio.regs.driver-5: natural, aligned; 64 bits in two halves."""
    with MmioPair() as pair:
        for offset, length, expected in [(0, 8, [4, 4]), (4, 4, [4]), (2, 2, [2]), (1, 7, [1, 2, 4]), (15, 1, [1])]:
            start = len(pair.bus.log)
            assert len(pair.transport.read_config(offset, length)) == length
            assert [size for _, o, size, _ in pair.bus.log[start:] if o >= 0x100] == expected


# -- interrupts ---------------------------------------------------------------------------------------------------


def test_an_interrupt_is_read_and_acknowledged():
    """mmio.irq.driver-1: InterruptStatus says why; mmio.irq.driver-2: a used buffer means all queues; mmio.irq.driver-3
    and mmio.regs.driver-19: what was handled is acknowledged.
    """
    with MmioPair() as pair:
        pair.settle()
        pair.device.set_target(3)
        pair.mmio.deliver()
        assert pair.levels[-1] == 1
        start = len(pair.bus.log)
        what = pair.transport.interrupts()
        assert what.config
        assert not what.queues
        assert pair.bus.names(start) == ["rInterruptStatus", "wInterruptACK", "rStatus"]
        assert pair.levels[-1] == 0
        pair.mmio._raise(1)
        what = pair.transport.interrupts()
        assert what.queues == {0, 1, 2, 3, 4}
        assert not what.config
        start = len(pair.bus.log)
        assert not pair.transport.interrupts().queues
        assert pair.bus.names(start) == ["rInterruptStatus"]


def test_undefined_interrupt_bits_are_disregarded():
    """mmio.regs.driver-18, and mmio.regs.driver-20: they are not acknowledged either."""
    with MmioPair() as pair:
        pair.transport.interrupts()
        pair.mmio.interrupt_status = 0xFFFFFFFC
        what = pair.transport.interrupts()
        assert not what.config
        assert not what.queues
        assert pair.mmio.interrupt_status == 0xFFFFFFFC
        pair.mmio.interrupt_status = 0xFFFFFFFF
        assert pair.transport.interrupts().config
        assert pair.mmio.interrupt_status == 0xFFFFFFFC


def test_waiting_for_a_buffer():
    with MmioPair(on_notify=False) as pair:
        pair.settle()
        assert not pair.transport.wait(0)
        pauses = []

        def let_it_work():
            pauses.append(1)
            if len(pauses) == 3:
                pair.mmio._raise(1)

        pair.transport._pause = let_it_work
        assert pair.transport.wait(0)
        assert len(pauses) == 3
        assert pair.transport.interrupts().queues


# -- trouble and recovery -----------------------------------------------------------------------------------------


def test_a_broken_queue_needs_a_reset():
    """basic.status.device-3 and -4: DEVICE_NEEDS_RESET and a config interrupt; after a reset all is well."""
    with MmioPair() as pair:
        pair.target(20)
        queue = pair.driver._queues[QueueRole.INFLATE]
        idx = pair.memory.array(queue.layout.avail + 2, 1, "<u2")
        idx[0] += 1000
        pair.transport.kick(0)
        assert pair.mmio.status & Status.DEVICE_NEEDS_RESET
        assert "queue 0" in str(pair.mmio.last_error)
        assert pair.levels[-1] == 1
        used = pair.memory.read(queue.layout.used, queue.layout.used_bytes)
        with pytest.raises(DeviceError, match="DEVICE_NEEDS_RESET"):
            pair.transport.interrupts()
        pair.transport.kick(0)
        assert pair.memory.read(queue.layout.used, queue.layout.used_bytes) == used
        assert "queue 0: broken" in pair.mmio.dump()
        pair.driver.remove()
        pair.unchanged()
        pair.driver.probe()
        pair.target(30)
        assert pair.ballooned() == 30
        assert pair.mmio.last_error is None


def test_a_queue_outside_ram_needs_a_reset():
    """split.layout: a ring that is not in RAM is never touched; the same path as a broken ring."""
    with MmioPair(probe=False) as pair:
        transport = pair.transport
        transport.set_driver_features(transport.device_features())
        transport.setup_queue(0, QueueLayout.place(pair.memory.end, 16))
        transport.driver_ok()
        with pytest.raises(DeviceError, match="DEVICE_NEEDS_RESET"):
            transport.interrupts()
        transport.reset()
        pair.driver.probe()


def test_reset_waits_for_the_device():
    """basic.reset.driver-1: until Status reads 0, but not for ever."""
    with MmioPair(probe=False) as pair:
        reads = []

        class Slow(ClauseBus):
            def read(self, offset, size):
                value = super().read(offset, size)
                if offset == R.Status:
                    reads.append(value)
                    return 4 if len(reads) < 5 else value
                return value

        MmioTransport(Slow(pair.mmio), polls=20).reset()
        assert len(reads) == 5
        reads[:] = []
        with pytest.raises(DeviceError, match=r"status still reads 0x4 \[basic\.reset\.device-1\]"):
            MmioTransport(Slow(pair.mmio), polls=3).reset()
