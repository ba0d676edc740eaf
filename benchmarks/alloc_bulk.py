"""Allocating many blocks in one call against one call for each: the batch allocation API.

Compares within one run, interleaved, medians; only the ratios mean something on another machine. The part without
Python is compiled with ``cc`` if there is one.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from guest_driver.memory_manager import Alloc, MemoryManager, Owner
from vring.memory import GuestMemory

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 9
MAX_SINGLE = 20_000


def from_c() -> list[tuple[int, int, list[float]]]:
    """Return (order, blocks, ns for each of alloc one by one, bulk, free one by one, bulk), without Python."""
    compiler = shutil.which("cc")
    if compiler is None:
        return []
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/alloc_bulk"
        files = [str(ROOT / "benchmarks/alloc_bulk.c"), *map(str, sorted((ROOT / "csrc/page_alloc").glob("*.c")))]
        command = [compiler, "-std=gnu11", "-O2", f"-I{ROOT / 'csrc'}", *files, "-o", program]
        subprocess.run(command, check=True)
        lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    rows = [line.split() for line in lines]
    return [(int(row[0]), int(row[1]), [float(cell) for cell in row[2:]]) for row in rows]


def from_python(manager: MemoryManager, order: int) -> tuple[int, int, list[float]]:
    """Return the same for calls from Python."""
    n = min(MAX_SINGLE, (manager.free_pages - manager.watermark >> order) - 2)
    out = np.empty(n, dtype=np.uint64)
    took: list[list[float]] = [[], [], [], []]
    for _ in range(ROUNDS):
        t = [time.perf_counter_ns()]
        single = [manager.alloc_pages(order, Owner.HINT, Alloc.NORETRY) for _ in range(n)]
        t.append(time.perf_counter_ns())
        for pfn in single:
            if pfn is not None:
                manager.free(pfn, order)
        t.append(time.perf_counter_ns())
        bulk = manager.alloc_pages_bulk(order, n, Owner.HINT, Alloc.NORETRY, out=out)
        t.append(time.perf_counter_ns())
        manager.free_bulk(bulk, order)
        t.append(time.perf_counter_ns())
        for i, (a, b) in enumerate([(0, 1), (2, 3), (1, 2), (3, 4)]):
            took[i].append((t[b] - t[a]) / n)
    return order, n, [statistics.median(times) for times in took]


def main() -> int:
    """Print the table."""
    table = Table("from", "order", "blocks", "alloc one by one", "bulk", "ratio", "free one by one", "bulk", "ratio")
    table.title = "ns per block, median"
    with GuestMemory.create(1 << 30) as memory:
        manager = MemoryManager.create(memory)
        runs = [("C", run) for run in from_c()] + [("Python", from_python(manager, order)) for order in (0, 4, 10)]
        for language, (order, n, ns) in runs:
            figures = [f"{ns[0]:.1f}", f"{ns[1]:.1f}", f"{ns[0] / ns[1]:.1f}"]
            figures += [f"{ns[2]:.1f}", f"{ns[3]:.1f}", f"{ns[2] / ns[3]:.1f}"]
            table.add_row(language, str(order), str(n), *figures)
        del manager
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
