"""Process between the host and one Linux guest: starts the guest's kernel, and sees that nothing outlives the host.

Run as a program by `host_qemu_side.linux_guest.launch`, never imported by it; uses the standard library alone.

The kernel is several processes, in process groups of its own making, and killing the first leaves the others. So the
keeper makes itself the reaper of all its descendants: an orphan becomes its child, and killing children until there
is none ends everything, without privilege and without guessing at names. It does so when the host closes the control
socket, when the host is gone (also by SIGKILL), on a signal, or when the kernel has ended; then it removes the
folders it was given. Should the keeper itself be killed, the kernel's first process dies with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
ADDR_NO_RANDOMIZE = 0x0040000

_libc = ctypes.CDLL(None, use_errno=True)


def descendants(root: int) -> list[int]:
    """Return the pids of all processes below `root`, parents first."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as stream:
                # The name in parentheses may hold anything; the parent is the second field after it.
                parent = int(stream.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found, todo = [], [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def _reap() -> Iterator[tuple[int, int]]:
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        yield pid, status


def end_everything(patience: float = 10.0) -> None:
    """Kill and reap all descendants of the calling process."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            for _ in _reap():
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def _start(argv: list[str], environment: dict[str, str]) -> int:
    keeper = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:
            os._exit(127)
        # Without it a random gap makes the guest's memory file larger than its memory.
        _libc.personality(ADDR_NO_RANDOMIZE)
        os.dup2(1, 2)
        os.execve(argv[0], argv, environment)
    except OSError as error:
        os.write(1, f"{argv[0]}: {error.strerror}\n".encode())
    os._exit(127)


def main() -> None:
    """Run one guest: ``keeper.py CONTROL_FD JSON``, with the guest's console on standard input and output."""
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    spec = json.loads(sys.argv[2])
    host = -1
    with contextlib.suppress(ProcessLookupError):  # killed before this program was up: only clean up
        host = os.pidfd_open(spec["host"])
    if os.getppid() != spec["host"]:
        host = -1
    wake, wake_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)

    def tell(text: str) -> None:
        with contextlib.suppress(OSError):
            control.send(text.encode() + b"\n", socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)

    status: int | None = None
    try:
        if host >= 0:
            guest = _start(spec["argv"], spec["environment"])
            null = os.open("/dev/null", os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            tell(f"pid {guest}")
            poll = select.poll()
            for fd in (control.fileno(), host, wake):
                poll.register(fd, select.POLLIN)
            going = True
            while going and status is None:
                ready = [fd for fd, _ in poll.poll()]
                going = control.fileno() not in ready and host not in ready
                if wake in ready:
                    going = going and not set(os.read(wake, 512)) - {signal.SIGCHLD}
                    with contextlib.suppress(ChildProcessError):
                        for pid, how in _reap():
                            status = how if pid == guest else status
    finally:
        end_everything()
        for folder in spec["remove"]:
            shutil.rmtree(folder, ignore_errors=True)
        tell(f"exit {'killed' if status is None else os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main()
