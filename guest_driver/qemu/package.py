"""Which QEMU there is on this machine, of which package, and whether it is as shipped."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from vring.errors import MissingFacility

__all__ = ["BINARIES", "QemuBinary", "find_qemu"]

BINARIES = {"mmio": "qemu-system-x86_64-microvm", "pci": "qemu-system-x86_64"}
"""Program for each transport: the first has qtest built in as an accelerator and virtio-mmio slots."""
PACKAGE = "qemu-system-x86"


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


def _output(*command: str) -> tuple[int, str]:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL, check=False, timeout=60
        )
    except OSError:
        return 127, ""
    return done.returncode, done.stdout.strip()


@cache
def find_qemu(transport: str) -> QemuBinary:
    """Return the QEMU for a transport, ``mmio`` or ``pci``.

    Raises
    ------
    MissingFacility
        If it is not installed or does not start; the message names the package.
    """
    name = BINARIES[transport]
    path = shutil.which(name)
    if path is None:
        raise MissingFacility(f"no {name} on this machine: apt install {PACKAGE}")
    code, version = _output(path, "--version")
    if code or not version:
        raise MissingFacility(f"{path} does not start: apt install --reinstall {PACKAGE}")
    code, owner = _output("dpkg", "-S", os.path.realpath(path))
    package, clean = "", None
    if code == 0:
        package = owner.partition(":")[0]
        clean = _output("dpkg", "-V", package) == (0, "")
        package = f"{package} {_output('dpkg-query', '-W', '-f', '${Version}', package)[1]}"
    return QemuBinary(path, version.splitlines()[0], package, clean)
