"""Reads a migration file back in a process of its own, for the verdict: the file's answer to what a socket says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from balloon_cli.errors import INVARIANT, MISSING, OK, USAGE, VANISHED
from host_qemu_side.migration.stream import StreamError
from vring.decode import parse_json
from vring.errors import MissingFacility, PeerVanished, UsageError

__all__ = ["read_back"]


def read_back(path: str, tick: Callable[[], None] = lambda: None) -> tuple[npt.NDArray[np.uint64], dict[str, Any]]:
    """Have ``balloon receive`` read a file, digest its pages and go on with the guest.

    Parameters
    ----------
    path
        Of the file.
    tick
        Called about ten times per second; what it raises ends the other process.

    Returns
    -------
    tuple
        The digest of each page of RAM in order, and the result as ``balloon receive --json`` gives it.

    Raises
    ------
    StreamError, PeerVanished, MissingFacility, UsageError
        If the file cannot be read back; the message is the other process's.
    """
    digests_fd = os.memfd_create("page-digests", os.MFD_CLOEXEC)
    command = [sys.executable, "-m", "balloon_cli", "receive", f"file:{path}", "--json", "--quiet", "--die-with-parent"]
    command += ["--digests", str(digests_fd)]
    try:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, pass_fds=[digests_fd], process_group=0
            )
            try:
                code = _wait(process, tick)
            except BaseException:
                process.send_signal(signal.SIGKILL)
                process.wait()
                raise
            out.seek(0)
            err.seek(0)
            if code not in (OK, INVARIANT):
                why = err.read().decode(errors="replace").strip().removeprefix("balloon: ") or f"exit code {code}"
                kind = {USAGE: UsageError, MISSING: MissingFacility, VANISHED: PeerVanished}.get(code, StreamError)
                raise kind(f"the file does not read back: {why}")
            facts = parse_json(out.read(), "what `balloon receive` found", refusal=StreamError)
        size = os.fstat(digests_fd).st_size // 8 * 8  # of one that broke off the oracle says how many are missing
        digests = np.frombuffer(os.pread(digests_fd, size, 0), dtype="<u8")
    finally:
        os.close(digests_fd)
    return digests, facts


def _wait(process: subprocess.Popen[bytes], tick: Callable[[], None]) -> int:
    while True:
        try:
            return process.wait(0.1)
        except subprocess.TimeoutExpired:
            tick()
