"""The register file by itself: each register as the standard has it, and drivers that write what they like."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmio_pair import ALL, MIB, R, Raw

from balloon_dev.device import BalloonDevice
from balloon_dev.features import RING_FEATURES, QueueRole
from guest_driver.balloon import BalloonDriver
from guest_driver.memory_manager import MemoryManager
from guest_driver.mmio import MmioTransport
from vring.errors import UsageError, VirtioError
from vring.features import CommonFeature, Status
from vring.memory import GuestMemory
from vring.mmio import VENDOR_ID, MmioDevice
from vring.mmio_registers import CONFIG_OFFSET, QUEUE_SETTINGS, READABLE, WRITABLE, register_name
from vring.split import QueueLayout

DEVICE = ALL & ~int(CommonFeature.RING_RESET)


@pytest.fixture
def ram():
    with GuestMemory.create(MIB) as memory:
        yield memory


def machine(ram, features=DEVICE, **options):
    levels = []
    device = BalloonDevice(features)
    mmio = MmioDevice(device, ram, irq=levels.append, **options)
    return device, mmio, Raw(mmio), levels


def test_every_mmio_clause_has_a_test():
    """Each clause of virtio-mmio is named in a docstring or assertion of these files."""
    here = Path(__file__).parent
    clauses = re.findall(r"^\| `(mmio\.[\w.-]+)`", (here.parent / "docs" / "clauses.md").read_text(), re.MULTILINE)
    tests = "".join(path.read_text() for path in here.glob("*mmio*.py"))
    assert len(clauses) == 44
    assert not [clause for clause in clauses if not re.search(re.escape(clause) + r"\b", tests)]


def test_identity(ram):
    """mmio.regs.device-1: magic; mmio.regs.device-2: version 2; the device's type and a vendor."""
    _, _, regs, _ = machine(ram)
    assert regs[R.MagicValue] == 0x74726976
    assert regs[R.Version] == 2
    assert regs[R.DeviceID] == 5
    assert regs[R.VendorID] == VENDOR_ID
    assert regs[R.SHMLenLow] == regs[R.SHMLenHigh] == regs[R.SHMBaseLow] == regs[R.SHMBaseHigh] == 0xFFFFFFFF


def test_map():
    """Every register is readable, writable or both, and the map has the standard's offsets."""
    assert set(R) == READABLE | WRITABLE
    assert {R.Status, R.QueueReady, R.QueueReset} == READABLE & WRITABLE
    assert (R.QueueReset, R.ConfigGeneration, CONFIG_OFFSET) == (0xC0, 0xFC, 0x100)
    assert [register_name(o) for o in (0x70, 0x74, 0x104)] == ["Status", "offset 0x74", "config+0x4"]


def test_feature_words(ram):
    _, mmio, regs, _ = machine(ram)
    words = []
    for word in (0, 1, 2, 3, 4, 0xFFFFFFFF):
        regs[R.DeviceFeaturesSel] = word
        words.append(regs[R.DeviceFeatures])
    assert words == [DEVICE & 0xFFFFFFFF, 1 | 1 << 8, 0, 0, 0, 0]
    assert not mmio.bad_accesses


@pytest.mark.parametrize(
    ("features", "accepted"),
    [
        (DEVICE, True),
        (RING_FEATURES, True),
        (1 << 32, True),
        (DEVICE | CommonFeature.RING_RESET, True),
        (0, False),  # a driver of the legacy kind
        (1 << 32 | 1 << 34, False),
        (1 << 32 | 1 << 20, False),
    ],
)
def test_features_ok(ram, features, accepted):
    """basic.features.device-3: FEATURES_OK reads back clear if refused; the driver may try again."""
    device, mmio, regs, _ = machine(ram)
    assert regs.negotiate(features) is accepted
    assert device.negotiated == (features & ~int(CommonFeature.RING_RESET) if accepted else 0)
    assert bool(mmio.bad_accesses) is not accepted
    if not accepted:
        regs[R.Status] = 7
        assert regs[R.Status] == 3
        assert regs.negotiate(DEVICE)


def test_features_beyond_the_second_word(ram):
    _, mmio, regs, _ = machine(ram)
    for word, value in [(2, 1), (7, 0), (7, 5)]:
        regs[R.DriverFeaturesSel] = word
        regs[R.DriverFeatures] = value
    assert not regs.negotiate(DEVICE & 0xFFFFFFFF)
    assert mmio.bad_accesses["DriverFeatures beyond bit 127"] == 1


def test_features_stay_after_features_ok(ram):
    """basic.init.driver-4: later writes change nothing."""
    device, mmio, regs, _ = machine(ram)
    regs.negotiate(RING_FEATURES)
    regs[R.DriverFeatures] = 0xFF
    regs[R.Status] = 15
    assert mmio.driver_features == device.negotiated == RING_FEATURES
    assert mmio.bad_accesses["DriverFeatures after FEATURES_OK"] == 1


def test_status_only_grows(ram):
    """basic.status.driver-2 broken: a bit that is left out stays; unknown ones and SUSPEND are not taken."""
    _, mmio, regs, _ = machine(ram)
    regs.negotiate()
    regs[R.Status] = 0xFFFFFF00 | Status.SUSPEND | Status.DEVICE_NEEDS_RESET
    assert regs[R.Status] == 11
    assert mmio.bad_accesses["Status without a bit that was set"] == 1


def test_status_in_another_order(ram):
    """A driver that says everything at once, or skips FEATURES_OK, is served all the same."""
    device, _, regs, _ = machine(ram)
    regs[R.DriverFeaturesSel] = 1
    regs[R.DriverFeatures] = 1
    regs.queue(0, QueueLayout.place(0, 8))
    regs[R.Status] = 7
    assert regs[R.Status] == 7
    assert device.queue(QueueRole.INFLATE) is not None
    regs[R.Status] = 0
    regs[R.DriverFeatures] = 1
    regs[R.Status] = 15
    assert regs[R.Status] == 15 & ~12  # word 0 was selected by the reset


def test_nothing_is_touched_before_driver_ok(ram):
    """basic.status.device-1 and -2: queues wait for DRIVER_OK, then what was there is served once it is notified."""
    device, mmio, regs, levels = machine(ram)
    device.set_target(7)
    layout = one_buffer(ram)
    before = ram.read(0, ram.size)
    regs.negotiate()
    regs.queue(0, layout)
    regs[R.QueueNotify] = 0
    mmio.deliver()
    assert ram.read(0, ram.size) == before
    assert regs[R.InterruptStatus] == 0
    assert mmio.bad_accesses["QueueNotify before DRIVER_OK"] == 1
    regs[R.Status] = 15
    assert ram.array(layout.used + 2, 1, "<u2")[0] == 1
    assert regs[R.InterruptStatus] == 3
    assert levels == [1]


def one_buffer(ram, size=8, at=4096):
    """Write a ring with one readable buffer of one PFN, without any help."""
    layout = QueueLayout.place(at, size)
    desc = ram.array(layout.desc, 1, [("addr", "<u8"), ("len", "<u4"), ("flags", "<u2"), ("next", "<u2")])
    desc[0] = (64, 4, 0, 0)
    ram.write(64, (3).to_bytes(4, "little"))
    ram.array(layout.avail, 3, "<u2")[:] = (0, 1, 0)
    return layout


def test_interrupt_status(ram):
    """mmio.regs.device-3: a bit stays until it is acknowledged; mmio.regs.device-4: the others read 0."""
    device, mmio, regs, levels = machine(ram)
    regs.negotiate()
    regs[R.Status] = 15
    assert regs[R.InterruptStatus] == 0
    device.set_target(1)
    mmio.deliver()
    assert [regs[R.InterruptStatus] for _ in range(3)] == [2, 2, 2]
    regs[R.InterruptACK] = 1
    assert regs[R.InterruptStatus] == 2
    assert levels == [1]
    regs[R.InterruptACK] = 0xFFFFFFFF
    assert regs[R.InterruptStatus] == 0
    assert levels == [1, 0]
    assert mmio.bad_accesses["InterruptACK of undefined bits"] == 1


def test_reset(ram):
    """mmio.regs.device-5: InterruptStatus and every QueueReady read 0; mmio.regs.device-8: so does QueueReset;
    basic.reset.device-1: Status reads 0; basic.reset.device-2 and -3: no notification and no queue after that.
    """
    device, mmio, regs, levels = machine(ram)
    layout = one_buffer(ram)
    regs.negotiate()
    regs.queue(0, layout)
    regs.queue(1, QueueLayout.place(3 * 4096, 8))
    regs[R.Status] = 15
    device.set_target(1)
    mmio.deliver()
    regs[R.Status] = 0
    assert regs[R.Status] == regs[R.InterruptStatus] == 0
    for index in range(5):
        regs[R.QueueSel] = index
        assert regs[R.QueueReady] == regs[R.QueueReset] == 0
    before = ram.read(0, ram.size)
    device.set_target(2)
    regs[R.QueueNotify] = 0
    mmio.deliver()
    assert mmio.poll() == 0
    assert ram.read(0, ram.size) == before
    assert levels == [1, 0]


def test_generation(ram):
    """mmio.regs.device-6: ConfigGeneration changes with the config space."""
    device, _, regs, _ = machine(ram)
    seen = [regs[R.ConfigGeneration]]
    for target in (5, 6, 5):
        device.set_target(target)
        seen.append(regs[R.ConfigGeneration])
    assert len(set(seen)) == 4


def test_config_space(ram):
    """basic.config.device-1: readable before FEATURES_OK, in any natural width; past its end it reads 0."""
    device, mmio, _, _ = machine(ram)
    device.set_target(0x04030201)
    assert [mmio.read(0x100 + i, 1) for i in range(4)] == [1, 2, 3, 4]
    assert [mmio.read(0x100 + i, 2) for i in (0, 2)] == [0x0201, 0x0403]
    assert mmio.read(0x110, 4) == mmio.read(0x1FC, 4) == 0
    mmio.write(0x104, 4, 0x1_0000_0007)
    assert device.actual == 7
    mmio.write(0x100, 4, 9)
    assert device.config[0] == 0x04030201
    assert device.bad_requests


def test_config_of_a_device_that_raises(ram):
    class Raises(BalloonDevice):
        def read_config(self, offset, length):
            raise UsageError("no")

        def write_config(self, offset, data):
            raise UsageError("neither")

    mmio = MmioDevice(Raises(), ram)
    assert mmio.read(0x100, 4) == 0
    mmio.write(0x100, 4, 1)
    assert dict(mmio.bad_accesses) == {"config read: no": 1, "config write: neither": 1}


@pytest.mark.parametrize(
    ("kind", "offset", "size"),
    [
        ("read", R.QueueNotify, 4),
        ("read", R.Status, 1),
        ("read", R.Status, 8),
        ("read", R.Status + 2, 4),
        ("read", R.Status + 2, 2),
        ("read", 0x40, 4),
        ("read", -4, 4),
        ("read", 0x200, 4),
        ("read", 0x1FE, 4),
        ("read", 0x102, 4),
        ("read", 0x100, 8),
        ("read", 0x100, 0),
        ("write", R.MagicValue, 4),
        ("write", R.ConfigGeneration, 4),
        ("write", R.Status, 2),
        ("write", 0x48, 4),
        ("write", 1 << 64, 4),
    ],
)
def test_bad_accesses_are_counted(ram, kind, offset, size):
    device, mmio, regs, _ = machine(ram)
    device.set_target(0xFFFFFFFF)
    regs.negotiate()
    dump = mmio.dump()
    if kind == "read":
        assert mmio.read(offset, size) == 0
    else:
        mmio.write(offset, size, 0xFFFFFFFF)
    assert sum(mmio.bad_accesses.values()) == 1
    assert mmio.dump().splitlines()[:7] == dump.splitlines()


def test_queue_settings(ram):
    """mmio.regs.driver-15 broken: settings of a ready queue stay; mmio.regs.driver-14 broken: too large a queue
    needs a reset; queues that are not there read 0.
    """
    _, mmio, regs, levels = machine(ram)
    regs[R.QueueSel] = 5
    assert regs[R.QueueSizeMax] == regs[R.QueueReady] == regs[R.QueueReset] == 0
    regs[R.QueueReady] = 1
    assert mmio.bad_accesses["QueueReady of a queue that does not exist"] == 1
    regs.negotiate()
    regs.queue(3, QueueLayout.place(0x1000, 16))
    assert regs[R.QueueSizeMax] == 1024
    for register in QUEUE_SETTINGS:
        regs[register] = 1
    assert mmio.queues[3].size == 16
    assert sum(n for why, n in mmio.bad_accesses.items() if why.endswith("is ready")) == 7
    regs[R.QueueReady] = 2
    assert regs[R.QueueReady] == 1
    regs[R.Status] = 15
    regs.queue(0, QueueLayout(256, 0x2000, 0x4000, 0x5000))
    assert regs[R.Status] & Status.DEVICE_NEEDS_RESET
    assert levels == [1]
    assert "mmio.regs.driver-14" in str(mmio.last_error)
    assert mmio.queues[3].ring is not None  # the others live


def test_queue_reset_needs_the_feature(ram):
    """mmio.regs.device-10 holds only with RING_RESET; mmio.regs.device-9, -12: see tests of the driver."""
    _, mmio, regs, _ = machine(ram, features=DEVICE)
    regs.negotiate(DEVICE)
    regs.queue(0, QueueLayout.place(0x1000, 16))
    regs[R.QueueReset] = 1
    assert regs[R.QueueReady] == 1
    assert mmio.bad_accesses
    with pytest.raises(UsageError):
        MmioDevice(BalloonDevice(), ram, features=1 << 34)


@pytest.mark.parametrize("data", [0, CommonFeature.NOTIFICATION_DATA])
def test_notify_with_data(ram, data):
    """ring.notifdata-1: the upper half of QueueNotify is the driver's avail index."""
    _, mmio, regs, _ = machine(ram, features=DEVICE)
    mmio._transport_features = int(data)
    layout = one_buffer(ram)
    regs.negotiate()
    regs.queue(0, layout)
    regs[R.Status] = 15
    regs[R.QueueNotify] = 1 << 16
    assert ram.array(layout.used + 2, 1, "<u2")[0] == bool(data)


def test_held(ram):
    """A paused VM: a notification is kept until it goes on."""
    device, mmio, regs, levels = machine(ram)
    layout = one_buffer(ram)
    regs.negotiate()
    regs.queue(0, layout)
    regs[R.Status] = 15
    mmio.hold()
    regs[R.QueueNotify] = 0
    assert mmio.poll() == 0
    assert device.ballooned_pages == 0
    mmio.release()
    assert device.ballooned_pages == 1
    assert levels[0] == 0
    assert levels[-1] == 1


# -- drivers that write what they like ----------------------------------------------------------------------------

OFFSETS = st.one_of(
    st.sampled_from([int(r) for r in R]), st.sampled_from([int(r) for r in WRITABLE]), st.integers(-8, 0x210)
)
VALUES = st.one_of(
    st.integers(0, 9), st.sampled_from([1 << i for i in range(33)]), st.integers(-1, 1 << 65), st.just(0x30)
)
SIZES = st.one_of(st.just(4), st.just(4), st.integers(-1, 9))


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.booleans(), OFFSETS, SIZES, VALUES), max_size=60),
    st.binary(min_size=0, max_size=400),
    st.booleans(),
    st.booleans(),
)
def test_anything_may_be_written(accesses, junk, live, on_notify):
    """Nothing raises or hangs, and nothing outside RAM is touched; a reset always recovers."""
    guard = bytearray(b"\xa5" * (3 * MIB))
    ram = GuestMemory.from_buffers([(0, memoryview(guard)[MIB : 2 * MIB])])
    ram.write(0, bytes(MIB))
    levels = []
    device = BalloonDevice(DEVICE)
    mmio = MmioDevice(device, ram, irq=levels.append, on_notify=on_notify)
    if live:
        regs = Raw(mmio)
        regs.negotiate()
        for index in range(5):
            regs.queue(index, QueueLayout.place(0x1000 * index, 16))
        regs[R.Status] = 15
        ram.write(0, junk)
        ram.write(0x1000, junk)
        ram.write(0x3000, junk)
    for write, offset, size, value in accesses:
        if write:
            mmio.write(offset, size, value)
        else:
            got = mmio.read(offset, size)
            assert 0 <= got < 1 << 32
        assert mmio.irq_level == (levels[-1] if levels else 0)
    mmio.poll()
    device.set_target(3)
    mmio.deliver()
    assert guard[:MIB] == guard[2 * MIB :] == b"\xa5" * MIB
    saved = mmio.save()
    mmio.dump()
    again = MmioDevice(BalloonDevice(DEVICE), ram)
    again.load(saved)
    again.release()
    mmio.write(R.Status, 4, 0)
    assert mmio.irq_level == 0
    assert mmio.status == 0
    ram.write(0, bytes(MIB))
    driver = BalloonDriver(MemoryManager.create(ram, watermark=0), MmioTransport(mmio))
    driver.probe()
    while driver.step():
        mmio.poll()
        driver.interrupt(driver.transport.interrupts())
    assert device.actual == 3


@settings(max_examples=100)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3),
        lambda s: (
            st.lists(s)
            | st.dictionaries(
                st.sampled_from(
                    ["status", "features", "selected", "queues", "size", "base", "device", "driver", "queue"]
                ),
                s,
            )
        ),
    )
)
def test_anything_may_be_loaded(saved):
    """State that is not state is refused, never half taken."""
    with GuestMemory.create(MIB) as ram:
        mmio = MmioDevice(BalloonDevice(DEVICE), ram)
        try:
            mmio.load(saved)
        except VirtioError:
            assert mmio.status == 0
