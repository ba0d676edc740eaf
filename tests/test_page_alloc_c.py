"""The C test of the page allocator, under the address and undefined behaviour sanitizers."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-std=c11", "-g", "-O1", "-Wall", "-Wextra", "-Werror"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) here")
    path = tmp_path_factory.mktemp("c") / "page_alloc_test"
    files = [ROOT / "csrc/tests/page_alloc_test.c", *sorted((ROOT / "csrc/page_alloc").glob("*.c"))]
    command = [compiler, *FLAGS, f"-I{ROOT / 'csrc'}", *map(str, files), "-o", str(path)]
    if subprocess.run([*command, *SANITIZERS], capture_output=True).returncode:
        subprocess.run(command, check=True)  # a compiler without sanitizers: the asserts are still worth it
    return path


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_operations_and_random_damage(program, seed):
    run = subprocess.run([program, str(seed), "0"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
