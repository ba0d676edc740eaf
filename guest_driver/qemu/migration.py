"""A live migration from one QEMU to another, with the guest of the first driven here; and what came of it.

QEMU stops the virtual machine when little is left and, before it sends that, waits for us (the capability
pause-before-switchover): the guest is frozen then, and what it wrote is marked a last time.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from guest_driver.memory_manager import HINT_ORDER, Owner
from guest_driver.qemu.guest import QemuGuest
from guest_driver.qemu.machine import QemuMachine
from vring import bitmap
from vring.contents import digests_of
from vring.errors import PeerVanished, VirtioError

__all__ = ["Hinted", "MigrationOutcome", "MigrationStopped", "Pass", "Verdict", "compare", "migrate"]

NO_LIMIT = (1 << 63) - 1
LONGEST_DOWNTIME_MS = 2000 * 1000
TIMEOUT = 300.0


class MigrationStopped(VirtioError):
    """The migration was cancelled because the caller wanted that; the guest has its pages back."""


@dataclass(slots=True)
class Pass:
    """One pass of QEMU over what is dirty, from the differences of its own counters (`query-migrate`)."""

    bytes_sent: int
    pages_normal: int
    pages_zero: int
    seconds: float
    pages_left: int
    """To send when it ended."""


@dataclass(slots=True)
class Hinted:
    """One hint run, as the driver saw it."""

    command_id: int
    blocks: int
    seconds: float
    """From the first block to the last."""


@dataclass(slots=True)
class Verdict:
    """Source and destination compared, page by page, both stopped."""

    pages_checked: int = 0
    pages_wrong: int = 0
    pages_skipped: int = 0
    """Differ, and may: free, and hinted."""
    kept_pages: int = 0
    """Of those checked, in use: the kernel area and everything allocated but the hinted blocks."""
    wrong: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class MigrationOutcome:
    """What a migration came to; sizes in bytes, times in seconds."""

    info: dict[str, Any]
    """QEMU's last `query-migrate`."""
    passes: list[Pass]
    hinted: list[Hinted]
    converged: bool
    frozen_seconds: float
    """From the guest's freeze until the destination had everything."""
    marked_at_freeze: int
    """Pages marked for QEMU's dirty log while the guest was frozen."""
    pages_marked: int
    """Pages marked in all."""
    guest_at_pause: dict[str, Any]
    dirty_log: str
    """How the writes were found."""
    verdict: Verdict = field(default_factory=Verdict)

    @property
    def bytes_sent(self) -> int:
        """As QEMU counts them: all of the stream."""
        return int(self.info["ram"]["transferred"])

    @property
    def total_seconds(self) -> float:
        """As QEMU counts them."""
        return float(self.info["total-time"]) / 1000

    @property
    def downtime_seconds(self) -> float:
        """As QEMU counts them: from stopping the machine to the end."""
        return float(self.info["downtime"]) / 1000


class _Watch:
    """What is noted while a migration goes on."""

    def __init__(self, guest: QemuGuest) -> None:
        self.guest = guest
        self.passes: list[Pass] = []
        self.hinted: list[Hinted] = []
        self._last = (0, 0, 0, time.monotonic())
        self._before = guest.driver.statistics()
        self._looked = self._began = time.monotonic()

    def hints(self) -> None:
        """Note what the driver hinted since the last look."""
        now = self.guest.driver.statistics()
        if now["runs"] > self._before["runs"]:
            self.hinted.append(Hinted(now["active"], 0, 0.0))
            self._began = self._looked
        self._looked = time.monotonic()
        if self.hinted and now["blocks"] > self._before["blocks"]:
            self.hinted[-1].blocks += now["blocks"] - self._before["blocks"]
            self.hinted[-1].seconds = self._looked - self._began
        self._before = now

    def pass_ended(self, info: dict[str, Any]) -> None:
        """Note the counters at the end of a pass."""
        ram = info.get("ram")
        if ram is None:
            return
        now = (int(ram["transferred"]), int(ram["normal"]), int(ram["duplicate"]), time.monotonic())
        if now[0] > self._last[0]:
            sent, normal, zero, seconds = (b - a for a, b in zip(self._last, now, strict=True))
            self.passes.append(Pass(int(sent), int(normal), int(zero), seconds, int(ram["remaining"]) >> 12))
            self._last = now


def _prepare(machine: QemuMachine, *names: str) -> None:
    capabilities = [{"capability": name, "state": True} for name in ("events", *names)]
    machine.qmp.execute("migrate-set-capabilities", capabilities=capabilities)


def _connect(source: QemuMachine, destination: QemuMachine) -> None:
    """Give both ends of a socket to the two, and begin."""
    ends = socket.socketpair()
    for machine, end in zip((source, destination), ends, strict=True):
        with end:
            machine.qmp.execute("getfd", [end.fileno()], fdname="migration")
    destination.qmp.execute("migrate-incoming", uri="fd:migration")
    source.qmp.execute("migrate", uri="fd:migration")


def migrate(
    guest: QemuGuest,
    destination: QemuMachine,
    *,
    bandwidth: int = 128 << 20,
    downtime_limit: float = 0.3,
    max_rounds: int = 30,
    dirty_log: str = "auto",
    tick: Callable[[], bool] = lambda: False,
    timeout: float = TIMEOUT,
) -> MigrationOutcome:
    """Migrate a guest while it runs, and compare both machines' memory.

    Afterwards the source is stopped for good, and the destination waits: `QemuGuest.attach`, then QMP's ``cont``.

    Parameters
    ----------
    guest
        Of the source.
    destination
        Started with `QemuOptions.incoming`, with the same features.
    bandwidth
        Bytes per second, 0 for no limit.
    downtime_limit
        Seconds: QEMU stops the machine when what is left can be sent in this time.
    max_rounds
        After so many passes the machine is stopped however much is left.
    dirty_log
        How this process's writes are found: ``wp-async``, ``software`` or ``auto``.
    tick
        Called again and again; when it returns True the migration is cancelled.
    timeout
        Seconds until it is given up.

    Raises
    ------
    MigrationStopped
        If `tick` wanted that.
    VirtioError
        If the migration failed; the guest goes on at the source.
    PeerVanished
        If a QEMU is gone, or it takes too long.
    """
    source = guest.machine
    _prepare(source, "pause-before-switchover")
    _prepare(destination)
    limits = {"max_bandwidth": bandwidth or NO_LIMIT, "downtime_limit": round(downtime_limit * 1000)}
    source.qmp.execute("migrate-set-parameters", **limits)
    before = guest.pages_marked
    name = guest.track_writes(dirty_log)
    watch = _Watch(guest)
    converged, marked, frozen_at = True, 0, 0.0
    pause: dict[str, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        _connect(source, destination)
        done = False
        while not done:
            guest.serve()
            watch.hints()
            for event in source.qmp.take_events():
                if event["event"] == "MIGRATION_PASS":
                    if event["data"]["pass"] > 1:  # the event is sent when a pass begins
                        watch.pass_ended(source.qmp.execute("query-migrate"))
                    if event["data"]["pass"] > max_rounds and converged:
                        converged = False
                        source.qmp.execute("migrate-set-parameters", downtime_limit=LONGEST_DOWNTIME_MS)
                elif event["event"] == "MIGRATION":
                    status = event["data"]["status"]
                    if status == "pre-switchover":
                        guest.freeze()
                        frozen_at = time.monotonic()
                        pause = guest.status()
                        marked = guest.mark()
                        source.qmp.execute("migrate-continue", state="pre-switchover")
                    elif status in ("failed", "cancelled"):
                        raise _failure(source)
                    done = status == "completed"
            if tick():
                _cancel(guest)
            if time.monotonic() > deadline:
                _cancel(guest, f"the migration was not over in {timeout:g} s")
        destination.qmp.wait_event("MIGRATION", 30.0, status="completed")
    finally:
        guest.stop_tracking()
    frozen = time.monotonic() - frozen_at
    info = source.qmp.execute("query-migrate")
    watch.pass_ended(info)
    total = guest.pages_marked - before
    outcome = MigrationOutcome(info, watch.passes, watch.hinted, converged, frozen, marked, total, pause, name)
    outcome.verdict = compare(guest, destination, hints=bool(outcome.hinted))
    return outcome


def _failure(source: QemuMachine) -> VirtioError:
    why = source.qmp.execute("query-migrate").get("error-desc", "no reason given")
    return VirtioError(f"QEMU's migration failed: {why}")


def _cancel(guest: QemuGuest, why: str = "") -> None:
    """Cancel; let the driver have DONE; raise."""
    guest.machine.qmp.execute("migrate_cancel")
    if guest.frozen:
        guest.thaw()
    guest.run_until(lambda: not guest.driver.hinted_blocks, 5.0, "DONE after a cancelled migration")
    raise PeerVanished(why) if why else MigrationStopped("interrupted")


def compare(guest: QemuGuest, destination: QemuMachine, *, hints: bool) -> Verdict:
    """Compare the memory of both machines while both stand still.

    A page in use must be equal. A free one may differ if hints were given, and only within a block that the driver
    still holds for hints (or anywhere, if it had to take some back): all others must be equal too.
    """
    manager = guest.manager
    layout, span = guest.memory.page_layout, guest.memory.page_span
    differ = digests_of(guest.memory) != digests_of(destination.memory)
    hinted = layout.pick(bitmap.to_bools(manager.bitmap(Owner.HINT), span))
    kept = layout.pick(bitmap.to_bools(manager.allocated_bitmap(), span)) & ~hinted
    may = np.zeros(layout.count, dtype=np.bool_)
    if hints:
        may = ~kept if guest.driver.statistics()["reclaimed"] else hinted
    wrong = np.flatnonzero(differ & ~may)
    names = [
        f"page {page:#x} ({'in use' if kept[slot] else 'free'}) differs"
        for slot, page in zip(wrong[:5], layout.numbers(wrong[:5]).tolist(), strict=True)
    ]
    return Verdict(layout.count, len(wrong), int(np.count_nonzero(differ & may)), int(np.count_nonzero(kept)), names)


def hinted_pages(outcome: MigrationOutcome) -> int:
    """Return how many pages all runs hinted."""
    return sum(h.blocks for h in outcome.hinted) << HINT_ORDER
