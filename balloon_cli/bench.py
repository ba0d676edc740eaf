"""``balloon bench ring``: what a buffer costs on its way through a ring and back, next to a plain ring.

All rings run by turns, plain and ours, round after round, and only medians of ratios within a round are judged: the
two processors of a virtual machine are near one minute and far the next.
"""

from __future__ import annotations

import json as json_module
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from balloon_cli._bench import ffi, lib
from balloon_cli.streams import result
from vring.errors import MissingFacility, PeerVanished, VirtioError
from vring.memory import GuestMemory
from vring.split import SEG_WRITE, DeviceQueue, DriverQueue, QueueLayout

__all__ = ["bench", "bench_ring", "ring"]

SCHEMA_VERSION = 1
RING_SIZE: int = lib.BENCH_RING_SIZE
BATCHES = (1, 32, 128)
LIMIT_SECONDS = 60.0
SPINS = 20_000
C_BAR = 0.35
PYTHON_BAR = 1.6

_RING, _STATE, _FLAG, _DATA = 0x0, 0x8000, 0x10000, 0x20000
_PLAIN: int = lib.BENCH_PLAIN
_BATCHED: int = lib.BENCH_BATCHED


@dataclass(frozen=True, slots=True)
class _Case:
    """One line of the table."""

    key: str
    title: str
    run: Callable[[int], float]
    """Takes a number of buffers, returns nanoseconds per buffer."""
    share: int = 1
    """Divides the number of buffers, where each takes long."""


def _cpus() -> tuple[int, int]:
    allowed = sorted(os.sched_getaffinity(0))
    return (allowed[0], allowed[1]) if len(allowed) > 1 else (-1, -1)


def _c(kind: int, batch: int, cpus: tuple[int, int] | None) -> Callable[[int], float]:
    def run(buffers: int) -> float:
        result = ffi.new("struct bench_result *")
        if cpus is None:
            code = lib.bench_same_thread(kind, batch, buffers, result)
        else:
            code = lib.bench_two_processes(kind, batch, buffers, *cpus, LIMIT_SECONDS, result)
        if code:
            raise VirtioError(f"ring benchmark in C failed with {code} ({os.strerror(-code)})")
        return float(result.ns)

    return run


def _pair() -> tuple[GuestMemory, DriverQueue, DeviceQueue]:
    memory = GuestMemory.create(1 << 20, name="bench-ring")
    layout = QueueLayout.place(_RING, RING_SIZE)
    driver = DriverQueue(memory, layout, state=_STATE, event_idx=True)
    device = DeviceQueue(memory, layout, event_idx=True)
    driver.disable_callbacks()
    device.disable_notify()
    return memory, driver, device


class _Log:
    """What came out of the ring, kept in an untimed run to be compared with what went in."""

    def __init__(self, buffers: int) -> None:
        self.numbers = np.zeros(buffers, dtype=np.uint64)
        self.at = 0

    def add(self, numbers: Any) -> None:
        self.numbers[self.at : self.at + len(numbers)] = numbers
        self.at += len(numbers)

    def check(self, want: Any) -> None:
        if not np.array_equal(self.numbers, want):
            raise VirtioError("ring benchmark: buffers came out other than they went in")


def _addresses(buffers: int) -> Any:
    return _DATA + (np.arange(buffers, dtype=np.uint64) & np.uint64(1023)) * np.uint64(64)


def _python_driver(
    driver: DriverQueue, buffers: int, batch: int, spins: int, log: _Log | None = None
) -> Callable[[], bool]:
    """Return a turn of the driver: writes fresh addresses, exchanges; False when everything is back."""
    addr, tokens, back = driver.segs["addr"], driver.tokens, driver.done_tokens
    driver.segs["len"], driver.segs["flags"] = 64, SEG_WRITE
    exchange, source = driver.exchange, _addresses(1024 + RING_SIZE)
    # Views made once, as the arrays are: slicing costs as much as the store.
    whole, chunks = addr[:batch], [source[at : at + batch] for at in range(1024)]
    added = done = 0

    def turn() -> bool:
        nonlocal added, done
        n = buffers - added
        if n >= batch:
            n = batch
            whole[...] = chunks[added & 1023]
        else:
            addr[:n] = chunks[added & 1023][:n]
        if log:
            tokens[:n] = np.arange(added, added + n)
        got = exchange(n, spins=spins)
        if n:
            added += driver.added
        if log:
            log.add(back[:got])
        done += got
        return done < buffers

    return turn


def _python_device(device: DeviceQueue, batch: int, spins: int, log: _Log | None = None) -> Callable[[], int]:
    """Return a turn of the device: gives back the last batch, takes the next; how many it gave back so far."""
    addr, exchange = device.segs["addr"], device.exchange
    held = used = 0

    def turn() -> int:
        nonlocal held, used
        used += held
        held = exchange(held, batch, spins=spins)
        if log:
            log.add(addr[:held])
        return used

    return turn


def _python_same_thread(batch: int) -> Callable[[int], float]:
    def run(buffers: int) -> float:
        memory, driver, device = _pair()
        driver_turn = _python_driver(driver, buffers, batch, 0)
        device_turn = _python_device(device, batch, 0)
        start = time.perf_counter_ns()
        while driver_turn():
            device_turn()
        elapsed = time.perf_counter_ns() - start
        memory.close()
        return elapsed / buffers

    return run


def _python_device_process(
    memory: GuestMemory, device: DeviceQueue, buffers: int, batch: int, cpu: int, log: _Log | None
) -> None:
    """Be the device in a forked child; never returns."""
    status = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(LIMIT_SECONDS))  # never outlives a parent that died
        if cpu >= 0:
            os.sched_setaffinity(0, {cpu})
        turn = _python_device(device, batch, SPINS, log)
        memory.array(_FLAG, 1, np.uint32)[0] = 1
        while turn() < buffers:
            pass
        if log:
            log.check(_addresses(buffers))
        status = 0
    finally:
        os._exit(status)


def _python_two_processes(batch: int, cpus: tuple[int, int], checked: bool = False) -> Callable[[int], float]:
    def run(buffers: int) -> float:
        memory, driver, device = _pair()
        log = _Log(buffers) if checked else None
        before = os.sched_getaffinity(0)
        child = os.fork()
        if not child:
            _python_device_process(memory, device, buffers, batch, cpus[1], log)
        deadline = time.monotonic() + LIMIT_SECONDS
        try:
            if cpus[0] >= 0:
                os.sched_setaffinity(0, {cpus[0]})
            turn = _python_driver(driver, buffers, batch, SPINS, log)
            ready = memory.array(_FLAG, 1, np.uint32)
            while not ready[0] and time.monotonic() < deadline:
                pass
            start = time.perf_counter_ns()
            turns = 0
            while turn():
                turns += 1
                if not turns % 1024 and time.monotonic() > deadline:
                    raise PeerVanished("ring benchmark: the device process does not answer")
            elapsed = time.perf_counter_ns() - start
        except BaseException:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
        finally:
            os.sched_setaffinity(0, before)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status):
            raise VirtioError("ring benchmark: the device process saw other buffers than were sent")
        if log:
            log.check(np.arange(buffers, dtype=np.uint64))
        memory.close()
        return elapsed / buffers

    return run


def _cases(cpus: tuple[int, int]) -> list[_Case]:
    """Return one round: what something is judged by runs just before it."""
    reference = _Case("reference", "plain ring, C, two processes", _c(_PLAIN, RING_SIZE, cpus))
    in_c = {b: _Case(f"c_{b}", f"batched, C, two processes, {b}", _c(_BATCHED, b, cpus)) for b in BATCHES}
    cases = []
    for batch in BATCHES:
        cases += [reference, in_c[batch]]
    for batch in BATCHES:
        run = _python_two_processes(batch, cpus)
        share = 20 if batch == 1 else 1
        cases += [in_c[128], _Case(f"python_{batch}", f"batched, Python, two processes, {batch}", run, share)]
    cases.append(_Case("reference_same", "plain ring, C, same thread", _c(_PLAIN, 32, None)))
    cases += [_Case(f"c_same_{b}", f"batched, C, same thread, {b}", _c(_BATCHED, b, None)) for b in BATCHES]
    cases += [
        _Case(f"python_same_{b}", f"batched, Python, same thread, {b}", _python_same_thread(b), 20 if b == 1 else 1)
        for b in BATCHES
    ]
    return cases


def _judge(times: dict[str, list[float]], ratios: dict[str, list[float]], key: str) -> None:
    """Note the ratio of the last run of `key` to the last run of what it is judged by; same-thread runs are not."""
    kind, *rest = key.split("_")
    base = {"c": "reference", "python": "c_128"}.get(kind)
    if base and rest[0] != "same" and times[base] and times[base][-1] is not times[key][-1]:
        ratios.setdefault(f"{key} / {base}", []).append(times[key][-1] / times[base][-1])


def bench_ring(
    *, buffers: int = 2_000_000, repeats: int = 7, progress: Callable[[int, int, str], None] | None = None
) -> dict[str, Any]:
    """Time the rings against each other.

    Parameters
    ----------
    buffers
        Per run; fewer where each takes long.
    repeats
        Rounds; each runs every ring once, and the reference before each of ours.
    progress
        Called with the run's number, how many there are, and its title.

    Returns
    -------
    dict
        ``cases``: title and nanoseconds per buffer (median, fastest, all) by key; ``ratios``: medians of ratios within
        a round; ``bars``: value, limit, and whether it holds; ``line_round_trip_ns``: the state of the machine.

    Raises
    ------
    MissingFacility
        If there is one processor only: two processes would measure the scheduler.
    VirtioError
        If a ring lost or changed a buffer.
    """
    cpus = _cpus()
    if cpus[0] < 0:
        raise MissingFacility("the ring benchmark needs two processors; allow this process two with taskset")
    for batch in BATCHES:  # contents are checked once, outside the time; the C runs check sums each time
        _python_two_processes(batch, cpus, checked=True)(10_000)
    cases = _cases(cpus)
    times: dict[str, list[float]] = {case.key: [] for case in cases}
    ratios: dict[str, list[float]] = {}
    lines: list[float] = []
    total, at = repeats * len(cases), 0
    for _ in range(repeats):
        lines.append(float(lib.bench_line_round_trip(50_000, *cpus, LIMIT_SECONDS)))
        for case in cases:
            at += 1
            if progress:
                progress(at, total, case.title)
            times[case.key].append(case.run(max(RING_SIZE * 4, buffers // case.share)))
            _judge(times, ratios, case.key)
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    bars: list[dict[str, Any]] = [
        {"name": "c_32 / reference", "limit": C_BAR, "value": medians["c_32 / reference"]},
        {"name": "python_128 / c_128", "limit": PYTHON_BAR, "value": medians["python_128 / c_128"]},
    ]
    for bar in bars:
        bar["holds"] = float(str(bar["value"])) <= float(str(bar["limit"]))
    return {
        "schema_version": SCHEMA_VERSION,
        "buffers": buffers,
        "repeats": repeats,
        "ring_size": RING_SIZE,
        "cpus": list(cpus),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "line_round_trip_ns": statistics.median(lines),
        "cases": {
            case.key: {
                "title": case.title,
                "ns": statistics.median(times[case.key]),
                "fastest_ns": min(times[case.key]),
                "all_ns": times[case.key],
            }
            for case in cases
        },
        "ratios": medians,
        "bars": bars,
    }


def _table(report: dict[str, Any]) -> Table:
    table = Table(title=f"ring of {report['ring_size']}, ns per buffer, medians of {report['repeats']} rounds")
    table.add_column("ring")
    for name in ("median", "fastest", "ratio"):
        table.add_column(name, justify="right")
    for key, case in report["cases"].items():
        ratio = next(
            (f"{v:.2f} x {n.split(' / ')[1]}" for n, v in report["ratios"].items() if n.startswith(f"{key} /")), ""
        )
        table.add_row(case["title"], f"{case['ns']:.1f}", f"{case['fastest_ns']:.1f}", ratio)
    return table


def _print(report: dict[str, Any], out: Console) -> None:
    out.print(_table(report))
    out.print(f"one line to the other processor and back: {report['line_round_trip_ns']:.0f} ns")
    for bar in report["bars"]:
        verdict = "holds" if bar["holds"] else "MISSED"
        out.print(f"bar {bar['name']} <= {bar['limit']}: {bar['value']:.2f}, {verdict}")


@click.group(
    epilog="""\b
Examples:
  balloon bench ring
  balloon bench ring --help                  all options
"""
)
def bench() -> None:
    """Measure what things cost on this machine."""


@bench.command(
    epilog="""\b
Examples:
  balloon bench ring
  balloon bench ring --repeats 15 --json > ring.json
"""
)
@click.option(
    "--buffers", default=2_000_000, show_default=True, type=click.IntRange(1024, 1 << 40), help="Buffers per run."
)
@click.option(
    "--repeats", default=7, show_default=True, type=click.IntRange(min=1), help="Rounds; medians are reported."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--check", is_flag=True, help="Exit with 1 if a bar is missed.")
def ring(buffers: int, repeats: int, as_json: bool, check: bool) -> None:
    """Time the split ring against a plain one."""
    console = Console(stderr=True)

    def progress(at: int, total: int, title: str) -> None:
        if console.is_terminal:
            console.print(f"[{at}/{total}] {title}".ljust(79), end="\r", markup=False, highlight=False)

    report = bench_ring(buffers=buffers, repeats=repeats, progress=progress)
    with result() as out:
        if as_json:
            print(json_module.dumps(report, indent=2))
        else:
            _print(report, out)
    if check and not all(bar["holds"] for bar in report["bars"]):
        sys.exit(1)
