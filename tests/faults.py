"""Planted faults: each breaks engine, device or driver in one way for as long as its context lasts.

`FAULTS` names them; the tests show that each is found, and that without it nothing is.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
from harness import World

from balloon_dev import hinting
from balloon_dev.device import BalloonDevice
from balloon_dev.features import QueueRole
from balloon_dev.hinting import Action, HintEvent, HintState, Transition
from guest_driver.balloon import BalloonDriver, FreeAt
from guest_driver.memory_manager import HINT_ORDER, Owner
from host_qemu_side.discard import Discarder
from host_qemu_side.migration import HintRunStats, Migration, Phase
from host_qemu_side.migration.ram import RamState
from host_qemu_side.migration.stream import Kind
from vring.contents import digests_of
from vring.dirty.software import SoftwareDirtyLog
from vring.pages import PageSet
from vring.split import DriverQueue

FAULTS: dict[str, Callable[[], AbstractContextManager[None]]] = {}


def fault(function: Callable[[], Iterator[None]]) -> Callable[[], AbstractContextManager[None]]:
    """Register a planted fault under its name."""
    FAULTS[function.__name__] = contextmanager(function)
    return FAULTS[function.__name__]


def table_cell(state: str, event: HintEvent, following: str, action: Action) -> Any:
    """Change one cell of the hint table."""
    return patch.dict(hinting.TABLE, {(HintState[state], event): Transition(HintState[following], action)})


# -- engine -----------------------------------------------------------------------------------------------------------


@fault
def late_discard() -> Iterator[None]:
    """Hinted pages are punched out one step after their hint, while the guest runs and may have them back."""
    hint, step = Migration._hint, Migration.step

    def remember(self: Any, command_id: int, addr: Any, length: Any) -> None:
        hint(self, command_id, addr, length)
        self.__dict__.setdefault("late", []).append((addr.copy(), length.copy()))

    def punch(self: Any, now: float) -> float:
        for addr, length in self.__dict__.pop("late", []):
            Discarder(self.memory)(addr, length)
        return step(self, now)

    with patch.object(Migration, "_hint", remember), patch.object(Migration, "step", punch):
        yield


@fault
def hint_clears_the_log() -> Iterator[None]:
    """A hint wipes the log of writes too, not just the migration bitmap."""
    hint = Migration._hint

    def wipe(self: Any, command_id: int, addr: Any, length: Any) -> None:
        hint(self, command_id, addr, length)
        for log in self.log._logs:
            PageSet(log.layout, log.bits).clear_ranges(addr, length)

    with patch.object(Migration, "_hint", wipe):
        yield


@fault
def pages_of_another_run() -> Iterator[None]:
    """Pages sent under an old id count for the new one, before the guest has sent that."""
    with table_cell("REQUESTED", HintEvent.GUEST_PAGES, "REQUESTED", Action.APPLY):
        yield


@fault
def hint_after_stop() -> Iterator[None]:
    """Pages that come after STOP, and after the sync that follows it, are still taken out of the bitmap."""

    def hint(self: Any, command_id: int, addr: Any, length: Any) -> None:
        self._ram.hint(addr, length)

    with (
        table_cell("STOP", HintEvent.GUEST_PAGES, "STOP", Action.APPLY),
        patch.object(Migration, "_hint", hint),
    ):
        yield


@fault
def id_before_sync() -> Iterator[None]:
    """The next id is issued before the dirty log is synced."""
    begin = Migration._begin_round

    def between(self: Any, next_round: int) -> Generator[float, None, bool]:
        self.phase = Phase.SYNC
        if self.hints is not None:
            self.hints.stop()
            self._end_run()
        last = next_round >= self.limits.max_rounds
        self.observer.round_begins(next_round)
        command_id = None if last or self.hints is None else self.hints.start()
        self.early = command_id
        if command_id is not None:
            self.observer.id_issued(command_id)
        self._queue(self._writer.json(Kind.ROUND, {"round": next_round}))
        yield self._now
        self._sync()
        return last

    def begin_round(self: Any) -> None:
        early = self.__dict__.pop("early", None)
        if early is None:
            begin(self)
            return
        hints, self.hints = self.hints, None
        begin(self)
        self.hints, self._run = hints, HintRunStats(early)

    with patch.object(Migration, "_between_rounds", between), patch.object(Migration, "_begin_round", begin_round):
        yield


@fault
def hint_rounded_outward() -> Iterator[None]:
    """A page that a hint covers only in part counts as hinted."""
    hint = RamState.hint

    def outward(self: Any, addr: Any, length: Any) -> int:
        first = addr & ~np.uint64(4095)
        end = (addr + length + np.uint64(4095)) & ~np.uint64(4095)
        return hint(self, first, end - first)

    with patch.object(RamState, "hint", outward):
        yield


@fault
def zero_pages_not_sent() -> Iterator[None]:
    """A page that became zero is left out, as if the destination had never got it with content."""
    take = RamState.take

    def without_zeros(self: Any, *args: Any) -> Any:
        taken = take(self, *args)
        return None if taken is None else (taken[0], taken[1], taken[2][:0])

    with patch.object(RamState, "take", without_zeros):
        yield


@fault
def same_content_is_no_write() -> Iterator[None]:
    """The dirty log compares pages: a page rewritten with what it held is not reported."""

    class CompareLog:
        name, needs_frozen_guest, hints_safe = "compare", False, True

        def __init__(self, log: SoftwareDirtyLog, memory: Any) -> None:
            self._log, self.memory, self.last = log._log, memory, None  # `_log`: as the real one has it

        def start(self) -> None:
            self.last = digests_of(self.memory)

        def sync(self, into: Any) -> int:
            now = digests_of(self.memory)
            changed = now != self.last
            into.set_bools(changed)
            self.last = now
            return int(changed.sum())

        def stop(self) -> None:
            pass

    migrate = World.migrate

    def comparing(self: Any, **options: Any) -> Migration:
        return migrate(self, wrap_log=lambda log: CompareLog(log, self.memory), **options)

    with patch.object(World, "migrate", comparing):
        yield


# -- device -----------------------------------------------------------------------------------------------------------


@fault
def old_stop_ends_new_run() -> Iterator[None]:
    """The stop command of an old run ends the run that is requested now."""
    with table_cell("REQUESTED", HintEvent.GUEST_OTHER_ID, "STOP", Action.NOTHING):
        yield


@fault
def stop_after_done() -> Iterator[None]:
    """A stop by the host is obeyed once more when the run is over: DONE is taken back."""
    with table_cell("DONE", HintEvent.HOST_STOP, "STOP", Action.PUBLISH):
        yield


@fault
def done_without_interrupt() -> Iterator[None]:
    """DONE stands in the config space, but nobody tells the guest."""
    finish = BalloonDevice.finish_hinting

    def silent(self: Any) -> None:
        due = self._config_change
        finish(self)
        self._config_change = due

    with patch.object(BalloonDevice, "finish_hinting", silent):
        yield


@fault
def used_ring_not_logged() -> Iterator[None]:
    """What the device writes to used rings is in no dirty log."""
    with patch.object(BalloonDevice, "_log_used_ring", lambda self, queue: None):
        yield


@fault
def discard_not_logged() -> Iterator[None]:
    """Pages that the device drops for the balloon are in no dirty log."""
    with patch.object(SoftwareDirtyLog, "mark_ranges", lambda self, addr, length: None):
        yield


# -- driver -----------------------------------------------------------------------------------------------------------


@fault
def stop_frees() -> Iterator[None]:
    """The driver frees hinted blocks at STOP."""
    init = BalloonDriver.__init__

    def eager(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **{**options, "free_at": FreeAt.STOP})

    with patch.object(BalloonDriver, "__init__", eager):
        yield


@fault
def done_leaks() -> Iterator[None]:
    """At DONE one block is forgotten."""

    def all_but_one(self: Any) -> None:
        blocks, _ = self.manager.owned(Owner.HINT)
        self.manager.free_bulk(blocks[1:].copy(), HINT_ORDER)

    with patch.object(BalloonDriver, "_free_hinted", all_but_one):
        yield


@fault
def torn_index() -> Iterator[None]:
    """The driver stores the avail index in two halves; the device may look between them."""
    publish, boot = DriverQueue.publish, World._guest_tools
    worlds: list[World] = []

    def note(self: World) -> None:
        worlds.append(self)
        boot(self)

    def torn(self: Any) -> bool:
        where = self.layout.avail + 2
        before = self.memory.read(where, 2)
        kick = publish(self)
        after = self.memory.read(where, 2)
        if before[1] != after[1]:
            self.memory.write(where, after[:1] + before[1:])
            for role in QueueRole:
                if worlds[-1].device.queue_number(role) == self.index:
                    worlds[-1].serve(role)
            self.memory.write(where, after)
        return kick

    with ExitStack() as stack:
        stack.enter_context(patch.object(World, "_guest_tools", note))
        stack.enter_context(patch.object(DriverQueue, "publish", torn))
        yield
