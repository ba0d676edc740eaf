"""virtio-mmio: queues that are reset, stopped and moved to another device."""

from __future__ import annotations

import contextlib
import json
import math

import numpy as np
import pytest
from mmio_pair import ALL, MmioPair, R

from balloon_dev.device import BalloonDevice
from balloon_dev.features import BalloonFeature, QueueRole
from guest_driver.balloon import BalloonDriver
from guest_driver.balloon.state import COMMAND_SLOTS
from guest_driver.memory_manager import MemoryManager
from guest_driver.mmio import MmioTransport
from vring.errors import DeviceError, UsageError
from vring.features import CommonFeature, Status
from vring.memory import GuestMemory
from vring.mmio import MmioDevice
from vring.split import DriverQueue, QueueLayout

# -- queue reset and stop -----------------------------------------------------------------------------------------


def hand_driver(pair, queue=0, size=8):
    """Set one queue up by hand; its ring lies in the last page but one."""
    transport = pair.transport
    transport.set_driver_features(transport.device_features())
    layout = QueueLayout.place(pair.memory.end - 2 * 4096, size)
    transport.setup_queue(queue, layout)
    transport.driver_ok()
    return layout


def give(pair, ring, pfn):
    """Put one page into the balloon."""
    at = pair.memory.end - 4096
    pair.memory.write(at, int(pfn).to_bytes(4, "little"))
    segments = np.zeros(1, dtype=ring.segs.dtype)
    segments["addr"], segments["len"] = at, 4
    assert ring.add(segments, [0], [1]) == 1
    ring.publish()
    pair.transport.kick(0)
    return len(ring.collect()[0])


def new_ring(pair, layout):
    return DriverQueue(pair.memory, layout, event_idx=True)


def test_ring_reset():
    """mmio.regs.device-10, mmio.regs.device-12, mmio.regs.driver-21 and basic.vqreset.device-3: the queue is reset,
    indexes included; mmio.regs.driver-22 and mmio.regs.driver-23: it is used again, with other settings
    (basic.vqenable.device-1); mmio.regs.device-9: QueueReset reads 0 then; others go on.
    """
    with MmioPair(probe=False) as pair:
        layout = hand_driver(pair)
        ring = new_ring(pair, layout)
        assert [give(pair, ring, pfn) for pfn in (5, 6, 7)] == [1, 1, 1]
        pair.transport.reset_queue(0)
        assert pair.mmio.queues[0].ring is None
        used = pair.memory.read(layout.used, layout.used_bytes)
        pair.bus.device.write(R.QueueNotify, 4, 0)  # basic.vqreset.device-1
        assert pair.memory.read(layout.used, layout.used_bytes) == used
        other = QueueLayout.place(pair.memory.end - 4 * 4096, 32)
        ring = new_ring(pair, other)
        pair.transport.setup_queue(0, other)
        assert pair.mmio.read(R.QueueReset, 4) == 0
        assert pair.mmio.read(R.QueueReady, 4) == 1
        assert [give(pair, ring, pfn) for pfn in (8, 9)] == [1, 1]
        assert pair.device.ballooned_pages == 5
        assert pair.memory.read(layout.used, layout.used_bytes) == used


def test_ring_reset_must_be_negotiated():
    with MmioPair(accept=ALL & ~CommonFeature.RING_RESET) as pair, pytest.raises(UsageError, match="RING_RESET"):
        pair.transport.reset_queue(0)
    with MmioPair(features=ALL) as pair:
        assert pair.driver.features & CommonFeature.RING_RESET
        plain = MmioDevice(BalloonDevice(), pair.memory, features=0)
        assert not plain.offered_features & CommonFeature.RING_RESET


def test_a_queue_is_stopped_and_started():
    """mmio.regs.driver-16 and mmio.regs.driver-17: QueueReady 0, read back; mmio.regs.device-7: no ring access then;
    made ready again it goes on where it was, set up anew it begins at 0.
    """
    with MmioPair(probe=False) as pair:
        layout = hand_driver(pair)
        ring = new_ring(pair, layout)
        give(pair, ring, 5)
        start = len(pair.bus.log)
        pair.transport.stop_queue(0)
        assert pair.bus.names(start) == ["wQueueSel", "wQueueReady", "rQueueReady"]
        used = pair.memory.read(layout.used, layout.used_bytes)
        pair.mmio.write(R.QueueNotify, 4, 0)
        assert pair.memory.read(layout.used, layout.used_bytes) == used
        pair.mmio.write(R.QueueReady, 4, 1)
        pair.bus.ready.add(0)
        assert give(pair, ring, 6) == 1
        pair.transport.stop_queue(0)
        ring = new_ring(pair, layout)
        pair.transport.setup_queue(0, layout)
        assert give(pair, ring, 7) == 1
        assert pair.device.ballooned_pages == 3


def test_resets_from_within_the_serving_of_a_queue():
    """mmio.regs.device-11: QueueReset reads 1 until the queue is at rest; likewise QueueReady and Status."""
    with MmioPair(probe=False) as pair:
        seen = []

        def discard(addr, length):
            for register, value in [(R.QueueReset, 1), (R.QueueReady, 0), (R.Status, 0)]:
                pair.mmio.write(register, 4, value)
                seen.append(pair.mmio.read(register, 4))
            with pytest.raises(UsageError, match="being served"):
                pair.mmio.save()

        pair.device.discard = discard
        layout = hand_driver(pair)
        ring = new_ring(pair, layout)
        assert give(pair, ring, 5) == 1
        assert seen == [1, 1, 15]
        assert pair.mmio.read(R.QueueReset, 4) == pair.mmio.read(R.Status, 4) == 0
        assert pair.mmio.queues[0].ring is None


@pytest.mark.parametrize("error", [OSError("full"), UsageError("wrong")])
def test_a_callback_that_fails_loses_no_buffer(error):
    """What the host's own code raises comes out; the guest's buffer is found again."""
    with MmioPair(probe=False) as pair:
        failures = [error]

        def discard(addr, length):
            if failures:
                raise failures.pop()

        pair.device.discard = discard
        ring = new_ring(pair, hand_driver(pair))
        with pytest.raises(type(error), match=str(error)):
            give(pair, ring, 5)
        assert not pair.mmio.status & Status.DEVICE_NEEDS_RESET
        assert len(ring.collect()[0]) == 0
        assert pair.mmio.poll() == 1
        assert len(ring.collect()[0]) == 1
        assert pair.device.ballooned_pages == 1


# -- migration ----------------------------------------------------------------------------------------------------


def moved(pair):
    """Move the guest to another device and memory, as a migration does; return the new pair."""
    pair.mmio.hold()
    saved = json.loads(json.dumps({"device": pair.device.save(), "mmio": pair.mmio.save()}))
    new = MmioPair.__new__(MmioPair)
    new.memory = GuestMemory.create(pair.memory.size)
    new.memory.write(0, pair.memory.read(0, pair.memory.size))
    new.levels = []
    new.device = BalloonDevice(pair.device.offered_features, profile=pair.device.profile)
    new.mmio = MmioDevice(new.device, new.memory, irq=new.levels.append)
    new.device.load(saved["device"])
    new.mmio.load(saved["mmio"])
    assert not new.levels  # told at release
    new.bus = new.mmio
    new.transport = MmioTransport(new.mmio, running=True, polls=20)
    new.manager = MemoryManager.attach(new.memory)
    new.driver = BalloonDriver.attach(new.manager, new.transport, {}, profile=new.device.profile, features=ALL, batch=4)
    new.before = pair.before
    return new


@pytest.mark.parametrize("steps", range(0, 40, 3))
def test_saved_at_any_step(steps):
    """The guest goes on elsewhere in the midst of a hint run, with its balloon and its statistics buffer."""
    with MmioPair(mib=32, on_notify=False) as pair:
        pair.target(100)
        pair.device.start_hinting()
        pair.device.set_target(150)
        pair.mmio.deliver()
        for step in range(steps):
            pair.driver.interrupt(pair.transport.interrupts())
            pair.driver.step()
            if step % 2:
                pair.mmio.poll()
        with moved(pair) as new:
            assert new.mmio.held
            new.mmio.release()
            assert new.levels[-1] == 1
            new.settle()
            assert new.ballooned() == 150
            assert new.device.request_stats()
            new.settle()
            new.device.finish_hinting()
            new.settle()
            assert new.driver.hinted_blocks == 0
            assert new.hint_run()
            assert not new.device.bad_requests
            new.driver.remove()
            new.unchanged()


def test_a_driver_goes_on_only_where_the_state_is():
    with MmioPair() as pair:
        transport = MmioTransport(MmioDevice(BalloonDevice(ALL & ~(1 << 40)), pair.memory), running=True)
        features = transport.device_features()
        with pytest.raises(DeviceError, match="taken over"):
            transport.set_driver_features(features)
        with pytest.raises(DeviceError, match="taken over"):
            transport.setup_queue(0, QueueLayout.place(0, 8))
        with pytest.raises(DeviceError, match="taken over"):
            transport.driver_ok()
        with pytest.raises(UsageError, match="base index"):
            pair.transport.setup_queue(0, QueueLayout.place(0, 8), base=3)
        with pytest.raises(DeviceError, match="QueueReady reads 1"):
            pair.transport.setup_queue(0, QueueLayout.place(0, 8))
        with pytest.raises(UsageError, match=r"mmio\.regs\.driver-14"):
            pair.transport.setup_queue(0, QueueLayout.place(0, 1024))


def test_state_that_cannot_be_loaded():
    with MmioPair() as pair:
        good = pair.mmio.save()
        queue = good["queues"][0]
        for wrong in [
            {},
            good | {"features": -1},
            good | {"features": 1 << 50},
            good | {"status": "x"},
            good | {"queues": good["queues"][:2]},
            good | {"selected": {}},
            good | {"queues": [None] * 5},
            good | {"queues": [queue | {"base": 1 << 16}, *good["queues"][1:]]},
            good | {"queues": [queue | {"desc": -1}, *good["queues"][1:]]},
            good | {"queues": [queue | {"size": math.inf}, *good["queues"][1:]]},
            good | {"queues": [*good["queues"][:4], queue | {"used": 10**400}]},
            good | {"queues": [*good["queues"][:4], queue | {"ready": 1}]},
            good | {"features": math.inf},
            good | {"features": math.nan},
            good | {"status": 256},
            good | {"selected": good["selected"] | {"queue": math.inf}},
        ]:
            mmio = MmioDevice(BalloonDevice(pair.device.offered_features), pair.memory)
            mmio.write(R.Status, 4, 3)
            with pytest.raises(UsageError):
                mmio.load(wrong)
            assert (mmio.status, mmio.held, mmio.device.negotiated) == (0, False, 0)
            assert mmio.save()["queues"] == MmioDevice(mmio.device, pair.memory).save()["queues"]


def test_state_is_not_loaded_while_a_queue_is_served():
    with MmioPair(on_notify=False) as pair:
        saved, refused = pair.mmio.save(), []

        def discard(addr, length):
            with pytest.raises(UsageError, match="while a queue is being served") as caught:
                pair.mmio.load(saved)
            refused.append(caught)

        pair.device.discard = discard
        pair.target(100)
        assert refused
        assert pair.device.ballooned_pages == 100


@pytest.mark.parametrize("attached", [False, True], ids=["probed", "attached"])
@pytest.mark.parametrize("role", list(QueueRole), ids=lambda role: role.value)
@pytest.mark.parametrize("steps", range(0, 30, 4))
def test_driver_resets_a_queue_at_any_step(role, steps, attached):
    """RING_RESET with anything on its way: whatever the device has not answered is asked again, no page is lost."""
    with contextlib.ExitStack() as stack:
        pair = stack.enter_context(MmioPair(mib=32, on_notify=False))
        pair.target(100)
        if attached:
            pair = stack.enter_context(moved(pair))
            pair.mmio.release()
            pair.settle()
        pair.device.start_hinting()
        pair.device.set_target(600)
        pair.device.request_stats()
        pair.mmio.deliver()
        for step in range(steps):
            pair.driver.interrupt(pair.transport.interrupts())
            pair.driver.step(100.0)
            if step % 3 == 2:
                pair.mmio.poll()
        pair.driver.reset_queue(role)
        pair.settle(100.0)
        assert pair.ballooned() == 600
        assert pair.device.request_stats()
        pair.settle(100.0)
        assert pair.device.stats.values["stat-free-memory"] == pair.manager.free_pages * 4096
        pair.device.finish_hinting()
        pair.settle(100.0)
        assert pair.driver.hinted_blocks == 0
        assert pair.hint_run()
        pair.settle(200.0)
        assert pair.device.counters["bytes reported"] > 0
        pair.driver.reset_queue(role)  # at rest
        pair.target(50, 300.0)
        assert pair.ballooned() == 50
        pair.driver.remove()
        pair.unchanged()


def test_a_report_on_its_way_is_made_again():
    with MmioPair(mib=32, on_notify=False) as pair:
        pair.settle()
        while not int(pair.driver._state["report_posted"]):
            assert pair.driver.step(100.0)
        n = int(pair.driver._state["report_blocks"])
        pair.driver.reset_queue(QueueRole.REPORTING)
        pair.settle(100.0)
        assert pair.device.counters["bytes reported"] >= n << 22
        assert int(pair.driver._state["report_blocks"]) == 0
        pair.driver.remove()
        pair.unchanged()


def test_commands_on_their_way_do_not_use_the_driver_up():
    """Each command has a slot in memory; slots of commands that were lost are free again."""
    with MmioPair(mib=32, on_notify=False) as pair:
        pair.settle()
        for _ in range(COMMAND_SLOTS):
            pair.device.start_hinting()
            pair.mmio.deliver()
            pair.driver.interrupt(pair.transport.interrupts())
            for _ in range(6):
                pair.driver.step()
            pair.driver.reset_queue(QueueRole.FREE_PAGE)
        pair.device.finish_hinting()
        pair.settle()
        assert pair.hint_run()
        pair.driver.remove()
        pair.unchanged()


def test_a_queue_that_is_not_there_cannot_be_reset():
    with (
        MmioPair(accept=ALL & ~int(BalloonFeature.REPORTING)) as pair,
        pytest.raises(UsageError, match="no reporting_vq"),
    ):
        pair.driver.reset_queue(QueueRole.REPORTING)
