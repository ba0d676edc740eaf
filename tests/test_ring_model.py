"""Both halves against a plain model, any interleaving; hypothesis chooses the order."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from models.ring_model import Buffer, QueueModel

from vring.memory import GuestMemory
from vring.split import DeviceQueue, DriverQueue, QueueLayout

RAM = 0x10000
RING, STATE, TABLES, DATA = 0x0, 0x4000, 0x8000, RAM - 0x800
INDIRECT_LEN = 4

seg = st.tuples(st.integers(DATA, RAM + 0x700), st.integers(1, 0x100))
chain = st.tuples(st.lists(seg, min_size=1, max_size=6), st.integers(0, 6))


class Ring(RuleBasedStateMachine):
    """split.*: whatever the order of calls, buffers come through once, whole, in order, and no side sleeps wrongly."""

    @initialize(
        size=st.sampled_from([1, 2, 4, 8, 32]),
        base=st.sampled_from([0, 1, 65520, 65535]),
        event_idx=st.booleans(),
        indirect=st.booleans(),
    )
    def start(self, size, base, event_idx, indirect):
        self.memory = GuestMemory.create([(0, RAM), (RAM, RAM)])
        self.layout = QueueLayout.place(RING, size)
        self.event_idx, self.indirect = event_idx, indirect
        tables = {"indirect": TABLES, "indirect_len": min(INDIRECT_LEN, size)} if indirect and size > 1 else {}
        self.driver = DriverQueue(self.memory, self.layout, state=STATE, event_idx=event_idx, base=base, **tables)
        self.device = DeviceQueue(self.memory, self.layout, base=base, event_idx=event_idx, indirect=indirect)
        self.slot_len = tables.get("indirect_len", 0)
        self.model = QueueModel(size)
        self.token = 0
        # What the other side was asked for: after how many more buffers it must speak up; None: when it likes.
        self.kick_after: int | None = 1
        self.call_after: int | None = 1
        self.kicks_owed = self.calls_owed = False

    # -- driver ---------------------------------------------------------------------------------------------------

    def buffers(self, shapes):
        made = []
        for segs, writable in shapes:
            segs = segs[: self.model.size]
            full = [(a, n, 2 if i >= len(segs) - writable else 0) for i, (a, n) in enumerate(segs)]
            direct = not 2 <= len(full) <= self.slot_len
            self.token += 1
            made.append(Buffer(self.token, full, len(full) if direct else 1))
        return made

    @rule(shapes=st.lists(chain, max_size=8))
    def add(self, shapes):
        made = self.buffers(shapes)
        n = self.driver.add([s for b in made for s in b.segs], [b.token for b in made], [len(b.segs) for b in made])
        assert n == self.model.add(made)

    @rule()
    def publish(self):
        self.check_kick(self.driver.publish(), self.model.publish())

    def check_kick(self, kick, n):
        if self.kick_after is not None and n:
            # EVENT_IDX: exactly at the event; flags: at every publish (split.availnotif.driver-4, -6, -7).
            assert kick == (n >= self.kick_after if self.event_idx else True)
            if kick:
                self.kick_after = None if self.event_idx else self.kick_after
            else:
                self.kick_after -= n
        elif not n or not self.event_idx:
            assert not kick

    @rule(maximum=st.integers(0, 33))
    def collect(self, maximum):
        tokens, lens = self.driver.collect(maximum)
        want = self.model.collect(min(maximum, self.model.size))
        assert tokens.tolist() == [b.token for b in want]
        assert lens.tolist() == [b.written for b in want]

    @rule(delay=st.integers(0, 8))
    def enable_callbacks(self, delay):
        passed = self.driver.enable_callbacks(delay)
        published = len(self.model.avail) + len(self.model.held) + len(self.model.used)
        delay = min(delay, max(published - 1, 0)) if self.event_idx else 0
        waiting = len(self.model.used)
        assert passed == (waiting > delay)
        if self.event_idx:
            self.call_after = None if passed else delay + 1 - waiting
        else:
            self.call_after = 1

    @rule()
    def disable_callbacks(self):
        self.driver.disable_callbacks()
        self.call_after = None

    @rule(shapes=st.lists(chain, max_size=8))
    def driver_exchange(self, shapes):
        made = self.buffers(shapes)
        segs = [s for b in made for s in b.segs][: self.model.size]
        while sum(len(b.segs) for b in made) > self.model.size:
            made.pop()
        self.driver.segs[: len(segs)] = segs
        self.driver.counts[: len(made)] = [len(b.segs) for b in made]
        self.driver.tokens[: len(made)] = [b.token for b in made]
        n = self.driver.exchange(len(made), chained=True, spins=3)
        want = self.model.collect(self.model.size)
        assert self.driver.done_tokens[:n].tolist() == [b.token for b in want]
        assert self.driver.added == self.model.add(made)
        if made:
            self.check_kick(self.driver.kick, self.model.publish())
        else:
            assert not self.driver.kick

    @rule()
    def another_process_takes_the_driver_over(self):
        self.driver = DriverQueue.attach(self.memory, STATE)

    # -- device ---------------------------------------------------------------------------------------------------

    def check_batch(self, chains, segs, maximum):
        n, room = 0, len(self.device.segs)
        for b in list(self.model.avail)[:maximum]:
            room -= len(b.segs)
            n += room >= 0
        assert len(chains) == n
        for c in chains:
            b = self.model.avail.popleft()
            got = [tuple(s) for s in segs[c["first_seg"] : c["first_seg"] + c["n_segs"]].tolist()]
            assert got == b.segs
            assert c["writable"] == b.writable
            assert c["readable"] == sum(length for _, length, w in b.segs if not w)
            assert c["n_readable"] == sum(not w for *_, w in b.segs)
            assert int(c["head"]) not in self.model.held
            self.model.held[int(c["head"])] = b
            self.model.order.append(int(c["head"]))

    @rule(maximum=st.integers(0, 33))
    def pop(self, maximum):
        maximum = min(maximum, self.model.size)
        batch = self.device.pop(maximum)
        self.check_batch(batch.chains, batch.segs, maximum)

    @rule(data=st.data())
    def push(self, data):
        heads = data.draw(st.lists(st.sampled_from(sorted(self.model.held)), unique=True)) if self.model.held else []
        lens = [data.draw(st.integers(0, self.model.held[h].writable)) for h in heads]
        self.check_call(self.device.push(heads, lens), heads, lens)

    def check_call(self, call, heads, lens):
        for head, length in zip(heads, lens, strict=True):
            b = self.model.held.pop(head)
            self.model.order.remove(head)
            b.written = length
            self.model.used.append(b)
        n = len(heads)
        if self.call_after is not None and n:
            # split.usednotif.device-3, -5, -6
            assert call == (n >= self.call_after if self.event_idx else True)
            if call:
                self.call_after = None if self.event_idx else self.call_after
            else:
                self.call_after -= n
        elif not n or not self.event_idx:
            assert not call

    @precondition(lambda self: self.model.order)
    @rule(data=st.data())
    def device_exchange(self, data):
        heads = data.draw(st.permutations(self.model.order))
        self.device.heads[: len(heads)] = heads
        self.device.lens[: len(heads)] = 0
        n = self.device.exchange(len(heads), self.model.size, spins=3)
        self.check_call(self.device.notify, heads, [0] * len(heads))
        self.check_batch(self.device.chains[:n], self.device.segs, self.model.size)
        assert self.device.heads[:n].tolist() == self.device.chains[:n]["head"].tolist()

    @precondition(lambda self: self.model.order)
    @rule(data=st.data())
    def unpop(self, data):
        # Only the tail popped since the last push is sure to lie together on the ring.
        base = self.device.next_avail
        n = data.draw(st.integers(1, len(self.model.order)))
        heads = self.model.order[-n:]
        together = [self.device._held[h].position for h in heads] == [(base - n + i) % 65536 for i in range(n)]
        if not together:
            return
        self.device.unpop(heads=heads)
        for head in reversed(heads):
            self.model.avail.appendleft(self.model.held.pop(head))
            self.model.order.remove(head)
        if self.kick_after is not None and self.event_idx:
            self.kick_after = None  # the event is behind the buffers given back: enable_notify sets it again
            self.device.disable_notify()

    @rule()
    def enable_notify(self):
        pending = self.device.enable_notify()
        assert pending == bool(self.model.avail)
        self.kick_after = None if self.event_idx and pending else 1

    @rule()
    def disable_notify(self):
        self.device.disable_notify()
        self.kick_after = None

    @precondition(lambda self: not self.model.held)
    @rule()
    def another_process_takes_the_device_over(self):
        base = self.device.next_avail
        self.device = DeviceQueue(self.memory, self.layout, base=base, event_idx=self.event_idx, indirect=self.indirect)

    # -- both -------------------------------------------------------------------------------------------------------

    @rule()
    def reset(self):
        assert sorted(self.driver.detach().tolist()) == sorted(b.token for b in self.model.outstanding)
        self.device = DeviceQueue(self.memory, self.layout, event_idx=self.event_idx, indirect=self.indirect)
        self.model = QueueModel(self.model.size)
        self.kick_after = self.call_after = 1

    @invariant()
    def counts_agree(self):
        if not hasattr(self, "driver"):
            return
        assert self.driver.num_free == self.model.free
        assert self.driver.outstanding == len(self.model.outstanding)
        assert self.device.in_flight == len(self.model.held)
        flags = (
            int(self.memory.array(self.layout.avail, 1, "u2")[0]),
            int(self.memory.array(self.layout.used, 1, "u2")[0]),
        )
        assert max(flags) <= 1  # split.usednotif.driver-1, split.availnotif.device-1
        if self.event_idx:
            assert flags == (0, 0)  # split.usednotif.driver-3, split.availnotif.device-3

    def teardown(self):
        if hasattr(self, "memory"):
            self.memory.close()


TestRing = Ring.TestCase
TestRing.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
