"""The driver half of a split virtqueue, over ``csrc/vring/driver.c``.

It owns the arrays that cross the border and turns codes into exceptions. No doorbells, no threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vring._vring import ffi, lib
from vring.codes import error_for
from vring.errors import UsageError
from vring.layout import MAX_SIZE, SEG, Array, QueueLayout, Results, c_ring, permanent_array
from vring.memory import GuestMemory

__all__ = ["DriverQueue"]

_exchange = lib.vq_driver_exchange  # looked up once: it is called per batch
_IN_USED_RING = {lib.VQ_EUSED_AHEAD: "idx", lib.VQ_EUSED_ID: "id", lib.VQ_EUSED_LEN: "len"}  # what is wrong there


class DriverQueue:
    """The driver half of a split virtqueue: add buffers, publish, collect.

    All calls take and return batches. Arrays returned are views of permanent ones: they hold until the next call of
    the same method.

    Parameters
    ----------
    memory
        Guest memory that holds the ring.
    layout
        Where the ring lies. It is zeroed: the device must not be using it.
    state
        Guest address for the private state (`state_bytes` bytes, aligned to 8), so that it is saved with the guest and
        `attach` finds it again; None keeps it in this process.
    event_idx
        EVENT_IDX was negotiated.
    indirect
        Guest address of ``size * indirect_len`` descriptors; with it, INDIRECT_DESC must have been negotiated,
        and chains of 2 to `indirect_len` segments take one descriptor of the table.
    indirect_len
        Descriptors of each indirect table.
    base
        First avail and used index; not 0 only in tests.
    lax_lengths
        Cut used lengths over the writable part of a buffer instead of breaking the queue: some devices report lengths
        for buffers they only read. `cut_lengths` counts them.
    index
        Number of the queue, for messages.

    Raises
    ------
    UsageError
        If a size, an alignment or an address is wrong.
    """

    def __init__(
        self,
        memory: GuestMemory,
        layout: QueueLayout,
        *,
        state: int | None = None,
        event_idx: bool = False,
        indirect: int | None = None,
        indirect_len: int = 0,
        base: int = 0,
        lax_lengths: bool = False,
        index: int = 0,
    ) -> None:
        flags = event_idx * lib.VQ_F_EVENT_IDX | (indirect is not None) * lib.VQ_F_INDIRECT
        ring = c_ring(layout, flags | lax_lengths * lib.VQ_F_LAX_LEN)
        self._prepare(memory, index)
        where = self._state_at(self.state_bytes(layout.size), state)
        self._check(lib.vq_driver_init(self._q, memory.c_table, ring, indirect or 0, indirect_len, base, where))
        self._make_arrays(layout)

    @classmethod
    def attach(cls, memory: GuestMemory, state: int, *, index: int = 0) -> DriverQueue:
        """Go on with a queue whose private state lies in guest memory, written by this process or another.

        Parameters
        ----------
        memory
            Guest memory that holds state and ring.
        state
            Guest address of the state.
        index
            Number of the queue, for messages.

        Raises
        ------
        UsageError
            If there is no sound state at that address, or the ring it names is not in this memory.
        """
        self = cls.__new__(cls)
        self._prepare(memory, index)
        region = memory.regions[memory.region_index(state)]
        room = region.end - state
        where = self._state_at(room, state)
        self._check(lib.vq_driver_bind(self._q, memory.c_table, where, room))
        ring = self._q.ring
        self._make_arrays(QueueLayout(ring.size, ring.desc, ring.avail, ring.used))
        return self

    @staticmethod
    def state_bytes(size: int) -> int:
        """Bytes of private state for a queue of `size` entries (0 for a size that cannot be)."""
        return int(lib.vq_driver_state_bytes(size)) if 0 < size <= MAX_SIZE else 0

    def _prepare(self, memory: GuestMemory, index: int) -> None:
        self.memory = memory
        self.index = index
        self._q = ffi.new("struct vq_driver *")

    def _state_at(self, length: int, state: int | None) -> Any:
        if state is None:
            # The array keeps the memory alive; uint64_t makes it aligned.
            self._private = ffi.new("uint64_t[]", max(1, -(-length // 8)))
            return self._private
        return ffi.cast("void *", self.memory.host_address(state, max(1, length)))

    def _make_arrays(self, layout: QueueLayout) -> None:
        self.layout = layout
        self.size = layout.size
        """Entries of the ring."""
        size = layout.size
        self._segs, self.segs = permanent_array("struct vq_seg", size, SEG)
        self._counts, self.counts = permanent_array("uint32_t", size, np.uint32)
        self._tokens, self.tokens = permanent_array("uint64_t", size, np.uint64)
        self._done_tokens, self.done_tokens = permanent_array("uint64_t", size, np.uint64)
        self._done_lens, self.done_lens = permanent_array("uint32_t", size, np.uint32)
        self._io = ffi.new("struct vq_driver_io *")
        self._io.segs, self._io.counts, self._io.tokens = self._segs, ffi.NULL, self._tokens
        self._io.done_tokens, self._io.done_lens, self._io.max_done = self._done_tokens, self._done_lens, size
        results = Results(self._io, "n_added", "kick")
        self._words, (self._added_at, self._kick_at) = results.words, results.at
        self._chained = False

    def _check(self, result: int) -> int:
        if result < 0:
            detail, index = "", None
            if result in _IN_USED_RING:
                index = int(self._q.bad_index)
                detail = f": {_IN_USED_RING[result]} {self._q.bad_id}"
            raise error_for(result, "driver", queue=self.index, index=index, detail=detail)
        return result

    # -- adding ---------------------------------------------------------------------------------------------------

    def add(self, segs: npt.ArrayLike, tokens: npt.ArrayLike, counts: npt.ArrayLike | None = None) -> int:
        """Add buffers; the device sees them after `publish`.

        Parameters
        ----------
        segs
            Segments of all buffers one after another, dtype `SEG` (or tuples of that shape).
        tokens
            One 64-bit number per buffer, given back by `collect`.
        counts
            Segments of each buffer; None: one each.

        Returns
        -------
        int
            How many buffers fitted: the first so many.

        Raises
        ------
        UsageError
            If lengths do not agree, or a segment or chain is malformed; nothing was added.
        DeviceError
            If the device broke the queue earlier.
        """
        seg = np.ascontiguousarray(segs, dtype=SEG)
        token = np.ascontiguousarray(tokens, dtype=np.uint64)
        n = token.size
        if counts is None:
            if seg.size != n:
                raise UsageError(f"{seg.size} segments for {n} buffers of one segment", queue=self.index)
            c_counts = ffi.NULL
        else:
            count = np.ascontiguousarray(counts, dtype=np.uint32)
            if count.size != n or int(count.sum(dtype=np.uint64)) != seg.size:
                raise UsageError(f"{n} tokens, {count.size} counts, {seg.size} segments do not agree", queue=self.index)
            c_counts = ffi.from_buffer("uint32_t[]", count)
        c_segs = ffi.from_buffer("struct vq_seg[]", seg)
        return self._check(lib.vq_driver_add(self._q, c_segs, c_counts, ffi.from_buffer("uint64_t[]", token), n))

    def publish(self) -> bool:
        """Show the device what was added.

        Returns
        -------
        bool
            Whether the device must be kicked now.
        """
        return self._check(lib.vq_driver_publish(self._q)) != 0

    def collect(self, maximum: int | None = None) -> tuple[Array, Array]:
        """Take used buffers.

        Parameters
        ----------
        maximum
            At most so many; None: the queue size.

        Returns
        -------
        tokens, lens : numpy.ndarray
            Tokens (uint64) and bytes written (uint32) of each, in the order the device used them.

        Raises
        ------
        DeviceError
            If the device wrote nonsense; the queue is broken until `detach`.
        """
        limit = self.size if maximum is None else min(maximum, self.size)
        n = self._check(lib.vq_driver_collect(self._q, self._done_tokens, self._done_lens, limit))
        return self.done_tokens[:n], self.done_lens[:n]

    def exchange(self, n_add: int, *, spins: int = 0, chained: bool = False) -> int:
        """Collect, add, publish in one call, with the permanent arrays.

        Adds ``segs[:n_add]`` (with `chained`, as many segments as ``counts[:n_add]`` say) under ``tokens[:n_add]``;
        collects into ``done_tokens`` and ``done_lens``. `added` and `kick` tell the rest. If not everything fitted (or,
        with `n_add` 0, nothing was collected) and no kick is due, the used ring is polled up to `spins` times.

        Returns
        -------
        int
            How many were collected.

        Raises
        ------
        DeviceError
            As `collect`; what was collected before the error is lost: `detach` gives only what is outstanding.
        UsageError
            As `add`.
        """
        if chained is not self._chained:
            if chained:
                self._io.counts = self._counts
            else:
                self._io.counts = ffi.NULL
            self._chained = chained
        if n_add > self.size:
            raise UsageError(f"{n_add} buffers for arrays of {self.size}", queue=self.index)
        if chained and int(self.counts[:n_add].sum(dtype=np.uint64)) > self.size:
            raise UsageError(f"more segments than the array of {self.size} holds", queue=self.index)
        n: int = _exchange(self._q, self._io, n_add, spins)
        return n if n >= 0 else self._check(n)

    @property
    def added(self) -> int:
        """Buffers added by the last `exchange`."""
        added: int = self._words[self._added_at]
        return added

    @property
    def kick(self) -> bool:
        """Whether the device must be kicked after the last `exchange`."""
        return bool(self._words[self._kick_at])

    # -- interrupts -----------------------------------------------------------------------------------------------

    def enable_callbacks(self, delay: int = 0) -> bool:
        """Ask for one interrupt, `delay` buffers after the next one is used (at most with the last outstanding one).

        Returns
        -------
        bool
            True if that point has passed: no interrupt will come, collect more.

        Raises
        ------
        DeviceError
            As `collect`, also for nonsense behind the buffers collected last.
        """
        return self._check(lib.vq_driver_enable_cb(self._q, delay)) != 0

    def disable_callbacks(self) -> None:
        """Ask for no interrupts; they may come nevertheless (split.usednotif.driver-5)."""
        self._check(lib.vq_driver_disable_cb(self._q))

    # -- reset and facts ------------------------------------------------------------------------------------------

    def detach(self) -> npt.NDArray[np.uint64]:
        """Give up all outstanding buffers after a reset of the device; the ring starts again from index 0.

        Returns
        -------
        numpy.ndarray
            Their tokens, a copy, in no particular order.
        """
        tokens = np.zeros(self.size, dtype=np.uint64)
        n = self._check(lib.vq_driver_detach(self._q, ffi.from_buffer("uint64_t[]", tokens), len(tokens)))
        return tokens[:n]

    @property
    def num_free(self) -> int:
        """Free descriptors of the table."""
        return int(lib.vq_driver_num_free(self._q))

    @property
    def outstanding(self) -> int:
        """Buffers added and not collected."""
        return int(self._q.outstanding)

    @property
    def broken(self) -> bool:
        """Whether the device broke the queue."""
        return bool(self._q.error)

    @property
    def avail_idx(self) -> int:
        """Avail index as published."""
        return int(self._q.avail_published)

    @property
    def used_idx(self) -> int:
        """Used index up to which buffers were collected."""
        return int(self._q.used_next)

    @property
    def cut_lengths(self) -> int:
        """Used lengths cut so far, with `lax_lengths`."""
        return int(self._q.cut_lens)
