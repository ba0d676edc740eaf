"""The C tests of the core under the address and undefined behaviour sanitizers, for a second each.

`./run test-sanitize` and `./run explore` give them more time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = sorted(path.stem for path in (ROOT / "csrc/tests").glob("*.c"))


def all_run(**environment: str) -> None:
    command = ["sh", str(ROOT / "tests/sanitize.sh"), "2", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    for name in PROGRAMS:
        assert f"{name}: ok" in done.stdout


@pytest.mark.slow
def test_c_core_under_sanitizers() -> None:
    all_run()


@pytest.mark.slow
def test_c_core_with_another_c_library() -> None:
    """What glibc and its linker offer beyond the others is not relied on."""
    if shutil.which("musl-gcc") is None:
        pytest.skip("no musl-gcc: apt install musl-tools")
    multiarch = subprocess.run(["gcc", "-print-multiarch"], capture_output=True, text=True, check=True).stdout.strip()
    kernel_headers = f"-idirafter /usr/include -idirafter /usr/include/{multiarch}"
    all_run(CC=f"musl-gcc {kernel_headers}", SANITIZERS="")


def test_every_room_of_the_core_has_a_test() -> None:
    texts = [path.read_text() for path in (ROOT / "csrc/tests").glob("*.c")]
    for room in ("vring", "dirty", "page_alloc", "peer"):
        assert any(f'#include "{room}/' in text for text in texts), room
