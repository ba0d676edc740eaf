"""What this package compiles on the user's machine when it is needed, and keeps in a folder; writing files whole."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from vring.errors import MissingFacility, UsageError

__all__ = ["compiled", "find_compiler", "replace"]

_WARNINGS = ["-std=c11", "-O2", "-Wall", "-Wextra"]


def find_compiler() -> str:
    """Return the path of the C compiler: what ``CC`` in the environment names, else gcc, cc or clang.

    Raises
    ------
    MissingFacility
        If there is none.
    """
    for name in (os.environ.get("CC", ""), "gcc", "cc", "clang"):
        if name and (found := shutil.which(name)):
            return found
    raise MissingFacility("no C compiler on this machine: apt install gcc libc6-dev")


def replace(target: Path, data: bytes, mode: int) -> None:
    """Write a file aside and rename it, so that two who make it at once both end with a whole one."""
    fd, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    with os.fdopen(fd, "wb") as stream:
        stream.write(data)
    os.chmod(name, mode)
    os.replace(name, target)


def _own(path: Path) -> bytes | None:
    """Return what a file holds that only this user (or root) can have written; None if it is not there.

    What is compiled gets loaded into a program here, and the folder may be one where others can write as well.

    Raises
    ------
    UsageError
        If it is somebody else's, or everybody's.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): remove it, or name another work folder") from error
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid not in (0, os.geteuid()) or info.st_mode & 0o022:
            raise UsageError(f"{path} may be another user's, so it is not used: remove it, or name another work folder")
        with open(fd, "rb", closefd=False) as stream:
            return stream.read()
    finally:
        os.close(fd)


def compiled(source: Path, flags: list[str], cache: Path) -> bytes:
    """Compile one file, or take what was compiled before from the same source with the same flags.

    Parameters
    ----------
    source
        A C file.
    flags
        Beside the usual ones, such as ``-static``.
    cache
        Folder to keep the result in, made if it is not there. Files in it are named by a hash of text and flags.

    Returns
    -------
    bytes
        The program or library.

    Raises
    ------
    MissingFacility
        If there is no compiler, or it fails; the message has what it said.
    UsageError
        If what lies in `cache` may be somebody else's.
    """
    key = hashlib.sha256("\0".join([*_WARNINGS, *flags]).encode() + source.read_bytes()).hexdigest()[:16]
    target = cache / f"{source.stem}-{key}"
    if (data := _own(target)) is not None:
        return data
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        made = Path(scratch) / "made"
        command = [find_compiler(), *_WARNINGS, *flags, "-o", str(made), str(source)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
        )
        if done.returncode == 0:
            made.chmod(0o700)  # whatever the umask
        data = _own(made)
        if done.returncode != 0 or data is None:
            raise MissingFacility(
                f"{source.name} cannot be compiled with {' '.join(flags)} (apt install gcc libc6-dev): "
                f"{done.stderr.strip()[-400:]}"
            )
    replace(target, data, 0o755)
    return data
