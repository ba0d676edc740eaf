"""Guest and host in one process, without sockets: the test chooses the order of every step.

`World` is one guest and the host it runs on. The two see the same RAM through a mapping each, as two processes would;
kicks and interrupts are flags that the test delivers, early, late or never; the device serves as many buffers as it is
told; the migration is stepped with a clock that the test moves. What must hold is checked as it goes (`Violation`), and
`World.judge` and `World.settle` hold the two oracles at the end.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from reference import HintModel
from shape import MIB, PLAIN, SMALL_QUEUES, Arrived, FakeClock, Shape, SoundRing, Tee, Violation
from wire import Destination, MemoryTransport

from balloon_dev.device import BalloonDevice
from balloon_dev.features import QueueRole
from balloon_dev.journal import Journal
from guest_driver._page_alloc import lib as page_alloc
from guest_driver.balloon import BLOCK_BYTES
from guest_driver.memory_manager import HINT_ORDER, Alloc, MemoryManager, Owner
from guest_driver.workloads import Workload
from host_qemu_side.discard import Discarder
from host_qemu_side.migration import Limits, Migration, Phase
from host_qemu_side.python_guest import CombinedLog
from host_qemu_side.witness import Witness
from vring import bitmap
from vring.contents import digests_in_order
from vring.dirty import DirtyLog
from vring.dirty.software import SoftwareDirtyLog
from vring.dirty.wp_async import WpAsyncDirtyLog, WriteProtection
from vring.errors import VirtioError
from vring.memory import GuestMemory
from vring.split import SEG, SEG_WRITE

__all__ = ["MIB", "SMALL_QUEUES", "Arrived", "Shape", "Violation", "World"]


class World:
    """One guest on one host. It is a `GuestControl` and a `HintPort` for its own migration."""

    def __init__(self, shape: Shape = PLAIN, *, received: Destination | None = None) -> None:
        self.shape, self.clock = shape, FakeClock()
        self.frozen, self.events = False, []
        self.migration: Migration | None = None
        self.witness: Witness | None = None
        self.destination: Destination | None = None
        self.serve_limit = 0
        """Buffers the device serves whenever the migration has it serve the free page queue; 0: only `serve` does."""
        self.hints_applied = 0
        self.fail_freeze = False
        self._sink: Callable[..., None] | None = None
        if received is None:
            self.memory = GuestMemory.create(shape.regions)
        else:
            assert received.receiver.memory is not None
            self.memory = GuestMemory.from_fds(received.receiver.memory.regions)
        self._host_side()
        if received is None:
            self._boot()
        else:
            self._go_on(received)

    # -- the two sides --------------------------------------------------------------------------------------------

    def _host_side(self) -> None:
        self.host_memory = GuestMemory.from_fds(self.memory.regions)
        self.device = BalloonDevice(self.shape.device_features, profile=self.shape.profile)
        self.device.discard = Discarder(self.host_memory)
        self.device.set_memory(self.host_memory)
        self.device_log = SoftwareDirtyLog.for_memory(self.host_memory)
        self.device.dirty_log = self.device_log
        self.model = HintModel()
        self.tap = Tee([self.model])
        self.device.tap = self.tap
        self.transport = MemoryTransport(self.device, self.host_memory, self.model)

    def _guest_tools(self) -> None:
        self.journal = Journal.create(self.memory.page_span)
        self.manager.use_journal(self.journal)
        self.protection: WriteProtection | None = None
        if self.shape.log == "wp-async":
            self.protection = WriteProtection(self.memory)
        else:
            size = SoftwareDirtyLog.bytes_for(self.memory.page_span)
            fd = os.memfd_create("log")
            os.ftruncate(fd, size)
            self.guest_log = SoftwareDirtyLog(self.memory.page_span, fd)
            self.manager.use_dirty_log(np.frombuffer(mmap.mmap(fd, size), dtype=np.uint64))
            os.close(fd)

    def _boot(self) -> None:
        zone = page_alloc.pa_zone_bytes(self.memory.page_span)
        self.manager = MemoryManager.create(
            self.memory, seed=7, watermark=0, spare=BLOCK_BYTES - 2 * mmap.PAGESIZE - zone & -mmap.PAGESIZE
        )
        self._guest_tools()
        self.driver = self.shape.driver(
            self.manager, self.transport, features=self.shape.driver_features, **self._options
        )
        self.driver.probe()
        self.workload = Workload.create(self.manager, "writer:1M@4M", seed=5)
        self.workload.setup()  # 1 MiB, so that the first step of a round sends this and nothing else
        self.manager.alloc_pages_bulk(0, (1 << HINT_ORDER) - 256, Owner.KERNEL)  # what is left is whole blocks
        self.held: dict[int, int] = {int(p): 0 for p in self.workload.pages()}
        """What the guest's programs hold: first page -> order. All of it is written."""
        self.own: list[int] = []
        """The blocks among them that `free` may free."""

    def _go_on(self, received: Destination) -> None:
        state = received.receiver.device_state
        self.device.load(state["device"])
        self.model.state, self.model.id = state["model"]["state"], state["model"]["id"]
        self.manager = MemoryManager.attach(self.memory)
        self._guest_tools()
        bases = {ring["index"]: ring["base"] for ring in state["rings"]}
        self.driver = self.shape.driver.attach(self.manager, self.transport, bases, **self._options)
        self.workload = Workload.attach(self.manager)
        self.held = {int(pfn): order for pfn, order in state["held"]}
        self.own = list(state["own"])
        self.transport.collect()

    @property
    def _options(self) -> dict[str, Any]:
        return {"profile": self.shape.profile, "batch": self.shape.batch, "free_at": self.shape.free_at}

    def close(self) -> None:
        if self.protection is not None:
            self.protection.close()
        self.journal.close()
        self.memory.close()
        self.host_memory.close()

    # -- the guest ------------------------------------------------------------------------------------------------

    def deliver(self) -> None:
        """The guest takes all interrupts that are pending."""
        self.driver.interrupt(self.transport.interrupts())

    def step_driver(self) -> bool:
        """One step of the driver. It may let hinted blocks go only after it has read DONE."""
        before = self.driver.hinted_blocks
        with SoundRing():
            more = self.driver.step()
        if self.driver.hinted_blocks < before and self.transport.id_read != 1 and not self.shape.frees_early:
            raise Violation(f"blocks were freed while the config space said {self.transport.id_read:#x}, not DONE")
        return more

    def run_driver(self) -> None:
        """Let the driver work until it has nothing more to do."""
        for _ in range(10_000):
            if not self.step_driver():
                return
        raise Violation("the driver never comes to rest")

    def alloc(self, order: int = 0, n: int = 1, *, bump: int = 1, flags: Alloc = Alloc.NORMAL) -> list[int]:
        """Allocate blocks and write all of their pages (with `bump` 0: what they held once before)."""
        pfns = self.manager.alloc_pages_bulk(order, n, Owner.WORKLOAD, flags).copy()
        self.manager.write(pfns, order, bump=bump)
        self.held.update((int(p), order) for p in pfns)
        self.own.extend(int(p) for p in pfns)
        return pfns.tolist()

    def free(self, pfn: int) -> None:
        """Free a block."""
        self.own.remove(pfn)
        self.manager.free(pfn, self.held.pop(pfn))

    def write(self, pfn: int, *, bump: int = 1) -> None:
        """Write all pages of a block; with `bump` 0 what they hold already."""
        self.manager.write_block(pfn, self.held[pfn], bump=bump)

    def take_back(self, n: int = 1, *, bump: int = 1) -> list[int]:
        """Memory runs short: the shrinker gives hinted blocks back, pages of which are allocated and written."""
        self.shrink(1)
        return self.alloc(0, n, bump=bump)

    def shrink(self, pages: int) -> int:
        """The shrinker is called: hinted blocks go back to the allocator, and the host is not told."""
        return self.driver._shrink(pages)

    def touch(self) -> None:
        """The guest writes one page, so that there is something left to send."""
        self.manager.write_block(int(self.workload.pages()[0]))

    def work(self, seconds: float) -> None:
        """The workload goes on for a while."""
        self.clock.now += seconds
        self.workload.step(self.clock.now)

    def raw_hint(self, addr: int, length: int) -> None:
        """Put a range on the free page queue as no driver of ours would."""
        queue = self.driver._queues[QueueRole.FREE_PAGE]
        with SoundRing():
            self.driver._reclaim(queue)
            segment = np.zeros(1, SEG)
            segment["addr"], segment["len"], segment["flags"] = addr, length, SEG_WRITE
            if queue.num_free > 1:
                queue.add(segment, [addr])
                if queue.publish():
                    self.transport.kick(queue.index)

    def reload_driver(self) -> None:
        """The guest unloads its driver and loads it again."""
        self.driver.remove()
        if self.driver.hinted_blocks or self.manager.pages_by_owner().get(int(Owner.BALLOON)):
            raise Violation("removing the driver left pages behind")
        self.expect_allocator()
        with SoundRing():
            self.driver.probe()
        self.transport.collect()

    # -- the device -----------------------------------------------------------------------------------------------

    def serve(self, role: QueueRole = QueueRole.FREE_PAGE, limit: int | None = None) -> int:
        """The device serves a queue: all of it, or the next `limit` buffers. A frozen guest's queues are held."""
        index = self.device.queue_number(role)
        if self.frozen or index is None:
            return 0
        with SoundRing():
            n = self.device.process(index) if limit is None else self.device.process_batch(index, limit)
        if limit is None:
            self.transport.kicked.discard(index)
        elif n:
            self.transport.kicked.add(index)  # kicks were not asked for again: it has to come back on its own
        self.transport.collect()
        self.check_model()
        return n

    def set_target(self, pages: int) -> None:
        """The host asks for a balloon."""
        self.device.set_target(pages)
        self.transport.collect()

    def check_model(self) -> None:
        """The device is in the state that the table in the documentation says."""
        found = self.device.hinting.state.name, self.device.hinting.command_id
        if self.shape.model and found != (self.model.state, self.model.id):
            raise Violation(f"the device is in {found}, the table says {self.model.state}, {self.model.id:#x}")

    # -- HintPort -------------------------------------------------------------------------------------------------

    @property
    def sink(self) -> Callable[..., None] | None:
        return self._sink

    @sink.setter
    def sink(self, sink: Callable[..., None] | None) -> None:
        self._sink = sink
        self.device.hint_sink = None if sink is None else self._hint

    def _hint(self, command_id: int, addr: Any, length: Any) -> None:
        if self.shape.model and (self.model.state, self.model.id) != ("START", command_id):
            raise Violation(f"a hint under {command_id:#x} came through in state {self.model.state}")
        self.hints_applied += len(addr)
        assert self._sink is not None
        self._sink(command_id, addr, length)

    @property
    def running(self) -> bool:
        return self.device.hinting.active

    def start(self) -> int | None:
        if not self.device.hinting_negotiated:
            return None
        self.model.start()
        command_id = self.device.start_hinting()
        self.transport.collect()
        self.check_model()
        return command_id

    def stop(self) -> None:
        self.model.stop()
        self.device.stop_hinting()
        self.transport.collect()
        self.check_model()

    def done(self) -> None:
        if self.device.hinting_negotiated:
            self.model.done()
        self.device.finish_hinting()
        self.transport.collect()
        self.check_model()

    # (`serve` of the port is the method above, as far as the test lets it)

    # -- GuestControl ---------------------------------------------------------------------------------------------

    def freeze(self) -> None:
        if self.fail_freeze:
            raise VirtioError("the guest does not answer")
        assert not self.frozen
        self.frozen = True
        self.events.append("freeze")

    def thaw(self) -> None:
        assert self.frozen or self.fail_freeze  # asked to freeze, if not frozen: it might have been so later
        if self.destination is not None and self.destination.commit_sent:
            raise Violation("the guest was started again after COMMIT")
        self.frozen = False
        self.events.append("thaw")

    # -- migration ------------------------------------------------------------------------------------------------

    def migrate(
        self,
        *,
        hints: bool = True,
        two_way: bool = True,
        hand_over: bool = True,
        wrap_log: Callable[[DirtyLog], DirtyLog] = lambda log: log,
        **limits: Any,
    ) -> Migration:
        """Begin a migration. With nothing else said a round takes for ever, until `advance` says how long it was."""
        self.destination = Destination(two_way=two_way)
        self.witness = Witness(self.host_memory, self.device, self.journal, self.clock)  # type: ignore[arg-type]
        self.tap.taps = [self.model, self.witness.oracle]
        self.device.tap = self.tap
        if self.protection is not None:
            guest_log: DirtyLog = WpAsyncDirtyLog(os.getpid(), self.protection.ranges, self.memory.page_layout)
            always = []
        else:
            guest_log, always = wrap_log(self.guest_log), [(0, self.manager.kernel.size)]
        self.migration = Migration(
            self.host_memory,
            CombinedLog("test", [guest_log, self.device_log], always=always),
            self.destination,
            self,
            hints=_Port(self) if hints else None,
            # Pieces of 1 MiB on a link that takes days for one: what comes in between is the test's to say.
            limits=Limits(
                **{"bandwidth": 1.0, "piece": 1e7, "frozen": math.inf, "downtime": 0.0, "max_rounds": 3, **limits}
            ),
            state=self._state,
            observer=self.witness,
            hand_over=hand_over,
        )
        return self.migration

    def _state(self) -> dict[str, Any]:
        rings = [{"index": i, "base": q.next_avail} for i, q in self.transport.queues.items()]
        model = {"state": self.model.state, "id": self.model.id}
        guest = {"held": list(self.held.items()), "own": self.own}
        return {"device": self.device.save(), "rings": rings, "model": model, **guest}

    def advance(self, seconds: float = 0.0) -> Arrived | None:
        """One step of the migration; what came of it, once it is over."""
        assert self.migration is not None
        assert self.destination is not None
        self.clock.now += seconds
        error = None
        try:
            self.migration.step(self.clock.now)
        except (VirtioError, OSError) as raised:
            error = raised
        self.check_model()
        if not self.migration.finished:
            return None
        return self._arrived(error)

    def _arrived(self, error: BaseException | None) -> Arrived:
        migration, witness, destination = self.migration, self.witness, self.destination
        assert migration is not None
        assert witness is not None
        assert destination is not None
        arrived = Arrived(migration.phase.value, error=error, destination=destination)
        if error is None:
            destination.finish()
            assert destination.receiver.memory is not None
            arrived.verdict = witness.verdict(np.concatenate(list(digests_in_order(destination.receiver.memory))))
        witness.close()
        self.tap.taps = [self.model]
        self.device.tap = self.tap
        self.migration = None
        return arrived

    def finish(self, seconds: float | None = None) -> Arrived:
        """Step the migration to its end, nothing else happening: as if the link were without limit, or by the clock."""
        for _ in range(5000):
            assert self.migration is not None
            unlimited = 1.0 if self.migration.phase is Phase.HANDOVER else 1e7
            arrived = self.advance(unlimited if seconds is None else seconds)
            if arrived is not None:
                return arrived
        raise Violation("the migration never ends")

    def to_round(self, number: int, seconds: float = 1e7) -> None:
        """Step until that round (0 is the first) has begun; nothing of it is sent yet but the workload's pages."""
        for _ in range(5000):
            assert self.migration is not None, "the migration ended before that"
            phase = self.migration.phase.value
            if phase == "round" and len(self.migration.result.rounds) == number + 1:
                return
            if phase == "round":
                self.touch()
            self.advance(seconds if phase == "round" else 0.0)
        raise Violation(f"round {number} never comes")

    def to_end_of_round(self) -> None:
        """Step until all of the current round is sent; STOP and sync come next."""
        for _ in range(5000):
            assert self.migration is not None, "the migration ended before that"
            assert self.migration.ram is not None
            if not self.migration.ram.to_send:
                return
            self.advance(1e7)
        raise Violation("the round never ends")

    # -- judging --------------------------------------------------------------------------------------------------

    def judge(self, arrived: Arrived) -> World | None:
        """After a migration: the oracle; then the guest itself, here or as it goes on at the destination."""
        verdict = arrived.verdict
        if verdict is not None and verdict.pages_wrong:
            raise Violation(f"the oracle: {verdict.as_dict()}")
        if arrived.error is not None or arrived.destination is None or not arrived.destination.receiver_owns_guest:
            if self.frozen:
                raise Violation("the guest was not given back")
            self.settle()
            return None
        there = World(self.shape, received=arrived.destination)
        there.check_content()
        there.settle()
        return there

    def check_content(self) -> None:
        """Every page the guest has allocated holds what was written to it last."""
        found = self.manager.check_owned(Owner.WORKLOAD)
        if found.wrong:
            raise Violation(f"{found.wrong} of {found.pages} pages are wrong, the first is {found.first_wrong}")

    def settle(self) -> None:
        """Deliver what was signalled, and nothing else, until both sides rest; nobody may be stuck."""
        if self.frozen:
            raise Violation("the guest is still frozen")
        for _ in range(1000):
            self.deliver()
            self.run_driver()
            if not self.transport.kicked and not self.transport.pending:
                break
            for role in QueueRole:
                if self.device.queue_number(role) in self.transport.kicked:
                    self.serve(role)
        else:
            raise Violation("the two sides never come to rest")
        for role, queue in self.driver._queues.items():
            live = self.device.queue(role)
            if live is not None and live.next_avail != queue.avail_idx:
                raise Violation(f"{role.value}: {queue.avail_idx - live.next_avail & 0xFFFF} buffers nobody will serve")
        self.check_model()
        self.check_content()
        self.expect_allocator()

    def expect_allocator(self) -> None:
        """The second oracle: the allocator holds exactly what it should, counted page by page."""
        self.manager.verify()
        span = self.memory.page_span
        expected = {Owner.WORKLOAD: bitmap.empty(span)}
        for pfn, order in self.held.items():
            bitmap.set_run(expected[Owner.WORKLOAD], pfn, 1 << order)
        now = self.manager.snapshot()
        if self.model.state == "DONE" and self.transport.quiet and Owner.HINT in now.owners:
            raise Violation(f"after DONE {self.driver.hinted_blocks} blocks are still kept from the guest")
        if not np.array_equal(now.owners.get(Owner.WORKLOAD, bitmap.empty(span)), expected[Owner.WORKLOAD]):
            raise Violation("the guest's programs hold other pages than they allocated")
        ballooned = now.owners.get(Owner.BALLOON, bitmap.empty(span))
        if self.transport.quiet and set(bitmap.pages_of(ballooned)) != set(self.device._ballooned.numbers()):
            raise Violation("guest and device disagree on what is in the balloon")
        pages = sum(bitmap.count(words) for words in now.owners.values()) + bitmap.count(now.free)
        if pages != self.manager.total_pages:
            raise Violation(f"{self.manager.total_pages - pages} pages belong to nobody")


class _Port:
    """The world as a `HintPort`: `serve` means as much as the test lets the device do."""

    def __init__(self, world: World) -> None:
        self.world = world

    def __getattr__(self, name: str) -> Any:
        return getattr(self.world, name)

    @property
    def sink(self) -> Any:
        return self.world.sink

    @sink.setter
    def sink(self, sink: Any) -> None:
        self.world.sink = sink

    def serve(self) -> None:
        if self.world.serve_limit:
            self.world.serve(limit=self.world.serve_limit)
