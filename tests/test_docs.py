"""The docs agree with the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("csrc", "vring", "balloon_dev", "guest_driver", "host_qemu_side", "balloon_cli", "tests")
CLAUSE = re.compile(r"\b(?:basic|feat|split|mmio|balloon|ring)\.[a-z]+(?:\.[a-z]+)?-\d+\b")


def test_generated_parts_are_up_to_date() -> None:
    """What docs/generate.py draws from the code is what stands in the docs."""
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_clause_named_is_listed() -> None:
    """A clause id in an error, a comment or a test can be looked up in docs/clauses.md."""
    listed = set(CLAUSE.findall((ROOT / "docs" / "clauses.md").read_text()))
    used: dict[str, str] = {}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.[pch]*"):
            if path.suffix in (".py", ".c", ".h"):
                for clause in CLAUSE.findall(path.read_text()):
                    used.setdefault(clause, str(path.relative_to(ROOT)))
    missing = {clause: where for clause, where in used.items() if clause not in listed}
    assert not missing
