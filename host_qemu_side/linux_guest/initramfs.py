"""The Linux guest's first file system.

Builds an initramfs from Debian's busybox, the balloon module of the guest's kernel, and this package's own ``init.sh``
and ``guest_tool.c``. Which kernel that is says `host_qemu_side.linux_guest.kernel`.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from host_qemu_side.linux_guest.kernel import GuestKernel, find_kernel
from host_qemu_side.linux_guest.work_folder import compiled, kept
from vring.errors import MissingFacility
from vring.programs import APT_INSTALL

__all__ = ["Entry", "build", "build_with", "cpio", "find_busybox"]

_HERE = Path(__file__).resolve().parent


def find_busybox() -> Path:
    """Return the path of a statically linked busybox.

    Raises
    ------
    MissingFacility
        If there is none, or the one found is linked dynamically.
    """
    found = shutil.which("busybox") or ("/bin/busybox" if Path("/bin/busybox").exists() else None)
    if found is None:
        raise MissingFacility(f"no busybox on this machine: {APT_INSTALL} busybox-static")
    path = Path(found)
    if b"/ld-linux" in path.read_bytes():
        raise MissingFacility(f"{path} is dynamically linked: {APT_INSTALL} busybox-static")
    return path


# -- the archive ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in the archive: a file with content, a folder, or a character device."""

    name: str
    """Path without the leading slash."""
    mode: int
    """Type and permission bits, as in ``st_mode``."""
    data: bytes = b""
    """Content of a regular file."""
    device: tuple[int, int] = (0, 0)
    """Major and minor number of a device node."""


def cpio(entries: Iterable[Entry]) -> bytes:
    """Return a "newc" archive; equal entries give equal bytes (no times, owner 0)."""
    out = bytearray()
    for number, entry in enumerate([*entries, Entry("TRAILER!!!", 0)], start=1):
        name = entry.name.encode() + b"\0"
        # inode, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        fields = (number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        out += bytes(-len(out) % 4)
        out += entry.data
        out += bytes(-len(out) % 4)
    return bytes(out)


def build(cache: Path, kernel: GuestKernel | None = None, *, compress: bool = False) -> Path:
    """Build the guest's initramfs, or return the one built before from the same inputs.

    The archive is a function of its inputs alone: the same packages, sources and compiler give the same bytes.

    Parameters
    ----------
    cache
        Folder to keep it in, made if it is not there. Files in it are named by a hash of all inputs.
    kernel
        Whose balloon module it gets; by default that of `find_kernel`.
    compress
        Whether to gzip it; boots are a little slower, the file is half the size.

    Returns
    -------
    Path
        The archive, for the kernel's ``initrd=``.

    Raises
    ------
    MissingFacility
        If a package is missing; the message says which.
    UsageError
        If what lies in `cache` may be another user's.
    """
    module = (kernel or find_kernel()).module
    return build_with(cache, [Entry(f"lib/{module.name}", 0o100644, module.read_bytes())], compress=compress)


def build_with(cache: Path, more: Iterable[Entry], *, compress: bool = False) -> Path:
    """Do what `build` does for a kernel on any machine.

    Parameters
    ----------
    cache, compress
        As for `build`.
    more
        What that kernel needs beside busybox and this package's files, such as modules in ``lib``.
    """
    busybox, tool = find_busybox().read_bytes(), compiled(_HERE / "guest_tool.c", ["-static"], cache)

    entries = [Entry(name, 0o40755) for name in ("bin", "dev", "fill", "lib", "proc", "sys", "tmp")]
    entries += [
        Entry("dev/console", 0o20600, device=(5, 1)),
        Entry("dev/null", 0o20666, device=(1, 3)),
        Entry("bin/busybox", 0o100755, busybox),
        Entry("bin/guest_tool", 0o100755, tool),
        Entry("init", 0o100755, (_HERE / "init.sh").read_bytes()),
        *more,
    ]
    archive = cpio(entries)
    key = hashlib.sha256(archive + bytes([compress])).hexdigest()[:16]
    name = f"initramfs-{key}.cpio{'.gz' if compress else ''}"
    kept(cache, name, lambda: gzip.compress(archive, 6, mtime=0) if compress else archive)
    return cache / name
