"""Programs that somebody else built: what they say of themselves, and which Debian package they come from.

Both sides have such a peer (a guest kernel, a QEMU), and say of each result which one it was.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from vring.errors import MissingFacility

__all__ = ["Origin", "origin_of", "version_of"]

VERSION_TIMEOUT = 10.0


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
        done = subprocess.run(
            [os.fspath(path), "--version"],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=VERSION_TIMEOUT,
        )
    except subprocess.TimeoutExpired as error:
        raise MissingFacility(f"{path} --version does not end") from error
    except OSError as error:
        raise MissingFacility(f"{path} does not start: {error.strerror}") from error
    words = (done.stdout.strip() or done.stderr.strip()).splitlines() or [f"exit code {done.returncode}"]
    if done.returncode != 0:
        raise MissingFacility(f"{path} does not start: {words[0][:300]}")
    return words[0]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where files come from."""

    package: str
    """Name and version of the Debian package that has these very files, empty if none has."""
    clean: bool | None
    """Whether ``dpkg -V`` found every file of that package as shipped; None without a package."""
    problems: tuple[str, ...] = ()
    """The lines of ``dpkg -V``."""

    def __str__(self) -> str:
        if not self.package:
            return "of no Debian package"
        return f"{self.package}, dpkg -V {'clean' if self.clean else 'NOT CLEAN'}"


def _dpkg(program: str, *arguments: str) -> tuple[int, str]:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            [program, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            stdin=subprocess.DEVNULL,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError):
        return 127, ""
    return done.returncode, (done.stdout + done.stderr).strip()


def _package_of(path: str | os.PathLike[str]) -> str:
    """Return the name of the package that has the file behind `path`, empty if none has."""
    real = Path(os.path.realpath(path))
    names = [real]
    if real.parts[:2] == ("/", "usr"):  # packages from before /bin and /lib were merged into /usr name them so
        names.append(Path("/", *real.parts[2:]))
    for name in names:
        _, listed = _dpkg("dpkg-query", "-S", str(name))
        for line in listed.splitlines():
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
    _, version = _dpkg("dpkg-query", "-W", "-f", "${Version}\\n", package)
    code, said = _dpkg("dpkg", "-V", package)
    problems = tuple(said.splitlines())
    return Origin(f"{package} {version.partition(chr(10))[0]}", code == 0 and not problems, problems)
