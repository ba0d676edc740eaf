"""A balloon driver and a balloon device joined in memory, for tests of the feature bits; kicks wait to be served."""

from __future__ import annotations

from balloon_dev.device import BalloonDevice
from balloon_dev.features import ALL_BALLOON_FEATURES, RING_FEATURES, QueueRole
from balloon_dev.profiles import SPEC
from guest_driver.balloon import DEFAULT_FEATURES, BalloonDriver
from guest_driver.memory_manager import MemoryManager, Owner
from guest_driver.transport import Interrupts
from host_qemu_side.discard import Discarder
from vring import bitmap
from vring.errors import DeviceError
from vring.features import CommonFeature
from vring.memory import GuestMemory
from vring.split import DeviceQueue

MIB = 1 << 20
ALL = ALL_BALLOON_FEATURES | RING_FEATURES


class PairTransport:
    """Straight onto a device; `trace` notes what the driver did, `fail_at` makes the n-th call fail."""

    def __init__(self, device, memory):
        self.device, self.memory = device, memory
        self.raised = Interrupts()
        self.kicked = set()
        self.queues = {}
        self.live = False
        self.trace = []
        self.fail_at = None
        self.answers = True
        """Whether `wait` lets the device work."""
        self.waits = 0

    def _note(self, what, *details):
        self.trace.append((what, *details))
        if self.fail_at is not None:
            self.fail_at -= 1
            if self.fail_at < 0:
                self.fail_at = None
                raise DeviceError(f"injected: {what}")

    def collect(self):
        self.raised.config |= self.device.take_config_change()
        self.raised.queues |= set(self.device.take_calls())

    def device_features(self):
        self._note("features?")
        return self.device.offered_features

    def set_driver_features(self, features):
        self._note("features", features)
        if not self.device.set_features(features):
            raise DeviceError("features refused")

    def read_config(self, offset, length):
        self._note("read", offset)
        return self.device.read_config(offset, length)

    def write_config(self, offset, data):
        self._note("write", offset, int.from_bytes(data, "little"))
        self.device.write_config(offset, data)

    def queue_size_max(self, index):
        self._note("size?", index)
        sizes = self.device.queue_sizes
        return sizes[index] if index < len(sizes) else 0

    def setup_queue(self, index, layout, *, base=0):
        self._note("setup", index)
        negotiated = self.device.negotiated
        self.queues[index] = DeviceQueue(
            self.memory,
            layout,
            base=base,
            event_idx=bool(negotiated & CommonFeature.EVENT_IDX),
            indirect=bool(negotiated & CommonFeature.INDIRECT_DESC),
            index=index,
        )

    def driver_ok(self):
        self._note("driver_ok")
        self.live = True
        for index, queue in self.queues.items():
            self.device.attach_queue(index, queue)

    def kick(self, index):
        self.trace.append(("kick", index, self.live))
        self.kicked.add(index)

    def interrupts(self):
        self.collect()
        raised, self.raised = self.raised, Interrupts()
        return raised

    def wait(self, index):
        self.waits += 1
        if self.answers:
            self.device.process(index)
            self.collect()
        return self.answers

    def filenos(self):
        return []

    def reset(self):
        self.device.reset()
        self.queues.clear()
        self.kicked.clear()
        self.raised = Interrupts()
        self.live = False

    def close(self):
        pass


class Pair:
    """One guest and its device. `serve` and `step` choose the order; `settle` lets both work until they rest."""

    def __init__(
        self,
        features=ALL,
        *,
        accept=DEFAULT_FEATURES,
        mib=64,
        profile=SPEC,
        driver_profile=None,
        poison=None,
        probe=True,
        **options,
    ):
        self.memory = GuestMemory.create(mib * MIB)
        self.host = GuestMemory.from_fds(self.memory.regions)
        self.discarded = []
        self.device = BalloonDevice(features, profile=profile, discard=self._discard, **options)
        self.device.set_memory(self.host)
        self.transport = PairTransport(self.device, self.host)
        self.manager = MemoryManager.create(self.memory, watermark=0)
        if poison is not None:
            self.manager.poison = poison
            self.manager.poison_free_pages()
        self.driver = BalloonDriver(
            self.manager, self.transport, features=accept, profile=driver_profile or profile, batch=4
        )
        self.before = self.manager.snapshot()
        if probe:
            self.driver.probe()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.memory.close()
        self.host.close()

    def _discard(self, addr, length):
        Discarder(self.host)(addr, length)
        self.discarded += list(zip(addr.tolist(), length.tolist(), strict=True))

    def serve(self, role):
        index = self.device.queue_number(role)
        n = 0 if index is None else self.device.process(index)
        self.transport.kicked.discard(index)
        self.transport.collect()
        return n

    def serve_all(self):
        for index in sorted(self.transport.kicked):
            self.transport.kicked.discard(index)
            self.device.process(index)
        self.transport.collect()

    def step(self, now=None):
        self.driver.interrupt(self.transport.interrupts())
        return self.driver.step(now)

    def settle(self, now=None, limit=5000):
        """Both sides work until they rest; a pair that never does is a failure."""
        for _ in range(limit):
            more = self.step(now)
            self.transport.collect()
            if self.transport.kicked:
                self.serve_all()
            elif not more and not self.transport.raised.config and not self.transport.raised.queues:
                return
        raise AssertionError("driver and device never come to rest")

    def target(self, pages, now=None):
        self.device.set_target(pages)
        self.settle(now)

    def owned(self, owner):
        return self.manager.pages_by_owner().get(int(owner), 0)

    def agree(self):
        """Guest and device mean the same pages by the balloon, and the allocator is sound."""
        self.manager.verify()
        assert bitmap.pages_of(self.manager.bitmap(Owner.BALLOON)).tolist() == self.device._ballooned.numbers().tolist()

    def unchanged(self):
        """The allocator holds exactly what it held before the driver was there."""
        self.manager.verify()
        assert self.before.difference(self.manager.snapshot()) == []

    def queue(self, role):
        return self.driver._queues[role]

    def hint_run(self, now=None):
        self.device.start_hinting()
        self.settle(now)
        blocks = self.driver.hinted_blocks
        self.device.finish_hinting()
        self.settle(now)
        return blocks


ROLES = list(QueueRole)
