"""A whole pass of free page hints, driver and device in one process: what batches of blocks save.

``python benchmarks/hint_pass.py [--memory 4G] [--rounds 9]``. A batch of 1 is what Linux does: one allocation, one
buffer, one kick for each block of 4 MiB. Passes by turns, medians; only the ratios mean something on another machine.
"""

from __future__ import annotations

import argparse
import statistics
import time

from balloon_dev.device import BalloonDevice
from guest_driver.balloon import BalloonDriver
from guest_driver.memory_manager import MemoryManager
from guest_driver.mmio import MmioTransport
from vring.memory import GuestMemory
from vring.mmio import MmioDevice
from vring.sizes import parse_size

BATCHES = (1, 8, 64, 256)


class World:
    """One guest whose memory is all free, and its device."""

    def __init__(self, memory: int, batch: int) -> None:
        self.memory = GuestMemory.create(memory)
        self.device = BalloonDevice()
        self.mmio = MmioDevice(self.device, self.memory)
        self.transport = MmioTransport(self.mmio)
        self.driver = BalloonDriver(MemoryManager.create(self.memory), self.transport, batch=batch)
        self.driver.probe()
        self.settle()

    def settle(self) -> None:
        """Let both sides work until they rest."""
        self.mmio.deliver()
        self.driver.interrupt(self.transport.interrupts())
        while self.driver.step():
            pass

    def run(self) -> tuple[int, float]:
        """Return the blocks of one pass and ns for each of them."""
        self.device.start_hinting()
        began = time.perf_counter_ns()
        self.settle()
        took = time.perf_counter_ns() - began
        blocks = self.driver.hinted_blocks
        self.device.finish_hinting()
        self.settle()
        return blocks, took / blocks


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", type=parse_size, default=4 << 30)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    worlds = {batch: World(args.memory, batch) for batch in BATCHES}
    found: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    blocks = 0
    for _ in range(args.rounds):
        for batch, world in worlds.items():
            blocks, ns = world.run()
            found[batch].append(ns)
    one = statistics.median(found[1])
    print(f"{blocks} blocks a pass\n| blocks a batch | ns per block | of one at a time |\n|---|---|---|")
    for batch, times in found.items():
        print(f"| {batch} | {statistics.median(times):,.0f} | {statistics.median(times) / one:.3f} |")


if __name__ == "__main__":
    main()
