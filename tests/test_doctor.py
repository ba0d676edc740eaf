"""``balloon doctor``: what can be tried is tried, and "yes" is said of nothing else; how much memory there is."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cli_support import BALLOON, has_schema, run, script
from click.testing import CliRunner

from balloon_cli.commands import cli
from balloon_cli.machine import MemoryRoom, address_room, memory_room
from host_qemu_side.linux_guest import ptrace_xstate
from host_qemu_side.linux_guest.kernel import find_kernel

MIB = 1 << 20


def checks(report: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in report["checks"]}


@pytest.mark.uml
def test_both_guests_are_tried(tmp_path: Path) -> None:
    done = run("doctor", "--json", "--work-dir", str(tmp_path), timeout=120)
    report = json.loads(done.stdout)
    has_schema(report, {"schema_version": int, "usable": bool, "linux_guest": bool, "checks": list})
    assert done.returncode == 0
    found = checks(report)
    for check in found.values():
        has_schema(check, {"name": str, "state": str, "detail": str, "needed_for": str, "todo": str})
        assert check["state"] in ("ok", "missing", "not usable")
        assert (check["state"] == "ok") == (not check["todo"]), check
    for name in ("wp-async", "software", "cachestat"):
        assert f"dirty log {name}" in found
    for name in ("Python", "C compiler", "kernel", "userfaultfd", "user-mode-linux", "busybox-static", "memory"):
        assert name in found
    assert report["usable"]
    assert "32.0 MiB booted and migrated" in found["Python guest"]["detail"]
    assert "8,192 pages compared, none wrong" in found["Python guest"]["detail"]
    linux = found["Linux guest"]
    assert f"Linux {find_kernel().release}: 128.0 MiB booted and migrated" in linux["detail"], linux
    assert report["linux_guest"] == (linux["state"] == "ok") == (found["dirty log cachestat"]["state"] == "ok")
    assert ("completed" in linux["detail"]) == ptrace_xstate.wanted()
    assert str(find_kernel().origin()) in found["user-mode-linux"]["detail"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("nothing_named")
def test_what_is_missing_is_named_and_what_needs_it_is_not_tried(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    shown = CliRunner().invoke(cli, ["doctor", "--work-dir", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    for package in ("user-mode-linux", "qemu-system-x86", "gcc libc6-dev"):
        assert f"apt install --no-install-recommends {package}" in shown.output
    assert "migrate a Python guest with hints: yes, it was done" in shown.output
    assert "migrate a Linux guest with hints: not tried" in shown.output
    names = checks(json.loads(run("doctor", "--json", "--work-dir", str(tmp_path)).stdout))
    states = ("ok ", "missing ", "not usable ", "not tried ")
    assert len([line for line in shown.stdout.splitlines() if line.startswith(states)]) == len(names)
    (line,) = (line for line in shown.output.splitlines() if line.startswith("not tried"))
    assert "no C compiler, no user-mode-linux" in line
    assert list(tmp_path.iterdir()) == []


def test_without_a_python_guest_it_exits_with_3(tmp_path: Path) -> None:
    """A real limit: no file, and no memory object, of more than 1 MiB."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))  # noqa: E731
    done = run("doctor", "--json", "--work-dir", str(tmp_path), "--linux", "/nope", preexec_fn=limit)
    assert done.returncode == 3
    report = json.loads(done.stdout)
    assert not report["usable"]
    assert not report["linux_guest"]
    found = checks(report)
    assert found["Python guest"]["state"] == "not usable"
    assert re.search(r"guest: .*File too large", done.stderr)
    assert "Traceback" not in done.stderr
    assert "/nope" in found["user-mode-linux"]["detail"]
    assert found["Linux guest"]["state"] == "not tried"


@pytest.mark.uml
def test_a_linux_guest_that_does_not_boot_is_no(tmp_path: Path) -> None:
    """It is all there, and it does not work: that is what is said, with the line that decides."""
    real = find_kernel()
    asked = f'[ "$1" = --version ] && exec {real.path} --version'
    broken = script(tmp_path / "linux", f'{asked}\necho "out of luck, errno = 99"; exit 1')
    chosen = ["--linux", str(broken), "--modules", str(real.module.parents[3])]
    report = json.loads(run("doctor", "--json", "--work-dir", str(tmp_path), *chosen, timeout=120).stdout)
    assert report["usable"]
    assert not report["linux_guest"]
    guest = checks(report)["Linux guest"]
    assert guest["state"] == "not usable"
    assert "out of luck, errno = 99" in guest["detail"]
    assert "of no Debian package" in checks(report)["user-mode-linux"]["detail"]


@pytest.mark.uml
@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "wait"),
    [*((signal.SIGINT, wait) for wait in (0.05, 0.4, 0.7, 2.0)), (signal.SIGTERM, 0.6), (signal.SIGHUP, 1.5)],
)
def test_interrupted(tmp_path: Path, number: int, wait: float) -> None:
    """Not a verdict: what it had started ended because of the interrupt, not because it does not work.

    The signal goes to all of its process group, as a terminal sends it, at several moments of the Linux guest's trial:
    while a package is asked for, something is compiled, the guest boots.
    """
    work, temporary = tmp_path / "w", tmp_path / "t"  # short: there will be sockets
    work.mkdir()
    temporary.mkdir()
    doctor = subprocess.Popen(
        [*BALLOON, "doctor", "--json", "--work-dir", str(work)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
        process_group=0,
    )
    assert doctor.stderr is not None
    while "a Linux guest boots" not in doctor.stderr.readline():
        assert doctor.poll() is None
    time.sleep(wait)
    assert doctor.poll() is None
    os.killpg(doctor.pid, number)
    out, err = doctor.communicate(timeout=30)
    assert doctor.returncode == 130, err
    assert out == ""
    assert "interrupted" in err or "cancelled" in err
    assert "Traceback" not in err
    assert list(work.iterdir()) == []
    assert list(temporary.iterdir()) == []


@pytest.mark.uml
def test_with_closed_streams_a_guest_boots_all_the_same(tmp_path: Path) -> None:
    """Descriptors opened later would take the places of standard output and error, also in the programs started."""
    command = [*BALLOON, "doctor", "--json", "--work-dir", str(tmp_path)]
    code = f"import os; [os.close(fd) for fd in (0, 2)]; os.execv({command[0]!r}, {command!r})"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=120, check=False)
    assert done.returncode == 0
    assert checks(json.loads(done.stdout))["Linux guest"]["detail"].startswith("Linux ")


# -- memory -----------------------------------------------------------------------------------------------------------


def proc(folder: Path, cgroup: str, mounts: str) -> Path:
    """A /proc of a machine with 8 GiB free of 16."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/meminfo").write_text("MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable: 8388608 kB\n")
    (folder / "proc/self/cgroup").write_text(cgroup)
    (folder / "proc/self/mountinfo").write_text(mounts.format(folder))
    (folder / "proc/self/statm").write_text("1000 1 1 1 0 1 0\n")
    return folder / "proc"


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


ROOT_MOUNT = "20 1 254:0 / / rw - ext4 /dev/vda rw\n"
VERSION_2 = ROOT_MOUNT + "30 20 0:26 / {}/tree rw - cgroup2 cgroup2 rw\n"
VERSION_1 = ROOT_MOUNT + "30 20 0:26 {{root}} {}/tree rw - cgroup cgroup rw,memory\n"


def test_memory_without_limits(tmp_path: Path) -> None:
    files = {"memory__max": "max\n", "memory__high": "max\n", "memory__current": "5\n"}
    group(tmp_path / "tree/user", **files, memory__stat="inactive_file 1\n")
    group(tmp_path / "tree/user/x")  # no files: the controller is not on
    found = memory_room(proc(tmp_path, "0::/user/x\n", VERSION_2))
    assert found == MemoryRoom(8 << 30, 16 << 30, "this machine")
    assert memory_room(proc(tmp_path / "none", "", "")) == found


def test_the_closest_group_of_version_2_counts(tmp_path: Path) -> None:
    """Also one further up; what is cached there can be had."""
    for name, limit, taken, cached in (("a", 700, 300, 100), ("a/b", 600, 50, 0), ("a/b/c", 900, 1, 0)):
        group(
            tmp_path / "tree" / name,
            memory__max=f"{limit * MIB}\n",
            memory__high="max\n",
            memory__current=f"{taken * MIB}\n",
            memory__stat=f"anon 1\ninactive_file {cached * MIB}\n",
        )
    assert memory_room(proc(tmp_path, "0::/a/b/c\n", VERSION_2)) == MemoryRoom(500 * MIB, 700 * MIB, "control group /a")


def test_a_group_of_version_1_seen_from_a_container(tmp_path: Path) -> None:
    """The mount shows the container's part of the tree, while the process's own path is from the root."""
    unlimited = str((1 << 63) - 4096)
    for name, limit, taken in (("", unlimited, 900), ("x", 256 * MIB, 300), ("ab", MIB, 0), ("docker/12/x", MIB, 0)):
        group(
            tmp_path / "tree" / name,
            memory__limit_in_bytes=f"{limit}\n",
            memory__usage_in_bytes=f"{taken * MIB}\n",
            memory__stat="total_inactive_file 0\n",
        )
    mounts = VERSION_1.replace("{{root}}", "/docker/12")
    found = memory_room(proc(tmp_path, "4:cpu,memory:/docker/12/x\n0::/\n", mounts))
    assert found == MemoryRoom(0, 256 * MIB, "control group /x")
    other = memory_room(proc(tmp_path / "other", "4:cpu,memory:/docker/12ab\n", mounts.replace("{}", str(tmp_path))))
    assert other.limit == "this machine", "a group whose name begins alike is not this one"


def test_memory_that_may_only_be_had_slowly(tmp_path: Path) -> None:
    """`memory.high` is a bound in practice; and the name of a mount may have a space or be in another script."""
    group(
        tmp_path / "a tré/x",
        memory__max=f"{900 * MIB}\n",
        memory__high=f"{500 * MIB}\n",
        memory__current=f"{100 * MIB}\n",
        memory__stat="inactive_file 0\n",
    )
    mounts = VERSION_2.replace("{}/tree", "{}/a\\040tré")
    found = memory_room(proc(tmp_path, "0::/x\n", mounts))
    assert found == MemoryRoom(400 * MIB, 500 * MIB, "control group /x")


@pytest.mark.parametrize("lost", ["self/cgroup", "self/mountinfo"])
def test_tables_that_are_not_there_or_make_no_sense_bound_nothing(tmp_path: Path, lost: str) -> None:
    made = proc(tmp_path, "0::/x\n", VERSION_2)
    (made / lost).write_bytes(b"junk\n\xff\n - \n1:2\n")
    assert memory_room(made).limit == "this machine"
    (made / lost).unlink()
    assert memory_room(made).limit == "this machine"


def test_the_limit_of_address_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64 * MIB, resource.RLIM_INFINITY))
    found = address_room(proc(tmp_path, "", ""))
    assert found == MemoryRoom(64 * MIB - 1000 * 4096, 64 * MIB, "the limit of address space (ulimit -v)")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert address_room(tmp_path / "proc") is None


def test_the_limit_of_this_very_process() -> None:
    """Not a made-up machine: a child with a real limit."""
    code = "from balloon_cli.machine import address_room as m; r = m(); print(r.limit, r.available < r.total < 5 << 30)"
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # noqa: E731
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        check=True,
    )
    assert done.stdout.endswith("True\n")
    assert memory_room().available > 0
