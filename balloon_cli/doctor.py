"""``balloon doctor``: what this machine can do, and what to install for the rest."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from host_qemu_side.discard import punch_hole
from vring import bitmap
from vring._vring import lib
from vring.contents import populated
from vring.dirty import wp_async
from vring.dirty.software import SoftwareDirtyLog
from vring.errors import MissingFacility, VirtioError
from vring.memory import GuestMemory
from vring.sizes import format_size

__all__ = ["MISSING", "NOT_USABLE", "OK", "Finding", "examine", "print_findings"]

OK, MISSING, NOT_USABLE = "ok", "missing", "not usable"
STYLES = {OK: "green", MISSING: "yellow", NOT_USABLE: "red"}
PYTHON_GUEST = "Python guest"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    name: str
    state: str
    """`OK`, `MISSING` or `NOT_USABLE`."""
    detail: str
    """What was found, such as a version."""
    needed_for: str
    todo: str = ""
    """What to install or change; empty where nothing is needed."""


class _Problem(Exception):
    """Why something is not ok; the arguments are the state, what was found, and what to do."""

    def __init__(self, state: str, detail: str, todo: str) -> None:
        super().__init__(state, detail, todo)
        self.state, self.detail, self.todo = state, detail, todo


def _output(*command: str) -> str:
    """Return the first line a program prints, nothing if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


def _package(name: str) -> str:
    version = _output("dpkg-query", "-W", "-f", "${Version}", name)
    return f", package {name} {version}" if version else ""


def _python() -> str:
    return f"{platform.python_implementation()} {platform.python_version()}, numpy {np.__version__}"


def _compiler() -> str:
    name = next((n for n in (os.environ.get("CC", ""), "cc", "gcc", "clang") if n and shutil.which(n)), None)
    if name is None:
        raise _Problem(MISSING, "no C compiler", "to build from source: apt install gcc libc6-dev")
    return _output(name, "--version") or name


def _kernel() -> str:
    release = platform.release()
    if platform.system() != "Linux":
        raise _Problem(NOT_USABLE, f"{platform.system()} {release}", "use Linux: memory and doorbells are Linux's")
    number = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    if number < (6, 7):
        return f"Linux {release} (before 6.7 there is no dirty log wp-async; software does instead)"
    return f"Linux {release}"


def _python_guest() -> str:
    """Try all that an embedded guest and its migration need of the system: cheap, and nothing is left behind."""
    try:
        os.close(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with first, second, GuestMemory.create(1 << 20, name="doctor") as memory:
            socket.send_fds(first, [b"x"], [memory.regions[0].fd])
            _, fds, _, _ = socket.recv_fds(second, 1, 1)
            for fd in fds:
                os.close(fd)
            memory.write(1 << 16, b"x")
            if bitmap.pages_of(populated(memory)).tolist() != [16]:
                raise _Problem(NOT_USABLE, "SEEK_DATA does not tell holes of a memfd", "use a newer kernel")
            punch_hole(memory.regions[0].fd, 1 << 16, 4096)
        importlib.import_module("guest_driver.process")
    except (OSError, ImportError, VirtioError) as error:
        raise _Problem(
            NOT_USABLE, str(error), "memfd, eventfd, unix sockets and hole punching must be allowed"
        ) from error
    return "memfd, eventfd, descriptor passing and hole punching work"


def _software() -> str:
    with GuestMemory.create(1 << 20, name="doctor") as memory:
        log = SoftwareDirtyLog.for_memory(memory)
        log.start()
        log.mark(5)
        seen = bitmap.empty(memory.page_span)
        log.sync(seen)
        log.stop()
        if bitmap.pages_of(seen).tolist() != [5]:
            raise _Problem(NOT_USABLE, f"page 5 was marked, {bitmap.pages_of(seen).tolist()} found", "report a bug")
    return "a shared bitmap that the guest marks; works everywhere"


def _wp_async() -> str:
    try:
        wp_async.probe()
    except MissingFacility as error:
        raise _Problem(NOT_USABLE, str(error), "--dirty-log software does instead") from error
    return "userfaultfd WP_ASYNC and PAGEMAP_SCAN work"


def _cachestat(folder: Path) -> str:
    """Let the log try itself on a file in the work directory."""
    todo = "Linux 6.5 or newer, and a work directory on ext4 or xfs"
    try:
        module = importlib.import_module("vring.dirty.cachestat")
    except ImportError as error:
        raise _Problem(MISSING, "not part of this installation", "install a newer version of this package") from error
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            size = 1 << 20
            file.truncate(size)
            region = importlib.import_module("vring.memory").Region(0, size, file.fileno())
            with GuestMemory.from_fds([region]) as memory:
                log = module.CachestatLog(memory)
                try:
                    log.start()
                finally:
                    log.stop()
    except (MissingFacility, OSError) as error:
        raise _Problem(NOT_USABLE, str(error), todo) from error
    return f"works in {folder}"


def _userfaultfd() -> str:
    try:
        allowed = Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip()
    except OSError:
        raise _Problem(MISSING, "the kernel has no userfaultfd", "a kernel with CONFIG_USERFAULTFD") from None
    fd = lib.dirty_uffd_open()
    if fd < 0:
        why = os.strerror(-fd)
        raise _Problem(NOT_USABLE, why, "allow the system call (seccomp of a container?), or --dirty-log software")
    os.close(fd)
    mode = "every user" if allowed == "1" or os.geteuid() == 0 else "user mode only, which is enough"
    return f"permitted ({mode})"


def file_system(path: Path) -> str:
    """Return the type of the file system that holds `path`, such as ``ext4``."""
    best, kind = "", "unknown"
    target = os.path.realpath(path)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        mount = before.split()[4].encode().decode("unicode_escape")
        inside = target == mount or target.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, after.split()[0]
    return kind


def _work_directory(folder: Path) -> str:
    try:
        room = os.statvfs(folder)
    except OSError as error:
        raise _Problem(MISSING, f"{folder}: {error.strerror}", "name a folder that exists with --work-dir") from error
    if not os.access(folder, os.W_OK):
        raise _Problem(NOT_USABLE, f"{folder} cannot be written", "name another with --work-dir")
    kind = file_system(folder)
    text = f"{folder}: {kind}, {format_size(room.f_bavail * room.f_frsize)} free"
    if kind in ("tmpfs", "overlay", "ramfs"):
        raise _Problem(NOT_USABLE, text, "hints of a Linux guest need ext4 or xfs: name another with --work-dir")
    return text


def _user_mode_linux() -> str:
    path = shutil.which("linux.uml")
    if path is None:
        raise _Problem(MISSING, "no linux.uml", "apt install user-mode-linux")
    release = _output(path, "--version")
    if not release:
        raise _Problem(NOT_USABLE, f"{path} does not start", "apt install --reinstall user-mode-linux")
    return f"kernel {release}{_package('user-mode-linux')}"


def _busybox() -> str:
    path = shutil.which("busybox")
    if path is None:
        raise _Problem(MISSING, "no busybox", "apt install busybox-static")
    if b"/ld-linux" in Path(path).read_bytes():
        raise _Problem(NOT_USABLE, f"{path} is linked dynamically", "apt install busybox-static")
    return f"{path}, static{_package('busybox-static')}"


def _qemu() -> str:
    path = shutil.which("qemu-system-x86_64")
    if path is None:
        raise _Problem(MISSING, "no qemu-system-x86_64", "apt install qemu-system-x86")
    return _output(path, "--version") or path


def _memory() -> str:
    facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(facts[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
    text = f"{format_size(free)} available of {format_size(total)}"
    if free < 1 << 30:
        raise _Problem(NOT_USABLE, text, "a migration of 1 GiB holds it twice: use --memory 256M or less")
    return f"{text}: guests up to {format_size(free / 2.5)}"


def _cores() -> str:
    count = len(os.sched_getaffinity(0))
    if count < 2:
        raise _Problem(NOT_USABLE, "1", "works, slowly; `balloon bench ring` needs two: allow them with taskset")
    return str(count)


def examine(folder: Path | None = None) -> dict[str, Any]:
    """Try everything.

    Parameters
    ----------
    folder
        Work directory, where the RAM files of Linux guests would lie; by default ``/var/tmp``.

    Returns
    -------
    dict
        JSON values: ``usable`` (an embedded Python guest can be migrated with hints), ``linux_guest`` (so can a Linux
        guest), and ``checks``, a list of `Finding` as objects.
    """
    where = folder or Path("/var/tmp")
    linux = "--guest linux"
    checks: list[tuple[str, str, Callable[[], str]]] = [
        ("Python", "everything", _python),
        ("C compiler", "building", _compiler),
        ("kernel", "everything", _kernel),
        ("memory", "everything", _memory),
        ("cores", "everything", _cores),
        (PYTHON_GUEST, "--guest python", _python_guest),
        ("dirty log software", "--guest python", _software),
        ("dirty log wp-async", "--guest python", _wp_async),
        ("userfaultfd", "dirty log wp-async", _userfaultfd),
        ("dirty log cachestat", f"{linux} with hints", lambda: _cachestat(where)),
        ("work directory", linux, lambda: _work_directory(where)),
        ("user-mode-linux", linux, _user_mode_linux),
        ("busybox-static", linux, _busybox),
        ("qemu-system-x86", "tests against QEMU", _qemu),
    ]
    found = []
    for name, needed_for, check in checks:
        try:
            found.append(Finding(name, OK, check(), needed_for))
        except _Problem as problem:
            found.append(Finding(name, problem.state, problem.detail, needed_for, problem.todo))
        except (OSError, VirtioError) as error:
            found.append(Finding(name, NOT_USABLE, str(error), needed_for, "see the message"))
    good = {f.name for f in found if f.state == OK}
    usable = {PYTHON_GUEST, "Python", "kernel"} <= good and bool(good & {"dirty log software", "dirty log wp-async"})
    return {
        "schema_version": 1,
        "usable": usable,
        "linux_guest": usable and {"dirty log cachestat", "user-mode-linux", "busybox-static", "C compiler"} <= good,
        "checks": [asdict(f) for f in found],
    }


def print_findings(report: dict[str, Any], console: Console) -> None:
    """Print what `examine` returned."""
    for check in report["checks"]:
        line = Text(f"{check['state']:<10}  ", STYLES[check["state"]]).append(f"{check['name']:<20}", "bold")
        line.append(check["detail"], "not bold default")
        if check["todo"]:
            line.append(f" -> {check['todo']} (for {check['needed_for']})", "not bold yellow")
        console.print(line, soft_wrap=True)
    yes, no = "[green]yes[/]", "[red]no[/]"
    console.print(f"\nmigrate a Python guest with hints: {yes if report['usable'] else no}")
    console.print(f"migrate a Linux guest with hints: {yes if report['linux_guest'] else no}")
