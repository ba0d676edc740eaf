"""Program that tries whether this host lets a tracer write processor state short: ``xstate_probe.py BYTES``.

Run by `host_qemu_side.linux_guest.ptrace_xstate`, never imported by it; uses the standard library alone. Prints the
size of the whole state (NT_X86_XSTATE) and the error number of a write of the first `BYTES` of it (0: accepted), or
nothing where the host does not have it or forbids tracing: then nothing can be completed either.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PTRACE_TRACEME, PTRACE_GETREGSET, PTRACE_SETREGSET = 0, 0x4204, 0x4205
NT_X86_XSTATE = 0x202
LARGEST = 64 << 10


class IoVec(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long


def transfer(request: int, pid: int, buffer: ctypes.Array[ctypes.c_char], size: int) -> tuple[int, int]:
    """Read or write the state of a stopped process; return the error number and how many bytes it was."""
    vector = IoVec(ctypes.addressof(buffer), size)
    failed = libc.ptrace(request, pid, NT_X86_XSTATE, ctypes.addressof(vector)) != 0
    return (ctypes.get_errno() if failed else 0), vector.len


def stopped_child() -> int:
    """Return the pid of a child that this process traces, and that waits."""
    pid = os.fork()
    if pid == 0:
        libc.ptrace(PTRACE_TRACEME, 0, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    os.waitpid(pid, os.WUNTRACED)
    return pid


def main() -> None:
    """Try it on a child."""
    pid = stopped_child()
    try:
        buffer = ctypes.create_string_buffer(LARGEST)
        error, whole = transfer(PTRACE_GETREGSET, pid, buffer, LARGEST)
        if error == 0:
            print(whole, transfer(PTRACE_SETREGSET, pid, buffer, int(sys.argv[1]))[0])
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
