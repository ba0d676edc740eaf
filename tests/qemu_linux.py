"""A Debian kernel on QEMU whose balloon device is behind a vhost-user socket, for `behind_qemu.py`.

The guest's kernel talks on the first serial port, its shell takes commands on the second. Nothing here knows `serve`.
"""

from __future__ import annotations

import contextlib
import lzma
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from guest_driver.process import die_with_parent
from guest_driver.qemu.qmp import QmpClient
from host_qemu_side.linux_guest.console import Console
from host_qemu_side.linux_guest.initramfs import Entry, build_with
from vring.errors import MissingFacility, PeerVanished

MEMORY = 256 << 20
DEVICE = "vhost-user-test-device-pci"
BALLOON = f"{DEVICE},chardev=balloon,virtio-id=5,num_vqs=5,vq_size=128,config_size=16"
DRIVERS = ("virtio_pci", "virtio_balloon")
TTY_S1 = (4, 65)
START = b"#!/bin/busybox sh\nexec /init <>/dev/ttyS1 >&0 2>&1\n"
TROUBLE = re.compile(r".*(?:corruption|Bad page|BUG:|Oops:).*")
"""What its kernel says when somebody wrote to memory that was not his."""
T = TypeVar("T")


# -- kernels ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DebianKernel:
    """A kernel as its Debian packages have it."""

    image: Path
    release: str
    modules: dict[str, bytes]
    """Content by file name, those that others need first; what the kernel has built in is not there."""


def debian_kernel(folder: Path) -> DebianKernel:
    """Return the kernel whose packages were unpacked in a folder (``dpkg -x``)."""
    images = [*folder.glob("boot/vmlinuz-*"), *folder.glob("usr/lib/modules/*/vmlinuz")]
    files = {_module_name(path): path for path in folder.glob("**/kernel/drivers/**/*.ko*")}
    if len(images) != 1 or DRIVERS[-1] not in files:
        raise MissingFacility(
            f"{folder} has {len(images)} kernels and {'a' if DRIVERS[-1] in files else 'no'} module {DRIVERS[-1]}: "
            "unpack Debian's linux-image-*-amd64 (from 7.2 on linux-binary-* and linux-modules-*) into a folder of its "
            "own with dpkg -x; a cloud kernel does not poison pages"
        )
    modules: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in files and name not in modules:
            data = files[name].read_bytes()
            data = lzma.decompress(data) if files[name].suffix == ".xz" else data
            needs = re.search(rb"\0depends=([^\0]*)", data)
            for needed in needs.group(1).decode().split(",") if needs else ():
                add(needed.replace("-", "_"))
            modules[name] = data

    for name in DRIVERS:
        add(name)
    release = next(path for path in folder.glob("**/modules/*") if path.parent.parent.name == "lib").name
    return DebianKernel(images[0], release, {f"{name}.ko": data for name, data in modules.items()})


def _module_name(path: Path) -> str:
    return path.name.partition(".")[0].replace("-", "_")


# -- the guest --------------------------------------------------------------------------------------------------------


class LinuxOnQemu:
    """One QEMU with one guest; started at once, `boot` waits for it.

    `socket_path` is where its balloon listens. QEMU is not told to connect again: with ``reconnect-ms`` the 11.1.3 does
    not start with the device (it connects too late), and aborts when a back end comes back to one plugged in later.
    """

    def __init__(
        self,
        qemu: str,
        kernel: DebianKernel,
        folder: Path,
        cache: Path,
        socket_path: Path,
        *,
        arguments: str,
    ) -> None:
        self.kernel, self.log, self._errors = kernel, folder / "console", folder / "qemu"
        entries = [Entry(f"lib/{name}", 0o100644, data) for name, data in kernel.modules.items()]
        entries += [Entry("dev/ttyS1", 0o20600, device=TTY_S1), Entry("start", 0o100755, START)]
        mine, theirs = socket.socketpair()
        self.command_line = [
            *(qemu, "-nodefaults", "-no-user-config", "-display", "none"),
            *("-machine", "q35,memory-backend=ram", "-m", f"{MEMORY >> 20}M"),
            *("-object", f"memory-backend-memfd,id=ram,size={MEMORY >> 20}M,share=on"),
            *("-chardev", f"socket,id=balloon,path={socket_path}", "-device", BALLOON),
            *("-kernel", str(kernel.image), "-initrd", str(build_with(cache, entries, compress=True))),
            *("-append", f"console=ttyS0 rdinit=/start panic=1 {arguments}"),
            *("-chardev", f"file,id=log,path={self.log},append=on", "-serial", "chardev:log", "-serial", "stdio"),
            *("-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control"),
        ]
        with theirs, self._errors.open("ab") as errors:
            self.process = subprocess.Popen(
                self.command_line,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                pass_fds=[theirs.fileno()],
                process_group=0,
                preexec_fn=die_with_parent,
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._pipes = self.process.stdout, self.process.stdin
        self._console = Console(*(os.dup(pipe.fileno()) for pipe in self._pipes))
        self._memory = -1
        try:
            self.qmp = QmpClient(mine)
        except PeerVanished as error:
            self.kill()
            raise PeerVanished(f"QEMU ended: {self.how_it_ended()}") from error

    # -- the shell in it ----------------------------------------------------------------------------------------------

    def _wait(self, done: Callable[[], T | None], timeout: float, doing: str) -> T:
        end = time.monotonic() + timeout
        while (found := done()) is None:
            self._console.pump()
            if self.process.poll() is not None:
                raise PeerVanished(f"QEMU ended during {doing}: {self.how_it_ended()}")
            if time.monotonic() > end:
                raise PeerVanished(f"the guest did not answer in {timeout} s: {doing}; it said: {self.said()[-300:]!r}")
            time.sleep(0.02)
        return found

    def boot(self) -> None:
        """Wait until the guest's shell is there, and load what it needs but the balloon's driver."""
        self._wait(lambda: self._console.release, 120, "boot")
        self.run("dmesg -n 8")
        for name in list(self.kernel.modules)[:-1]:
            self.run(f"insmod /lib/{name}")

    def begin(self, command: str) -> None:
        """Run a command nobody hears the end of."""
        self._console.send(command)

    def reboot(self, how: Callable[[], object]) -> None:
        """Call `how`, which makes the guest boot again, and wait for that."""
        self._console.release = None
        how()
        self.boot()

    def run(self, command: str, timeout: float = 120.0) -> str:
        """Run a command; return its output."""
        tag = self._console.send(command)
        result = self._wait(lambda: self._console.result(tag), timeout, command)
        if result.code:
            raise PeerVanished(f"in the guest {command!r} failed with {result.code}: {result.output[-300:]}")
        return result.output.strip()

    def load(self) -> None:
        """Load the balloon's driver."""
        self.run(f"insmod /lib/{list(self.kernel.modules)[-1]}")

    def unload(self) -> None:
        """Unload it."""
        self.run(f"rmmod {DRIVERS[-1]}")

    def meminfo(self, field: str) -> int:
        """Return a line of the guest's /proc/meminfo, in bytes."""
        return int(self.run(f"grep ^{field}: /proc/meminfo").split()[1]) << 10

    def balloon_pages(self) -> int:
        """Return how many pages are in the balloon by the guest's own count."""
        counts = dict(line.split() for line in self.run("grep ^balloon_ /proc/vmstat").splitlines())
        return int(counts["balloon_inflate"]) - int(counts["balloon_deflate"])

    # -- from outside -------------------------------------------------------------------------------------------------

    def said(self) -> str:
        """Return all that the guest's kernel said."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def trouble(self) -> list[str]:
        """Return the lines in which its kernel complains."""
        return [line.strip() for line in TROUBLE.findall(self.said())]

    def held(self) -> int:
        """Return how many bytes of the host the guest's RAM takes."""
        if self._memory < 0:
            for name in os.listdir(f"/proc/{self.process.pid}/fd"):
                link = f"/proc/{self.process.pid}/fd/{name}"
                with contextlib.suppress(OSError):
                    if os.readlink(link).startswith("/memfd:") and os.stat(link).st_size == MEMORY:
                        self._memory = os.open(link, os.O_RDONLY | os.O_CLOEXEC)
                        break
        return os.fstat(self._memory).st_blocks * 512

    def how_it_ended(self) -> str:
        """Return QEMU's exit code and last words."""
        lines = [line for line in self._errors.read_text(errors="replace").splitlines() if "warning:" not in line]
        return f"exit code {self.process.poll()}, {' | '.join(lines)[-300:] or 'no words'}"

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()
        for pipe in self._pipes:
            pipe.close()
        self._console.close()
        if hasattr(self, "qmp"):
            self.qmp.close()
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1


def check_qemu(path: str) -> None:
    """See that a QEMU has the generic vhost-user device."""
    devices = subprocess.run([path, "-device", "help"], capture_output=True, text=True, timeout=60)
    if f'"{DEVICE}"' not in devices.stdout + devices.stderr:
        raise MissingFacility(f"{path} has no {DEVICE}: QEMU 11 has it (Debian sid: qemu-system-x86)")
