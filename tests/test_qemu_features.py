"""Every feature QEMU's balloon offers, used by the guest driver: all together and each alone, on both transports."""

from __future__ import annotations

import pytest

from balloon_dev.features import BalloonFeature, QueueRole
from guest_driver.balloon import DEFAULT_FEATURES
from guest_driver.qemu import QemuGuest, QemuMachine, QemuOptions
from guest_driver.qemu.exercise import exercise
from vring.errors import DeviceError, UsageError
from vring.features import CommonFeature

pytestmark = pytest.mark.qemu
MIB = 1 << 20
NONE = {"hint": False, "reporting": False, "deflate_on_oom": False, "poison": False, "indirect": False}
SWITCHES = {
    "hint": BalloonFeature.FREE_PAGE_HINT,
    "reporting": BalloonFeature.REPORTING,
    "deflate_on_oom": BalloonFeature.DEFLATE_ON_OOM,
    "poison": BalloonFeature.PAGE_POISON,
    "indirect": CommonFeature.INDIRECT_DESC,
    "event_idx": CommonFeature.EVENT_IDX,
}
ALWAYS = int(BalloonFeature.STATS_VQ | CommonFeature.VERSION_1)


@pytest.mark.parametrize("transport", ["mmio", "pci"])
def test_all_features(transport: str) -> None:
    with QemuMachine(QemuOptions(96 * MIB, transport)) as machine:
        guest = QemuGuest.boot(machine, poison=0)
        assert guest.driver.features == ALWAYS | sum(SWITCHES.values())
        done = exercise(guest, 2000)
        assert done.findings() == []
        assert done.inflated_pages == 2000
        assert done.reported_pages > 0
        assert done.oom_deflated_pages > 0
        used = [q.layout.size for q in guest.driver.queues]
        assert used == [128, 128, 128, 1024, 32]
        assert machine.binary.dpkg_verify_clean


@pytest.mark.parametrize("name", [None, *SWITCHES])
def test_one_feature_alone(name: str | None) -> None:
    """With nothing else offered but STATS_VQ, which QEMU cannot leave out; queues then have other numbers."""
    offered = {**NONE, "event_idx": False, **({name: True} if name else {})}
    with QemuMachine(QemuOptions(64 * MIB, **offered)) as machine:
        guest = QemuGuest.boot(machine, poison=0 if name == "poison" else None)
        assert guest.driver.features == ALWAYS | int(SWITCHES[name] if name else 0)
        done = exercise(guest, 1000)
        assert done.findings() == []
        assert bool(done.reported_pages) is (name == "reporting")
        assert bool(done.oom_deflated_pages) is (name == "deflate_on_oom")


def test_reports_of_poisoned_pages_drop_nothing() -> None:
    with QemuMachine(QemuOptions(64 * MIB)) as machine:
        done = exercise(QemuGuest.boot(machine, poison=0xAA), 1000)
        assert done.reported_pages > 0
        assert done.reported_dropped_pages == 0


@pytest.mark.parametrize("transport", ["mmio", "pci"])
def test_driver_removed_and_probed_again(transport: str) -> None:
    with QemuMachine(QemuOptions(64 * MIB, transport)) as machine:
        guest = QemuGuest.boot(machine)
        before = guest.manager.snapshot()
        machine.set_balloon(500)
        guest.run_until(lambda: machine.balloon_pages() == 500, 5, "the balloon")
        guest.driver.remove()
        assert guest.manager.snapshot() == before
        guest.driver.probe()
        guest.run_until(lambda: machine.balloon_pages() == 500, 5, "the balloon again")
        guest.manager.verify()


@pytest.mark.parametrize("role", [r for r in QueueRole if r is not QueueRole.STATS], ids=lambda role: role.value)
def test_one_queue_is_reset_and_used_again(role: QueueRole) -> None:
    """RING_RESET as QEMU's virtio-pci has it: the queue begins at index 0 again, at another place if one likes."""
    with QemuMachine(QemuOptions(96 * MIB, "pci")) as machine:
        guest = QemuGuest.boot(machine, poison=0, features=DEFAULT_FEATURES | int(CommonFeature.RING_RESET))
        assert guest.driver.features & CommonFeature.RING_RESET
        machine.set_balloon(1000)
        guest.run_until(lambda: machine.balloon_pages() == 1000, 10, "the balloon")
        machine.set_balloon(0)  # a request may be on its way
        guest.driver.reset_queue(role)
        done = exercise(guest, 2000)
        assert done.findings() == []
        guest.driver.reset_queue(role)
        assert exercise(guest, 1000).findings() == []


def test_qemu_keeps_the_buffer_of_a_statsq_that_was_reset() -> None:
    """QEMU 7.2 gives a buffer of before the reset back into the new ring: the driver notices; a whole reset helps."""
    with QemuMachine(QemuOptions(96 * MIB, "pci")) as machine:
        guest = QemuGuest.boot(machine, poison=0, features=DEFAULT_FEATURES | int(CommonFeature.RING_RESET))
        guest.run_for(0.1)
        guest.driver.reset_queue(QueueRole.STATS)
        with pytest.raises(DeviceError, match="queue 2, index 1: used element names no buffer"):
            exercise(guest, 1000)
        guest.driver.remove()
        guest.driver.probe()
        assert exercise(guest, 1000).findings() == []


def test_queue_reset_must_be_negotiated() -> None:
    with QemuMachine(QemuOptions(64 * MIB, "pci")) as machine:
        guest = QemuGuest.boot(machine)
        with pytest.raises(UsageError, match="RING_RESET was not negotiated"):
            guest.driver.reset_queue(QueueRole.INFLATE)
