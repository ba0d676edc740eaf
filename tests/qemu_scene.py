"""One scene of `behind_qemu.py`: a guest on QEMU, a `serve` that is its balloon, and what can be asked of both."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qemu_linux import DebianKernel, LinuxOnQemu
from serve_process import Process

MIB = 1 << 20
POISON = 0xAAAAAAAA
NEAR = 24 * MIB
"""How far figures of free memory may be apart that are taken one after another."""


class Wrong(Exception):
    """Something is not as it has to be."""


class Scene:
    """One guest, one `serve`, and what was seen."""

    def __init__(self, options: argparse.Namespace, kernel: DebianKernel, folder: Path, arguments: str) -> None:
        self.options, self.kernel, self.folder, self.arguments = options, kernel, folder, arguments
        self.seen: list[str] = []
        self.size = 0
        self.digest = ""
        self.serve = self.new_serve()
        self._guest: LinuxOnQemu | None = None

    def new_serve(self) -> Process:
        return Process(self.folder, "--profile", "linux", "--features", "all", guest=False)

    def start(self, reconnect: int = 0) -> None:
        """Start QEMU and the balloon's driver in its guest."""
        self._guest = LinuxOnQemu(
            self.options.qemu,
            self.kernel,
            self.folder,
            Path(self.options.cache),
            self.serve.socket,
            arguments=self.arguments,
            reconnect=reconnect,
        )
        self.guest.boot()
        self.prepare()

    @property
    def guest(self) -> LinuxOnQemu:
        if self._guest is None:
            raise Wrong("no guest was started")
        return self._guest

    def prepare(self) -> None:
        """After a boot: load the driver, and write a file that has to stay as it is."""
        self.digest = self.guest.run("dd if=/dev/urandom of=/fill/keep bs=1M count=32 2>&1; md5sum /fill/keep")
        self.digest = self.digest.splitlines()[-1]
        self.guest.load()
        self.until("the driver is there", lambda: self.device()["config"]["poison-val"] == self.poison)
        self.size = self.device()["front-end"]["memory"]

    @property
    def poison(self) -> int:
        return POISON if "page_poison=1" in self.arguments else 0

    def device(self) -> dict[str, Any]:
        return self.serve.ask("query-device")

    def note(self, text: str) -> None:
        self.seen.append(text)

    def until(self, what: str, true: Callable[[], object], timeout: float = 30.0) -> None:
        end = time.monotonic() + timeout
        while not true():
            if time.monotonic() > end:
                raise Wrong(f"never happened: {what}")
            self.alive()
            time.sleep(0.1)

    def alive(self) -> None:
        if self.guest.process.poll() is not None:
            raise Wrong(f"QEMU ended: {self.guest.how_it_ended()}")
        if self.serve.process.poll() is not None:
            raise Wrong(f"`balloon serve` ended with {self.serve.process.returncode}")

    # -- figures ------------------------------------------------------------------------------------------------------

    def balloon(self, pages: int) -> None:
        self.serve.ask("balloon", value=self.size - (pages << 12))

    def figures(self) -> tuple[int, int, int]:
        """Return the size of the balloon by the guest's kernel, by its word to the device, by the device's record."""
        told = self.size - self.serve.ask("query-balloon")["actual"] >> 12
        return self.guest.balloon_pages(), told, self.device()["balloon-pages"]

    def agree(self, pages: int, what: str) -> None:
        figures: tuple[int, ...] = ()

        def same() -> bool:
            nonlocal figures
            figures = self.figures()
            return set(figures) == {pages}

        try:
            self.until(what, same)
        except Wrong as error:
            raise Wrong(f"{error}: {pages} pages wanted; guest, query-balloon, record: {figures}") from error

    def hints(self) -> None:
        """A run of hints: the guest gives its free memory away and gets it back."""
        before = self.guest.meminfo("MemFree")
        self.serve.ask("hint-start")
        self.until("the guest ended its run of hints", lambda: self.serve.ask("query-hint")["ended-by"] == "guest")
        during, blocks = self.guest.meminfo("MemFree"), self.serve.ask("query-hint")["blocks"]
        self.serve.ask("hint-done")
        self.until("the guest has its hinted pages back", lambda: self.guest.meminfo("MemFree") > before - NEAR)
        after = self.guest.meminfo("MemFree")
        self.note(f"{blocks} blocks, MemFree {before >> 20} -> {during >> 20} -> {after >> 20} MiB")
        if not blocks or abs(before - during - blocks * 4 * MIB) > NEAR:
            raise Wrong("blocks and MemFree do not agree")

    def use_memory(self) -> None:
        """The guest fills its memory, frees it, lets it be reported, and fills it again; its file is as it was."""
        for _ in range(2):
            self.guest.run("guest_tool churn --keep 0")
            time.sleep(3)
        if self.guest.run("md5sum /fill/keep") != self.digest:
            raise Wrong("a file in the guest's memory has changed")

    def end(self) -> None:
        """What has to be true after every scene."""
        self.use_memory()
        self.alive()
        if bad := {request["what"]: request["count"] for request in self.device()["bad-requests"]}:
            self.note(f"refused: {bad}")

    def close(self) -> list[str]:
        """End both; return the complaints of the guest's kernel."""
        trouble: list[str] = []
        if self._guest is not None:
            self._guest.kill()
            trouble = self._guest.trouble()
        with contextlib.suppress(Exception):
            self.serve.end()
        return trouble
