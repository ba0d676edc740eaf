"""The results of ``balloon migrate`` and ``balloon receive`` for people: tables and verdicts in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vring.programs import Origin
from vring.sizes import format_size

__all__ = ["findings", "print_migration", "print_reception", "resumed_findings"]

PAGE_SIZE = 4096


def resumed_findings(resumed: dict[str, Any] | None) -> list[str]:
    """Return what is wrong with a guest that went on, one line each; nothing if all is well."""
    found = []
    for key, when in (("pages_wrong", "on arrival"), ("pages_wrong_again", "after it ran on")):
        if resumed and resumed.get(key):
            found.append(f"{resumed[key]:,} of the guest's pages are wrong {when}")
    for key, when in (("hinted_pages_after_done", "after DONE"), ("hinted_pages_left", "at the end")):
        if resumed and resumed.get(key):
            found.append(f"the guest still holds {resumed[key]:,} hinted pages {when}")
    return found


def findings(result: dict[str, Any]) -> list[str]:
    """Return what is wrong with the result of a migration, one line each; nothing if all is well."""
    found = []
    for run in result["runs"]:
        name = "with hints" if run["hints"] else "without hints"
        oracle = run["oracle"]
        if oracle and oracle["pages_wrong"]:
            found.append(f"{name}: {oracle['pages_wrong']:,} of {oracle['pages_checked']:,} pages are wrong")
            found += [f"{name}: {text}" for text in oracle["wrong"]]
        found += [f"{name}: {text}" for text in resumed_findings(run["resumed"])]
        found += [f"{name}: {text}" for text in _linux_findings(run.get("linux"))]
    return found


def _linux_findings(linux: dict[str, Any] | None) -> list[str]:
    """Return what is wrong with a Linux guest's tagged pages in the image, and with the guest itself."""
    if not linux:
        return []
    tags, found = linux["tags"], []
    if tags is None or "error" in tags:
        found.append(f"the tagged pages of the image were not judged: {(tags or {}).get('error', 'no answer')}")
    elif not tags["ok"]:
        found.append(
            f"of {tags['pages']:,} tagged pages in the image {tags['missing']:,} are missing, {tags['stale']:,} stale, "
            f"{tags['torn']:,} torn"
        )
    if not linux["alive_after"]:
        found.append("the guest does not answer after the migration")
    return found


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms"


def _pages(value: int) -> str:
    return f"{value:,}"


def _hint_runs(run: dict[str, Any]) -> str:
    runs = run["hint_runs"]
    if not runs:
        return "refused" if run["hints_refused"] else "-"
    blocks, size = sum(h["blocks"] for h in runs), sum(h["bytes"] for h in runs)
    seconds = sum(h["seconds"] for h in runs)
    return f"{len(runs)}: {blocks:,} blocks\n{format_size(size)} in {_seconds(seconds)}"


_ROWS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("total time", lambda r: _seconds(r["total_seconds"])),
    ("downtime", lambda r: _seconds(r["downtime_seconds"])),
    ("rounds", lambda r: f"{len(r['rounds'])}{'' if r['converged'] else ' (not converged)'}"),
    ("sent", lambda r: format_size(r["bytes_sent"])),
    ("pages with content", lambda r: _pages(r["pages"]["normal"])),
    ("pages of zeros", lambda r: _pages(r["pages"]["zero"])),
    ("pages skipped by hint", lambda r: _pages(r["pages"]["skipped"])),
    ("hint runs", _hint_runs),
    ("pages rewritten meanwhile", lambda r: "?" if "linux" in r else _pages(r["pages_rewritten"])),
]
_RATIOS = {
    "total time": lambda r: r["total_seconds"],
    "downtime": lambda r: r["downtime_seconds"],
    "sent": lambda r: r["bytes_sent"],
    "pages with content": lambda r: r["pages"]["normal"],
}


def _comparison(result: dict[str, Any]) -> Table:
    runs = result["runs"]
    title = (
        f"{format_size(result['memory_bytes'])} {result['guest']} guest, {result['workload']}, seed {result['seed']}"
    )
    table = Table(title=Text(title, "bold"), title_justify="left")
    table.add_column("")
    for run in runs:
        table.add_column("with hints" if run["hints"] else "without hints", justify="right")
    if len(runs) == 2:
        table.add_column("ratio", justify="right", style="bold")
    for name, value in _ROWS:
        row = [name, *(value(run) for run in runs)]
        if len(runs) == 2:
            of = _RATIOS.get(name)
            row.append(f"{of(runs[1]) / of(runs[0]):.3f}" if of is not None and of(runs[0]) else "")
        table.add_row(*row)
    return table


def _rounds(run: dict[str, Any]) -> Table:
    title = f"rounds {'with' if run['hints'] else 'without'} hints, dirty log {run['dirty_log']}"
    table = Table(title=title, title_justify="left")
    for name in ("round", "dirty", "content", "zeros", "skipped", "sent", "time", "frozen"):
        table.add_column(name, justify="right")
    for number, r in enumerate(run["rounds"], 1):
        numbers = [_pages(r[f"pages_{kind}"]) for kind in ("dirty", "normal", "zero", "skipped")]
        frozen = _seconds(r["frozen_seconds"]) if r["frozen_seconds"] else "-"
        table.add_row(str(number), *numbers, format_size(r["bytes_sent"]), _seconds(r["seconds"]), frozen)
    return table


def _hints(run: dict[str, Any]) -> Table:
    table = Table(title="hint runs", title_justify="left")
    for name in ("command id", "blocks", "hinted", "pages spared", "time"):
        table.add_column(name, justify="right")
    for h in run["hint_runs"]:
        row = [f"{h['command_id']:#x}", _pages(h["blocks"]), format_size(h["bytes"])]
        table.add_row(*row, _pages(h["pages_spared"]), _seconds(h["seconds"]))
    return table


def _oracle_text(run: dict[str, Any]) -> Text:
    text = Text(f"oracle, {'with' if run['hints'] else 'without'} hints: ")
    oracle = run["oracle"]
    if oracle is None:
        return text.append("no verdict, the destination sent no digests", "yellow")
    if oracle["pages_wrong"]:
        return text.append(f"WRONG: {oracle['pages_wrong']:,} of {oracle['pages_checked']:,} pages", "bold red")
    text.append("good: ", "bold green")
    text.append(f"{oracle['pages_checked']:,} pages compared, none wrong")
    if oracle["pages_skipped"]:
        text.append(f" ({oracle['pages_skipped']:,} differ and may: free, and not written since the hint)")
    return text


def _linux_text(linux: dict[str, Any]) -> Text:
    """Return what is known of a Linux guest beside the oracle's verdict."""
    found = _linux_findings(linux)
    text = Text("  Linux guest: ")
    if found:
        return text.append("WRONG: ", "bold red").append("; ".join(found))
    free = linux["mem_free_bytes"]
    text.append("good: ", "bold green").append(f"{linux['kernel']}, Linux {linux['release']}, ")
    origin = Origin(linux["package"], linux["dpkg_verify_clean"])
    text.append(str(origin), "bold red" if origin.clean is False else None)
    text.append(f"; {linux['tags']['found']:,} tagged pages at their latest version; MemFree ")
    names = {"before": "", "after_pass": " after the pass", "after_stop": " after STOP", "after_done": " after DONE"}
    text.append(", ".join(f"{format_size(free[key])}{name}" for key, name in names.items() if key in free))
    return text.append("; it goes on here")


def resumed_text(resumed: dict[str, Any] | None) -> Text:
    """Return what became of a guest that went on, in words."""
    if not resumed:
        return Text("not resumed here", "yellow")
    found = resumed_findings(resumed)
    if found:
        return Text("WRONG: ", "bold red").append("; ".join(found))
    text = Text("good: ", "bold green").append("it went on")
    if "pages_checked" in resumed:
        text.append(f", {resumed['pages_checked']:,} allocated pages checked, none wrong")
    if resumed.get("pages_written_since"):
        text.append(f"; it wrote {resumed['pages_written_since']:,} pages since")
    if resumed.get("hint_run"):
        text.append(f"; it answered a new hint run with {resumed['hint_run']['blocks']:,} blocks")
    return text


def print_migration(result: dict[str, Any], console: Console, *, verbose: int = 0) -> None:
    """Print the result of `balloon_cli.migrate.migrate_all`.

    Parameters
    ----------
    result
        As documented in ``docs/cli.md``.
    console
        Where to.
    verbose
        From 1 on with each round and each hint run.
    """
    console.print(_comparison(result))
    for run in result["runs"] if verbose else []:
        console.print(_rounds(run))
        if run["hint_runs"]:
            console.print(_hints(run))
    for run in result["runs"]:
        if run["hints_refused"]:
            console.print(Text(f"hints were not used: {run['hints_refused']}", "yellow"))
        for i, r in enumerate(run["rounds"], 1):
            if r["log_voided"]:
                what = "hints were void" if run["hints"] else "the dirty log of the run without hints was void"
                console.print(Text(f"{what} before round {i}: {r['log_voided']}", "yellow"))
    for run in result["runs"]:
        console.print(_oracle_text(run), soft_wrap=True)
        if run["oracle"]:
            for line in run["oracle"]["wrong"]:
                console.print(Text(f"  {line}", "red"), soft_wrap=True)
        if run.get("linux"):
            console.print(_linux_text(run["linux"]), soft_wrap=True)
        else:
            console.print(Text("  resumed guest: ").append_text(resumed_text(run["resumed"])), soft_wrap=True)


def print_reception(facts: dict[str, Any], console: Console) -> None:
    """Print the result of `balloon_cli.receive.receive_guest`."""
    title = f"{format_size(facts['memory_bytes'])} {facts['guest'] or ''} guest from {facts['from']}"
    table = Table(title=Text(title, "bold"), title_justify="left", show_header=False)
    table.add_row("state", {"committed": "complete, handed over", "image": "a complete image"}[facts["state"]])
    table.add_row("pages with content", _pages(facts["pages_received"]))
    table.add_row("pages of zeros", _pages(facts["zero_pages_received"]))
    table.add_row("rounds", str(facts["rounds"]))
    console.print(table)
    console.print(Text("guest: ").append_text(resumed_text(facts["resumed"])), soft_wrap=True)
