"""`./run` on machines in every state: what it installs and how, what it repairs, what it says.

It runs in a copy of its own, where the system's package manager, sudo and Python are small programs that note how they
were called. `tests/fresh.sh` has the real ones.
"""

from __future__ import annotations

import os
import pty
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = "sh env cat cksum cp date dirname find flock grep ln mkdir mktemp readlink rm sort tee touch true"
"""What every system has; nothing else of this one is seen."""

FAKES = {
    "id": 'echo "${FAKE_UID:-1000}"',
    "sleep": "exec /bin/sleep 0.05",  # the wait between two lines of progress
    "gcc": "exit 0",
    "dpkg-query": 'for package; do :; done; grep -qx "$package" "$STATE/installed" && echo installed',
    "apt-get": """
        echo "apt-get ${DEBIAN_FRONTEND:-} $*" >>"$STATE/calls"
        echo "noise of apt"
        [ ! -e "$STATE/slow" ] || /bin/sleep 0.5
        case "$*" in
            *update*) [ ! -e "$STATE/foreign source" ] || { echo "E: foreign.example does not answer"; exit 100; } ;;
            *install*)
                [ ! -e "$STATE/no network" ] || { echo "E: cannot fetch"; exit 100; }
                for package; do echo "$package" >>"$STATE/installed"; done ;;
        esac""",
    "sudo": """
        echo "sudo $*" >>"$STATE/calls"
        case $1 in
            -n) [ ! -e "$STATE/password" ] || exit 1; shift ;;
            -v) [ ! -e "$STATE/refused" ]; exit ;;
        esac
        exec env -i PATH="$PATH" STATE="$STATE" "$@" """,
    "python3": """
        here=$(dirname "$(readlink -f "$0")")
        case "$1 ${2:-}" in
            "-m venv")
                [ ! -e "$STATE/stuck venv" ] || { mkdir -p .venv/bin; exec /bin/sleep 60; }
                echo "venv" >>"$STATE/calls"
                mkdir -p .venv/bin
                ln -s "$here/python3" .venv/bin/python
                ln -s python .venv/bin/python3 ;;
            "-m pip")
                echo "pip $*" >>"$STATE/calls"
                echo "noise of pip"
                [ ! -e "$STATE/stuck pip" ] || exec /bin/sleep 60
                [ ! -e "$STATE/slow" ] || /bin/sleep 0.5
                [ ! -e "$STATE/no network" ] || { echo "cannot fetch"; exit 1; }
                cp "$here/balloon" .venv/bin/
                echo "pip ended" >>"$STATE/calls" ;;
            "-m pytest") shift 2; echo "in $PWD: pytest $*" ;;
            "-c "*print*) cat "$STATE/version" ;;
        esac""",
    "balloon": 'echo "in $PWD: balloon $*"',
}
ALL = ["gcc", "libc6-dev", "user-mode-linux", "busybox-static", "qemu-system-x86", "musl-tools"]


class Machine:
    """A clone, and what its user has."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state, self.bin = folder, folder / "state", folder / "bin"
        self.path = str(self.bin)
        self.clone = folder / "a clone"
        for made in (self.state, self.bin, self.clone / "csrc", self.clone / "vring"):
            made.mkdir(parents=True)
        for name in TOOLS.split():
            found = shutil.which(name)
            assert found
            (self.bin / name).symlink_to(found)
        for name, text in FAKES.items():
            self.program(name, text)
        for name in ("run", "pyproject.toml", "setup.py", "vring/__init__.py", "vring/_build.py"):
            shutil.copy(ROOT / name, self.clone / name)
        self.now("version", "3.11")
        self.now("installed", "\n".join(ALL))
        self.now("calls", "")

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.bin / name).chmod(0o755)

    def now(self, what: str, text: str = "") -> None:
        """Something about the machine is so from now on."""
        (self.state / what).write_text(text and f"{text}\n")

    def no_more(self, what: str) -> None:
        (self.state / what).unlink()

    @property
    def calls(self) -> list[str]:
        return (self.state / "calls").read_text().splitlines()

    def start(
        self, *arguments: str, cwd: str = ".", uid: int = 1000, stdin: int = subprocess.DEVNULL
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.clone / "run", *arguments],
            cwd=self.clone / cwd,
            env={"PATH": self.path, "STATE": str(self.state), "FAKE_UID": str(uid)},
            text=True,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def run(self, *arguments: str, code: int = 0, cwd: str = ".", uid: int = 1000) -> tuple[str, str]:
        """Return what it said on stdout and stderr; `calls` are its own."""
        self.now("calls")
        process = self.start(*arguments, cwd=cwd, uid=uid)
        out, err = process.communicate(timeout=30)
        assert process.returncode == code, err
        return out, err

    def stop_when(self, there: Callable[[], bool], number: signal.Signals) -> None:
        """Build, and send a signal to all that runs there when something has come to be, as a terminal does."""
        process = self.start("build")
        deadline = time.monotonic() + 10
        while not there():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, number)
        process.communicate(timeout=10)
        assert process.returncode != 0


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def bare(machine: Machine) -> Machine:
    """A machine without any of the packages."""
    machine.now("installed")
    return machine


# -- packages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uid", [0, 1000])
def test_packages_are_installed_without_questions(bare: Machine, uid: int) -> None:
    out, err = bare.run("test", uid=uid)
    assert out == f"in {bare.clone}: pytest \n"
    apt = [call for call in bare.calls if call.startswith("apt-get")]
    assert len(apt) == 6  # for the Linux guest, QEMU and musl: update and install
    assert all(call.startswith("apt-get noninteractive -o DPkg::Lock::Timeout=") for call in apt)
    installed = (bare.state / "installed").read_text().split()
    assert set(ALL) <= set(installed)
    assert any(call.startswith("sudo") for call in bare.calls) == (uid != 0)
    assert "password" not in err
    assert "noise" not in err
    assert not [call for call in bare.calls if call == "sudo -v"]


def test_what_is_there_is_not_installed(machine: Machine) -> None:
    machine.run("test")
    assert not [call for call in machine.calls if call.startswith(("apt-get", "sudo"))]


def test_a_broken_foreign_source_does_not_matter(bare: Machine) -> None:
    bare.now("foreign source")
    out, err = bare.run("migrate-linux")
    assert "balloon migrate --guest linux" in out
    assert "foreign.example does not answer" in err


BY_HAND = "apt-get install --no-install-recommends user-mode-linux busybox-static gcc libc6-dev\n"


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        ("apt-get", "there is no apt-get"),
        ("sudo", "there is no sudo"),
        ("password", "no terminal"),
        ("no network", "E: cannot fetch"),
    ],
)
def test_what_cannot_be_installed_is_named_with_the_command(bare: Machine, lacks: str, says: str) -> None:
    if lacks in FAKES:
        (bare.bin / lacks).unlink()
    else:
        bare.now(lacks)
    _, err = bare.run("migrate-linux", code=3)
    assert says in err
    assert err.endswith(BY_HAND)
    assert not {call.split()[0] for call in bare.calls} & {"venv", "pip"}


@pytest.mark.parametrize("refused", [True, False])
def test_a_password_is_asked_for_at_a_terminal(bare: Machine, refused: bool) -> None:
    bare.now("password")
    if refused:
        bare.now("refused")
    ours, theirs = pty.openpty()
    process = bare.start("migrate-linux", stdin=theirs)
    _, err = process.communicate(timeout=30)
    os.close(ours)
    os.close(theirs)
    assert "sudo asks for your password" in err
    assert bare.calls[:2] == ["sudo -n true", "sudo -v"]
    assert process.returncode == (3 if refused else 0)
    assert err.endswith(BY_HAND) == refused


# -- the virtual environment ------------------------------------------------------------------------------------------

MADE = ["venv", "pip -m pip install --no-input --disable-pip-version-check --editable .", "pip ended"]


def test_it_is_made_once_and_built_when_something_changes(machine: Machine) -> None:
    _, err = machine.run("build")
    assert machine.calls == MADE
    assert "noise" not in err
    machine.run("build")
    assert machine.calls == []
    source = machine.clone / "csrc/new.h"
    source.write_text("int it;\n")
    os.utime(source, (1, 1))  # a file of an older commit is new all the same
    machine.run("build")
    assert machine.calls == MADE[1:]
    machine.run("test")  # with what tests need
    assert machine.calls == [f"{MADE[1]}[test,lint]", MADE[2]]
    machine.run("build")
    assert machine.calls == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
@pytest.mark.parametrize("where", ["venv", "pip"])
def test_an_interrupted_one_is_made_again(machine: Machine, where: str, number: signal.Signals) -> None:
    machine.now(f"stuck {where}")
    machine.stop_when(
        lambda: (machine.clone / ".venv").exists() and (where == "venv" or len(machine.calls) > 1), number
    )
    machine.no_more(f"stuck {where}")
    machine.run("build")
    assert machine.calls == MADE
    machine.run("build")
    assert machine.calls == []


def test_a_build_that_fails_says_why_and_is_tried_again(machine: Machine) -> None:
    machine.now("no network")
    _, err = machine.run("build", code=1)
    assert "noise of pip\ncannot fetch\n" in err
    machine.no_more("no network")
    machine.run("build")
    assert machine.calls == MADE[1:]  # pip itself undid what it had begun


def moved(machine: Machine) -> None:
    machine.clone = machine.clone.rename(machine.folder / "another name")


def upgraded(machine: Machine) -> None:
    machine.now("version", "3.13")


def removed(machine: Machine) -> None:
    (machine.clone / ".venv/bin/python").unlink()
    (machine.clone / ".venv/bin/python").symlink_to("/nowhere/python3")


@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize("change", [moved, upgraded, removed])
def test_one_that_does_not_fit_any_more_is_made_again(
    machine: Machine, change: Callable[[Machine], None], activated: bool
) -> None:
    machine.run("build")
    change(machine)
    if activated:
        machine.path = f"{machine.clone}/.venv/bin:{machine.path}"
    machine.run("build")
    assert machine.calls == MADE
    machine.run("build")
    assert machine.calls == []


def test_two_at_once_build_once(machine: Machine) -> None:
    machine.now("slow")
    both = [machine.start("migrate") for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
        assert "balloon migrate" in out
    assert machine.calls == MADE


# -- what is said, and where it counts from ---------------------------------------------------------------------------


@pytest.mark.parametrize("busy", ["installing", "building"])
def test_it_says_that_it_still_works(bare: Machine, busy: str) -> None:
    bare.now("slow")
    _, err = bare.run("migrate-linux")
    assert len(re.findall(rf"run: still {busy}, \d+ s\n", err)) >= 3


def test_paths_count_from_the_callers_folder(machine: Machine) -> None:
    sub = machine.clone / "sub"
    sub.mkdir()
    (sub / "test_x.py").touch()
    out, _ = machine.run("migrate", "--to", "file:x.vbm", cwd="sub")
    assert out == f"in {sub}: balloon migrate --to file:x.vbm\n"
    out, _ = machine.run("test", "test_x.py::test_y", "-k", "a b", "tests/test_z.py", cwd="sub")
    assert out == f"in {machine.clone}: pytest {sub}/test_x.py::test_y -k a b tests/test_z.py\n"


def test_through_a_link(machine: Machine) -> None:
    link = machine.folder / "balloon-run"
    link.symlink_to(machine.clone / "run")
    done = subprocess.run(
        [link, "migrate"], cwd=machine.folder, env={"PATH": str(machine.bin), "STATE": str(machine.state)},
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.stdout == f"in {machine.folder}: balloon migrate\n", done.stderr


def test_an_unknown_command(machine: Machine) -> None:
    _, err = machine.run("nonsense", code=2)
    assert "unknown command 'nonsense'" in err
    assert "usage: ./run" in err
