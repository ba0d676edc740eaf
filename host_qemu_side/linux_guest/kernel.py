"""Which Linux kernel becomes the guest: its program, its balloon module, and where both come from.

Debian's ``user-mode-linux`` unless another is named, by argument or by the environment. Nothing is started here.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vring.errors import MissingFacility, UsageError, quoted
from vring.programs import APT_INSTALL, Origin, origin_of, version_of

__all__ = ["KERNEL_ENVIRONMENT", "MODULES_ENVIRONMENT", "GuestKernel", "find_kernel"]

PACKAGE = "user-mode-linux"
KERNEL_ENVIRONMENT, MODULES_ENVIRONMENT = "BALLOON_LINUX", "BALLOON_LINUX_MODULES"
"""Environment variables that name the program and the folder of its modules."""

_MODULES = Path("/usr/lib/uml/modules")
_MODULE = Path("kernel/drivers/virtio/virtio_balloon.ko")
_RELEASE = re.compile(r"[0-9]+\.[0-9]+[^\s/]{0,60}")


@dataclass(frozen=True, slots=True)
class GuestKernel:
    """A User-Mode Linux kernel on this machine."""

    path: Path
    """The program."""
    module: Path
    """Its ``virtio_balloon.ko``."""
    release: str
    """Kernel release, as the program says it and ``uname -r`` in the guest."""

    def origin(self) -> Origin:
        """Return where program and module come from: without a package if it is not the same for both."""
        return origin_of(self.path, self.module)


def find_kernel(
    linux: str | os.PathLike[str] | None = None, modules: str | os.PathLike[str] | None = None
) -> GuestKernel:
    """Find the guest's kernel and its modules.

    Parameters
    ----------
    linux
        The program; by default what ``BALLOON_LINUX`` in the environment names, else ``linux.uml`` from the ``PATH``.
    modules
        Folder with its modules, of one kernel or with a folder for each release; by default what
        ``BALLOON_LINUX_MODULES`` names, else ``lib/uml/modules`` beside the program's ``bin``, else Debian's.

    Raises
    ------
    UsageError
        If what is named is not there.
    MissingFacility
        If nothing was named and nothing is installed, or what is there cannot be used; the message says why.
    """
    named = os.fspath(linux or os.environ.get(KERNEL_ENVIRONMENT, ""))
    path = _named_program(named) if named else _installed_program()
    release = version_of(path)
    if not _RELEASE.fullmatch(release):
        raise MissingFacility(f"{path} is not User-Mode Linux: --version says {release[:100]!r}")
    folder = os.fspath(modules or os.environ.get(MODULES_ENVIRONMENT, ""))
    if folder:
        if not os.path.isdir(folder):
            raise UsageError(f"the folder of the guest kernel's modules is not there: {quoted(folder)}")
        places = [Path(folder).absolute()]
    else:
        beside = Path(os.path.realpath(path)).parent.parent / "lib/uml/modules"
        places = [beside] if beside == _MODULES else [beside, _MODULES]
    todo = "name the folder of its modules" if named or folder else f"{APT_INSTALL} {PACKAGE}"
    return GuestKernel(path, _find_module(places, release, todo, exact=not folder), release)


def _named_program(name: str) -> Path:
    if not os.path.isfile(name):
        raise UsageError(f"the guest's kernel is not there: {quoted(name)}")
    if not os.access(name, os.X_OK):
        raise UsageError(f"the guest's kernel is not a program that can be executed: {quoted(name)}")
    return Path(name).absolute()


def _installed_program() -> Path:
    found = shutil.which("linux.uml")
    if found is None:
        raise MissingFacility(f"no linux.uml on this machine: {APT_INSTALL} {PACKAGE}")
    return Path(found).absolute()


def _find_module(places: Sequence[Path], release: str, todo: str, *, exact: bool) -> Path:
    """Return the balloon module of a release; without `exact` a folder may be that of one kernel, whatever its name."""
    for place in places:
        for folder in [place / release] if exact else [place / release, place]:
            if (folder / _MODULE).exists():
                return folder / _MODULE
            for packed in sorted(folder.glob(f"{_MODULE}.*")):
                raise MissingFacility(f"{packed} is compressed, which the guest's insmod cannot read: decompress it")
    where = " or ".join(str(place) for place in places)
    raise MissingFacility(f"no {_MODULE.name} of Linux {release} under {where}: {todo}")
