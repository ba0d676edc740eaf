"""The unmodified Linux guest: boots, obeys, freezes, and never outlives its host."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cli_support import descendants
from shared import Shared

from balloon_dev.device import BalloonDevice
from balloon_dev.profiles import LINUX
from host_qemu_side.linux_guest import LinuxGuest, initramfs, kernel, tags
from host_qemu_side.linux_guest.console import Console
from host_qemu_side.linux_guest.mconsole import Request
from host_qemu_side.loop import Loop
from host_qemu_side.vhost_user import VhostUserBackend
from vring.dirty import DirtyLogVoid
from vring.dirty.cachestat import CachestatLog
from vring.errors import MissingFacility, PeerVanished, UsageError, VirtioError
from vring.memory import GuestMemory, Region
from vring.pages import PageSet

MIB = 1 << 20
uml = pytest.mark.uml


def gone(pids: list[int], patience: float = 10.0) -> bool:
    """Whether all these processes end within that time (a zombie has ended)."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if not any(lives(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def lives(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("initramfs")


def check(guest: LinuxGuest) -> None:
    """It takes commands and does what it is told."""
    assert not guest.frozen
    assert guest.run("echo sound", 5.0).output == "sound\n"


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Shared[LinuxGuest]]:
    @contextlib.contextmanager
    def boot() -> Iterator[LinuxGuest]:
        try:
            guest = LinuxGuest(256 * MIB, tmp_path_factory.mktemp("guest"), cache=cache)
        except MissingFacility as missing:
            pytest.skip(str(missing))
        with guest:
            began = time.monotonic()
            guest.wait_ready()
            assert time.monotonic() - began < 20
            yield guest

    with Shared(boot, check) as shared:
        yield shared


@pytest.fixture
def guest(guests: Shared[LinuxGuest]) -> Iterator[LinuxGuest]:
    """The shared guest; whatever becomes of the test, what it started and wrote there is gone afterwards."""
    guest = guests.get()
    yield guest
    with contextlib.suppress(VirtioError):  # then the next test gets another guest
        guest.run("killall guest_tool; rm -rf /fill/*", check=False)


@pytest.fixture
def fresh(tmp_path: Path, cache: Path) -> Iterator[LinuxGuest]:
    try:
        guest = LinuxGuest(128 * MIB, tmp_path / "work", cache=cache)
    except MissingFacility as missing:
        pytest.skip(str(missing))
    with guest:
        guest.wait_ready()
        yield guest


@contextlib.contextmanager
def frozen(guest: LinuxGuest) -> Iterator[None]:
    """Whatever becomes of a test, the guest it shares with others goes on."""
    guest.freeze()
    try:
        yield
    finally:
        guest.thaw()


# -- what needs no guest ---------------------------------------------------------------------------------------------


def test_the_archive_depends_on_its_content_alone() -> None:
    entries = [initramfs.Entry("bin", 0o40755), initramfs.Entry("bin/x", 0o100755, b"four!")]
    archive = initramfs.cpio(entries)
    assert archive == initramfs.cpio(entries)
    assert archive != initramfs.cpio(entries[:1])
    assert len(archive) % 4 == 0
    assert archive.startswith(b"070701")


@pytest.mark.parametrize("size", [0, 32 * MIB, 64 * MIB + 4096])
def test_impossible_sizes(tmp_path: Path, size: int) -> None:
    with pytest.raises(UsageError, match="64 MiB"):
        LinuxGuest(size, tmp_path)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in (kernel.KERNEL_ENVIRONMENT, kernel.MODULES_ENVIRONMENT):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(Path, "exists", lambda self: False)
    for find in (kernel.find_kernel, initramfs.find_busybox):
        with pytest.raises(MissingFacility, match="apt install"):
            find()


def pipes() -> tuple[Console, int, int]:
    from_guest, guest_out = os.pipe()
    guest_in, to_guest = os.pipe()
    return Console(from_guest, to_guest), guest_out, guest_in


def test_console_tells_answers_from_noise() -> None:
    console, out, into = pipes()
    os.write(out, b"Linux version\n\x1eR 6.1.0\nnoise")
    console.pump()
    assert console.release == "6.1.0"
    first, second = console.send("one"), console.send("two")
    assert os.read(into, 100) == f"{first} one\n{second} two\n".encode()
    os.write(out, f"\n\x1eB {first}\nsome\n\x1eE zz 0\n\x1e".encode())
    console.pump()
    assert console.result(first) is None
    text = f"junk\x1eE {first}\n\n\x1eE {first} 3\nkernel message\n\x1eB {second}\n\n\x1eE {second} 0\n"
    for byte in text.encode():
        os.write(out, bytes([byte]))
        console.pump()
    answer = console.result(first)
    assert answer is not None
    assert (answer.code, answer.command) == (3, "one")
    assert answer.output == f"some\n\x1eE zz 0\n\x1ejunk\x1eE {first}\n"
    empty = console.result(second)
    assert empty is not None
    assert (empty.code, empty.output) == (0, "")
    assert console.result(second) is None
    os.close(out)
    console.pump()
    assert console.closed
    with pytest.raises(PeerVanished, match="kernel message"):
        console.send("three")
    with pytest.raises(UsageError, match="one line"):
        console.send("two\nlines")
    os.close(into)
    console.close()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            'Linux version 6.1.176\nCouldn\'t stat "/nope" : err = 2\nFailed to initialize ubd device 0 :x\nBtrfs\n'
            "registered\n\nRun /init as init process\nuserspace - ptrace set fp regs failed, errno = 14\n"
            "Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b\nCPU: 0 PID: 1 Comm: x\nStack:\n"
            " 606944ba 607e7fcd 60c33b90 6067bb96\nCall Trace:\n [<606944ba>] ? _printk+0x0/0x94\n"
            " [<6002d37a>] show_stack+0x184/0x193\n",
            'Couldn\'t stat "/nope" : err = 2 | registered | Run /init as init process | '
            "userspace - ptrace set fp regs failed, errno = 14 | "
            "Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b",
        ),
        ("a\nb failed\nc\nd\ne\nf\ng\nh\n", "b failed | c | d | e | f | g | h"),
        ("only\n\x1eR 6.1\n", "only | R 6.1"),
        ("", "(none)"),
    ],
)
def test_last_words_have_what_decided(said: str, told: str) -> None:
    """A panic says that the first program ended; what it ended of stands before it."""
    console, out, into = pipes()
    os.write(out, said.encode())
    console.pump()
    assert console.last_words() == told
    for fd in (out, into):
        os.close(fd)
    console.close()


def test_console_does_not_block_on_a_guest_that_does_not_read() -> None:
    console, out, into = pipes()
    for _ in range(100):
        console.send("x" * 4000)
    assert not console.pump()
    os.close(out)
    os.close(into)
    console.pump()
    console.close()


def test_management_console_without_a_guest(tmp_path: Path) -> None:
    with pytest.raises(PeerVanished, match="not there"):
        Request(tmp_path / "mconsole", "version")
    with pytest.raises(UsageError):
        Request(tmp_path / "mconsole", "x" * 512)


# -- with the guest --------------------------------------------------------------------------------------------------


@uml
def test_the_package_is_what_debian_ships(guest: LinuxGuest) -> None:
    origin = guest.kernel.origin()
    if kernel.KERNEL_ENVIRONMENT in os.environ:  # somebody's own, of which dpkg may know nothing
        assert origin.clean is not False, origin.problems
    else:
        assert origin.package.startswith("user-mode-linux ")
        assert origin.clean is True, origin.problems
    assert guest.run("uname -r").output.strip() == guest.kernel.release == guest.wait_ready()


@uml
def test_commands(guest: LinuxGuest) -> None:
    assert guest.run("echo out; echo err >&2; exit 3", check=False).code == 3
    assert guest.run("echo out; echo err >&2").output == "out\nerr\n"
    assert guest.run("printf 'no newline'").output == "no newline"
    assert guest.run("cat").output == ""
    assert len(guest.run("seq 20000").output.split()) == 20000
    with pytest.raises(UsageError, match="code 1"):
        guest.run("false")
    meminfo = guest.meminfo()
    assert 220 * MIB < meminfo["MemTotal"] < 256 * MIB


@uml
def test_waiting_serves_the_caller(guest: LinuxGuest) -> None:
    calls = []
    guest.run("sleep 0.3", serve=lambda: calls.append(time.monotonic()))
    assert len(calls) > 20
    assert max(after - before for before, after in itertools.pairwise(calls)) < 0.2
    with pytest.raises(PeerVanished, match=r"no answer to command 'sleep 1' in 0.2 s"):
        guest.run("sleep 1", timeout=0.2)
    assert guest.run("echo again").output == "again\n"


@uml
def test_freeze_and_thaw(guest: LinuxGuest) -> None:
    guest.tool("writer --pages 64 --rate 2000 --seed 5")
    fd = guest.ram_fd()
    assert os.fstat(fd).st_size >= 256 * MIB
    memory = np.memmap(f"/proc/self/fd/{fd}", dtype=np.uint8, mode="r")
    os.close(fd)
    with frozen(guest):
        guest.freeze()
        assert guest.frozen
        assert guest.alive()
        before = np.array(memory)
        time.sleep(0.3)
        assert np.array_equal(before, memory)
        with pytest.raises(UsageError, match="frozen"):
            guest.run("true")
        guest.thaw()
    time.sleep(0.3)
    assert not np.array_equal(before, memory)


@uml
@pytest.mark.parametrize(
    "hurt",
    [
        lambda guest: os.kill(guest.pid, signal.SIGKILL),
        lambda guest: guest.kill(),
        lambda guest: guest.freeze(),
        lambda guest: os.kill(guest.pid, signal.SIGSTOP),
        lambda guest: guest.run("sleep 1000", timeout=0.1),
        lambda guest: guest.run("echo c >/proc/sysrq-trigger; sleep 5"),
    ],
    ids=["kernel killed", "ended", "frozen", "stopped", "busy", "panic"],
)
def test_who_hurts_the_shared_guest_hurts_nobody_else(
    guests: Shared[LinuxGuest], hurt: Callable[[LinuxGuest], object]
) -> None:
    victim = guests.get()
    pids = victim.processes()
    assert victim.pid in pids
    with contextlib.suppress(PeerVanished):
        hurt(victim)
    other = guests.get()
    assert other is not victim
    check(other)
    assert not any(lives(pid) for pid in pids)


@uml
def test_a_frozen_guest_is_stopped_and_not_only_about_to_wait(guest: LinuxGuest) -> None:
    """Its kernel answers before it has stored its last word, and its timer's signals come later still."""
    assert guest.pid is not None
    for _ in range(10):
        with frozen(guest):
            for task in Path(f"/proc/{guest.pid}/task").iterdir():
                assert (task / "stat").read_text().rpartition(")")[2].split()[0] in "Tt"
            assert guest.alive()
        assert guest.run("echo here").output == "here\n"


@pytest.fixture
def with_device(tmp_path: Path, cache: Path) -> Iterator[tuple[LinuxGuest, BalloonDevice, Loop]]:
    loop = Loop()
    profile = dataclasses.replace(LINUX, queue_sizes=(256,) * 5)
    device = BalloonDevice(profile=profile)
    backend = VhostUserBackend(device, loop)
    try:
        guest = LinuxGuest(128 * MIB, tmp_path / "work", tmp_path / "s", cache=cache)
    except MissingFacility as missing:
        pytest.skip(str(missing))
    backend.listen(str(tmp_path / "s"))
    with guest:
        guest.wait_ready(serve=loop.run_once)
        yield guest, device, loop
    backend.close()
    loop.close()


@uml
@pytest.mark.parametrize("again", [True, False], ids=["frozen at the second try", "given up"])
def test_freezing_waits_until_the_device_has_answered(
    with_device: tuple[LinuxGuest, BalloonDevice, Loop], again: bool
) -> None:
    guest, device, loop = with_device
    with pytest.raises(PeerVanished, match="insmod"):
        guest.run("insmod /lib/virtio_balloon.ko", timeout=0.3)  # nobody answers the driver's first request
    with pytest.raises(PeerVanished, match=r"'stop' in 0\.3 s"):
        guest.freeze(timeout=0.3)
    assert not guest.frozen
    if again:
        guest.freeze(serve=loop.run_once)
        assert guest.alive(serve=loop.run_once)
        guest.thaw(serve=loop.run_once)
    assert "virtio_balloon" in guest.run("lsmod", serve=loop.run_once).output
    assert device.negotiated
    guest.unload_balloon(serve=loop.run_once)


@uml
def test_churn_fills_and_frees(guest: LinuxGuest) -> None:
    found = guest.tool("churn --keep 10 --extent 8M --seed 3")
    assert found["filled"] > 0.85 * found["total"]
    assert found["free_now"] > 0.7 * found["total"]
    assert guest.tool("churn --keep 10 --extent 8M --seed 4")["free_now"] > 0.6 * found["total"]
    fd = guest.ram_fd()
    pages = np.memmap(f"/proc/self/fd/{fd}", dtype=np.uint64, mode="r").reshape(-1, 512)[: 256 * MIB // 4096]
    os.close(fd)
    with frozen(guest):
        # What it filled and freed is junk now, not zeros; and the rest of it the guest uses itself.
        used = (pages.any(axis=1)).sum() * 4096
    assert used > max(found["filled"], 0.95 * (found["total"] - found["free_when_full"]))


@uml
def test_tagged_pages_are_all_found_at_any_instant(guest: LinuxGuest) -> None:
    guest.tool("tagger --pages 2000 --rate 100000 --nonce 21")
    fd = guest.ram_fd()
    updates = []
    for _ in range(5):
        with frozen(guest):
            report = tags.scan(fd, 21)
            image = np.fromfile(f"/proc/self/fd/{fd}", dtype=np.uint8)
        assert report.ok, report.summary()
        assert report.count == report.found == 2000
        updates.append(report.updates)
        time.sleep(0.1)
    assert updates == sorted(updates)
    assert updates[-1] > updates[0] + 2000
    with frozen(guest):
        later = np.fromfile(f"/proc/self/fd/{fd}", dtype=np.uint8)
    os.close(fd)
    found = tags.compare(later, image, 21)
    assert found.source.ok
    assert found.destination is not None
    assert found.destination.ok  # it is sound, only older
    assert not found.ok


@uml
def test_the_cachestat_log_misses_nothing_the_guest_writes(guest: LinuxGuest) -> None:
    guest.tool("churn --keep 20 --seed 9")
    guest.tool("writer --pages 500 --rate 3000 --seed 1")
    guest.tool("writer --pages 500 --rate 3000 --seed 2 --same")
    fd = guest.ram_fd()
    with GuestMemory.from_fds([Region(0, 256 * MIB, fd)]) as memory:
        os.close(fd)
        log = CachestatLog(memory)
        pages = memory.arrays[0].reshape(-1, 4096)
        with frozen(guest):
            try:
                log.start()
            except MissingFacility as missing:
                pytest.skip(str(missing))
            for told in (False, False, True, True):
                before = np.array(pages)
                if told:
                    log.note_sent(np.arange(memory.page_span, dtype=np.uint64), before)
                guest.thaw()
                time.sleep(0.2)
                guest.freeze()
                into = PageSet(memory.page_layout)
                with contextlib.suppress(DirtyLogVoid):
                    log.sync(into)
                seen = into.to_bools()
                changed = (before != pages).any(axis=1)
                assert changed.sum() > 100
                assert not (changed & ~seen).any()
                # The page cache knows whole folios, of any size; what was sent tells which of their pages to leave out.
                assert not told or seen.sum() < 4000
        log.stop()
        del pages


# -- the end ---------------------------------------------------------------------------------------------------------


@uml
def test_kill_leaves_nothing(fresh: LinuxGuest) -> None:
    pids = fresh.processes()
    assert set(pids) == {pids[0], *descendants(pids[0])}
    assert fresh.pid in pids
    assert len(pids) > 2  # the keeper, the kernel, and at least its first program
    fresh.freeze()
    fresh.kill()
    fresh.kill()
    assert not any(lives(pid) for pid in pids)
    assert not any(fresh.workdir.iterdir())
    assert not fresh.alive()
    with pytest.raises(PeerVanished, match="killed by the host"):
        fresh.run("true")


@uml
def test_a_guest_that_halts_leaves_nothing(fresh: LinuxGuest) -> None:
    pids = fresh.processes()
    with pytest.raises(PeerVanished, match="gone during command"):
        fresh.run("poweroff -f")
    assert gone(pids)
    assert not any(fresh.workdir.iterdir())
    assert not fresh.alive()


@uml
def test_a_panic_is_told_with_the_guests_last_words(fresh: LinuxGuest) -> None:
    with pytest.raises(PeerVanished, match="panic"):
        fresh.run("echo c >/proc/sysrq-trigger; sleep 5")


@uml
def test_a_boot_that_fails_is_told_with_what_decided(tmp_path: Path, cache: Path) -> None:
    says = r"gone during boot: .*/nope.*Kernel panic"
    with (
        LinuxGuest(128 * MIB, tmp_path / "work", cache=cache, kernel_args=["initrd=/nope"]) as guest,
        pytest.raises(PeerVanished, match=says) as caught,
    ):
        guest.wait_ready(60.0)
    assert "[<" not in str(caught.value)


@uml
def test_without_its_keeper_kill_still_ends_the_helpers(fresh: LinuxGuest) -> None:
    pids = fresh.processes()
    os.kill(pids[0], signal.SIGKILL)
    assert gone(pids[:2])
    assert not fresh.alive()
    fresh.kill()
    assert gone(pids)
    assert not any(fresh.workdir.iterdir())


HOST = """
import os, signal, sys, time
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from balloon_dev.device import BalloonDevice
from balloon_dev.profiles import LINUX
from host_qemu_side.linux_guest import LinuxGuest
guest = LinuxGuest(128 << 20, sys.argv[1], cache=Path(sys.argv[2]))
guest.start()
if os.environ.get("WHEN") == "booted":
    guest.wait_ready()
else:
    while guest.pid is None:
        guest.pump()
spare = 0
if os.environ.get("FORK"):  # a child that never execs holds all descriptors open
    spare = os.fork()
    if not spare:
        time.sleep(60)
        os._exit(0)
print(spare, *guest.processes(), flush=True)
time.sleep(60)
"""


@uml
@pytest.mark.parametrize(("when", "fork"), [("booting", ""), ("booted", ""), ("booted", "yes")])
def test_a_host_killed_at_once_leaves_nothing(
    guest: LinuxGuest, tmp_path: Path, cache: Path, when: str, fork: str
) -> None:
    work = tmp_path / "work"
    host = subprocess.Popen(
        [sys.executable, "-c", HOST, str(work), str(cache), *sys.path],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "WHEN": when, "FORK": fork},
    )
    assert host.stdout is not None
    spare, *pids = map(int, host.stdout.readline().split())
    try:
        assert len(pids) >= 2
        host.kill()
        host.wait()
        assert gone(pids)
        deadline = time.monotonic() + 5
        while any(work.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(work.iterdir())
    finally:
        host.stdout.close()
        if spare:
            os.kill(spare, signal.SIGKILL)
