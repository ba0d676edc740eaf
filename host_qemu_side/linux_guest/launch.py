"""An unmodified Linux guest (User-Mode Linux): start it, talk to it, freeze and thaw it, end it.

No threads, and nothing here blocks for long: every wait runs a loop that calls the caller's `serve`, because the
guest's kernel stands still whenever it waits for an answer from the vhost-user back end that lives in this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from host_qemu_side.linux_guest import initramfs as _initramfs
from host_qemu_side.linux_guest import ptrace_xstate
from host_qemu_side.linux_guest.console import CommandResult, Console
from host_qemu_side.linux_guest.kernel import GuestKernel, find_kernel
from host_qemu_side.linux_guest.mconsole import Reply, Request
from host_qemu_side.linux_guest.ptrace_xstate import PtraceXstate, XstateCounts
from host_qemu_side.linux_guest.work_folder import own_folder
from vring.errors import MissingFacility, PeerVanished, UsageError
from vring.unix_socket import MAX_PATH, socket_path

__all__ = ["LinuxGuest", "Serve", "check_memory"]

Serve = Callable[[], object]
"""Called again and again while something here waits: does what is due on the caller's sockets, does not wait itself."""

_T = TypeVar("_T")
_KEEPER = Path(__file__).resolve().with_name("keeper.py")
_BALLOON_ID = 5
_BLINK = 0.0005
"""Seconds between two looks at a program that is about to stop."""
_TRACES = re.compile("ptrace.*OK")
"""On the console once the guest's kernel has tried ptrace, which it does first of all."""


def check_memory(memory_bytes: int) -> None:
    """See that a Linux guest can have so much RAM.

    Raises
    ------
    UsageError
        If it cannot.
    """
    if memory_bytes < 64 << 20 or memory_bytes % (4 << 20):
        raise UsageError(f"a Linux guest has at least 64 MiB, in steps of 4 MiB, not {memory_bytes} bytes")


class LinuxGuest:
    """One Linux guest with one CPU.

    Its RAM is a sparse file without a name: guest physical address equals offset in the file.

    Parameters
    ----------
    memory_bytes
        RAM, a multiple of 4 MiB, at least 64 MiB.
    workdir
        Folder for the RAM file and the guest's control sockets; on a file system whose dirty pages `cachestat` counts
        (ext4, not tmpfs) if that log is wanted. What is made in it is removed at the end, however the end comes.
    vhost_user_socket
        Path where a back end for the balloon already listens; None for a guest without the device.
    initramfs
        The guest's first file system; None builds it, with `initramfs.build`, in `cache`.
    cache
        Folder for what is built; None means `workdir`.
    kernel
        The guest's kernel; None takes that of `kernel.find_kernel`.
    complete_xstate
        Whether ``ptrace_xstate.c`` is preloaded into the kernel's program, which old kernels need on processors with
        AMX; None means where `ptrace_xstate.wanted` says so.
    kernel_args
        More arguments for the guest's kernel, such as ``init_on_alloc=1``.
    remove
        Folders to remove as well when the guest is gone, also if this process is killed.
    watch
        Returns descriptors that `serve` looks at: a wait ends early when one of them becomes readable, so that
        requests of the guest are answered at once and not at the next tick of 2 ms.

    Raises
    ------
    UsageError
        If the size is not possible, or a kernel that was named is not there.
    MissingFacility
        If the machine lacks a package, or room in `workdir` for all of the guest's RAM.
    """

    def __init__(
        self,
        memory_bytes: int,
        workdir: str | os.PathLike[str],
        vhost_user_socket: str | os.PathLike[str] | None = None,
        *,
        initramfs: Path | None = None,
        cache: Path | None = None,
        kernel: GuestKernel | None = None,
        complete_xstate: bool | None = None,
        kernel_args: Sequence[str] = (),
        remove: Sequence[str] = (),
        watch: Callable[[], Iterable[int]] | None = None,
    ) -> None:
        check_memory(memory_bytes)
        self.memory_bytes = memory_bytes
        self.workdir = Path(workdir).resolve()
        self.frozen = False
        """Whether `freeze` succeeded and `thaw` was not called since."""
        self.watch = watch
        self.pid: int | None = None
        """Pid of the guest's kernel, once it is known (`wait_ready` waits for it)."""
        self.end_reason: str | None = None
        """How the guest ended, once it did."""
        self._vhost = None if vhost_user_socket is None else os.path.abspath(vhost_user_socket)
        self._kernel_args = tuple(kernel_args)
        self._remove = tuple(remove)
        self.kernel = kernel or find_kernel()
        """Which kernel it is."""
        self._complete_xstate = ptrace_xstate.wanted() if complete_xstate is None else complete_xstate
        self._cache = cache or self.workdir
        self._initrd = Path(initramfs or _initramfs.build(self._cache, self.kernel)).absolute()
        self._xstate: PtraceXstate | None = None
        self._console: Console | None = None
        self._keeper: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._said = b""
        self._known: set[int] = set()
        self._folders: list[Path] = []
        self._umid = Path()
        self._late_stop: Request | None = None

    # -- starting ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the guest and return at once; `wait_ready` waits until it takes commands.

        Raises
        ------
        UsageError
            If it was started before, or `workdir` can be changed by other users.
        MissingFacility
            If `workdir` has less room than the guest has RAM: the guest would die of SIGBUS when it is full.
        """
        if self._keeper is not None:
            raise UsageError("a LinuxGuest is started once; make another one")
        own_folder(self.workdir)
        room = os.statvfs(self.workdir)
        if room.f_bavail * room.f_frsize < self.memory_bytes:
            raise MissingFacility(
                f"{self.workdir} has {room.f_bavail * room.f_frsize >> 20} MiB free, the guest's RAM file may need "
                f"{self.memory_bytes >> 20} MiB: free some, or give another work folder"
            )
        with contextlib.ExitStack() as undo:
            self._launch(undo)
            undo.pop_all()  # from here on the keeper tidies up

    def _launch(self, undo: contextlib.ExitStack) -> None:
        if self._complete_xstate:
            self._xstate = PtraceXstate(self._cache)
            undo.callback(self._xstate.close)
        ram = self._folder(undo, self.workdir)
        control_dir = ram
        if len(os.fsencode(ram)) + len("/guest/mconsole") > MAX_PATH:
            control_dir = self._folder(undo, None)
            socket_path(str(control_dir / "guest/mconsole"))
        self._umid = control_dir / "guest"
        argv = [str(self.kernel.path), f"mem={self.memory_bytes >> 10}K", f"initrd={self._initrd}"]
        argv += ["con=null", "con0=fd:0,fd:1", f"umid={self._umid.name}", f"uml_dir={control_dir}"]
        if self._vhost is not None:
            argv.append(f"virtio_uml.device={self._vhost}:{_BALLOON_ID}")
        argv += self._kernel_args
        environment = {"TMPDIR": str(ram), "PATH": "/usr/bin:/bin"}
        inherited: tuple[int, ...] = ()
        if self._xstate is not None:
            environment |= self._xstate.environment
            inherited = self._xstate.fds
        spec = {
            "argv": argv,
            "environment": environment,
            "host": os.getpid(),
            "remove": [*(str(folder) for folder in self._folders), *self._remove],
        }
        near, far = socket.socketpair()
        undo.callback(near.close)
        near.setblocking(False)
        with contextlib.ExitStack() as theirs:
            theirs.enter_context(far)
            stdin, to_guest = os.pipe2(os.O_CLOEXEC)
            theirs.callback(os.close, stdin)
            undo.callback(os.close, to_guest)
            from_guest, stdout = os.pipe2(os.O_CLOEXEC)
            theirs.callback(os.close, stdout)
            undo.callback(os.close, from_guest)
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_KEEPER), str(far.fileno()), json.dumps(spec)],
                stdin=stdin,
                stdout=stdout,
                pass_fds=[far.fileno(), *inherited],
                start_new_session=True,  # a Ctrl-C for the host is not one for the guest
            )
        self._control = near
        self._console = Console(from_guest, to_guest)

    def _folder(self, undo: contextlib.ExitStack, parent: Path | None) -> Path:
        """Make a folder that goes with the guest."""
        folder = Path(tempfile.mkdtemp(prefix="uml-", dir=parent))
        undo.callback(folder.rmdir)  # nothing is in it before the guest is started
        self._folders.append(folder)
        return folder

    def wait_ready(self, timeout: float = 30.0, serve: Serve | None = None) -> str:
        """Wait until the guest takes commands; return its kernel release.

        Raises
        ------
        PeerVanished
            If it ends, or does not get that far in `timeout` seconds.
        MissingFacility
            If ``ptrace_xstate.c`` was to be preloaded and is not in place.
        """
        console = self._running()
        try:
            release = self._wait(lambda: console.release, timeout, serve, "boot")
        except PeerVanished as error:
            if _TRACES.search(console.transcript):
                self._check_preloaded(f"; {error}")
            raise
        self.processes()
        self._check_preloaded()
        return release

    def _check_preloaded(self, more: str = "") -> None:
        """Raise if ptrace was called, and not ours which was to be in its place."""
        counts = self.xstate_counts
        if counts is not None and not counts.calls:
            raise MissingFacility(
                f"ptrace_xstate.c was preloaded into {self.kernel.path}, but is not called: is the program linked "
                f"statically, or does it have privileges of its own?{more}"
            )

    @property
    def xstate_counts(self) -> XstateCounts | None:
        """How often the preloaded ``ptrace_xstate.c`` was called; None if it was not put in place."""
        return None if self._xstate is None else self._xstate.counts

    def __enter__(self) -> LinuxGuest:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    # -- the caller's loop --------------------------------------------------------------------------------------------

    def filenos(self) -> list[int]:
        """Return the descriptors to wait on for reading; when one is readable, call `pump`."""
        found = []
        if self._console is not None and not self._console.closed:
            found.append(self._console.fileno())
        if self._control is not None:
            found.append(self._control.fileno())
        if self._late_stop is not None:
            found.append(self._late_stop.fileno())
        return found

    def pump(self) -> bool:
        """Do what is due without waiting; return whether anything happened."""
        moved = self._console is not None and not self._console.closed and self._console.pump()
        if self._late_stop is not None and self._late_stop.poll() is not None:
            self._late_stop.close()
            self._late_stop = None
            with contextlib.suppress(PeerVanished):
                Request(self._umid / "mconsole", "go").close()
        if self._control is not None:
            try:
                data = self._control.recv(4096)
            except BlockingIOError:
                return moved
            except OSError:
                data = b""
            moved = True
            self._said += data
            *lines, self._said = self._said.split(b"\n")
            for line in lines:
                word, _, value = line.decode().partition(" ")
                if word == "pid":
                    self.pid = int(value)
                elif word == "exit":
                    self.end_reason = f"its kernel ended ({value})"
            if not data:
                self.end_reason = self.end_reason or "the process that keeps it was killed"
                self._control.close()
                self._control = None
        return moved

    def _running(self) -> Console:
        if self._console is None:
            raise UsageError("the guest was not started")
        return self._console

    def _check(self, doing: str) -> None:
        console = self._running()
        if self.end_reason is not None or console.closed:
            reason = self.end_reason or "it closed its console"
            raise PeerVanished(f"the Linux guest is gone during {doing}: {reason}; last words: {console.last_words()}")

    def _wait(
        self, done: Callable[[], _T | None], timeout: float, serve: Serve | None, doing: str, extra: Sequence[int] = ()
    ) -> _T:
        deadline = time.monotonic() + timeout
        while True:
            if serve is not None:
                serve()
            moved = self.pump()
            if (answer := done()) is not None:
                return answer
            self._check(doing)
            left = deadline - time.monotonic()
            if left <= 0:
                words = self._running().last_words()
                raise PeerVanished(f"the Linux guest gave no answer to {doing} in {timeout:g} s; last words: {words}")
            if not moved:
                poll = select.poll()
                for fd in (*self.filenos(), *extra, *(self.watch() if self.watch is not None else ())):
                    poll.register(fd, select.POLLIN)
                poll.poll(min(left, 0.002 if serve is not None else 0.1) * 1000)

    # -- commands -----------------------------------------------------------------------------------------------------

    def run(
        self, command: str, timeout: float = 30.0, serve: Serve | None = None, *, check: bool = True
    ) -> CommandResult:
        """Run a shell command line in the guest and wait for its end.

        A command that does not end in time goes on in the guest and keeps its console busy.

        Parameters
        ----------
        command
            One line for the guest's shell (busybox). Its standard input is empty.
        timeout
            Seconds.
        serve
            See `Serve`.
        check
            Whether a non-zero exit code raises.

        Raises
        ------
        UsageError
            If the guest is frozen, or the command fails and `check` is set.
        PeerVanished
            If the guest ends or does not answer in time.
        """
        if self.frozen:
            raise UsageError(f"the guest is frozen and cannot run {command!r}: thaw it first")
        self._check(f"command {command!r}")
        console = self._running()
        tag = console.send(command)
        result = self._wait(lambda: console.result(tag), timeout, serve, f"command {command!r}")
        if check and result.code:
            raise UsageError(f"guest command {command!r} ended with code {result.code}: {result.output.strip()[-400:]}")
        return result

    def load_balloon(self, serve: Serve | None = None, timeout: float = 30.0) -> None:
        """Load the balloon driver: only now is the device reset, negotiated and started."""
        self.run("insmod /lib/virtio_balloon.ko", timeout, serve)

    def unload_balloon(self, serve: Serve | None = None, timeout: float = 30.0) -> None:
        """Unload the balloon driver."""
        self.run("rmmod virtio_balloon", timeout, serve)

    def meminfo(self, serve: Serve | None = None) -> dict[str, int]:
        """Return the guest's ``/proc/meminfo``, in bytes (counts without a unit as they are)."""
        found = {}
        for line in self.run("cat /proc/meminfo", serve=serve).output.splitlines():
            name, _, value = line.partition(":")
            words = value.split()
            if words and words[0].isdigit():
                found[name] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
        return found

    def tool(self, arguments: str, timeout: float = 120.0, serve: Serve | None = None) -> dict[str, int | float]:
        """Run ``guest_tool`` (churn, writer, tagger; see its source) and return the numbers it prints."""
        output = self.run(f"guest_tool {arguments}", timeout, serve).output
        pairs = (word.partition("=") for word in output.split() if "=" in word)
        return {name: float(value) if "." in value else int(value) for name, _, value in pairs}

    # -- freezing -----------------------------------------------------------------------------------------------------

    def _ask(self, command: str, timeout: float, serve: Serve | None) -> Reply:
        self._check(f"management command {command!r}")
        with Request(self._umid / "mconsole", command) as request:
            return self._wait(request.poll, timeout, serve, f"management command {command!r}", (request.fileno(),))

    def freeze(self, serve: Serve | None = None, timeout: float = 10.0) -> None:
        """Stop the guest between two instructions; until `thaw` it writes no memory.

        The guest does not look at this request while it waits for an answer from its device, so `serve` must go on
        answering. A frozen guest answers nothing: after this, never wait for a reply of its driver.

        Raises
        ------
        PeerVanished
            If the guest is gone or does not stop in time. Should it still come to stop, `pump` lets it go on.
        """
        if self.frozen:
            return
        doing = "management command 'stop'"
        self._check(doing)
        # There is never more than one "stop" under way: the guest answers "go" at once and "stop" when it gets to
        # it, the latest first, so a second one would freeze it for good.
        request = self._late_stop or Request(self._umid / "mconsole", "stop")
        self._late_stop = None
        try:
            done, words = self._wait(request.poll, timeout, serve, doing, (request.fileno(),))
        except PeerVanished:
            self._late_stop = request
            raise
        request.close()
        if not done and words != "Already stopped":
            raise PeerVanished(f"the Linux guest refuses to stop: {words}")
        self.frozen = True
        self._halt(timeout)

    def _halt(self, timeout: float) -> None:
        """Stop the kernel's program as well.

        When its answer has come it still runs on to where it waits for the next request, late if this machine is busy,
        and its timer's signals reach it there: both write a little into its memory.
        """
        pid = self.pid
        assert pid is not None
        deadline = time.monotonic() + timeout
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            while not _stopped(pid):
                if time.monotonic() > deadline:
                    raise PeerVanished(f"the Linux guest's kernel (process {pid}) does not stop in {timeout:g} s")
                time.sleep(_BLINK)

    def thaw(self, serve: Serve | None = None, timeout: float = 10.0) -> None:
        """Let a frozen guest go on; a guest that is not frozen is left alone.

        Raises
        ------
        PeerVanished
            If the guest is gone or does not answer in time.
        """
        if self.frozen and self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGCONT)
        done, words = self._ask("go", timeout, serve)
        if not done and words != "Not stopped":
            raise PeerVanished(f"the Linux guest refuses to go on: {words}")
        self.frozen = False

    def alive(self, serve: Serve | None = None, timeout: float = 5.0) -> bool:
        """Whether the guest's kernel answers, or is frozen; False if it is gone or silent for `timeout` seconds."""
        if self.frozen:
            self.pump()
            return self.end_reason is None and self.pid is not None and _stopped(self.pid)
        try:
            return self._ask("version", timeout, serve)[0]
        except PeerVanished:
            return False

    # -- memory -------------------------------------------------------------------------------------------------------

    def ram_fd(self) -> int:
        """Open the guest's RAM file; guest physical address equals offset. The caller closes the descriptor.

        A vhost-user back end gets the same file in SET_MEM_TABLE; this is for a guest without a device.

        Raises
        ------
        PeerVanished
            If the guest has no RAM file (yet, or any more).
        """
        ram = str(self._folders[0]) if self._folders else ""
        for pid in self.processes()[1:]:
            with contextlib.suppress(OSError):
                for name in os.listdir(f"/proc/{pid}/fd"):
                    link = f"/proc/{pid}/fd/{name}"
                    # It never had a name (O_TMPFILE) or lost it at once: the folder and the size tell it.
                    if os.readlink(link).startswith(f"{ram}/") and os.stat(link).st_size >= self.memory_bytes:
                        return os.open(link, os.O_RDWR | os.O_CLOEXEC)
        raise PeerVanished("the Linux guest's RAM file is not to be found: it is not running")

    # -- the end ------------------------------------------------------------------------------------------------------

    def processes(self) -> list[int]:
        """Return the pids of all processes of the guest, the keeper's first; kept for `kill`."""
        if self._keeper is None or self._keeper.poll() is not None:
            return []
        found = [self._keeper.pid, *_descendants(self._keeper.pid)]
        self._known.update(found)
        return found

    def kill(self, timeout: float = 10.0) -> None:
        """End the guest and all its processes, remove its files. May be called at any time, more than once.

        The keeper does the work: it is told by closing the control socket. Were the keeper itself killed, its orphans
        are ended here, each by its pid and after a look whether it is still the same program. Among them are those
        whose pid was never noted (each program the guest runs is a process here): they have the guest's RAM mapped.
        """
        if self._keeper is None:
            return
        self.processes()
        if self._control is not None:
            self._control.close()
            self._control = None
        self.end_reason = self.end_reason or "it was killed by the host"
        try:
            orderly = self._keeper.wait(timeout) == 0
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()
            orderly = False
        if not orderly:
            for pid in (self._known | _users_of(self._folders)) - {self._keeper.pid, os.getpid()}:
                with contextlib.suppress(OSError):
                    if os.path.samefile(f"/proc/{pid}/exe", self.kernel.path):
                        os.kill(pid, signal.SIGKILL)
            for folder in self._folders:
                shutil.rmtree(folder, ignore_errors=True)
        self._known.clear()
        if self._late_stop is not None:
            self._late_stop.close()
            self._late_stop = None
        if self._console is not None and not self._console.closed:
            self._console.pump()
        if self._console is not None:
            self._console.close()
        if self._xstate is not None:
            self._xstate.close()
            self._xstate = None
        self.frozen = False


def _stopped(pid: int) -> bool:
    """Return whether all threads of a process are stopped; no longer being there counts."""
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            state = Path(f"/proc/{pid}/task/{task}/stat").read_text().rpartition(")")[2].split()[0]
            if state not in "TtZX":
                return False
    return True


def _descendants(root: int) -> list[int]:
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                below = [int(word) for word in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
                found += below
                todo += below
    return found


def _users_of(folders: Sequence[Path]) -> set[int]:
    """Return the pids of all processes that have a file of these folders mapped, which may have lost its name."""
    inside = tuple(f" {folder}/" for folder in folders)
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{name}/maps").read_text(errors="replace")
                if any(folder in text for folder in inside):
                    found.add(int(name))
    return found
