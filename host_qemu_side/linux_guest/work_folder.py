"""The work folder, and what is made once and kept in it, some by compiling: whole, and nobody else's."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from vring.errors import MissingFacility, UsageError
from vring.programs import APT_INSTALL, run_program

__all__ = ["compiled", "find_compiler", "kept", "own_folder"]

_WARNINGS = ["-std=c11", "-O2", "-Wall", "-Wextra"]
_TIMEOUT = 120.0
_ELSE = "name another work folder"


def own_folder(folder: Path) -> None:
    """Make a folder, and see that nobody but this user (or root) can change what this user keeps in it.

    What is kept there is loaded into programs here and booted. A folder such as ``/tmp``, in which everybody can make
    files but change only his own, will do.

    Raises
    ------
    UsageError
        If it belongs to another user, or others can change it.
    """
    folder.mkdir(0o755, parents=True, exist_ok=True)  # not everybody's, whatever the umask
    info = folder.stat()
    by_group = info.st_mode & stat.S_IWGRP and info.st_gid not in (0, os.getegid())
    shared = (info.st_mode & stat.S_IWOTH or by_group) and not info.st_mode & stat.S_ISVTX
    if info.st_uid not in (0, os.geteuid()) or shared:
        raise UsageError(f"other users can change what is kept in {folder}: {_ELSE}")


def _own(path: Path) -> bytes | None:
    """Return what a file holds that only this user (or root) can have written; None if it is not there.

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
        raise UsageError(f"{path} cannot be read ({error.strerror}): remove it, or {_ELSE}") from error
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid not in (0, os.geteuid()) or info.st_mode & 0o022:
            raise UsageError(f"{path} may be another user's, so it is not used: remove it, or {_ELSE}")
        with open(fd, "rb", closefd=False) as stream:
            return stream.read()
    finally:
        os.close(fd)


def kept(folder: Path, name: str, make: Callable[[], bytes]) -> bytes:
    """Return what is kept under that name; if it is not there, make it and keep it.

    It is written aside and renamed, so that two who make it at once both end with a whole one.

    Parameters
    ----------
    folder
        Where it is kept; made if it is not there.
    name
        Of the file; tells what it was made from, as it is not made again.
    make
        Returns the content.

    Raises
    ------
    UsageError
        If file or folder may be somebody else's.
    """
    own_folder(folder)
    target = folder / name
    if (data := _own(target)) is not None:
        return data
    data = make()
    fd, aside = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
    try:
        with os.fdopen(fd, "wb") as stream:
            stream.write(data)
            os.fchmod(fd, 0o644)
        os.replace(aside, target)
    except BaseException:
        os.unlink(aside)
        raise
    return data


def find_compiler() -> list[str]:
    """Return the command of the C compiler: what ``CC`` in the environment says, else gcc, cc or clang.

    Raises
    ------
    MissingFacility
        If there is none.
    """
    try:
        said = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise MissingFacility(f"CC in the environment is no command: {error}") from error
    for name in said[:1] or ("gcc", "cc", "clang"):
        if found := shutil.which(name):
            return [found, *said[1:]]
    if said:
        raise MissingFacility(f"CC in the environment says {' '.join(said)!r}, and there is no {said[0]}")
    raise MissingFacility(f"no C compiler on this machine: {APT_INSTALL} gcc libc6-dev")


def compiled(source: Path, flags: list[str], folder: Path) -> bytes:
    """Compile one file, or take what was compiled before from the same source in the same way.

    Parameters
    ----------
    source
        A C file.
    flags
        Beside the usual ones, such as ``-static``.
    folder
        Where the result is kept.

    Returns
    -------
    bytes
        The program or library.

    Raises
    ------
    MissingFacility
        If there is no compiler, or it fails; the message has what it said.
    UsageError
        If what lies in `folder` may be somebody else's.
    """

    def make() -> bytes:
        compiler = find_compiler()
        scratch = Path(tempfile.mkdtemp(dir=folder))
        made = scratch / "made"
        try:
            command = [*compiler, *_WARNINGS, *flags, "-o", str(made), str(source)]
            done = run_program(command, _TIMEOUT, environment={**os.environ, "LC_ALL": "C"})
            data = made.read_bytes() if done.code == 0 and made.exists() else b""
        finally:  # without a descriptor: they may be what is lacking
            made.unlink(missing_ok=True)
            scratch.rmdir()
        if not data.startswith(b"\x7fELF"):
            said = done.err.strip()[-400:] or f"it ended with code {done.code}"
            raise MissingFacility(
                f"{' '.join(compiler)} does not compile {source.name} with {' '.join(flags)} "
                f"(it takes gcc and libc6-dev): {said}"
            )
        return data

    made_from = "\0".join([os.environ.get("CC", ""), *_WARNINGS, *flags]).encode() + source.read_bytes()
    return kept(folder, f"{source.stem}-{hashlib.sha256(made_from).hexdigest()[:16]}", make)
