"""``balloon doctor``: what this machine can do, and what to install for the rest.

What can be tried is tried: both guests boot and are migrated, small. Nothing is left behind.
"""

from __future__ import annotations

import importlib
import os
import platform
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from balloon_cli import report
from balloon_cli.machine import address_room, memory_room, mounts
from balloon_cli.migrate import MigrateOptions, Progress, migrate_all
from balloon_dev.profiles import SPEC
from guest_driver.qemu import find_qemu
from host_qemu_side.discard import punch_hole
from host_qemu_side.linux_guest import ptrace_xstate
from host_qemu_side.linux_guest.initramfs import find_busybox
from host_qemu_side.linux_guest.kernel import find_kernel
from host_qemu_side.linux_guest.work_folder import find_compiler
from host_qemu_side.migration import Cancelled, Limits
from vring._vring import lib
from vring.contents import populated
from vring.dirty import wp_async
from vring.dirty.software import SoftwareDirtyLog
from vring.errors import MissingFacility, UsageError, VirtioError
from vring.memory import GuestMemory
from vring.pages import PageSet
from vring.programs import APT_INSTALL, origin_of, version_of
from vring.sizes import format_size

__all__ = ["MISSING", "NOT_TRIED", "NOT_USABLE", "OK", "DoctorOptions", "Finding", "examine", "print_findings"]

OK, MISSING, NOT_USABLE, NOT_TRIED = "ok", "missing", "not usable", "not tried"
STYLES = {OK: "green", MISSING: "yellow", NOT_USABLE: "red", NOT_TRIED: "yellow"}
PYTHON_GUEST, LINUX_GUEST = "Python guest", "Linux guest"
LINUX_NEEDS = ("C compiler", "user-mode-linux", "busybox-static")
TRIAL = MigrateOptions(
    guest="python",
    memory=32 << 20,
    workload="churn",
    hints="on",
    to="spawn",
    limits=Limits(bandwidth=64.0 * 2**20),  # slow enough for hints to come in time
    free_at="done",
    dirty_log="auto",
    profile=SPEC,
    seed=1,
    warm_up=0.0,
)
LINUX_MEMORY = 128 << 20


@dataclass(frozen=True, slots=True)
class DoctorOptions:
    """What the command line asked for."""

    work_dir: Path = Path("/var/tmp")
    """Where the RAM files of Linux guests would lie."""
    linux: str = ""
    """The Linux guest's kernel, where it is not the installed one."""
    modules: str = ""
    """Folder of its modules."""
    qemu: str = ""
    """QEMU's program or its folder, where it is not the installed one."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    name: str
    state: str
    """`OK`, `MISSING`, `NOT_USABLE` or `NOT_TRIED`."""
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


def _python() -> str:
    return f"{platform.python_implementation()} {platform.python_version()}, numpy {np.__version__}"


def _compiler() -> str:
    return version_of(find_compiler()[0])


def _kernel() -> str:
    release = platform.release()
    if platform.system() != "Linux":
        raise _Problem(NOT_USABLE, f"{platform.system()} {release}", "use Linux: memory and doorbells are Linux's")
    number = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    if number < (6, 7):
        return f"Linux {release} (before 6.7 there is no dirty log wp-async; software does instead)"
    return f"Linux {release}"


def _shared_memory() -> str:
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
            if populated(memory).numbers().tolist() != [16]:
                raise _Problem(NOT_USABLE, "SEEK_DATA does not tell holes of a memfd", "use a newer kernel")
            punch_hole(memory.regions[0].fd, 1 << 16, 4096)
    except (OSError, VirtioError) as error:
        raise _Problem(
            NOT_USABLE, str(error), "memfd, eventfd, unix sockets and hole punching must be allowed"
        ) from error
    return "memfd, eventfd, descriptor passing and hole punching work"


def _migrated(options: MigrateOptions) -> tuple[dict[str, Any], str]:
    """Migrate a small guest with hints; return the run, and what came of it in words."""
    began = time.monotonic()
    try:
        result = migrate_all(options, Progress())
    except Cancelled:
        raise
    except (OSError, VirtioError) as error:
        raise _Problem(
            NOT_USABLE, str(error), f"see the message; again with balloon migrate --guest {options.guest}"
        ) from error
    found = report.findings(result)
    if found:
        raise _Problem(NOT_USABLE, "; ".join(found), "report a bug")
    run = result["runs"][0]
    blocks = sum(hint_run["blocks"] for hint_run in run["hint_runs"])
    words = (
        f"{format_size(options.memory)} booted and migrated in {time.monotonic() - began:.1f} s, {blocks} blocks "
        f"hinted, {run['oracle']['pages_checked']:,} pages compared, none wrong"
    )
    if run["hints_refused"]:
        raise _Problem(NOT_USABLE, f"{words}; but hints are refused: {run['hints_refused']}", "see the dirty logs")
    if not blocks:
        raise _Problem(NOT_USABLE, words, "again, when this machine is less busy: the guest's hints came too late")
    return run, words


def _python_guest() -> str:
    """Migrate one."""
    _, words = _migrated(TRIAL)
    return words


def _linux_guest(options: DoctorOptions) -> str:
    """Boot one, and migrate it into an image."""
    with tempfile.TemporaryDirectory(prefix="balloon-doctor-", dir=options.work_dir) as folder:
        run, words = _migrated(
            replace(
                TRIAL,
                guest="linux",
                memory=LINUX_MEMORY,
                work_dir=folder,
                linux=options.linux,
                modules=options.modules,
            )
        )
    linux = run["linux"]
    if linux["xstate_completed"] is not None:
        words += f"; {linux['xstate_completed']:,} writes of processor state completed for it"
    return f"Linux {linux['release']}: {words}"


def _software() -> str:
    with GuestMemory.create(1 << 20, name="doctor") as memory:
        log = SoftwareDirtyLog.for_memory(memory)
        log.start()
        log.mark(5)
        seen = PageSet(memory.page_layout)
        log.sync(seen)
        log.stop()
        if seen.numbers().tolist() != [5]:
            raise _Problem(NOT_USABLE, f"page 5 was marked, {seen.numbers().tolist()} found", "report a bug")
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
    if not folder.is_dir():
        raise _Problem(MISSING, f"{folder} is no folder", "name a folder that exists with --work-dir")
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
    for mount in mounts():
        inside = target == mount.place or target.startswith(mount.place.rstrip("/") + "/")
        if inside and len(mount.place) >= len(best):
            best, kind = mount.place, mount.kind
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


def _user_mode_linux(options: DoctorOptions) -> str:
    kernel = find_kernel(options.linux, options.modules)
    text = f"Linux {kernel.release}, {kernel.path}, {kernel.origin()}"
    if ptrace_xstate.host_takes_only_all():
        text += "; this host takes processor state only whole (AMX), so ptrace_xstate.c is preloaded where needed"
    return text


def _busybox() -> str:
    path = find_busybox()
    return f"{path}, static, {origin_of(path)}"


def _qemu(options: DoctorOptions) -> str:
    found = [find_qemu(transport, options.qemu) for transport in ("mmio", "pci")]
    return f"{found[0].version}, {' and '.join(sorted({binary.path for binary in found}))}"


def _memory() -> str:
    room = min((memory_room(), *filter(None, [address_room()])), key=lambda room: room.available)
    text = f"{format_size(room.available)} available of {format_size(room.total)}, by {room.limit}"
    if room.available < 1 << 30:
        raise _Problem(NOT_USABLE, text, "a migration of 1 GiB holds it twice: use --memory 256M or less")
    return f"{text}: guests up to {format_size(room.available / 2.5)}"


def _cores() -> str:
    count = len(os.sched_getaffinity(0))
    if count < 2:
        raise _Problem(NOT_USABLE, "1", "works, slowly; `balloon bench ring` needs two: allow them with taskset")
    return str(count)


def examine(options: DoctorOptions = DoctorOptions(), say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Try everything.

    Parameters
    ----------
    options
        Where Linux guests would lie, and which programs to take.
    say
        Told what is tried if it takes long.

    Returns
    -------
    dict
        JSON values: ``usable`` (an embedded Python guest was migrated with hints), ``linux_guest`` (so was a Linux
        guest), and ``checks``, a list of `Finding` as objects.

    Raises
    ------
    Cancelled
        On Ctrl-C during a trial.
    """
    linux, work_dir = "--guest linux", options.work_dir
    checks: list[tuple[str, str, Callable[[], str]]] = [
        ("Python", "everything", _python),
        ("C compiler", "building", _compiler),
        ("kernel", "everything", _kernel),
        ("memory", "everything", _memory),
        ("cores", "everything", _cores),
        ("shared memory", "everything", _shared_memory),
        ("dirty log software", "--guest python", _software),
        ("dirty log wp-async", "--guest python", _wp_async),
        ("userfaultfd", "dirty log wp-async", _userfaultfd),
        ("dirty log cachestat", f"{linux} with hints", lambda: _cachestat(work_dir)),
        ("work directory", linux, lambda: _work_directory(work_dir)),
        ("user-mode-linux", linux, lambda: _user_mode_linux(options)),
        ("busybox-static", linux, _busybox),
        ("qemu-system-x86", "tests against QEMU", lambda: _qemu(options)),
    ]
    found = [_find(*check) for check in checks]
    say("a Python guest boots and is migrated")
    found.append(_find(PYTHON_GUEST, "--guest python", _python_guest))
    lacking = [f.name for f in found if f.name in LINUX_NEEDS and f.state != OK]
    if lacking:
        found.append(Finding(LINUX_GUEST, NOT_TRIED, f"no {', no '.join(lacking)}", linux, "see above"))
    else:
        say("a Linux guest boots and is migrated")
        found.append(_find(LINUX_GUEST, linux, lambda: _linux_guest(options)))
    good = {f.name for f in found if f.state == OK}
    return {
        "schema_version": 1,
        "usable": PYTHON_GUEST in good,
        "linux_guest": LINUX_GUEST in good,
        "checks": [asdict(f) for f in found],
    }


def _find(name: str, needed_for: str, check: Callable[[], str]) -> Finding:
    """Make one check."""
    try:
        return Finding(name, OK, check(), needed_for)
    except _Problem as problem:
        return Finding(name, problem.state, problem.detail, needed_for, problem.todo)
    except Cancelled:
        raise
    except MissingFacility as error:
        detail, _, todo = str(error).partition(f": {APT_INSTALL} ")
        if todo:
            return Finding(name, MISSING, detail, needed_for, f"{APT_INSTALL} {todo}")
        return Finding(name, NOT_USABLE, detail, needed_for, "see the message")
    except UsageError as error:  # what was named is not there
        return Finding(name, MISSING, str(error), needed_for, "name another")
    except (OSError, VirtioError) as error:
        return Finding(name, NOT_USABLE, str(error), needed_for, "see the message")


def print_findings(found: dict[str, Any], console: Console) -> None:
    """Print what `examine` returned."""
    for check in found["checks"]:
        line = Text(f"{check['state']:<10}  ", STYLES[check["state"]]).append(f"{check['name']:<20}", "bold")
        line.append(check["detail"], "not bold default")
        if check["todo"]:
            line.append(f" -> {check['todo']} (for {check['needed_for']})", "not bold yellow")
        console.print(line, soft_wrap=True)
    state = {check["name"]: check["state"] for check in found["checks"]}
    words = {OK: "[green]yes[/], it was done", NOT_TRIED: "[yellow]not tried[/]"}
    console.print(f"\nmigrate a Python guest with hints: {words.get(state[PYTHON_GUEST], '[red]no[/]')}")
    console.print(f"migrate a Linux guest with hints: {words.get(state[LINUX_GUEST], '[red]no[/]')}")
