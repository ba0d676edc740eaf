"""The balloon driver: its life cycle, and what it does next.

Behaves as the Linux driver does. All of its state lies in guest RAM (queues, their private state, ids, requests; which
blocks are held is in ``mem_map``), so a migrated guest goes on with `BalloonDriver.attach`.
"""

from __future__ import annotations

import contextlib
from math import inf
from typing import Any

import numpy as np

from balloon_dev.config import CMD_ID, NUM_PAGES, POISON_VAL
from balloon_dev.features import BalloonFeature, QueueRole
from balloon_dev.profiles import SPEC, Profile, QueueNumbering
from guest_driver.balloon.hinting import Hinting
from guest_driver.balloon.inflate import Inflating
from guest_driver.balloon.reporting import Reporting
from guest_driver.balloon.state import (
    DEFAULT_FEATURES,
    MAGIC,
    REPORT_DELAY,
    REPORT_RANGES,
    STATE,
    FreeAt,
    Request,
)
from guest_driver.balloon.stats import Statistics
from guest_driver.memory_manager import MemoryManager, Owner
from guest_driver.transport import CanResetQueues, Interrupts, Transport
from vring.errors import DeviceError, UsageError, VirtioError
from vring.features import CommonFeature
from vring.split import DESC, DriverQueue

__all__ = ["BalloonDriver"]


class BalloonDriver(Hinting, Inflating, Reporting, Statistics):
    """Drives a balloon device for a guest.

    Parameters
    ----------
    manager
        The guest's memory manager; pieces of its kernel area hold the driver's state.
    transport
        The device.
    profile
        How the queues are numbered, and how large they are at most.
    features
        Feature bits to accept if they are offered.
    batch
        Hint blocks taken from the allocator and published at a time. 1 is what Linux does (one allocation, one kick a
        block); more is the batch allocation the commit left to do.
    free_at
        When hinted blocks are freed.

    Notes
    -----
    Call `interrupt` with what the transport signalled (it only notes it: nothing is read there), and `step` until it
    returns False, then again at the next interrupt or at `next_wake`.
    """

    def __init__(
        self,
        manager: MemoryManager,
        transport: Transport,
        *,
        profile: Profile = SPEC,
        features: int = DEFAULT_FEATURES,
        batch: int = 64,
        free_at: FreeAt = FreeAt.DONE,
    ) -> None:
        if batch < 1:
            raise UsageError(f"a batch of {batch} blocks")
        self.manager, self.transport, self.profile = manager, transport, profile
        self.batch, self.free_at = batch, free_at
        self._wanted = features
        self._now = 0.0
        self._queues: dict[QueueRole, DriverQueue] = {}
        self._prepare_hinting()

    # -- life -----------------------------------------------------------------------------------------------------

    @classmethod
    def attach(
        cls, manager: MemoryManager, transport: Transport, bases: dict[int, int], **options: Any
    ) -> BalloonDriver:
        """Go on with the driver whose state is in this RAM, on a device that has taken over the saved state.

        Parameters
        ----------
        manager
            Attached to the guest's RAM.
        transport
            A fresh connection to the device.
        bases
            Avail index of each queue to go on from, by queue number, as the old device saved them.
        options
            As for the constructor.

        Raises
        ------
        UsageError
            If there is no driver state in this RAM.
        DeviceError
            If the device does not offer the features that were negotiated, or goes on where it takes buffers again.
        """
        driver = cls(manager, transport, **options)
        kernel = manager.kernel
        if kernel.find("balloon") is None:
            raise UsageError("there is no balloon driver in this guest's RAM")
        driver._map_state()
        if int(driver._state["magic"]) != MAGIC or not int(driver._state["ready"]):
            raise UsageError("the balloon driver in this guest's RAM was not running")
        offered = transport.device_features()
        if driver.features & ~offered:
            raise DeviceError(f"the guest runs with features {driver.features:#x}, this device offers {offered:#x}")
        transport.set_driver_features(driver.features)
        for role, index in driver._roles():
            state = kernel.find(f"{role.value}.state")
            if state is None:
                raise VirtioError(f"the kernel area of this RAM has no state of the {role.value}: it is damaged")
            queue = DriverQueue.attach(manager.memory, state, index=index)
            driver._queues[role] = queue
            base = bases.get(index, queue.used_idx)
            if (base - queue.used_idx) & 0xFFFF > (queue.avail_idx - queue.used_idx) & 0xFFFF:
                raise DeviceError(
                    f"a device cannot go on at avail index {base}: those from {queue.used_idx} up to {queue.avail_idx} "
                    "are in its hands",
                    queue=index,
                )
            transport.setup_queue(index, queue.layout, base=bases.get(index, 0))
        transport.driver_ok()
        driver._register()
        for _, index in driver._roles():  # kicks and interrupts do not travel: pretend one of each came
            transport.kick(index)
        driver._state["config_due"] = 1
        return driver

    def probe(self) -> None:
        """Initialise the device and the queues (VIRTIO 3.1.1 and 5.5.5).

        If that fails the device is reset and nothing is left behind but reserved memory; probing again is possible.

        Raises
        ------
        DeviceError
            If the device does not take what it offered, or has other queues.
        """
        self._reserve()
        self._map_state()
        try:
            self._probe()
        except BaseException:
            with contextlib.suppress(VirtioError):
                self.transport.reset()
            self._forget()
            raise

    def _probe(self) -> None:
        transport = self.transport
        self._record[:] = np.zeros(1, dtype=STATE)
        self._busy[:] = 0
        self._state["magic"] = MAGIC
        offered = transport.device_features()
        if not offered & CommonFeature.VERSION_1:
            raise DeviceError("the device does not offer VERSION_1; legacy devices are not supported")
        self._state["offered"] = offered
        self._state["features"] = self._negotiated(offered)
        transport.set_driver_features(self.features)
        for role, index in self._roles():
            self._set_up_queue(role, index)
        if (
            self.features & BalloonFeature.PAGE_POISON
        ):  # before DRIVER_OK, and never again (balloon.poison.driver-2, -3)
            transport.write_config(POISON_VAL, (self.manager.poison or 0).to_bytes(4, "little"))
        stats = self._queues.get(QueueRole.STATS)
        if stats is not None:
            self._prime_stats(stats)
        transport.driver_ok()
        if stats is not None:
            transport.kick(stats.index)
        self._state["ready"] = 1
        self._state["config_due"] = 1
        self._state["report_at"] = self._now + REPORT_DELAY
        self._register()

    def _negotiated(self, offered: int) -> int:
        """Return the features to accept, as Linux's validate callback does.

        PAGE_POISON is for guests that fill freed pages (balloon.features.driver-2). Such a guest that cannot tell the
        host must not report free pages: they would come back changed (balloon.features.driver-3).
        """
        features = offered & self._wanted
        if self.manager.poison is None:
            features &= ~int(BalloonFeature.PAGE_POISON)
        elif not features & BalloonFeature.PAGE_POISON:
            features &= ~int(BalloonFeature.REPORTING)
        return features

    def _set_up_queue(self, role: QueueRole, index: int) -> None:
        largest = self.transport.queue_size_max(index)
        if largest == 0:
            raise DeviceError(
                f"the device has no queue {index} for the {role.value}: {self._why_no_queue(role, index)}",
                queue=index,
                clause="balloon.queues-1",
            )
        # Some transports cannot ask for the largest size (vhost-user): what the profile says is no more than that.
        largest = min(largest, self.profile.queue_sizes[list(QueueRole).index(role)])
        largest = 1 << largest.bit_length() - 1  # a maximum may be any number, a size only a power of two (ring.size-1)
        layout, state = self._ring(role, largest)
        queue = DriverQueue(
            self.manager.memory,
            layout,
            state=state,
            event_idx=bool(self.features & CommonFeature.EVENT_IDX),
            indirect=self._indirect(role, layout.size),
            indirect_len=min(REPORT_RANGES, layout.size) if self._indirect(role, layout.size) is not None else 0,
            index=index,
            lax_lengths=True,
        )
        if role is QueueRole.FREE_PAGE:
            queue.disable_callbacks()  # used buffers are collected before the next add, never waited for
        self._queues[role] = queue
        self.transport.setup_queue(index, queue.layout)

    def _why_no_queue(self, role: QueueRole, index: int) -> str:
        offered, policy = int(self._state["offered"]), self.profile.numbering
        if all(other.number(role, offered, self.features) == index for other in QueueNumbering):
            return "its largest size reads 0, though the queue has that number by every policy"
        return f"it numbers its queues by another policy than {policy.value}"

    def _indirect(self, role: QueueRole, size: int) -> int | None:
        """Return where a queue's indirect tables lie, None for a queue that does without.

        Only reports have buffers of more than one segment, and a ring of many entries holds several of them anyway.
        """
        if role is not QueueRole.REPORTING or not self.features & CommonFeature.INDIRECT_DESC:
            return None
        if not 1 < size <= REPORT_RANGES:
            return None
        kernel, name = self.manager.kernel, f"{role.value}.indirect"
        place = kernel.find(name)
        return kernel.reserve(name, size * min(REPORT_RANGES, size) * DESC.itemsize, 64) if place is None else place

    def reset_queue(self, role: QueueRole) -> None:
        """Reset one queue and set it up anew (RING_RESET); the others go on.

        A request of which it is not known whether the device has seen it is made again, statistics are sent afresh: to
        the device both are the same twice. Hints are not: those that were on their way are lost, and their blocks stay
        with the driver until DONE as all others do.

        Raises
        ------
        UsageError
            If there is no such queue, or RING_RESET was not negotiated.
        DeviceError
            If the device does not finish.
        """
        queue = self._queues.get(role)
        if queue is None:
            raise UsageError(f"there is no {role.value} under the features {self.features:#x}")
        if not isinstance(self.transport, CanResetQueues):
            raise UsageError("this transport cannot reset one queue alone", queue=queue.index)
        self.transport.reset_queue(queue.index)
        queue.detach()
        if role is QueueRole.FREE_PAGE:
            self._busy[:] = 0
            queue.disable_callbacks()
        elif role is QueueRole.STATS:
            self._state["stats_due"] = 1
        elif role is QueueRole.REPORTING:
            self._state["report_posted"] = 0
        elif self._request_role() is role:
            self._state["request_posted"] = 0
        self.transport.setup_queue(queue.index, queue.layout)

    def remove(self) -> None:
        """Empty the balloon as far as the device answers, reset the device, give every page back to the allocator."""
        try:
            if self._queues:
                with contextlib.suppress(DeviceError):  # a broken queue: then reset is all the device gets to know
                    self._leak_all()
            self.transport.reset()
        finally:
            self._forget()

    def freeze(self) -> None:
        """Suspend the guest: as `remove`, for whatever comes back need not be the same device (Linux does so too)."""
        self.remove()
        self._state["magic"], self._state["frozen"] = MAGIC, 1

    def restore(self) -> None:
        """Resume the guest after `freeze`: probe again; the balloon is filled again to what the host asks for.

        Raises
        ------
        UsageError
            If it was not frozen.
        DeviceError
            As `probe`.
        """
        self._map_state()
        if not int(self._state["frozen"]):
            raise UsageError("the balloon driver was not frozen")
        self.probe()

    def _forget(self) -> None:
        """The device is reset: take back all that was with it."""
        for queue in self._queues.values():
            queue.detach()
        self._queues.clear()
        self._unregister()
        self._busy[:] = 0
        self._free_hinted()
        self._take_back_reported()
        self.manager.free_owned(0, self.manager.end_pfn, Owner.BALLOON)
        self._record[:] = np.zeros(1, dtype=STATE)

    def _register(self) -> None:
        self.manager.register_shrinker(self._shrink)
        self.manager.register_mover(Owner.BALLOON, self._move)
        if self.features & BalloonFeature.DEFLATE_ON_OOM:
            self.manager.register_oom_notifier(self._out_of_memory)

    def _unregister(self) -> None:
        self.manager.unregister_shrinker(self._shrink)
        self.manager.unregister_mover(Owner.BALLOON)
        self.manager.unregister_oom_notifier(self._out_of_memory)

    # -- facts ----------------------------------------------------------------------------------------------------

    @property
    def next_wake(self) -> float:
        """Guest time at which there is something to do without an interrupt; infinite if there never is."""
        times = [inf]
        if QueueRole.REPORTING in self._queues and not int(self._state["report_blocks"]):
            times.append(float(self._state["report_at"]))
        if int(self._state["working"]) and int(self._state["request"]) == Request.NONE:
            times.append(float(self._state["retry_at"]))
        return min(times)

    @property
    def queues(self) -> list[DriverQueue]:
        """The queues that are set up."""
        return list(self._queues.values())

    def statistics(self) -> dict[str, int]:
        """Return counters since the driver was probed."""
        names = ("runs", "blocks", "reclaimed", "done_seen", "received", "active")
        more = ("reported", "moved", "oom_deflated", "stats_sent")
        return {name: int(self._state[name]) for name in names + more}

    # -- work -----------------------------------------------------------------------------------------------------

    def interrupt(self, what: Interrupts) -> None:
        """Note an interrupt. Nothing is read here: that is the worker's business."""
        if what.config:
            self._state["config_due"] = 1

    def step(self, now: float | None = None) -> bool:
        """Do one small piece of work. Return whether there is more to do now.

        Parameters
        ----------
        now
            Guest time in seconds, never less than before. None: no time has passed; then nothing is done that waits for
            time (reports, another try to inflate).
        """
        if now is not None:
            self._now = now
        if not self._queues:
            return False
        if int(self._state["config_due"]):
            self._read_config()
            return True
        return self._balloon_step() or self._hint_step() or self._stats_step() or self._report_step()

    def _read_config(self) -> None:
        self._state["config_due"] = 0
        self._state["target"] = int.from_bytes(self.transport.read_config(NUM_PAGES, 4), "little")
        self._state["working"], self._state["retry_at"] = 1, self._now
        if not self.features & BalloonFeature.FREE_PAGE_HINT:
            return
        received = int.from_bytes(self.transport.read_config(CMD_ID, 4), "little")
        self._state["received"] = received
        if not int(self._state["sending"]):
            self._after_run()
