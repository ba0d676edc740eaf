"""What is given to users: the sdist has all that the tests need, and the wheel built from it works without a clone."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vring", "balloon_dev", "guest_driver", "host_qemu_side", "balloon_cli")
MADE = (
    "*.egg-info",
    "__pycache__",
    "*.so",
    "*.py[cod]",
    "_vring.c",
    "_page_alloc.c",
    "_bench.c",
    "build",
    "dist",
    "out",
)
"""What a build leaves in a clone."""

pytestmark = pytest.mark.slow


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def build(what: str, source: Path, into: Path) -> Path:
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{what}(sys.argv[1]))"
    # A compiler that warns of something new, here of padding in structures, stops nobody.
    environment = {**os.environ, "CFLAGS": "-Wpadded"}
    done = subprocess.run(
        [sys.executable, "-c", code, into], cwd=source, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return into / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A clone, and what its sdist unpacks to."""
    base = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, base / "clone", ignore=shutil.ignore_patterns(*MADE, ".*"))
    there = files(base / "clone")
    subprocess.run(["tar", "-xf", build("sdist", base / "clone", base), "-C", base], check=True)
    for name in files(base / "clone") - there:
        (base / "clone" / name).unlink()
    return base / "clone", base / f"virtio_balloon-{version('virtio-balloon')}"


@pytest.fixture(scope="module")
def wheel(sdist: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel that is built from the sdist installs."""
    base = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(build("wheel", sdist[1], base)) as archive:
        archive.extractall(base / "site")
    return base / "site"


def test_the_sdist_has_all_that_the_tests_need(sdist: tuple[Path, Path]) -> None:
    clone, unpacked = sdist
    added = {name for name in files(unpacked) if name.startswith("virtio_balloon.egg-info/")} | {
        "PKG-INFO",
        "setup.cfg",
    }
    assert files(unpacked) - added == files(clone) - added
    assert os.access(unpacked / "run", os.X_OK)


def test_the_wheel_has_the_packages_and_nothing_else(wheel: Path) -> None:
    found = files(wheel)
    assert {name.split("/")[0] for name in found} == {
        *PACKAGES,
        f"virtio_balloon-{version('virtio-balloon')}.dist-info",
    }
    inside = {name for name in found if name.startswith(PACKAGES)}
    source = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert {name for name in inside if name.endswith(".py")} == source
    rest = {name for name in inside if not name.endswith(".py")}
    assert {name for name in rest if not name.endswith(".so")} == {
        *(f"{package}/py.typed" for package in PACKAGES),
        "host_qemu_side/linux_guest/guest_tool.c",
        "host_qemu_side/linux_guest/init.sh",
        "host_qemu_side/linux_guest/ptrace_xstate.c",
    }
    built = {name.split(".")[0] for name in rest if name.endswith(".so")}
    assert built == {"vring/_vring", "guest_driver/_page_alloc", "balloon_cli/_bench"}


def test_what_the_wheel_installs_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(wheel)},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    for extension in ("vring._vring", "guest_driver._page_alloc", "balloon_cli._bench"):
        assert run("-c", f"import {extension} as it; print(it.__file__)").startswith(f"{wheel}/")
    assert run("-m", "balloon_cli", "--version") == f"balloon {version('virtio-balloon')}\n"
    to = tmp_path / "guest.vbm"
    run("-m", "balloon_cli", "migrate", "--memory", "64M", "--warm-up", "0", "--hints", "on", "--to", f"file:{to}")
    assert to.stat().st_size > 0


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_tells_the_version(package: str) -> None:
    assert importlib.import_module(package).__version__ == version("virtio-balloon")
