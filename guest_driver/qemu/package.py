"""Which QEMU there is on this machine, of which package, and whether it is as shipped."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from vring.errors import MissingFacility, UsageError, quoted
from vring.programs import APT_INSTALL, origin_of, version_of

__all__ = ["BINARIES", "QEMU_ENVIRONMENT", "QemuBinary", "find_qemu"]

BINARIES = {"mmio": "qemu-system-x86_64-microvm", "pci": "qemu-system-x86_64"}
"""Program for each transport: the first has qtest built in as an accelerator and virtio-mmio slots."""
PACKAGE = "qemu-system-x86"
QEMU_ENVIRONMENT = "BALLOON_QEMU"
"""Environment variable that names a QEMU, or the folder that has it."""


@dataclass(frozen=True, slots=True)
class QemuBinary:
    """A QEMU program."""

    path: str
    """Where it is."""
    version: str
    """What it says of itself, first line."""
    package: str
    """Name and version of the Debian package it belongs to, empty if of none."""
    dpkg_verify_clean: bool | None
    """Whether ``dpkg -V`` found every file of that package as shipped; None without a package."""

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def find_qemu(transport: str, qemu: str = "") -> QemuBinary:
    """Return the QEMU for a transport, ``mmio`` or ``pci``.

    Parameters
    ----------
    transport
        Key of `BINARIES`.
    qemu
        Path of the program, or of the folder that has it under its usual name; by default what ``BALLOON_QEMU`` in the
        environment names, else what is found through the ``PATH``.

    Raises
    ------
    UsageError
        If what is named is not there.
    MissingFacility
        If it is not installed or does not start; the message names the package.
    """
    name = BINARIES[transport]
    named = qemu or os.environ.get(QEMU_ENVIRONMENT, "")
    if os.path.isdir(named):
        path = shutil.which(os.path.join(os.path.abspath(named), name))
    else:
        path = shutil.which(os.path.abspath(named) if named else name)
    if path is None and named:
        what = f"a folder without {name}" if os.path.isdir(named) else "no program that can be executed"
        raise UsageError(f"the QEMU that was named is {what}: {quoted(named)}")
    if path is None:
        raise MissingFacility(f"no {name} on this machine: {APT_INSTALL} {PACKAGE}")
    return _examined(os.path.abspath(path))


@cache
def _examined(path: str) -> QemuBinary:
    version, origin = version_of(path), origin_of(path)
    if "QEMU" not in version:
        raise MissingFacility(f"{path} is not QEMU: --version says {version[:100]!r}")
    return QemuBinary(path, version, origin.package, origin.clean)
