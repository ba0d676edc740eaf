"""Free page hinting in the driver (VIRTIO 5.5.6.5), as Linux does it since commit 86a559787e6.

On a new command id it sends that id, then its free MAX_ORDER-1 blocks, taken out of the allocator, one block per
buffer, then a stop; it keeps the blocks until the host says DONE, because freeing them dirties memory. A shrinker gives
blocks back under pressure without telling the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from balloon_dev.features import QueueRole
from balloon_dev.hinting import CMD_ID_DONE, CMD_ID_STOP
from guest_driver.balloon.core import DriverCore
from guest_driver.balloon.state import BLOCK_BYTES, COMMAND_SLOTS, COMMAND_TOKEN, FreeAt
from guest_driver.memory_manager import HINT_ORDER, Owner
from vring.errors import VirtioError
from vring.split import SEG, SEG_WRITE, DriverQueue

__all__ = ["Hinting"]


class Hinting(DriverCore):
    """The free page queue."""

    def _prepare_hinting(self) -> None:
        self._segs: npt.NDArray[Any] = np.zeros(self.batch, dtype=SEG)
        self._segs["len"] = BLOCK_BYTES
        self._segs["flags"] = SEG_WRITE
        self._command: npt.NDArray[Any] = np.zeros(1, dtype=SEG)
        self._command["len"] = 4
        self._blocks = np.zeros(self.batch, dtype=np.uint64)

    @property
    def hinted_blocks(self) -> int:
        """Blocks taken out of the allocator for hints and not yet given back."""
        return self.manager.pages_by_owner().get(int(Owner.HINT), 0) >> HINT_ORDER

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
        if received <= CMD_ID_DONE or received == active:
            return False
        if not self._send_command(queue, received):
            return queue.enable_callbacks()  # the ring is full: go on when the host has used something
        self._state["active"] = received
        self._state["sending"] = 1
        self._state["runs"] += 1
        return True

    def _send_blocks(self, queue: DriverQueue) -> bool:
        self._reclaim(queue)
        kept = queue.size > 1  # one slot, for the command that ends the run
        room = min(queue.num_free - kept, self.batch)
        if room < 1:  # the host is slow: have it say when a quarter of the ring is free again
            return queue.enable_callbacks(queue.size // 4)
        blocks = self.manager.alloc_hint_blocks(room, out=self._blocks)
        n = len(blocks)
        if n:
            addresses = blocks << np.uint64(12)
            self._segs["addr"][:n] = addresses
            added = queue.add(self._segs[:n], addresses)
            if added < n:
                self.manager.free_bulk(blocks[added:].copy(), HINT_ORDER)
            self._state["blocks"] += added
            if queue.publish():
                self.transport.kick(queue.index)
        if n < room:
            return self._close_run(queue)  # out of free blocks
        return True

    def _close_run(self, queue: DriverQueue) -> bool:
        """Send the stop command. Return whether that is done."""
        if not self._send_command(queue, CMD_ID_STOP):
            return queue.enable_callbacks()
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
        self._command["addr"] = self._commands_gpa + slot * 4
        if queue.add(self._command, [COMMAND_TOKEN | slot]) != 1:
            return False
        self._busy[slot] = 1
        if queue.publish():
            self.transport.kick(queue.index)
        return True

    def _reclaim(self, queue: DriverQueue) -> None:
        """Collect used buffers. Blocks stay ours until DONE; command slots are free again."""
        while True:
            tokens, _ = queue.collect()
            if not len(tokens):
                return
            slots = tokens[tokens >= np.uint64(COMMAND_TOKEN)] - np.uint64(COMMAND_TOKEN)
            if len(slots) and slots.max() >= COMMAND_SLOTS:
                raise VirtioError(f"a token in guest RAM is damaged: there is no command slot {slots.max()}")
            self._busy[slots.astype(np.int64)] = 0

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
