"""The embedded guest on a QEMU: allocator, balloon driver and workload, stepped in this process.

The driver and the workload are those of every other guest; only the transport is QEMU's. Nothing here has a thread:
`serve` does what is due and waits a bounded time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from balloon_dev.profiles import QEMU
from guest_driver.balloon import DEFAULT_FEATURES, BalloonDriver
from guest_driver.memory_manager import MemoryManager, Owner
from guest_driver.qemu.machine import LOW_MEMORY, QemuMachine
from guest_driver.qemu.remark import WriteLog, mark_written
from guest_driver.waiting import wait_readable
from guest_driver.workloads import Workload
from vring.errors import PeerVanished, UsageError

__all__ = ["QemuGuest"]

SLICE_STEPS = 64
LONGEST_WAIT = 0.01
MARK_INTERVAL = 0.02
"""Seconds between two rounds of marking while a migration goes on."""


class QemuGuest:
    """The guest of one QEMU. Make one with `boot` or `attach`."""

    def __init__(self, machine: QemuMachine, manager: MemoryManager, driver: BalloonDriver) -> None:
        self.machine, self.manager, self.driver = machine, manager, driver
        self.memory = machine.memory
        self.workload: Workload | None = None
        self.pages_marked = 0
        """Pages marked in QEMU's dirty log so far; one page may count many times."""
        self._log: WriteLog | None = None
        self._marked_at = 0.0
        clock = manager.kernel.find("clock")
        if clock is None:
            raise UsageError("the RAM holds no guest of this program: there is no clock in its kernel area")
        self._clock = self.memory.array(clock, 1, np.float64)
        self._since = time.monotonic()
        self._frozen = False

    @classmethod
    def boot(
        cls,
        machine: QemuMachine,
        *,
        workload: str = "idle",
        seed: int = 1,
        features: int = DEFAULT_FEATURES,
        poison: int | None = None,
        batch: int = 64,
    ) -> QemuGuest:
        """Format RAM, probe the device, set the workload up.

        Parameters
        ----------
        machine
            A QEMU that runs and that nobody has driven.
        workload, seed
            What the guest does.
        features
            To accept where they are offered.
        poison
            32-bit value that freed pages are filled with, None for none.
        batch
            Blocks hinted at a time.

        Raises
        ------
        DeviceError
            If QEMU does not do what the driver must be able to rely on.
        """
        manager = MemoryManager.create(machine.memory, seed=seed, low=LOW_MEMORY)
        manager.kernel.reserve("clock", 8, 8)
        if poison is not None:
            manager.poison = poison
            manager.poison_free_pages()
        driver = BalloonDriver(manager, machine.transport(), profile=QEMU, features=features, batch=batch)
        driver.probe()
        guest = cls(machine, manager, driver)
        guest.workload = Workload.create(manager, workload, seed=seed)
        while not guest.workload.setup_step():
            guest._serve_driver()
        return guest

    @classmethod
    def attach(cls, machine: QemuMachine, *, batch: int = 64) -> QemuGuest:
        """Go on with the guest that was migrated into this QEMU; the device is not reset."""
        manager = MemoryManager.attach(machine.memory)
        driver = BalloonDriver.attach(manager, machine.transport(running=True), {}, profile=QEMU, batch=batch)
        guest = cls(machine, manager, driver)
        guest.workload = Workload.attach(manager)
        # An interrupt that was up when the guest left is up here without having been raised: look once.
        driver.interrupt(driver.transport.interrupts())
        return guest

    # -- time -----------------------------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Seconds this guest has run, on all its machines."""
        return float(self._clock[0]) + (0.0 if self._frozen else time.monotonic() - self._since)

    def skip(self, seconds: float) -> None:
        """Let guest time go on at once, instead of waiting."""
        self._clock[0] += seconds

    @property
    def frozen(self) -> bool:
        """Whether it stands still."""
        return self._frozen

    def freeze(self) -> None:
        """Store nothing more to guest RAM until `thaw`."""
        self._clock[0] = self.now
        self._frozen = True

    def thaw(self) -> None:
        """Go on."""
        self._frozen = False
        self._since = time.monotonic()

    # -- running --------------------------------------------------------------------------------------------------

    def _serve_driver(self) -> bool:
        if self.machine.interrupted:
            self.driver.interrupt(self.driver.transport.interrupts())
        return all(self.driver.step(self.now) for _ in range(SLICE_STEPS))

    def serve(self, longest: float = LONGEST_WAIT) -> None:
        """Let driver and workload work a while; then wait for interrupts or monitor events, at most `longest` s."""
        if self._frozen:
            wait_readable([self.machine.qmp.fileno()], longest)
            return
        busy = self._serve_driver()
        wake = self.driver.next_wake
        if self.workload is not None:
            wake = min(wake, self.workload.step(self.now))
        if self._log is not None and time.monotonic() - self._marked_at >= MARK_INTERVAL:
            self.mark()
        wait = 0.0 if busy else min(max(wake - self.now, 0.0), longest)
        if wait > 0 and not self.machine.qtest.any_high:
            wait_readable([self.machine.qtest.fileno(), self.machine.qmp.fileno()], wait)

    def run_until(self, done: Callable[[], bool], timeout: float, what: str) -> None:
        """Serve until `done()`.

        Raises
        ------
        PeerVanished
            If it does not come to that in `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while not done():
            if time.monotonic() > deadline:
                raise PeerVanished(f"waited {timeout:g} s in vain for {what}")
            self.serve()

    def run_for(self, seconds: float) -> None:
        """Serve for a while."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.serve(max(0.0, min(LONGEST_WAIT, end - time.monotonic())))

    # -- what QEMU cannot see -------------------------------------------------------------------------------------

    def track_writes(self, wanted: str = "auto") -> str:
        """Begin to mark what this process writes in QEMU's dirty log; return how the writes are found."""
        self._log = WriteLog(self.manager, wanted)
        self._log.start()
        return self._log.name

    def mark(self) -> int:
        """Mark what was written since the last call; return how many pages."""
        if self._log is None:
            return 0
        layouts = [queue.layout for queue in self.driver.queues]
        marked = mark_written(self.machine.qtest, self.memory, self._log.sync(), layouts)
        self.pages_marked += marked
        self._marked_at = time.monotonic()
        return marked

    def stop_tracking(self) -> None:
        """End that."""
        if self._log is not None:
            self._log.close()
            self._log = None

    # -- facts ----------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Return what the guest says of itself, as every embedded guest does."""
        owners = self.manager.pages_by_owner()
        return {
            "allocated_pages": owners.get(int(Owner.WORKLOAD), 0),
            "hinted_pages": owners.get(int(Owner.HINT), 0),
            "ballooned_pages": owners.get(int(Owner.BALLOON), 0),
            "free_pages": self.manager.free_pages,
            "total_pages": self.manager.total_pages,
            "pages_written": self.workload.pages_written if self.workload else 0,
            "guest_seconds": self.now,
            "driver": self.driver.statistics(),
        }
