"""The C tests of the core under the address and undefined behaviour sanitizers, for a second each.

`./run test-sanitize` and `./run explore` give them more time.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = sorted(path.stem for path in (ROOT / "csrc/tests").glob("*.c"))


@pytest.mark.slow
def test_c_core_under_sanitizers() -> None:
    command = ["sh", str(ROOT / "tests/sanitize.sh"), "2", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    for name in PROGRAMS:
        assert f"{name}: ok" in done.stdout


def test_every_room_of_the_core_has_a_test() -> None:
    texts = [path.read_text() for path in (ROOT / "csrc/tests").glob("*.c")]
    for room in ("vring", "dirty", "page_alloc"):
        assert any(f'#include "{room}/' in text for text in texts), room
