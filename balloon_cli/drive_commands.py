"""The commands that need a QEMU: ``balloon drive`` and ``balloon compare``, options and output."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from balloon_cli import report
from balloon_cli.compare import CompareOptions, compare_all
from balloon_cli.drive import DriveOptions, drive_all, drive_findings, drive_summary
from balloon_cli.guests import check_python_guest, require_descriptors, require_memory
from balloon_cli.live import LiveProgress, make_progress
from balloon_cli.migrate import Progress
from balloon_cli.options import SIZE, fail_if, limit_options, qemu_option, set_up_logging
from balloon_cli.streams import result
from guest_driver.qemu.launch import MAX_MEMORY
from guest_driver.qemu.machine import LOW_MEMORY
from guest_driver.workloads import FORMS
from vring.sizes import format_size

__all__ = ["compare", "drive"]

MIN_MEMORY = 32 << 20
LABELS = {"bytes_sent": "sent", "total_seconds": "total time", "downtime_seconds": "downtime"}
Command = Callable[..., None]


def _shared(hints: str) -> Callable[[Command], Command]:
    """Return a decorator with the options both commands have."""
    choices: list[Callable[[Command], Command]] = [
        click.option("--memory", type=SIZE, default="1G", show_default=True, help="RAM of the guest, 32M to 2G."),
        click.option("--workload", default="churn:20%@32M", show_default=True, help=f"What the guest does: {FORMS}"),
        click.option(
            "--hints",
            type=click.Choice(["on", "off", "both"]),
            default=hints,
            show_default=True,
            help="With free page hints, without, or both after one another, with two guests.",
        ),
        limit_options(warm_up=0.2),
        click.option(
            "--transport",
            type=click.Choice(["mmio", "pci"]),
            default="mmio",
            show_default=True,
            help="How the balloon is reached: virtio-mmio (machine microvm) or virtio-pci (machine q35).",
        ),
        qemu_option,
        click.option(
            "--dirty-log",
            type=click.Choice(["auto", "wp-async", "software"]),
            default="auto",
            show_default=True,
            help="How the writes are found that are marked for QEMU.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout."),
        click.option("-v", "--verbose", count=True, help="Show each round; twice: log everything."),
    ]

    def decorate(command: Command) -> Command:
        for choice in reversed(choices):
            command = choice(command)
        return command

    return decorate


def _start(name: str, options: dict[str, Any], verbose: int) -> tuple[DriveOptions, Progress]:
    """Check the values; return them, and what shows progress."""
    memory = options["memory"]
    if memory % (1 << 20) or not MIN_MEMORY <= memory <= MAX_MEMORY:
        raise click.BadParameter(f"{format_size(memory)}: whole MiB from 32M to 2G", param_hint="--memory")
    check_python_guest(memory, options["workload"], least=MIN_MEMORY, low=LOW_MEMORY)
    require_descriptors()
    require_memory(memory, options["workload"], hints=options["hints"] == "on")
    console = Console(stderr=True)
    title = f"{name}: {format_size(memory)} guest, {options['workload']}, seed {options['seed']}"
    progress = make_progress(title, console, verbose=verbose)
    set_up_logging(verbose, console if isinstance(progress, LiveProgress) else None)
    return DriveOptions(**options), progress


@click.command(
    epilog="""\b
Examples:
  balloon drive                                       1 GiB on two QEMUs, without and with hints
  balloon drive --transport pci --memory 256M
  balloon drive --workload churn:20%@32M+writer:64M@20M --hints on -v
  balloon drive --hints both --bandwidth 128M --json > result.json

\b
QEMU comes from the package qemu-system-x86; no guest kernel and no KVM are needed.
Exit code 1 says that a page is wrong, a feature did not do its part, or QEMU is not as packaged.
"""
)
@_shared("both")
def drive(as_json: bool, verbose: int, **options: Any) -> None:
    """Drive the balloon of an unmodified QEMU with our guest, and have QEMU migrate it.

    The embedded guest takes the place of a guest kernel, through qtest. It uses every feature once; then QEMU migrates
    it to a second QEMU while it runs, where it goes on without a reset. Every page is compared.
    """
    chosen, progress = _start("drive", options, verbose)
    found = drive_all(chosen, progress)
    with result() as out:
        if as_json:
            print(json.dumps(found))
        else:
            for line in drive_summary(found):
                out.print(Text(line), soft_wrap=True)
            report.print_migration(found, out, verbose=verbose)
    fail_if([*drive_findings(found), *report.findings(found)])


@click.command(
    epilog="""\b
Examples:
  balloon compare                                     medians of 5, with hints
  balloon compare --repeats 3 --hints both --json
  balloon compare --workload churn:20%@32M+writer:64M@20M
"""
)
@_shared("on")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, metavar="N", help="Runs of each.")
@click.option("--check", is_flag=True, help="Exit with 1 if ours sends more than 1.05 x the bytes or takes longer.")
def compare(as_json: bool, verbose: int, repeats: int, check: bool, **options: Any) -> None:
    """Migrate the same guest on QEMU's device and on ours, by turns, and show the medians side by side.

    Same driver, seed, workload and bandwidth; QEMU counts its own bytes and times, and so do we.
    """
    chosen, progress = _start("compare", options, verbose)
    compared = compare_all(CompareOptions(chosen, repeats), progress)
    with result() as out:
        if as_json:
            print(json.dumps(compared))
        else:
            _print_comparison(compared, out)
    found = report.findings(compared)
    if check:
        found += [f"ours exceeds QEMU's: {row['ratio']}" for row in compared["medians"] if not row["holds"]]
    fail_if(found)


def _print_comparison(result: dict[str, Any], console: Console) -> None:
    title = (
        f"{format_size(result['memory_bytes'])} guest, {result['workload']}, seed {result['seed']}, "
        f"medians of {result['repeats']}"
    )
    console.print(Text(f"{result['qemu']['version']}, {result['qemu']['path']}"), soft_wrap=True)
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("", "QEMU", "ours", "ours / QEMU"):
        table.add_column(name, justify="right" if name else "left")
    for row in result["medians"]:
        hints = "with hints" if row["hints"] else "without hints"
        for figure, label in (
            ("bytes_sent", "sent"),
            ("total_seconds", "total time"),
            ("downtime_seconds", "downtime"),
        ):
            values = [row[side][figure] for side in ("qemu", "ours")]
            texts = [format_size(v) if figure == "bytes_sent" else f"{v:.3f} s" for v in values]
            ratio = row["ratio"][figure]
            table.add_row(f"{label}, {hints}", *texts, "" if ratio is None else f"{ratio:.3f}")
    console.print(table)
