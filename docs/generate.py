"""Write the parts of the docs that are drawn from code: ``python docs/generate.py [--check]``."""

from __future__ import annotations

import ast
import sys
from itertools import pairwise
from pathlib import Path

from balloon_dev.hinting import TABLE, Action, HintState
from host_qemu_side import deadlines

DOCS = Path(__file__).resolve().parent
BEGIN, END = "<!-- generated: {} -->", "<!-- end -->"


def diagram() -> str:
    """Return the hint table as a mermaid state diagram, transitions that change nothing left out."""
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> STOP"]
    merged: dict[tuple[HintState, HintState], list[str]] = {}
    for (state, event), to in TABLE.items():
        if to.next is not state or to.action in (Action.APPLY, Action.NEW_ID):
            merged.setdefault((state, to.next), []).append(event.value)
    for (state, to), events in merged.items():
        lines.append(f"    {state.name} --> {to.name}: {', '.join(events)}")
    return "\n".join([*lines, "```"])


def table() -> str:
    """Return the whole table, row by row."""
    lines = ["| state | event | next | what the device does |", "|---|---|---|---|"]
    for (state, event), to in TABLE.items():
        lines.append(f"| {state.name} | {event.value} | {to.next.name} | {to.action.value} |")
    return "\n".join(lines)


def waits() -> str:
    """Return the waits of a migration, and what the file that has them says of each."""
    lines = ["| wait | seconds | |", "|---|---|---|"]
    body = ast.parse(Path(deadlines.__file__).read_text()).body
    for name, said in pairwise(body):
        if isinstance(name, ast.Assign) and isinstance(said, ast.Expr) and isinstance(said.value, ast.Constant):
            wait = ast.unparse(name.targets[0])
            lines.append(f"| {wait} | {getattr(deadlines, wait):g} | {' '.join(str(said.value.value).split())} |")
    return "\n".join(lines)


PARTS = {"hand-over.md": {"deadlines": waits}, "hinting.md": {"diagram": diagram, "table": table}}


def rendered(name: str) -> str:
    """Return the text of a page with its generated parts up to date."""
    text = (DOCS / name).read_text()
    for part, make in PARTS[name].items():
        head, _, rest = text.partition(BEGIN.format(part))
        _, _, tail = rest.partition(END)
        text = f"{head}{BEGIN.format(part)}\n{make()}\n{END}{tail}"
    return text


def main() -> int:
    """Write the pages; with ``--check`` only tell whether they are up to date."""
    stale = [name for name in PARTS if rendered(name) != (DOCS / name).read_text()]
    for name in stale:
        if "--check" in sys.argv:
            print(f"docs/{name} is not up to date: run `python docs/generate.py`", file=sys.stderr)
        else:
            (DOCS / name).write_text(rendered(name))
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
