"""What an unmodified Linux driver says, and does not say, when it is loaded and removed: with bit 30 and without.

User-Mode Linux drops bit 30 when the driver drops a feature it was offered (PAGE_POISON, in a kernel that does not
poison): rings are then enabled by their kicks alone, and no message says that the driver is gone.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from linux_pair import ALL, MIB, LinuxPair, kernel_complains, linux_pair

from balloon_dev.features import BalloonFeature, QueueRole
from balloon_dev.hinting import HintState
from vring.vhost_user import F_PROTOCOL_FEATURES, Request

pytestmark = [pytest.mark.uml, pytest.mark.slow]

QUIET = ALL & ~BalloonFeature.REPORTING
WITHOUT, WITH = QUIET, QUIET & ~BalloonFeature.PAGE_POISON


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LinuxPair]:
    with linux_pair(tmp_path_factory.mktemp("linux"), features=WITHOUT) as pair:
        yield pair


@pytest.fixture(params=[WITHOUT, WITH], ids=["without bit 30", "with bit 30"])
def pair(booted: LinuxPair, request: pytest.FixtureRequest) -> Iterator[LinuxPair]:
    if booted.device.offered_features != request.param:
        booted.replug(request.param)
    assert bool(booted.backend.features & F_PROTOCOL_FEATURES) == (request.param == WITH)
    yield booted
    booted.settle()
    assert not kernel_complains(booted)


def live(pair: LinuxPair) -> int:
    return sum(pair.device.queue(role) is not None for role in QueueRole)


def provoke(pair: LinuxPair) -> None:
    """Do all that could make the device write to a ring."""
    pair.device.request_stats()
    for index in range(5):
        pair.backend.process(index)
    with pair.frozen():
        pass
    pair.deliver()


def test_rings_of_a_driver_that_was_removed_are_left_alone(pair: LinuxPair) -> None:
    """Their memory is used for other things, which stay as they are; and nothing but the rings is gone."""
    pair.hint_round()
    figures = dict(pair.stats())
    assert live(pair) == 4
    pair.unload()
    assert live(pair) == 0
    assert not pair.backend.running
    assert pair.device.stats.values == figures
    size = int(pair.meminfo() * 0.8) >> 20
    pair.run(f"dd if=/dev/urandom of=/fill/x bs=1M count={size} 2>/dev/null; sha256sum /fill/x >/fill/sum")
    for _ in range(3):
        provoke(pair)
    assert "OK" in pair.run("sha256sum -c /fill/sum; rm /fill/*", 60.0)
    pair.load()


def test_the_next_driver_knows_nothing_of_the_one_before(pair: LinuxPair) -> None:
    pair.set_target(5000)
    pair.device.allowed[QueueRole.FREE_PAGE] = 5
    last = pair.start_hints()
    pair.until(lambda: pair.device.allowed[QueueRole.FREE_PAGE] == 0)
    assert pair.device.hinting.state is HintState.START
    pair.unload()
    del pair.device.allowed[QueueRole.FREE_PAGE]
    assert pair.device.hinting.active, "it may have been a pause"
    pair.device.set_target(0)
    pair.load()
    pair.until(lambda: live(pair) == 4)
    assert pair.device.hinting.state is HintState.STOP
    assert (pair.device.actual, pair.device.ballooned_pages) == (0, 0)
    assert pair.device.hinting.command_id == last
    assert pair.hint_round() > 50
    pair.done()
    pair.set_target(1000)


def test_a_driver_says_its_messages_one_way_or_the_other(pair: LinuxPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the back end goes by, of this kernel: removal is told by ENABLE 0, or only by asking for the features."""
    said: list[Request] = []
    handle = pair.backend._handle

    def listen(header, payload, fds):
        said.append(Request(header.request))
        handle(header, payload, fds)

    monkeypatch.setattr(pair.backend, "_handle", listen)
    pair.unload()
    removed = set(said)
    assert (Request.SET_VRING_ENABLE in removed) == (pair.device.offered_features == WITH)
    assert Request.GET_FEATURES in removed
    assert not removed & {Request.GET_VRING_BASE, Request.RESET_DEVICE, Request.RESET_OWNER}
    said.clear()
    pair.load()
    assert Request.GET_FEATURES not in said, "it ends rings without bit 30"
    assert Request.SET_VRING_KICK in said


def test_a_back_end_that_ends_takes_the_device_along(tmp_path) -> None:
    """As a `serve` that is started anew: the guest lives, does not connect again, and has not what it gave away."""
    with linux_pair(tmp_path, memory=256 * MIB, features=WITH) as pair:
        pair.set_target(5000)
        assert pair.hint_round() > 20
        free = pair.meminfo()
        pair.backend.close()
        pair._plug(WITH)
        pair.until(lambda: not pair.run("ls /sys/bus/virtio/devices").strip(), what="the guest to miss its device")
        assert not pair.backend.connected
        assert pair.guest.alive(pair.serve)
        assert pair.meminfo() < free + 20 * MIB
