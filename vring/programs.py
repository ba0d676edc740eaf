"""Programs that somebody else built: run to their end, asked for their version, and traced to their Debian package.

Both sides have such a peer (a guest kernel, a QEMU), and say of each result which one it was.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vring.errors import MissingFacility

__all__ = ["APT_INSTALL", "Ended", "Origin", "origin_of", "run_program", "version_of"]

APT_INSTALL = "apt install --no-install-recommends"
"""How a package is had without others that it only recommends: with QEMU's come 890 MB."""
MOST_OUTPUT = 1 << 20
VERSION_TIMEOUT = 10.0
DPKG_TIMEOUT = 60.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended."""

    code: int
    """Exit code, negative for a signal."""
    out: str
    """What it wrote to its standard output, at most `MOST_OUTPUT` bytes; not UTF-8 is replaced."""
    err: str
    """The same for its standard error."""
    whole: bool
    """Whether it ended by itself; else its time was up or it wrote too much, and it was killed."""


def run_program(argv: Sequence[str], timeout: float, *, environment: Mapping[str, str] | None = None) -> Ended:
    """Run a program that is expected to end soon, without input.

    It is in a process group of its own: a Ctrl-C is for whoever runs it, who would else take a program that was
    interrupted for one that failed. Nothing of that group is left.

    Parameters
    ----------
    argv
        Path and arguments.
    timeout
        Seconds.
    environment
        Its environment; this process's own if left out.

    Raises
    ------
    OSError
        If it cannot be started.
    """
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    said = {stream.fileno(): bytearray() for stream in (process.stdout, process.stderr)}
    ended = False
    try:
        ended = _read(process.pid, said, time.monotonic() + timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):  # before it is reaped: until then its group's number is its own
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        out, err = (bytes(data[:MOST_OUTPUT]).decode(errors="replace") for data in said.values())
        process.stdout.close()
        process.stderr.close()
    return Ended(process.returncode, out, err, ended)


def _read(pid: int, said: dict[int, bytearray], deadline: float) -> bool:
    """Read all of them until the process has ended; return whether it did, in time and with few words."""
    poll = select.poll()
    for fd in said:
        poll.register(fd, select.POLLIN)
    left = set(said)
    while time.monotonic() < deadline:
        # Looked at before reading: what it wrote before its end is then still read. A child that it leaves behind may
        # hold the pipes open.
        over = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        ready = [fd for fd, _ in poll.poll(0 if over else 20)]
        for fd in ready:
            data = os.read(fd, 1 << 16)
            said[fd] += data
            if not data:
                poll.unregister(fd)
                left.discard(fd)
            if len(said[fd]) > MOST_OUTPUT:
                return False
        if over and not ready:
            return True
        if not left:
            time.sleep(0.001)
    return False


def version_of(path: str | os.PathLike[str]) -> str:
    """Return the first line that a program prints when it is asked for its version.

    Parameters
    ----------
    path
        Of the program, with its folder.

    Raises
    ------
    MissingFacility
        If it does not start, fails or does not end; the message has what it said.
    """
    try:
        ended = run_program([os.fspath(path), "--version"], VERSION_TIMEOUT)
    except OSError as error:
        raise MissingFacility(f"{path} does not start: {error.strerror}") from error
    if not ended.whole:
        raise MissingFacility(f"{path} --version does not end")
    words = (ended.out.strip() or ended.err.strip()).splitlines() or [f"exit code {ended.code}"]
    if ended.code != 0:
        raise MissingFacility(f"{path} does not start: {words[0][:300]}")
    return words[0]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where files come from."""

    package: str
    """Name and version of the Debian package that has these very files, empty if none has."""
    clean: bool | None
    """Whether ``dpkg -V`` found every file of that package as shipped; None without a package or an answer."""
    problems: tuple[str, ...] = ()
    """The lines of ``dpkg -V``."""

    def __str__(self) -> str:
        if not self.package:
            return "of no Debian package"
        verdict = {True: "clean", False: "NOT CLEAN", None: "gave no answer"}[self.clean]
        return f"{self.package}, dpkg -V {verdict}"


def _dpkg(*argv: str) -> Ended:
    try:
        return run_program(argv, DPKG_TIMEOUT, environment={**os.environ, "LC_ALL": "C"})
    except OSError as error:
        return Ended(127, "", str(error), False)


def _package_of(path: str | os.PathLike[str]) -> str:
    """Return the name of the package that has the file behind `path`, empty if none has."""
    real = Path(os.path.realpath(path))
    names = [real]
    if real.parts[:2] == ("/", "usr"):  # packages from before /bin and /lib were merged into /usr name them so
        names.append(Path("/", *real.parts[2:]))
    for name in names:
        for line in _dpkg("dpkg-query", "-S", str(name)).out.splitlines():
            owner, _, which = line.rpartition(": ")
            # The argument is a pattern, which may find other files; and diversions are listed as well.
            if which == str(name) and not owner.startswith("diversion by"):
                return owner.split(", ")[0].partition(":")[0]
    return ""


def origin_of(*paths: str | os.PathLike[str]) -> Origin:
    """Ask dpkg which package has the files behind `paths`, and whether that package is as it was shipped.

    Parameters
    ----------
    *paths
        Of files; links are followed.

    Returns
    -------
    Origin
        Without a package if dpkg knows none for one of them, if it is not the same for all, or if there is no dpkg.
    """
    packages = {_package_of(path) for path in paths} if shutil.which("dpkg") else {""}
    package = packages.pop()
    if not package or packages:
        return Origin("", None)
    version = _dpkg("dpkg-query", "-W", "-f", "${Version}\\n", package).out.partition("\n")[0]
    check = _dpkg("dpkg", "-V", package)
    problems = tuple(check.out.splitlines())
    # Some versions tell of problems by lines alone, others by the exit code as well.
    clean = None if not check.whole or (check.code and not problems) else not problems
    return Origin(f"{package} {version}", clean, problems)
