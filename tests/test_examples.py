"""Every example runs and says what it promises."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MARKS = {"uml": pytest.mark.uml, "qemu": pytest.mark.qemu}
"""Examples whose names start so need that peer."""
EXAMPLES = [
    pytest.param(path, id=path.stem, marks=[mark for word, mark in MARKS.items() if path.stem.startswith(word)])
    for path in sorted((ROOT / "examples").glob("*.py"))
]


@pytest.mark.parametrize("path", EXAMPLES)
def test_example_runs(path: Path) -> None:
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode == 3:
        pytest.skip(done.stderr)  # the machine lacks something, and the example says what
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_what_an_example_lacks_is_code_3() -> None:
    example = ROOT / "examples/qemu_qtest.py"
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, env={"PATH": "/nonexistent"})
    assert done.returncode == 3
    assert done.stdout == ""
    assert "apt install --no-install-recommends qemu-system-x86" in done.stderr
    assert done.stderr.count("\n") == 1


def test_ring_in_c(tmp_path: Path) -> None:
    """csrc/vring is of use without Python."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) here")
    sources = [ROOT / "examples/c/ring_in_c.c", *sorted((ROOT / "csrc/vring").glob("*.c"))]
    flags = ["-std=c11", "-Wall", "-Wextra", f"-I{ROOT / 'csrc'}"]
    program = tmp_path / "ring_in_c"
    subprocess.run([compiler, *flags, *sources, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.splitlines()[-1] == "3 buffers used, 48 bytes written; a bad address: error -22 and the queue stops"
    )


def test_guests_are_what_their_sources_give() -> None:
    """The machine code in examples/guests was assembled from what stands beside it (as far as assemblers are here)."""
    script = ROOT / "examples/guests/assemble.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
