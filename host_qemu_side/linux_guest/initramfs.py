"""The Linux guest's first file system, and what the packages it comes from are.

Builds an initramfs from Debian's packages (busybox, the balloon module of User-Mode Linux) and this package's own
``init.sh`` and ``guest_tool.c``. Starting the guest is the business of `host_qemu_side.linux_guest.launch`.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vring.errors import MissingFacility

__all__ = ["Entry", "PackageState", "build", "cpio", "find_busybox", "find_kernel", "find_module", "verify_package"]

_HERE = Path(__file__).resolve().parent
_PACKAGE = "user-mode-linux"
_MODULES = Path("/usr/lib/uml/modules")
_CFLAGS = ["-std=c11", "-O2", "-Wall", "-Wextra", "-static"]


@dataclass(frozen=True, slots=True)
class PackageState:
    """What ``dpkg`` says of the packaged guest kernel."""

    package: str
    """Name of the package."""
    version: str
    """Version of the package, as ``dpkg`` writes it."""
    release: str
    """Kernel release, the name of its module folder (``uname -r`` in the guest)."""
    clean: bool
    """Whether ``dpkg -V`` found every file of the package as it was shipped."""
    problems: tuple[str, ...]
    """The lines of ``dpkg -V``."""


def _run(*argv: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(argv, capture_output=True, text=True, env=env, check=False, stdin=subprocess.DEVNULL)


def _package_files() -> list[Path]:
    if shutil.which("dpkg") is None:
        return []
    done = _run("dpkg", "-L", _PACKAGE)
    return [Path(line) for line in done.stdout.splitlines()] if done.returncode == 0 else []


def find_kernel() -> Path:
    """Return the path of the User-Mode Linux executable.

    Raises
    ------
    MissingFacility
        If Debian's ``user-mode-linux`` is not installed.
    """
    found = shutil.which("linux.uml")
    if found is None:
        raise MissingFacility(f"no linux.uml on this machine: apt install {_PACKAGE}")
    return Path(found)


def find_module() -> Path:
    """Return the path of ``virtio_balloon.ko`` of the packaged guest kernel.

    Raises
    ------
    MissingFacility
        If it is not there, or if there are several kernels and dpkg does not say which is the packaged one.
    """
    listed = [path for path in _package_files() if path.name.startswith("virtio_balloon.ko") and path.exists()]
    found = listed or sorted(_MODULES.glob("*/kernel/drivers/virtio/virtio_balloon.ko*"))
    if not found:
        raise MissingFacility(f"no virtio_balloon.ko under {_MODULES}: apt install {_PACKAGE}")
    if len(found) > 1:
        raise MissingFacility(f"{len(found)} guest kernels under {_MODULES}, none known to dpkg: keep one")
    if found[0].suffix != ".ko":
        raise MissingFacility(f"{found[0]} is compressed, which the guest's insmod cannot read: decompress it")
    return found[0]


def find_busybox() -> Path:
    """Return the path of a statically linked busybox.

    Raises
    ------
    MissingFacility
        If there is none, or the one found is linked dynamically.
    """
    found = shutil.which("busybox") or ("/bin/busybox" if Path("/bin/busybox").exists() else None)
    if found is None:
        raise MissingFacility("no busybox on this machine: apt install busybox-static")
    path = Path(found)
    if b"/ld-linux" in path.read_bytes():
        raise MissingFacility(f"{path} is dynamically linked: apt install busybox-static")
    return path


def verify_package() -> PackageState:
    """Ask dpkg whether the guest kernel and its modules are as Debian shipped them.

    Returns
    -------
    PackageState
        Version, kernel release, and what ``dpkg -V`` had to say.

    Raises
    ------
    MissingFacility
        If dpkg or the package is missing.
    """
    if shutil.which("dpkg") is None:
        raise MissingFacility("no dpkg on this machine: the guest kernel's origin cannot be verified; use Debian")
    query = _run("dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", _PACKAGE)
    status, _, version = query.stdout.strip().partition(" ")
    if query.returncode != 0 or status != "installed":
        raise MissingFacility(f"package {_PACKAGE} is not installed: apt install {_PACKAGE}")
    check = _run("dpkg", "-V", _PACKAGE)
    problems = tuple((check.stdout + check.stderr).strip().splitlines())
    release = find_module().relative_to(_MODULES).parts[0]
    return PackageState(_PACKAGE, version, release, check.returncode == 0 and not problems, problems)


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


def _compile_tool(source: Path, target: Path) -> None:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise MissingFacility("no C compiler for the guest's tool: apt install gcc libc6-dev")
    done = _run(compiler, *_CFLAGS, "-o", str(target), str(source))
    if done.returncode != 0:
        raise MissingFacility(
            f"the guest's tool cannot be linked statically (apt install gcc libc6-dev): {done.stderr.strip()[-400:]}"
        )


def _replace(target: Path, data: bytes, mode: int) -> None:
    # Written aside and renamed, so that two builders at once both end with a whole file.
    fd, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    with os.fdopen(fd, "wb") as stream:
        stream.write(data)
    os.chmod(name, mode)
    os.replace(name, target)


def build(cache: Path, *, compress: bool = False) -> Path:
    """Build the guest's initramfs, or return the one built before from the same inputs.

    The archive is a function of its inputs alone: the same packages, sources and compiler give the same bytes.

    Parameters
    ----------
    cache
        Folder to keep it in, made if it is not there. Files in it are named by a hash of all inputs.
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
    """
    busybox, module = find_busybox().read_bytes(), find_module().read_bytes()
    source, init = _HERE / "guest_tool.c", (_HERE / "init.sh").read_bytes()
    cache.mkdir(parents=True, exist_ok=True)

    tool_key = hashlib.sha256("\0".join(_CFLAGS).encode() + source.read_bytes()).hexdigest()[:16]
    tool = cache / f"guest_tool-{tool_key}"
    if not tool.exists():
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            _compile_tool(source, Path(scratch) / "tool")
            _replace(tool, (Path(scratch) / "tool").read_bytes(), 0o755)

    entries = [Entry(name, 0o40755) for name in ("bin", "dev", "fill", "lib", "proc", "sys", "tmp")]
    entries += [
        Entry("dev/console", 0o20600, device=(5, 1)),
        Entry("dev/null", 0o20666, device=(1, 3)),
        Entry("bin/busybox", 0o100755, busybox),
        Entry("bin/guest_tool", 0o100755, tool.read_bytes()),
        Entry("lib/virtio_balloon.ko", 0o100644, module),
        Entry("init", 0o100755, init),
    ]
    archive = cpio(entries)
    key = hashlib.sha256(archive + bytes([compress])).hexdigest()[:16]
    target = cache / f"initramfs-{key}.cpio{'.gz' if compress else ''}"
    if not target.exists():
        _replace(target, gzip.compress(archive, 6, mtime=0) if compress else archive, 0o644)
    return target
