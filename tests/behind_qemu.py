"""Debian kernels on a QEMU of version 11 whose balloon is `balloon serve`: what front end and guest can do to it.

``./run behind-qemu KERNEL...``. Scenes are played one after another; at the end of each the guest has used all its
memory twice, and found no page changed. Not part of ``./run test``: Debian's stable releases have an older QEMU.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from qemu_linux import DebianKernel, LinuxOnQemu, check_qemu, debian_kernel
from qemu_stage import MIB, NEAR, POISONING, Stage, Wrong
from rich.console import Console as Terminal
from rich.table import Table

from balloon_cli.monitor_client import CommandFailed
from guest_driver.qemu.package import QEMU_ENVIRONMENT, find_qemu
from vring.errors import MissingFacility, UsageError, VirtioError

PAGES = 64 * MIB >> 12
"""Size of the balloon in most scenes."""
STATS = "/machine/peripheral/balloon0"


# -- scenes -----------------------------------------------------------------------------------------------------------


def inflate(s: Stage) -> None:
    """Inflate, deflate."""
    held = [s.guest.held()]
    for pages in (PAGES, PAGES // 2, 0):
        s.balloon(pages)
        s.agree(pages, "the balloon has its size")
        held.append(s.guest.held())
    s.note(f"{PAGES} pages; RAM on the host {' -> '.join(str(n >> 20) for n in held)} MiB")


def hints(s: Stage) -> None:
    """Two runs of hints; a run that is stopped."""
    s.hints()
    s.serve.ask("hint-start")
    s.serve.ask("hint-stop")
    s.serve.ask("hint-done")
    s.hints()


def stats(s: Stage) -> None:
    """Statistics, polled."""
    s.serve.ask("qom-set", path=STATS, property="guest-stats-polling-interval", value=1)
    for _ in range(2):
        last = _stats(s)["last-update"]
        s.until("fresh statistics", lambda last=last: _stats(s)["last-update"] > last)  # type: ignore[misc]
        told, is_so = _stats(s)["stats"], s.guest.meminfo("MemFree")
        if told["stat-total-memory"] != s.guest.meminfo("MemTotal") or abs(told["stat-free-memory"] - is_so) > NEAR:
            raise Wrong(f"statistics {told}, MemFree {is_so}")
    s.note(f"stat-free-memory {told['stat-free-memory'] >> 20} MiB, MemFree {is_so >> 20} MiB")


def _stats(s: Stage) -> dict[str, Any]:
    return s.serve.ask("qom-get", path=STATS, property="guest-stats")


def reporting(s: Stage) -> None:
    """Reported pages are dropped where the guest does not poison."""
    s.guest.run("dd if=/dev/zero of=/fill/more bs=1M count=100 2>&1")
    full = s.guest.held()
    s.guest.run("rm /fill/more")
    s.until("reported pages are given to the host", lambda: s.guest.held() < full - 50 * MIB)
    s.note(f"RAM on the host {full >> 20} -> {s.guest.held() >> 20} MiB")


def out_of_memory(s: Stage) -> None:
    """The guest takes pages out of its balloon when it runs out of memory."""
    s.balloon(2 * PAGES)
    s.agree(2 * PAGES, "the balloon has its size")
    s.guest.run("dd if=/dev/zero of=/fill/more bs=1M count=80 2>&1")
    s.note(f"balloon {2 * PAGES} -> {s.guest.balloon_pages()} pages")
    s.balloon(0)
    s.guest.run("rm /fill/more")
    s.agree(0, "the balloon is empty")


def stop_cont(s: Stage) -> None:
    """QEMU's stop and cont."""
    s.balloon(PAGES)
    s.agree(PAGES, "the balloon has its size")
    for _ in range(2):
        with s.stopped():
            shown = *s.shown(), s.serve.ask("query-balloon").get("rings")
        if shown != (PAGES, PAGES, "stopped"):
            raise Wrong(f"while it is stopped `serve` shows {shown}, not {PAGES} pages")
        s.agree(PAGES, "the balloon is what it was before the stop")
        s.use_memory()
    s.note(f"{PAGES} pages throughout")
    s.balloon(PAGES // 4)
    s.agree(PAGES // 4, "the balloon follows after cont")
    s.hints()


def change_while_stopped(s: Stage) -> None:
    """A new size and a run of hints while QEMU has stopped."""
    for pages in (PAGES, PAGES // 2):
        with s.stopped():
            s.balloon(pages)
        s.agree(pages, "the balloon has the size that was asked for while stopped")
    with s.stopped():
        try:
            s.serve.ask("hint-start")
        except CommandFailed:
            s.note("a run of hints is refused meanwhile")
        else:
            raise Wrong("a run of hints began that the guest cannot hear of")
    s.hints()


def hints_over_stop(s: Stage) -> None:
    """QEMU stops while the guest's pages are with the host, and while a run goes on."""
    before = s.guest.meminfo("MemFree")
    s.serve.ask("hint-start")
    for _ in range(2):
        with s.stopped():
            pass
        s.until("the guest ended its run of hints", lambda: s.serve.ask("query-hint")["ended-by"] == "guest")
    with s.stopped():
        s.serve.ask("hint-done")
    s.until("the guest has its hinted pages back", lambda: s.guest.meminfo("MemFree") > before - NEAR)
    s.hints()


def reload(s: Stage) -> None:
    """The driver is removed with a balloon, and comes back."""
    for _ in range(3):
        s.balloon(PAGES)
        s.agree(PAGES, "the balloon has its size")
        s.guest.unload()
        if pages := s.guest.balloon_pages():
            raise Wrong(f"the guest has {pages} pages in the balloon of a driver that is gone")
        s.guest.load()
        s.agree(PAGES, "the next driver inflates")
    s.note(f"{PAGES} pages again, three times")
    s.hints()


def change_while_unloaded(s: Stage) -> None:
    """A new size while there is no driver."""
    s.balloon(PAGES)
    s.agree(PAGES, "the balloon has its size")
    s.guest.unload()
    s.balloon(PAGES // 2)
    s.use_memory()
    s.guest.load()
    s.agree(PAGES // 2, "the next driver inflates to the size asked for meanwhile")
    s.note(f"{PAGES} -> {PAGES // 2} pages")


def _boots_again(how: Callable[[LinuxOnQemu], object]) -> Callable[[Stage], None]:
    def scene(s: Stage) -> None:
        s.balloon(PAGES)
        s.agree(PAGES, "the balloon has its size")
        s.serve.ask("hint-start")
        s.guest.reboot(lambda: how(s.guest))
        s.prepare()
        s.agree(PAGES, "the guest that boots again inflates")
        s.use_memory()
        s.balloon(0)
        s.agree(0, "the balloon is empty")
        with contextlib.suppress(CommandFailed):
            s.serve.ask("hint-done")
        s.hints()

    return scene


reboot = _boots_again(lambda guest: guest.begin("reboot -f"))
reset = _boots_again(lambda guest: guest.qmp.execute("system_reset"))
crash = _boots_again(lambda guest: guest.begin("echo c >/proc/sysrq-trigger"))
sysrq_reboot = _boots_again(lambda guest: guest.begin("echo b >/proc/sysrq-trigger"))


def at_random(s: Stage) -> None:
    """Forty of these things, in any order."""
    chance = random.Random(s.seed)
    s.note(f"--seed {s.seed}")
    s.seed += 1  # if it is played again
    pages, stopped, loaded = 0, False, True
    for _ in range(40):
        what = chance.choice(("size", "stop or cont", "driver", "reset", "hint-start", "hint-stop", "hint-done"))
        if what == "size":
            pages = chance.choice((0, PAGES // 4, PAGES // 2, PAGES))
            s.balloon(pages)
        elif what == "stop or cont":
            stopped = not stopped
            s.guest.qmp.execute("stop" if stopped else "cont")
        elif what.startswith("hint"):
            with contextlib.suppress(CommandFailed):
                s.serve.ask(what)
        elif what == "driver" and not stopped:
            loaded = not loaded
            (s.guest.load if loaded else s.guest.unload)()
        elif what == "reset" and not stopped and chance.random() < 0.2:
            s.guest.reboot(lambda: s.guest.qmp.execute("system_reset"))
            s.prepare()
            loaded = True
        s.alive()
        time.sleep(0.05 + chance.random() / 2)  # a config change that finds QEMU stopped ends it, whoever sends it
    if stopped:
        s.guest.qmp.execute("cont")
    if not loaded:
        s.guest.load()
    with contextlib.suppress(CommandFailed):
        s.serve.ask("hint-done")
    s.agree(pages, "in the end the balloon has the size asked for last")
    s.hints()


def another_qemu(s: Stage) -> None:
    """QEMU is killed, another one connects."""
    s.balloon(PAGES)
    s.agree(PAGES, "the balloon has its size")
    for _ in range(2):
        s.guest.kill()
        s.start()
        s.agree(PAGES, "the guest of the next QEMU inflates")
    s.hints()


def serve_gone(s: Stage) -> None:
    """`serve` is killed under a guest that lives: QEMU does not connect again, the guest goes on as it is."""
    s.balloon(PAGES)
    s.agree(PAGES, "the balloon has its size")
    s.serve.process.kill()
    s.serve.process.wait()
    s.guest.run("dd if=/dev/zero of=/fill/more bs=1M count=40 2>&1; rm /fill/more")
    kept, same = s.guest.balloon_pages(), s.file() == s.digest
    s.serve = s.new_serve()
    s.alive()
    if kept != PAGES or not same:
        raise Wrong(f"without its device the guest has {kept} pages in the balloon, its file is {same=}")
    s.note(f"the guest went on with {kept} pages in its balloon")
    s.guest.kill()
    s.start()
    s.hints()


SCENES: dict[str, Callable[[Stage], None]] = {
    "reporting": reporting,
    "inflate": inflate,
    "hints": hints,
    "stats": stats,
    "out-of-memory": out_of_memory,
    "stop-cont": stop_cont,
    "change-while-stopped": change_while_stopped,
    "hints-over-stop": hints_over_stop,
    "reload": reload,
    "change-while-unloaded": change_while_unloaded,
    "reboot": reboot,
    "reset": reset,
    "crash": crash,
    "sysrq-reboot": sysrq_reboot,
    "random": at_random,
    "another-qemu": another_qemu,
    "serve-gone": serve_gone,
}


def play(stage: Stage, name: str) -> list[str]:
    """Play a scene; return what was wrong."""
    wrong, before = [], len(stage.trouble())
    for step in (stage.begin, partial(SCENES[name], stage), stage.empty, stage.end):
        try:
            step()
        except (Wrong, VirtioError, OSError) as error:
            wrong.append(f"{type(error).__name__}: {error}")
            if not stage.size:  # it has not begun
                break
    if trouble := stage.trouble()[before:]:
        wrong.append(f"{len(trouble)} complaints of its kernel, first: {trouble[0]}")
    return wrong


def play_all(options: argparse.Namespace, kernel: DebianKernel, cache: Path) -> Iterator[tuple[str, ...]]:
    """Play scenes with a kernel; yield rows of the table."""
    with contextlib.ExitStack() as closing:
        stage: Stage | None = None
        for name in options.only or SCENES:
            began = time.monotonic()
            arguments = "" if name == "reporting" else POISONING
            if stage is None or stage.arguments != arguments:
                closing.close()
                stage = Stage(options.qemu, kernel, cache, arguments, options.seed)
                closing.callback(stage.close)
            wrong = play(stage, name)
            yield kernel.release, name, f"{time.monotonic() - began:.0f}", "; ".join(stage.seen), "; ".join(wrong)
            if wrong:
                if options.keep:
                    kept, no_sockets = Path(options.keep) / f"{kernel.release}-{name}", shutil.ignore_patterns("*.sock")
                    shutil.copytree(stage.folder, kept, ignore=no_sockets, dirs_exist_ok=True)
                closing.close()
                stage = None


def main() -> int:
    parser = argparse.ArgumentParser(prog="./run behind-qemu", description=__doc__.partition("\n")[0])
    parser.add_argument("kernels", nargs="+", metavar="KERNEL", help="folder where a Debian kernel was unpacked")
    parser.add_argument("--qemu", default="", help=f"the program, or its folder; default: ${QEMU_ENVIRONMENT}, PATH")
    parser.add_argument("--only", action="append", choices=SCENES, help="play this scene; may be repeated")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="of the scene random")
    parser.add_argument("--keep", metavar="FOLDER", help="keep the logs of scenes that went wrong")
    options = parser.parse_args()
    try:
        qemu = find_qemu("pci", options.qemu)
        check_qemu(qemu.path)
        kernels = [debian_kernel(Path(folder)) for folder in options.kernels]
    except (MissingFacility, UsageError) as error:
        print(f"behind-qemu: {error}", file=sys.stderr)
        return 3 if isinstance(error, MissingFacility) else 2
    options.qemu = qemu.path
    terminal = Terminal(width=None if sys.stdout.isatty() else 120)
    table = Table("kernel", "scene", "s", "seen", "verdict", title=qemu.version)
    failed = 0
    with tempfile.TemporaryDirectory() as cache:
        for kernel in kernels:
            for *row, wrong in play_all(options, kernel, Path(cache)):
                failed += bool(wrong)
                print(*row, wrong or "good", sep=" | ", file=sys.stderr, flush=True)
                table.add_row(*row, wrong or "good")
    terminal.print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
