"""What a migration looks like while it runs: plain lines for a log, and a live view with a map of guest RAM.

Both go to stderr. The engine is only looked at (its bitmaps, its result so far); the live view takes at most a tenth
of the time, whatever the size of the guest.
"""

from __future__ import annotations

import sys
import time
from collections import deque

import numpy as np
import numpy.typing as npt
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from balloon_cli.migrate import Progress
from host_qemu_side.migration import HintRunStats, Migration, Phase
from host_qemu_side.migration.ram import RamState
from host_qemu_side.source import SourceHost
from host_qemu_side.witness import Witness
from vring.memory import PAGE_SIZE
from vring.sizes import format_size

__all__ = ["CELLS", "LiveProgress", "PlainProgress", "RamMap", "make_progress"]

REFRESH_SECONDS = 0.125
SHARE = 0.1
"""Of the time, which the live view may take at most."""
MAX_ROWS = 8
FREE, HINTED, SENT, SOME, TO_SEND = range(5)
CELLS = (
    # character, where only ASCII can be shown, style, what it says
    ("·", ".", "dim", "unused"),
    ("░", "h", "cyan", "hinted"),
    ("▄", "s", "green", "sent"),
    ("▓", "x", "yellow", "some to send"),
    ("█", "#", "bold yellow", "to send"),
)
PHASES = {
    Phase.SETUP: "setting up",
    Phase.ROUND: "sending",
    Phase.SYNC: "looking for dirty pages",
    Phase.FROZEN: "guest frozen, sending the rest",
    Phase.HANDOVER: "waiting for the destination",
    Phase.COMMITTED: "handed over",
    Phase.DONE: "done",
    Phase.CANCELLED: "cancelled",
    Phase.FAILED: "failed",
}

U64 = npt.NDArray[np.uint64]
_BITS = np.array([bin(i).count("1") for i in range(256)], np.uint8)


def _set_bits(words: U64) -> npt.NDArray[np.int64]:
    """Return how many bits of each word are set."""
    if hasattr(np, "bitwise_count"):
        return np.asarray(np.bitwise_count(words), np.int64)
    return np.asarray(_BITS[words.view(np.uint8)].reshape(-1, 8).sum(axis=1), np.int64)


class RamMap:
    """The state of guest RAM, a cell for each of its chunks. Holes between regions are left out.

    Parameters
    ----------
    ram
        What is left to send.
    max_cells
        At most this many cells (at least one).
    """

    def __init__(self, ram: RamState, max_cells: int) -> None:
        self._ram = ram
        per_cell, words = 1, len(ram.to_send.words)
        while words > per_cell * max(max_cells, 1):
            per_cell *= 2
        self._starts = np.arange(0, words, per_cell)
        self.chunk_bytes = per_cell * 64 * PAGE_SIZE
        """Bytes of RAM a cell stands for; a power of two."""
        self.pages = [0] * 4
        """Pages never used, hinted, sent and to send, as of the last `cells`."""

    def cells(self) -> npt.NDArray[np.uint8]:
        """Return `FREE`, `HINTED`, `SENT`, `SOME` or `TO_SEND` for each chunk.

        A chunk shows `TO_SEND` if that is so for half of its pages, `SOME` if for any, else what most pages are.
        """
        to_send = self._ram.to_send.words
        hinted = self._ram.skipped.words & ~to_send
        sent = self._ram.present.words & ~to_send & ~hinted
        counts = np.stack([np.add.reduceat(_set_bits(w), self._starts) for w in (hinted, sent, to_send)])
        per_cell = self.chunk_bytes // PAGE_SIZE
        free = np.maximum(per_cell - counts.sum(axis=0), 0)
        shown: npt.NDArray[np.uint8] = np.argmax(np.stack([free, counts[0], counts[1]]), axis=0).astype(np.uint8)
        shown[counts[2] > 0] = SOME
        shown[counts[2] * 2 >= per_cell] = TO_SEND
        total = [int(n) for n in counts.sum(axis=1)]
        self.pages = [max(self._ram.pages_total - sum(total), 0), *total]
        return shown


class PlainProgress(Progress):
    """One line on stderr for each event; nothing moves."""

    def __init__(self, title: str = "") -> None:
        self.title = title
        self.hints = False
        self._reset()

    def _reset(self) -> None:
        self._rounds = self._runs_told = 0
        self._phase = Phase.SETUP

    def emit(self, text: str) -> None:
        """Print a line."""
        print(f"balloon: {text}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Print what was said."""
        self.emit(text)

    def run_begins(self, hints: bool) -> None:
        """Name the run."""
        self.hints = hints
        self._reset()
        self.emit(f"{self.title}, {'with' if hints else 'without'} hints")

    def step(self, migration: Migration, witness: Witness, host: SourceHost) -> None:
        """Tell what is new since the last step."""
        result, phase = migration.result, migration.phase
        if phase is Phase.ROUND and len(result.rounds) > self._rounds:
            self._rounds = len(result.rounds)
            left = result.rounds[-1].pages_dirty
            self.emit(f"round {self._rounds}: {left:,} pages to send ({format_size(left * PAGE_SIZE)})")
            if result.rounds[-1].log_voided:
                self.emit(f"the dirty log missed writes, hints are void: {result.rounds[-1].log_voided}")
        for run in result.hint_runs[self._runs_told :]:
            if not run.seconds:
                break
            self._runs_told += 1
            self.emit(hint_run_text(run))
        if phase is self._phase:
            return
        self._phase = phase
        if phase is Phase.FROZEN:
            left = result.rounds[-1].pages_dirty if result.rounds else 0
            why = "" if result.converged else f", not converged after {len(result.rounds) - 1} rounds"
            self.emit(f"guest frozen{why}: {left:,} pages left to send ({format_size(left * PAGE_SIZE)})")
        elif phase is Phase.DONE:
            what = "handed over" if migration.hand_over else "image complete, the guest goes on here,"
            self.emit(
                f"{what} after {result.total_seconds:.2f} s, downtime {result.downtime_seconds * 1000:.0f} ms, "
                f"{format_size(result.bytes_sent)} sent"
            )


def hint_run_text(run: HintRunStats) -> str:
    """Return a run of hints in words."""
    return (
        f"hint run {run.command_id:#x}: {run.blocks:,} blocks ({format_size(run.bytes)}), "
        f"{run.pages_spared:,} pages spared in {run.seconds:.2f} s"
    )


class LiveProgress(PlainProgress):
    """A view that is drawn over and over, with a map of RAM; its last state stays.

    Parameters
    ----------
    console
        A terminal.
    title
        Says what is migrated.
    events
        Whether to print events above it as well.
    """

    def __init__(self, console: Console, title: str = "", *, events: bool = False) -> None:
        super().__init__(title)
        self.console, self.events = console, events
        self.draws = 0
        self.draw_seconds = 0.0
        self._live: Live | None = None
        self._clear()

    def _clear(self) -> None:
        self._status = ""
        self._migration: Migration | None = None
        self._map: RamMap | None = None
        self._map_for = (0, 0)
        self._began = time.monotonic()
        self._next = 0.0
        self._rates: deque[tuple[float, int]] = deque(maxlen=12)

    # -- Progress -------------------------------------------------------------------------------------------------

    def emit(self, text: str) -> None:
        """Print a line above the view, if asked for."""
        if self.events:
            self.console.print(Text(text, style="dim"))

    def say(self, text: str) -> None:
        """Show it in the view."""
        self._status = text
        self.emit(text)
        self._draw()

    def run_begins(self, hints: bool) -> None:
        """Put up the view."""
        self._clear()
        super().run_begins(hints)
        self._live = Live(console=self.console, auto_refresh=False, get_renderable=self.render)
        self._live.start()
        self.console.show_cursor(True)  # a second Ctrl-C kills: nothing may be left to put right
        self._draw()

    def step(self, migration: Migration, witness: Witness, host: SourceHost) -> None:
        """Look at the migration; draw if it is time to."""
        if self._migration is None:
            self._migration, self._status, self._began = migration, "", time.monotonic()
        super().step(migration, witness, host)
        self.tick()

    def tick(self) -> None:
        """Draw if it is time to."""
        if time.monotonic() >= self._next:
            self._draw()

    def run_ends(self) -> None:
        """Leave the last state on the screen."""
        if self._live is not None:
            self._draw()
            self._live.stop()
            self._live = None

    def _draw(self) -> None:
        if self._live is None:
            return
        began = time.monotonic()
        self._live.refresh()
        took = time.monotonic() - began
        self._next = began + max(REFRESH_SECONDS, took / SHARE)
        self.draws += 1
        self.draw_seconds += took

    # -- the view -------------------------------------------------------------------------------------------------

    def render(self) -> Panel:
        """Return the view as of now."""
        parts: list[Table | Text] = [self._headline()]
        migration = self._migration
        if migration is not None:
            parts.append(self._numbers(migration))
            parts.append(self._hint_line(migration))
            if migration.ram is not None:
                parts += self._map_lines(migration.ram)
        title = f"{self.title}, [bold]{'with' if self.hints else 'without'} hints[/]"
        width = min(self.console.width, self._columns() + 12)
        return Panel(Group(*parts), title=title, title_align="left", width=width, border_style="dim")

    def _headline(self) -> Table:
        line = Table.grid(expand=True)
        line.add_column(no_wrap=True, overflow="ellipsis")
        line.add_column(justify="right", no_wrap=True)
        migration, now = self._migration, time.monotonic()
        if migration is None:
            line.add_row(Text(self._status), f"{now - self._began:.1f} s")
            return line
        result, text = migration.result, Text()
        if result.rounds:
            text.append(f"round {len(result.rounds)}: ", "bold")
        text.append(self._status if migration.finished and self._status else PHASES[migration.phase])
        if migration.phase is Phase.DONE and not self._status:
            text.append(f", guest stood still for {result.downtime_seconds * 1000:.0f} ms")
        line.add_row(text, f"{result.total_seconds if migration.phase is Phase.DONE else now - self._began:.1f} s")
        return line

    def _numbers(self, migration: Migration) -> Table:
        sent, now = migration.result.bytes_sent, time.monotonic()
        left = 0 if migration.ram is None else len(migration.ram.to_send)
        dirty = max(migration.current_round.pages_dirty, left)
        line = Table.grid(padding=(0, 2))
        for _ in range(4):
            line.add_column(no_wrap=True)
        self._rates.append((now, sent))
        since, had = self._rates[0]
        rate = (sent - had) / (now - since) if now > since else 0.0
        if migration.phase is Phase.DONE:
            rate = sent / max(migration.result.total_seconds, 1e-9)
        bar = ProgressBar(max(dirty, 1), dirty - left if dirty else 1, width=max(8, self._columns() - 46))
        line.add_row(
            bar,
            f"sent {format_size(sent):>9}",
            f"{format_size(rate):>9}/s",
            f"left {format_size(left * PAGE_SIZE):>9}",
        )
        return line

    def _hint_line(self, migration: Migration) -> Text:
        runs = migration.result.hint_runs
        if migration.hints is None:
            refused = migration.result.hints_refused
            return Text(f"no hints: {refused}" if refused else "no hints asked for", "dim", overflow="ellipsis")
        if not runs:
            return Text("no hint run yet", "dim")
        run = runs[-1]
        text = Text(f"hint run {run.command_id:#x}: ", overflow="ellipsis", no_wrap=True)
        text.append(f"{run.blocks:,} blocks", "cyan")
        spared = sum(r.pages_spared for r in runs)
        text.append(f", {format_size(run.bytes)}; spared so far {format_size(spared * PAGE_SIZE)}")
        if migration.phase is Phase.ROUND and not run.seconds:
            text.append(" (going on)")
        return text

    def _columns(self) -> int:
        """Return the number of cells in a row: a power of two, so that rows begin at round addresses."""
        columns = 8
        while columns * 2 + 12 <= self.console.width and columns < 128:
            columns *= 2
        return columns

    def _map_lines(self, ram: RamState) -> list[Table | Text]:
        columns = self._columns()
        rows = max(1, min(MAX_ROWS, self.console.height - 10))
        if self._map is None or self._map_for != (columns, rows):
            self._map, self._map_for = RamMap(ram, columns * rows), (columns, rows)
        states = self._map.cells()
        plain = 1 if self.console.options.ascii_only else 0
        lines: list[Table | Text] = []
        for at in range(0, len(states), columns):
            row = states[at : at + columns]
            address = at * self._map.chunk_bytes
            line = Text(f"{_short(address):>6} ", no_wrap=True)
            ends = np.flatnonzero(np.diff(row)).tolist()
            begin = 0
            for end in [*ends, len(row) - 1]:
                kind = CELLS[row[begin]]
                line.append(kind[plain] * (end + 1 - begin), kind[2])
                begin = end + 1
            lines.append(line)
        counts = self._map.pages
        legend = Text(f"{_short(self._map.chunk_bytes):>6}/cell ")
        for state, pages in ((TO_SEND, counts[3]), (SENT, counts[2]), (HINTED, counts[1]), (FREE, counts[0])):
            kind = CELLS[state]
            legend.append(kind[plain], kind[2])
            if state == TO_SEND:
                legend.append(CELLS[SOME][plain], CELLS[SOME][2])
            legend.append(f" {kind[3]} {_short(pages * PAGE_SIZE)}  ")
        legend.rstrip()
        return [*lines, legend]


def _short(size: int) -> str:
    """Return a size in few characters."""
    value = float(size)
    for unit in "BKMGT":
        if value < 1024 or unit == "T":
            break
        value /= 1024
    return "0" if not size else f"{value:.0f}{unit}" if value >= 100 or value == int(value) else f"{value:.1f}{unit}"


def make_progress(title: str, console: Console, *, verbose: int = 0) -> Progress:
    """Return what shows progress on `console`: live in a terminal, else plain lines on stderr."""
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveProgress(console, title, events=verbose > 0)
    return PlainProgress(title)
