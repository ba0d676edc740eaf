"""The balloon driver as a core without threads: it is told of interrupts and does one small step at a time.

Behaves as the Linux driver does since commit 86a559787e6: on a new command id it sends that id, then its free
MAX_ORDER-1 blocks, taken out of the allocator, one block per buffer, then a stop; it keeps the blocks until the host
says DONE, because freeing them dirties memory. A shrinker gives blocks back under pressure without telling the host.

All of its state lies in guest RAM (queues, their private state, ids, requests; which blocks are held is in
``mem_map``), so a migrated guest goes on with `BalloonDriver.attach`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np

from balloon_dev.config import ACTUAL, CMD_ID, NUM_PAGES
from balloon_dev.features import BalloonFeature, QueueRole
from balloon_dev.hinting import CMD_ID_DONE, CMD_ID_STOP
from balloon_dev.profiles import SPEC, Profile
from guest_driver.memory_manager import HINT_ORDER, Alloc, MemoryManager, Owner
from guest_driver.transport import Interrupts, Transport
from vring.errors import DeviceError, UsageError
from vring.features import CommonFeature
from vring.memory import PAGE_SIZE
from vring.split import SEG, SEG_WRITE, DriverQueue, QueueLayout

__all__ = ["BLOCK_BYTES", "DEFAULT_FEATURES", "BalloonDriver", "FreeAt"]

BLOCK_BYTES = PAGE_SIZE << HINT_ORDER
"""Size of a hinted block: 4 MiB."""
PFNS_PER_REQUEST = 256
"""PFNs in one inflate or deflate request, 1 MiB, as in Linux."""
COMMAND_SLOTS = 256
COMMAND_TOKEN = 1 << 63
"""Token bit of a command buffer; the rest is its slot. Tokens of blocks are their guest addresses."""

DEFAULT_FEATURES = int(
    BalloonFeature.MUST_TELL_HOST
    | BalloonFeature.DEFLATE_ON_OOM
    | BalloonFeature.FREE_PAGE_HINT
    | CommonFeature.VERSION_1
    | CommonFeature.EVENT_IDX
    | CommonFeature.INDIRECT_DESC
)
"""What the driver accepts where it is offered."""

STATE = np.dtype(
    [
        ("magic", "<u8"),
        ("features", "<u8"),
        ("offered", "<u8"),
        ("received", "<u4"),  # command id last read from the config space
        ("active", "<u4"),  # id of the run this driver opened last
        ("sending", "<u4"),  # whether that run is open
        ("ready", "<u4"),  # whether the queues are set up
        ("request", "<u4"),  # Request: which one the host has not answered
        ("request_pages", "<u4"),
        ("target", "<u4"),
        ("ballooned", "<u4"),  # pages in the balloon that the host has acknowledged
        ("config_due", "<u4"),  # an interrupt came, the config space was not read since
        ("runs", "<u8"),
        ("blocks", "<u8"),  # blocks hinted
        ("reclaimed", "<u8"),  # blocks the shrinker gave back
        ("done_seen", "<u8"),
    ]
)
MAGIC = int.from_bytes(b"VBDRIVER", "little")


class Request(IntEnum):
    """The inflate or deflate request on its way."""

    NONE = 0
    INFLATE = 1
    DEFLATE = 2


class FreeAt(IntEnum):
    """When the blocks of a run go back to the allocator."""

    DONE = 0
    """At DONE, as the commit says: freeing dirties memory and keeps a migration from converging."""
    STOP = 1
    """At every STOP: only to measure what that costs."""


class BalloonDriver:
    """Drives a balloon device for a guest.

    Parameters
    ----------
    manager
        The guest's memory manager; pieces of its kernel area hold the driver's state.
    transport
        The device.
    profile
        How the queues are numbered.
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
    returns False.
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
        self._queues: dict[QueueRole, DriverQueue] = {}
        self._segs = np.zeros(batch, dtype=SEG)
        self._segs["len"] = BLOCK_BYTES
        self._segs["flags"] = SEG_WRITE
        self._command = np.zeros(1, dtype=SEG)
        self._command["len"] = 4
        self._blocks = np.zeros(batch, dtype=np.uint64)

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
            If the device does not offer the features that were negotiated.
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
            assert state is not None
            queue = DriverQueue.attach(manager.memory, state, index=index)
            driver._queues[role] = queue
            transport.setup_queue(index, queue.layout, base=bases.get(index, 0))
        transport.driver_ok()
        driver._register()
        for _, index in driver._roles():  # kicks and interrupts do not travel: pretend one of each came
            transport.kick(index)
        driver._state["config_due"] = 1
        return driver

    def probe(self) -> None:
        """Initialise the device and the queues (VIRTIO 3.1.1).

        Raises
        ------
        DeviceError
            If the device does not take what it offered.
        """
        kernel, transport = self.manager.kernel, self.transport
        if kernel.find("balloon") is None:
            kernel.reserve("balloon", STATE.itemsize, 64)
            kernel.reserve("balloon.commands", COMMAND_SLOTS * 8, 64)
            kernel.reserve("balloon.pfns", PFNS_PER_REQUEST * 4, 64)
        self._map_state()
        self._record[:] = np.zeros(1, dtype=STATE)
        self._busy[:] = 0
        self._state["magic"] = MAGIC
        offered = transport.device_features()
        if not offered & CommonFeature.VERSION_1:
            raise DeviceError("the device does not offer VERSION_1; legacy devices are not supported")
        self._state["offered"] = offered
        self._state["features"] = offered & self._wanted
        transport.set_driver_features(self.features)
        for role, index in self._roles():
            size = transport.queue_size_max(index)
            if size == 0:
                raise DeviceError(
                    f"the device has no queue {index} for the {role.value}: it numbers its queues by another policy "
                    f"than {self.profile.numbering.value}",
                    queue=index,
                    clause="balloon.queues-1",
                )
            bytes_needed = QueueLayout.place(0, size).bytes
            ring, state = kernel.find(f"{role.value}.ring"), kernel.find(f"{role.value}.state")
            if ring is None or state is None:
                ring = kernel.reserve(f"{role.value}.ring", bytes_needed, 64)
                state = kernel.reserve(f"{role.value}.state", DriverQueue.state_bytes(size), 64)
            queue = DriverQueue(
                self.manager.memory,
                QueueLayout.place(ring, size),
                state=state,
                event_idx=bool(self.features & CommonFeature.EVENT_IDX),
                index=index,
                lax_lengths=True,
            )
            if role is QueueRole.FREE_PAGE:
                queue.disable_callbacks()  # used buffers are collected before the next add, never waited for
            self._queues[role] = queue
            transport.setup_queue(index, queue.layout)
        transport.driver_ok()
        self._state["ready"] = 1
        self._state["config_due"] = 1
        self._register()

    def remove(self) -> None:
        """Reset the device and give every page back to the allocator."""
        self.transport.reset()
        for queue in self._queues.values():
            queue.detach()
        self._queues.clear()
        self.manager.unregister_shrinker(self._shrink)
        self._busy[:] = 0
        self._free_hinted()
        self.manager.free_owned(0, self.manager.end_pfn, Owner.BALLOON)
        self._record[:] = np.zeros(1, dtype=STATE)

    def _map_state(self) -> None:
        kernel, memory = self.manager.kernel, self.manager.memory
        where, commands, pfns = (kernel.find(name) for name in ("balloon", "balloon.commands", "balloon.pfns"))
        assert where is not None
        assert commands is not None
        assert pfns is not None
        self._record = memory.array(where, 1, STATE)
        self._state = self._record[0]
        self._commands_gpa, self._pfns_gpa = commands, pfns
        self._ids = memory.array(commands, COMMAND_SLOTS, "<u4")
        self._busy = memory.array(commands + COMMAND_SLOTS * 4, COMMAND_SLOTS, "<u4")
        self._pfns = memory.array(pfns, PFNS_PER_REQUEST, "<u4")

    def _register(self) -> None:
        self.manager.register_shrinker(self._shrink)

    def _roles(self) -> list[tuple[QueueRole, int]]:
        """Queues this driver uses and their numbers."""
        roles = []
        for role in (QueueRole.INFLATE, QueueRole.DEFLATE, QueueRole.FREE_PAGE):
            index = self.profile.numbering.number(role, int(self._state["offered"]), self.features)
            if index is not None:
                roles.append((role, index))
        return roles

    # -- facts ----------------------------------------------------------------------------------------------------

    @property
    def features(self) -> int:
        """Negotiated feature bits."""
        return int(self._state["features"])

    @property
    def hinted_blocks(self) -> int:
        """Blocks taken out of the allocator for hints and not yet given back."""
        return self.manager.pages_by_owner().get(int(Owner.HINT), 0) >> HINT_ORDER

    def statistics(self) -> dict[str, int]:
        """Return counters since the driver was probed."""
        return {
            name: int(self._state[name]) for name in ("runs", "blocks", "reclaimed", "done_seen", "received", "active")
        }

    # -- work -----------------------------------------------------------------------------------------------------

    def interrupt(self, what: Interrupts) -> None:
        """Note an interrupt. Nothing is read here: that is the worker's business."""
        if what.config:
            self._state["config_due"] = 1

    def step(self) -> bool:
        """Do one small piece of work. Return whether there is more to do now."""
        if int(self._state["config_due"]):
            self._read_config()
            return True
        if self._balloon_step():
            return True
        return self._hint_step()

    def _read_config(self) -> None:
        self._state["config_due"] = 0
        self._state["target"] = int.from_bytes(self.transport.read_config(NUM_PAGES, 4), "little")
        if not self.features & BalloonFeature.FREE_PAGE_HINT:
            return
        received = int.from_bytes(self.transport.read_config(CMD_ID, 4), "little")
        self._state["received"] = received
        if not int(self._state["sending"]):
            self._after_run()

    # -- free page hinting ----------------------------------------------------------------------------------------

    def _hint_step(self) -> bool:
        queue = self._queues.get(QueueRole.FREE_PAGE)
        if queue is None:
            return False
        received, active = int(self._state["received"]), int(self._state["active"])
        if int(self._state["sending"]):
            if received != active:
                return self._close_run(queue)
            return self._send_blocks(queue)
        # The id sent is the id decided on: it is not read again in between, or a STOP that came meanwhile would open a
        # run under id 0.
        if received > CMD_ID_DONE and received != active and self._send_command(queue, received):
            self._state["active"] = received
            self._state["sending"] = 1
            self._state["runs"] += 1
            return True
        return False

    def _send_blocks(self, queue: DriverQueue) -> bool:
        self._reclaim(queue)
        room = min(queue.num_free - 1, self.batch)  # one slot is kept for the command that ends the run
        if room < 1:
            return False  # the host is slow; go on when it has used something
        blocks = self.manager.alloc_hint_blocks(room, out=self._blocks)
        n = len(blocks)
        if n:
            addresses = blocks << np.uint64(12)
            self._segs["addr"][:n] = addresses
            queue.add(self._segs[:n], addresses)
            self._state["blocks"] += n
            if queue.publish():
                self.transport.kick(queue.index)
        if n < room:
            return self._close_run(queue)  # out of free blocks
        return True

    def _close_run(self, queue: DriverQueue) -> bool:
        """Send the stop command. Return whether that is done."""
        if not self._send_command(queue, CMD_ID_STOP):
            return False
        self._state["sending"] = 0
        self._after_run()
        return True

    def _after_run(self) -> None:
        """No run is open: DONE lets the blocks go, STOP keeps them (unless that is what is to be measured)."""
        received = int(self._state["received"])
        if received == CMD_ID_DONE:
            self._free_hinted()
            self._state["done_seen"] += 1
        elif self.free_at is FreeAt.STOP and received != int(self._state["active"]):
            self._free_hinted()  # STOP, or a new id so soon after it that the STOP was never read

    def _send_command(self, queue: DriverQueue, command_id: int) -> bool:
        self._reclaim(queue)
        free = np.flatnonzero(self._busy == 0)
        if not len(free) or queue.num_free < 1:
            return False
        slot = int(free[0])
        self._ids[slot] = command_id
        self._busy[slot] = 1
        self._command["addr"] = self._commands_gpa + slot * 4
        queue.add(self._command, [COMMAND_TOKEN | slot])
        if queue.publish():
            self.transport.kick(queue.index)
        return True

    def _reclaim(self, queue: DriverQueue) -> None:
        """Collect used buffers. Blocks stay ours until DONE; command slots are free again."""
        while True:
            tokens, _ = queue.collect()
            if not len(tokens):
                return
            commands = tokens[tokens >= np.uint64(COMMAND_TOKEN)]
            self._busy[(commands & np.uint64(COMMAND_TOKEN - 1)).astype(np.int64)] = 0

    def _free_hinted(self) -> None:
        self.manager.free_owned(0, self.manager.end_pfn, Owner.HINT)

    def _shrink(self, pages: int) -> int:
        """Give hinted blocks back under memory pressure; the host is not told (VIRTIO 5.5.6.5.1, MAY)."""
        wanted = -(-pages >> HINT_ORDER) or 1
        blocks = self.manager.owned(Owner.HINT)[0][:wanted]
        if len(blocks):
            self.manager.free_bulk(blocks, HINT_ORDER)
            self._state["reclaimed"] += len(blocks)
        return len(blocks) << HINT_ORDER

    # -- inflate and deflate --------------------------------------------------------------------------------------

    def _balloon_step(self) -> bool:
        request = Request(int(self._state["request"]))
        if request is Request.NONE:
            return self._start_request()
        role = QueueRole.INFLATE if request is Request.INFLATE else QueueRole.DEFLATE
        queue = self._queues[role]
        if not len(queue.collect()[0]):
            return False
        # Acknowledged: only now may pages of the balloon be reused.
        pages = int(self._state["request_pages"])
        if request is Request.DEFLATE:
            self.manager.free_bulk(self._pfns[:pages].astype(np.uint64), 0)
            self._state["ballooned"] -= pages
        else:
            self._state["ballooned"] += pages
        self._state["request"] = Request.NONE
        self.transport.write_config(ACTUAL, int(self._state["ballooned"]).to_bytes(4, "little"))
        return True

    def _start_request(self) -> bool:
        actual = int(self._state["ballooned"])
        target = int(self._state["target"])
        if target > actual:
            n = min(target - actual, PFNS_PER_REQUEST)
            pages = self.manager.alloc_pages_bulk(0, n, Owner.BALLOON, Alloc.NORETRY)
            request, role = Request.INFLATE, QueueRole.INFLATE
        elif target < actual:
            pages = self.manager.owned(Owner.BALLOON)[0][: min(actual - target, PFNS_PER_REQUEST)]
            request, role = Request.DEFLATE, QueueRole.DEFLATE
        else:
            return False
        if not len(pages):
            self._state["target"] = actual  # no memory for more; the next config interrupt tries again
            return False
        self._pfns[: len(pages)] = pages
        segment = np.zeros(1, dtype=SEG)
        segment["addr"], segment["len"] = self._pfns_gpa, 4 * len(pages)
        queue = self._queues[role]
        queue.add(segment, [0])
        self._state["request"], self._state["request_pages"] = request, len(pages)
        queue.enable_callbacks()
        if queue.publish():
            self.transport.kick(queue.index)
        return True
