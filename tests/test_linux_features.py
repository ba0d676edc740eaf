"""Every feature of the balloon with an unmodified Linux kernel: what the guest says, what the host has, what is left.

One guest for most of it; the device is replaced through sysfs where other features are wanted.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest
from linux_pair import ALL, BLOCK, MIB, PAGE, LinuxPair, kernel_complains, linux_pair
from shared import Shared

from balloon_dev.config import POISON_VAL
from balloon_dev.features import BalloonFeature, QueueRole
from balloon_dev.hinting import HintState

pytestmark = [pytest.mark.uml, pytest.mark.slow]

F = BalloonFeature
QUIET = ALL & ~F.REPORTING
"""Without reporting, so that memory the guest has freed stays with it until the balloon takes it."""
SLACK = 6 * MIB
"""What a running guest may need by itself from one look to the next."""


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared[LinuxPair]]:
    @contextlib.contextmanager
    def boot() -> Iterator[LinuxPair]:
        with linux_pair(tmp_path_factory.mktemp("linux"), features=QUIET) as pair:
            pair.start_tagger()
            yield pair

    with Shared(boot, LinuxPair.settle) as shared:
        yield shared


@pytest.fixture
def pair(guests: Shared[LinuxPair], request: pytest.FixtureRequest) -> Iterator[LinuxPair]:
    """The shared guest, with the features a test asks for; afterwards it is as before and nothing was wrong."""
    booted = guests.get()
    features = getattr(request, "param", QUIET)
    if booted.device.offered_features != features:
        booted.replug(features)
    booted.device.bad_requests.clear()
    yield booted
    booted.settle()


@pytest.mark.parametrize(
    "hurt",
    [
        lambda pair: pair.guest.kill(),
        lambda pair: pair.guest.freeze(pair.serve),
        lambda pair: pair.unload(),
        lambda pair: pair.backend.close(),
    ],
    ids=["ended", "frozen", "without driver", "without device"],
)
def test_who_hurts_the_shared_guest_hurts_nobody_else(
    guests: Shared[LinuxPair], hurt: Callable[[LinuxPair], object]
) -> None:
    victim = guests.get()
    hurt(victim)
    other = guests.get()
    assert other is not victim
    other.settle()


# -- inflate and deflate ---------------------------------------------------------------------------------------------


def test_balloon_of_a_quarter(pair: LinuxPair) -> None:
    """Guest's MemFree and counters, the device's bitmap and the RAM file agree on 25 per cent of RAM."""
    pages = pair.bytes // PAGE // 4
    pair.fill()
    free, count, file = pair.meminfo(), pair.vmstat(), pair.file_bytes
    pair.set_target(pages)
    full, inflated = pair.vmstat(), pair.file_bytes
    assert full["balloon_inflate"] - count["balloon_inflate"] == pages == pair.device.ballooned_pages
    assert free - pair.meminfo() == pytest.approx(pages * PAGE, abs=SLACK)
    print(f"inflated {pages * PAGE >> 20} MiB, its RAM file fell by {(file - inflated) / (pages * PAGE):.1%} of it")
    assert file - inflated >= 0.9 * pages * PAGE
    pair.check()
    pair.set_target(pages // 2 + 1)
    assert pair.device.ballooned_pages == pages // 2 + 1
    pair.set_target(0)
    empty = pair.vmstat()
    assert empty["balloon_deflate"] - count["balloon_deflate"] == pages
    assert pair.device.ballooned_pages == 0
    assert pair.until_free(free - SLACK) < free + SLACK
    pair.check()


def test_deflated_pages_wait_for_the_host(pair: LinuxPair) -> None:
    """MUST_TELL_HOST: pages leave the balloon for good only when their request was returned."""
    pair.set_target(8192)
    free = pair.meminfo()
    pair.device.allowed[QueueRole.DEFLATE] = 0
    pair.set_target(0, wait=False)
    end = time.monotonic() + 0.5
    pair.until(lambda: time.monotonic() > end)
    assert pair.device.actual == pair.device.ballooned_pages == 8192
    assert pair.meminfo() < free + SLACK
    del pair.device.allowed[QueueRole.DEFLATE]
    pair.serve_queue(QueueRole.DEFLATE)
    pair.until(lambda: pair.device.actual == 0)
    pair.until_free(free + 8192 * PAGE - SLACK)


# -- out of memory ----------------------------------------------------------------------------------------------------

BALLOON = 300 * MIB // PAGE
NEEDS = "dd if=/dev/zero of=/dev/null bs=220M count=1"


def oom_kills(pair: LinuxPair) -> int:
    return pair.vmstat()["oom_kill"]


def test_deflate_on_oom(pair: LinuxPair) -> None:
    """A process that needs more than is free gets it out of the balloon, and nobody is killed."""
    kills = oom_kills(pair)
    pair.set_target(BALLOON)
    assert pair.meminfo() < 200 * MIB
    pair.run(NEEDS, 60.0)
    assert oom_kills(pair) == kills
    assert pair.device.actual < BALLOON - 20 * MIB // PAGE
    assert pair.device.actual == pair.device.ballooned_pages


@pytest.mark.parametrize("pair", [QUIET & ~F.DEFLATE_ON_OOM], indirect=True, ids=["no-deflate-on-oom"])
def test_no_deflate_on_oom(pair: LinuxPair) -> None:
    """Without the feature the same process is killed, and the balloon keeps every page."""
    kills = oom_kills(pair)
    pair.set_target(BALLOON)
    assert pair.guest.run(NEEDS, 60.0, pair.serve, check=False).code != 0
    assert oom_kills(pair) > kills
    assert pair.device.actual == pair.device.ballooned_pages == BALLOON


# -- statistics -------------------------------------------------------------------------------------------------------


def test_statistics_are_the_guests_own(pair: LinuxPair) -> None:
    """Each tag against /proc of the same guest; each poll brings a fresh buffer."""
    first = dict(pair.stats())
    info, vm = pair.guest.meminfo(pair.serve), pair.vmstat()
    assert set(first) >= {
        *("stat-swap-in", "stat-swap-out", "stat-major-faults", "stat-minor-faults", "stat-free-memory"),
        *("stat-total-memory", "stat-available-memory", "stat-disk-caches"),
    }
    print(f"{len(first)} tags")
    assert first["stat-total-memory"] == info["MemTotal"]
    assert first["stat-free-memory"] == pytest.approx(info["MemFree"], abs=SLACK)
    assert first["stat-available-memory"] == pytest.approx(info["MemAvailable"], abs=SLACK)
    assert first["stat-disk-caches"] == pytest.approx(info["Cached"] + info["Buffers"], abs=MIB)
    assert first["stat-swap-in"] == first["stat-swap-out"] == 0
    assert first["stat-major-faults"] == vm["pgmajfault"]
    assert vm["pgfault"] - 2000 < first["stat-minor-faults"] <= vm["pgfault"]
    updates = pair.device.stats.updates
    pair.run("dd if=/dev/zero of=/fill/x bs=1M count=64 2>/dev/null")
    second = dict(pair.stats())
    pair.run("rm /fill/x")
    third = dict(pair.stats())
    assert pair.device.stats.updates == updates + 2
    assert first["stat-free-memory"] - second["stat-free-memory"] == pytest.approx(64 * MIB, abs=SLACK)
    assert second["stat-disk-caches"] - first["stat-disk-caches"] == pytest.approx(64 * MIB, abs=MIB)
    assert third["stat-free-memory"] == pytest.approx(first["stat-free-memory"], abs=SLACK)
    assert first["stat-minor-faults"] < second["stat-minor-faults"] < third["stat-minor-faults"]
    assert not pair.device.bad_requests


# -- hints ------------------------------------------------------------------------------------------------------------


def test_rounds_of_hints(pair: LinuxPair) -> None:
    """A round takes nearly all free blocks, STOP leaves them taken, a second one finds few, DONE frees all."""
    free = pair.meminfo()
    blocks = pair.hint_round()
    taken = free - pair.meminfo()
    print(f"{blocks} blocks, MemFree {free >> 20} MiB before and {free - taken >> 20} MiB after the round")
    assert blocks > 80
    assert taken == pytest.approx(blocks * BLOCK, abs=SLACK)
    pair.stop_hints()
    assert free - pair.meminfo() == pytest.approx(taken, abs=SLACK)
    assert pair.hint_round() < 4
    pair.done()
    pair.until_free(free - SLACK)
    assert pair.hint_round() == pytest.approx(blocks, abs=4)
    pair.done()
    pair.until_free(free - SLACK)
    assert not pair.device.bad_requests


@pytest.mark.parametrize("ending", ["STOP", "DONE"])
def test_ended_before_the_host_has_seen_all(pair: LinuxPair, ending: str) -> None:
    """The device has served 20 buffers of the pass when it ends; what comes late has no effect."""
    free = pair.meminfo()
    seen: list[int] = []
    pair.device.hint_sink = lambda command_id, addr, length: seen.extend(addr.tolist())
    pair.device.allowed[QueueRole.FREE_PAGE] = 20
    pair.start_hints()
    pair.until(lambda: pair.device.allowed[QueueRole.FREE_PAGE] == 0)
    assert len(seen) == 19  # one was the id
    (pair.stop_hints if ending == "STOP" else pair.done)()
    del pair.device.allowed[QueueRole.FREE_PAGE]
    pair.serve_queue(QueueRole.FREE_PAGE)
    if ending == "STOP":
        now = pair.meminfo()
        assert now < free - 19 * BLOCK + SLACK
        left = pair.hint_round()  # those it had not got to
        assert pair.meminfo() == pytest.approx(now - left * BLOCK, abs=SLACK)
        pair.done()
    pair.until_free(free - SLACK)
    assert len(seen) == 19


@pytest.fixture(scope="module")
def big_guests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared[LinuxPair]]:
    def boot() -> contextlib.AbstractContextManager[LinuxPair]:
        return linux_pair(tmp_path_factory.mktemp("big"), memory=1280 * MIB, features=QUIET)

    with Shared(boot, LinuxPair.settle) as shared:
        yield shared


@pytest.fixture
def big(big_guests: Shared[LinuxPair]) -> Iterator[LinuxPair]:
    """A guest with more free blocks than fit its queue, which User-Mode Linux makes of 256 entries in any case."""
    booted = big_guests.get()
    yield booted
    booted.settle()


@pytest.mark.parametrize("ending", ["STOP", "DONE", "unload"])
def test_ended_while_the_guest_is_in_mid_pass(big: LinuxPair, ending: str) -> None:
    """The queue is full and the host does not empty it: the guest is in the middle of its pass for certain."""
    pair = big
    free = pair.meminfo()
    assert free > 280 * BLOCK
    seen: list[int] = []
    pair.device.hint_sink = lambda command_id, addr, length: seen.extend(addr.tolist())
    pair.device.allowed[QueueRole.FREE_PAGE] = 10
    pair.start_hints()
    pair.until(lambda: pair.device.allowed[QueueRole.FREE_PAGE] == 0)
    end = time.monotonic() + 0.2
    pair.until(lambda: time.monotonic() > end)  # it fills the queue and goes round and round
    (pair.done if ending == "DONE" else pair.stop_hints)()
    if ending == "unload":
        pair.unload()
        pair.until_free(free - SLACK)
        del pair.device.allowed[QueueRole.FREE_PAGE]
        pair.load()
    else:
        held = free - pair.meminfo()
        if ending == "STOP":
            assert 240 * BLOCK < held < 275 * BLOCK
        del pair.device.allowed[QueueRole.FREE_PAGE]
        pair.serve_queue(QueueRole.FREE_PAGE)
        assert len(seen) == 9
        if ending == "STOP":
            assert pair.hint_round() == pytest.approx((free - held) // BLOCK, abs=6)
            pair.done()
    pair.until_free(free - SLACK)
    assert pair.hint_round() > 280
    pair.done()
    pair.until_free(free - SLACK)
    pair.check()


def test_five_ids_back_to_back(pair: LinuxPair) -> None:
    """Each id takes the place of the one before; the last one gets its round, and DONE gives everything back."""
    free = pair.meminfo()
    ids: list[int] = []
    seen: list[int] = []
    pair.device.hint_sink = lambda command_id, addr, length: seen.append(command_id)
    for _ in range(5):
        ids.append(pair.start_hints())
    pair.until(lambda: pair.device.hinting.state is HintState.STOP)
    assert ids == [ids[0] + n for n in range(5)]
    assert set(seen) <= {ids[-1]}
    pair.done()
    pair.until_free(free - SLACK)
    assert pair.hint_round() > 80
    pair.done()
    pair.until_free(free - SLACK)


@pytest.mark.parametrize("how", ["unload", "rebind", "replug"])
@pytest.mark.parametrize("when", ["after a round", "in a run", "with a balloon"])
def test_driver_removed_and_back(pair: LinuxPair, how: str, when: str) -> None:
    """Unloaded and loaded, or unbound and bound (driver or platform device): all memory returns, and it works again."""
    free = pair.meminfo()
    if when == "with a balloon":
        pair.set_target(20000)
    elif when == "in a run":
        pair.device.allowed[QueueRole.FREE_PAGE] = 5
        pair.start_hints()
        pair.until(lambda: pair.device.allowed[QueueRole.FREE_PAGE] == 0)
        del pair.device.allowed[QueueRole.FREE_PAGE]
    else:
        pair.hint_round()
    if how == "unload":
        pair.unload()
        pair.until_free(free - SLACK)
        assert pair.device.ballooned_pages == 0
        pair.device.set_target(0)
        pair.load()
    elif how == "rebind":
        pair.device.set_target(0)
        pair.rebind()
    else:
        pair.replug(QUIET)
    pair.done()
    pair.until_free(free - SLACK)
    assert pair.hint_round() > 80
    pair.done()
    pair.until_free(free - SLACK)
    pair.set_target(1000)


# -- reporting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [ALL], indirect=True, ids=["all"])
def test_a_freed_file_is_given_back(pair: LinuxPair) -> None:
    """200 MiB deleted in the guest are out of its RAM file within 10 s."""
    size = 200 * MIB
    pair.run("dd if=/dev/urandom of=/fill/x bs=1M count=200 2>/dev/null")
    file, reported = pair.file_bytes, pair.device.counters["bytes reported"]
    pair.run("rm /fill/x")
    began = time.monotonic()
    pair.until(lambda: file - pair.file_bytes >= 0.9 * size, 10.0, "the file to shrink")
    print(f"given back in {time.monotonic() - began:.1f} s")
    assert pair.device.counters["bytes reported"] - reported >= 0.9 * size
    assert pair.device.counters["bytes discarded"] == pair.device.counters["bytes reported"]
    pair.check()
    # what was given back is taken again and holds what is written
    copy = "dd if=/dev/urandom of=/fill/a bs=1M count=100 2>/dev/null && cp /fill/a /fill/b && cmp /fill/a /fill/b"
    assert "same" in pair.run(f"{copy} && echo same; rm /fill/*")


# -- poison -----------------------------------------------------------------------------------------------------------


def test_poison(tmp_path) -> None:
    """A guest that fills free pages with 0: it says so, reports, and what comes back as zeros suits it.

    Another value cannot be had from this kernel: it is built without CONFIG_PAGE_POISONING.
    """
    with linux_pair(tmp_path, memory=384 * MIB, kernel_args=("init_on_free=1",)) as pair:
        writes: list[tuple[int, bytes]] = []
        write_config = pair.device.write_config
        pair.device.write_config = lambda offset, data: (writes.append((offset, data)), write_config(offset, data))[1]  # type: ignore[method-assign]
        pair.rebind()
        assert (POISON_VAL, bytes(4)) in writes  # it tells, although 0 is there already
        assert pair.device.negotiated & F.PAGE_POISON
        assert pair.device.poison_val == 0
        pair.run("dd if=/dev/urandom of=/fill/x bs=1M count=180 2>/dev/null")
        discarded = pair.device.counters["bytes discarded"]
        pair.run("rm /fill/x")
        pair.until(lambda: pair.device.counters["bytes discarded"] - discarded > 100 * MIB)
        free = pair.meminfo()
        assert pair.hint_round() > 50
        pair.done()
        pair.until_free(free - SLACK)
        pair.set_target(10000)
        pair.set_target(0)
        pair.check()
        # A device that cannot be told gets no reports from it.
        pair.replug(ALL & ~F.PAGE_POISON)
        assert not pair.device.negotiated & F.REPORTING
        assert pair.device.negotiated & F.FREE_PAGE_HINT
        assert pair.hint_round() > 50
        pair.done()
        pair.until_free(free - SLACK)
        assert not kernel_complains(pair)
