"""Starts QEMU with a balloon, no guest kernel, and RAM that both map. Never outlives the process that started it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from typing import IO

from guest_driver.process import die_with_parent
from guest_driver.qemu.package import BINARIES, find_qemu
from guest_driver.qemu.qmp import QmpClient
from guest_driver.qemu.qtest import QtestClient
from vring.errors import PeerVanished, UsageError

__all__ = ["MAX_MEMORY", "QemuOptions", "QemuProcess"]

MAX_MEMORY = 2 << 30
"""More would be split around the hole below 4 GiB, elsewhere on each machine."""
ROM_BYTES = 64 << 10
LOOP = b"\xfa\xf4\xeb\xfd"  # cli; hlt; jmp to the hlt
RESET_VECTOR = 16  # bytes before the end of the ROM


@dataclass(frozen=True, slots=True)
class QemuOptions:
    """How to start QEMU."""

    memory: int = 1 << 30
    """Bytes of RAM, whole MiB."""
    transport: str = "mmio"
    """``mmio`` (machine microvm, accelerator qtest) or ``pci`` (machine q35, TCG with a CPU that sleeps)."""
    hint: bool = True
    reporting: bool = True
    deflate_on_oom: bool = True
    poison: bool = True
    indirect: bool = True
    event_idx: bool = True
    """Features to offer; STATS_VQ is always offered."""
    incoming: bool = False
    """Wait for a migration, and do not start the machine after it."""
    extra: tuple[str, ...] = ()
    """More arguments."""
    qemu: str = ""
    """Path of the program or its folder; empty for the usual one (see `find_qemu`)."""

    def __post_init__(self) -> None:
        if self.transport not in BINARIES:
            raise UsageError(f"no transport {self.transport!r}; there are {', '.join(BINARIES)}")
        if self.memory % (1 << 20) or not 16 << 20 <= self.memory <= MAX_MEMORY:
            raise UsageError(f"QEMU with {self.memory} bytes of RAM: whole MiB from 16M to 2G are supported")


def _on(value: bool) -> str:
    return "on" if value else "off"


class QemuProcess:
    """One QEMU with its two connections.

    Parameters
    ----------
    options
        What to start.
    ram
        Descriptor of the memory object that becomes its RAM; the caller keeps it.

    Raises
    ------
    UsageError, MissingFacility
        If what was named is not there, or it is not installed.
    PeerVanished
        If it ends at once; the message has what it said.
    """

    def __init__(self, options: QemuOptions, ram: int) -> None:
        self.options = options
        self.binary = find_qemu(options.transport, options.qemu)
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        with contextlib.ExitStack() as stack:
            mine, theirs = zip(*(socket.socketpair() for _ in range(2)), strict=True)
            for end in theirs:
                stack.enter_context(end)
            passed = [ram, *(end.fileno() for end in theirs)]
            arguments = self._arguments(ram, theirs[0].fileno(), theirs[1].fileno())
            if options.transport == "pci":
                rom = os.memfd_create("rom", os.MFD_CLOEXEC)
                stack.callback(os.close, rom)
                os.pwrite(rom, LOOP.rjust(ROM_BYTES - RESET_VECTOR + len(LOOP), b"\xf4").ljust(ROM_BYTES, b"\xf4"), 0)
                passed.append(rom)
                arguments += ["-bios", f"/proc/self/fd/{rom}"]
            self.process = subprocess.Popen(
                [self.binary.path, *arguments, *options.extra],
                pass_fds=passed,
                stdin=subprocess.DEVNULL,
                stdout=self._stderr,
                stderr=self._stderr,
                process_group=0,  # Ctrl-C is for us: we end it
                preexec_fn=die_with_parent,
            )
        try:
            self.qmp = QmpClient(mine[1])
            self.qtest = QtestClient(mine[0])
        except PeerVanished as error:
            for end in mine:
                end.close()
            said = self.close()
            raise PeerVanished(f"QEMU did not start: {said or error}") from error

    def _arguments(self, ram: int, qtest: int, qmp: int) -> list[str]:
        o = self.options
        machine = {
            "mmio": "microvm,memory-backend=mem,pit=off,pic=off,rtc=off,acpi=off,x-option-roms=off,isa-serial=off",
            "pci": "q35,memory-backend=mem,pit=off,hpet=off",
        }[o.transport]
        device = {"mmio": "virtio-balloon-device", "pci": "virtio-balloon-pci,addr=05.0,disable-legacy=on"}[o.transport]
        features = {
            "free-page-hint": o.hint,
            "free-page-reporting": o.reporting,
            "deflate-on-oom": o.deflate_on_oom,
            "page-poison": o.poison,
            "indirect_desc": o.indirect,
            "event_idx": o.event_idx,
        }
        mebibytes = o.memory >> 20
        arguments = ["-nodefaults", "-no-user-config", "-display", "none", "-m", f"{mebibytes}M"]
        arguments += [
            *("-object", f"memory-backend-file,id=mem,size={mebibytes}M,mem-path=/proc/self/fd/{ram},share=on"),
            *("-object", "iothread,id=io0"),
            *("-chardev", f"socket,id=qtc,fd={qtest}", "-object", "qtest,id=qt0,chardev=qtc,log=/dev/null"),
            *("-chardev", f"socket,id=qmpc,fd={qmp}", "-mon", "chardev=qmpc,mode=control"),
            *("-accel", "qtest" if o.transport == "mmio" else "tcg", "-machine", machine),
            *("-global", "virtio-mmio.force-legacy=false"),
            "-device",
            ",".join([device, "id=balloon0", "iothread=io0", *(f"{k}={_on(v)}" for k, v in features.items())]),
        ]
        if o.transport == "pci":
            arguments += ["-vga", "none"]
        if o.incoming:
            arguments += ["-S", "-incoming", "defer"]
        return arguments

    @property
    def pid(self) -> int:
        """Its process."""
        return self.process.pid

    def said(self) -> str:
        """Return what it wrote to its standard error so far."""
        self._stderr.seek(0)
        return self._stderr.read().decode(errors="replace").strip()

    def close(self, timeout: float = 2.0) -> str:
        """End it: ask, then kill. Return what it had to say."""
        if hasattr(self, "qmp"):
            if self.process.poll() is None:
                with contextlib.suppress(PeerVanished):
                    self.qmp.execute("quit")
            self.qmp.close()
        if hasattr(self, "qtest"):
            self.qtest.close()
        try:
            self.process.wait(timeout if hasattr(self, "qtest") else 0.2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        said = "" if self._stderr.closed else self.said()
        self._stderr.close()
        return said
