"""The device half of a split virtqueue, over ``csrc/vring/device.c``.

It owns the arrays that cross the border and turns codes into exceptions. No doorbells, no threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vring._vring import ffi, lib
from vring.codes import error_for
from vring.errors import UsageError
from vring.layout import CHAIN, MAX_SIZE, SEG, Array, QueueLayout, Results, c_ring, permanent_array
from vring.memory import GuestMemory

__all__ = ["Batch", "DeviceQueue"]

_exchange = lib.vq_device_exchange  # looked up once: it is called per batch


@dataclass(frozen=True, slots=True)
class Batch:
    """Buffers popped by one call: views that hold until the next pop."""

    chains: Array
    """One `CHAIN` per buffer; its segments are ``segs[first_seg : first_seg + n_segs]``."""
    segs: Array
    """`SEG`, all buffers one after another, readable ones of a buffer first."""

    def __len__(self) -> int:
        return len(self.chains)

    @property
    def heads(self) -> Array:
        """Heads, to be given to `DeviceQueue.push`."""
        heads: Array = self.chains["head"]
        return heads


class DeviceQueue:
    """The device half of a split virtqueue: pop buffers, push them back used.

    Whatever the driver wrote wrong raises `DriverError` and breaks the queue; buffers before it are returned first.

    Parameters
    ----------
    memory
        Guest memory that holds the ring and all buffers.
    layout
        Where the driver says the ring lies.
    base
        Avail index to start from, and used index: 0, or what `next_avail` was when the queue stopped with nothing in
        flight (vhost-user's SET_VRING_BASE).
    event_idx, indirect
        EVENT_IDX and INDIRECT_DESC were negotiated.
    index
        Number of the queue, for messages.

    Raises
    ------
    DriverError
        If a size, an alignment or an address is wrong.
    """

    def __init__(
        self,
        memory: GuestMemory,
        layout: QueueLayout,
        *,
        base: int = 0,
        event_idx: bool = False,
        indirect: bool = False,
        index: int = 0,
    ) -> None:
        self.memory = memory
        self.layout = layout
        self.index = index
        self.size = size = layout.size
        """Entries of the ring."""
        if not 0 <= base < 65536:
            raise UsageError(f"base index {base} does not fit into 16 bits", queue=index)
        self._q = ffi.new("struct vq_device *")
        ring = c_ring(layout, event_idx * lib.VQ_F_EVENT_IDX | indirect * lib.VQ_F_INDIRECT)
        room = size if 0 < size <= MAX_SIZE else 1
        self._held = ffi.new("struct vq_device_head[]", room)
        self._check(lib.vq_device_init(self._q, memory.c_table, ring, base, self._held))
        self._chains, self.chains = permanent_array("struct vq_chain", room, CHAIN)
        # A chain has up to `size` segments; indirect ones together more than the table has descriptors.
        room_segs = max(room, min(4 * room, MAX_SIZE)) if indirect else room
        self._segs, self.segs = permanent_array("struct vq_seg", room_segs, SEG)
        self._heads, self.heads = permanent_array("uint32_t", room, np.uint32)
        self._lens, self.lens = permanent_array("uint32_t", room, np.uint32)
        self._io = ffi.new("struct vq_device_io *")
        self._io.chains, self._io.segs, self._io.heads, self._io.lens = (
            self._chains,
            self._segs,
            self._heads,
            self._lens,
        )
        self._io.max_chains, self._io.max_segs = room, room_segs
        results = Results(self._io, "n_chains", "n_segs", "notify")
        self._words, (self._chains_at, self._segs_at, self._notify_at) = results.words, results.at

    def rebind(self, memory: GuestMemory) -> None:
        """Go on with another mapping of the same guest memory (vhost-user's SET_MEM_TABLE); nothing in flight is lost.

        Raises
        ------
        DriverError
            If the ring is not inside `memory`; the old one stays bound.
        """
        self._check(lib.vq_device_rebind(self._q, memory.c_table))
        self.memory = memory

    def _check(self, result: int) -> int:
        if result < 0:
            detail, index = "", None
            if lib.VQ_EINUSE <= result <= lib.VQ_EAVAIL_AHEAD and result != lib.VQ_ESEGS:
                q = self._q
                index = int(q.bad_index)
                detail = f": descriptor {q.bad_desc}, value {int(q.bad_addr):#x}"
                if result == lib.VQ_EAVAIL_AHEAD:
                    detail = f": idx {q.bad_addr}, {q.in_flight} in flight"
            raise error_for(result, "device", queue=self.index, index=index, detail=detail)
        return result

    # -- buffers --------------------------------------------------------------------------------------------------

    def pop(self, maximum: int | None = None, *, spins: int = 0) -> Batch:
        """Take buffers the driver made available, every segment checked to be guest memory.

        Parameters
        ----------
        maximum
            At most so many; None: the queue size. Indirect buffers may be fewer per call than are pending, where
            their segments fill the array; 0 always means that none is.
        spins
            Poll the avail ring up to so many times while it is empty.

        Returns
        -------
        Batch
            Possibly empty.

        Raises
        ------
        DriverError
            If the driver wrote nonsense; the queue is broken until a reset (a new `DeviceQueue`).
        """
        n = self.exchange(0, self.size if maximum is None else maximum, spins=spins)
        return Batch(self.chains[:n], self.segs[: self._words[self._segs_at]])

    def push(self, heads: npt.ArrayLike, lens: npt.ArrayLike = 0) -> bool:
        """Give buffers back.

        Parameters
        ----------
        heads
            Which (``Batch.heads``), in any order.
        lens
            Bytes written into each from its first writable one.

        Returns
        -------
        bool
            Whether the driver must be interrupted now.

        Raises
        ------
        UsageError
            If a head is not held, or a length is over the writable part; nothing was given back.
        DriverError
            If the driver broke the queue earlier.
        """
        head = np.ascontiguousarray(heads, dtype=np.uint32)
        length = np.ascontiguousarray(np.broadcast_to(np.asarray(lens, dtype=np.uint32), head.shape))
        c_heads, c_lens = ffi.from_buffer("uint32_t[]", head), ffi.from_buffer("uint32_t[]", length)
        return self._check(lib.vq_device_push(self._q, c_heads, c_lens, head.size)) != 0

    def exchange(self, n_push: int, max_pop: int, *, spins: int = 0) -> int:
        """Push ``heads[:n_push]`` with ``lens[:n_push]``, then pop up to `max_pop`, in one call.

        The buffers popped are ``chains[:n]`` and ``segs``; ``heads[:n]`` and ``lens[:n]`` (0 each) are ready to give
        all of them back by the next call. While there is nothing to pop and no interrupt is due, the avail ring is
        polled up to `spins` times. `notify` tells whether the driver must be interrupted.

        Returns
        -------
        int
            How many were popped.

        Raises
        ------
        DriverError
            As `pop`.
        UsageError
            As `push`; then nothing was popped.
        """
        n: int = _exchange(self._q, self._io, n_push, max_pop, spins)
        return n if n >= 0 else self._check(n)

    @property
    def notify(self) -> bool:
        """Whether the driver must be interrupted after the last `exchange`."""
        return bool(self._words[self._notify_at])

    def unpop(self, n: int | None = None, *, heads: npt.ArrayLike | None = None) -> None:
        """Undo the pop of the most recently popped buffers: a device saved now finds them again.

        Parameters
        ----------
        n
            The last so many of the last batch.
        heads
            Or these, in the order they were popped; none popped after the first of them may have been pushed.

        Raises
        ------
        UsageError
            If they are not the last ones popped, or not held.
        """
        if heads is None:
            last = self._words[self._chains_at]
            if n is None or not 0 <= n <= last:
                raise UsageError(f"the last batch had {last} buffers, cannot give back {n}", queue=self.index)
            heads = self.heads[last - n : last]
        head = np.ascontiguousarray(heads, dtype=np.uint32)
        self._check(lib.vq_device_unpop(self._q, ffi.from_buffer("uint32_t[]", head), head.size))
        self._words[self._chains_at] -= min(head.size, self._words[self._chains_at])

    # -- kicks ----------------------------------------------------------------------------------------------------

    def enable_notify(self) -> bool:
        """Ask to be kicked at the next buffer.

        Returns
        -------
        bool
            True if buffers are pending already: no kick will come, pop.

        Raises
        ------
        DriverError
            As `pop`, also for nonsense behind the buffers popped last.
        """
        return self._check(lib.vq_device_enable_notify(self._q)) != 0

    def disable_notify(self) -> None:
        """Ask for no kicks; they may come nevertheless (split.availnotif.device-5)."""
        self._check(lib.vq_device_disable_notify(self._q))

    # -- facts ----------------------------------------------------------------------------------------------------

    @property
    def next_avail(self) -> int:
        """Avail index of the next buffer to pop: the base for GET_VRING_BASE."""
        return int(self._q.avail_next)

    @property
    def used_idx(self) -> int:
        """Used index as published."""
        return int(self._q.used_next)

    @property
    def in_flight(self) -> int:
        """Buffers popped and not pushed."""
        return int(self._q.in_flight)

    @property
    def broken(self) -> bool:
        """Whether the driver broke the queue."""
        return bool(self._q.error)

    @property
    def used_pages(self) -> range:
        """Guest pages of the used ring, to be logged as written by whoever pushes."""
        return self.layout.used_pages
