"""Where the scenes of `behind_qemu.py` are played: a guest on QEMU, a `serve` that is its balloon."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qemu_linux import DebianKernel, LinuxOnQemu
from serve_process import Process

MIB = 1 << 20
POISONING, POISON = "page_poison=1", 0xAAAAAAAA
"""Argument of a kernel that fills its free pages, and with what."""
NEAR = 24 * MIB
"""How far figures of free memory may be apart that are taken one after another."""

REPORTED = 6.0
"""Seconds after which a guest has reported what it freed: it does so every 2 s."""


class Wrong(Exception):
    """Something is not as it has to be."""


class Stage:
    """One guest, one `serve`, what is asked of them, and what was seen in the scene that is played."""

    def __init__(self, qemu: str, kernel: DebianKernel, cache: Path, arguments: str, seed: int) -> None:
        self._qemu, self._kernel, self._cache, self.arguments = qemu, kernel, cache, arguments
        self._temporary = tempfile.TemporaryDirectory(prefix="behind-qemu-")
        self.folder = Path(self._temporary.name)
        self.seed = seed
        self.seen: list[str] = []
        self.size = 0
        self.digest = ""
        self.serve = self.new_serve()
        self._guest: LinuxOnQemu | None = None

    def begin(self) -> None:
        """Begin a scene."""
        self.seen.clear()
        if self._guest is None:
            self.start()

    def new_serve(self) -> Process:
        return Process(self.folder, "--profile", "linux", "--features", "all", guest=False)

    def start(self) -> None:
        """Start QEMU and the balloon's driver in its guest."""
        self._guest = LinuxOnQemu(
            self._qemu, self._kernel, self.folder, self._cache, self.serve.socket, arguments=self.arguments
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
        self.guest.run("dd if=/dev/urandom of=/fill/keep bs=1M count=32 2>&1")
        self.digest = self.file()
        self.guest.load()
        self.until("the driver is there", lambda: self.device()["config"]["poison-val"] == self.poison)
        self.size = self.device()["front-end"]["memory"]

    @property
    def poison(self) -> int:
        return POISON if self.arguments == POISONING else 0

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
        return self.guest.balloon_pages(), *self.shown()

    def shown(self) -> tuple[int, int]:
        """Return what `serve` alone says of it."""
        return self.size - self.serve.ask("query-balloon")["actual"] >> 12, self.device()["balloon-pages"]

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

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Within the block, and for a little longer, QEMU has stopped."""
        self.guest.qmp.execute("stop")
        yield
        time.sleep(0.5)
        self.alive()
        self.guest.qmp.execute("cont")

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

    def file(self) -> str:
        """Return the digest of the guest's file, as it is now."""
        return self.guest.run("md5sum /fill/keep")

    def use_memory(self) -> None:
        """The guest fills its memory, frees it, lets it be reported, and fills it again; its file is as it was.

        What is left free keeps it from taking pages out of its balloon.
        """
        fill = "guest_tool churn --keep 0 --reserve 16M"
        self.guest.run(fill)
        time.sleep(REPORTED)
        self.guest.run(fill)
        if self.file() != self.digest:
            raise Wrong("a file in the guest's memory has changed")

    def empty(self) -> None:
        """Take the balloon away."""
        self.balloon(0)
        self.agree(0, "the balloon is empty")

    def end(self) -> None:
        """What has to be true after every scene."""
        self.use_memory()
        if bad := self.device()["bad-requests"]:
            raise Wrong(f"refused requests: {bad}")

    def trouble(self) -> list[str]:
        """Return the complaints of all kernels so far."""
        return [] if self._guest is None else self._guest.trouble()

    def close(self) -> None:
        """End both."""
        if self._guest is not None:
            self._guest.kill()
        with contextlib.suppress(Exception):
            self.serve.end()
        self._temporary.cleanup()
