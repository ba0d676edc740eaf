"""All feature bits with an unmodified Linux kernel: its driver is the measure of the device."""

from __future__ import annotations

import dataclasses
import time

import pytest
from features_pair import ALL

from balloon_dev.config import POISON_VAL
from balloon_dev.device import BalloonDevice
from balloon_dev.features import BalloonFeature
from balloon_dev.hinting import HintState
from balloon_dev.profiles import LINUX
from host_qemu_side.discard import Discarder
from host_qemu_side.linux_guest import LinuxGuest
from host_qemu_side.loop import Loop
from host_qemu_side.vhost_user import VhostUserBackend
from vring.errors import MissingFacility

MIB = 1 << 20
pytestmark = pytest.mark.uml


class LinuxPair:
    def __init__(self, folder, cache, features, kernel_args):
        self.loop = Loop()
        self.device = BalloonDevice(features, profile=dataclasses.replace(LINUX, queue_sizes=(256,) * 5))
        self.device.discard = lambda addr, length: Discarder(self.backend.memory)(addr, length)
        self.backend = VhostUserBackend(self.device, self.loop)
        try:
            self.guest = LinuxGuest(384 * MIB, folder / "w", folder / "s", cache=cache, kernel_args=kernel_args)
        except MissingFacility as missing:
            pytest.skip(str(missing))
        self.backend.listen(str(folder / "s"))

    def until(self, condition, seconds=10.0):
        self.loop.run_until(condition, seconds, "the Linux guest")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("initramfs")


@pytest.mark.parametrize(
    ("kernel_args", "dropped", "poison"),
    [((), BalloonFeature.PAGE_POISON, 0), (("init_on_free=1",), 0, 0)],
    ids=["plain", "init_on_free"],
)
def test_linux_takes_all_features(tmp_path, cache, kernel_args, dropped, poison):
    pair = LinuxPair(tmp_path, cache, ALL, kernel_args)
    device = pair.device
    with pair.guest as guest:
        guest.wait_ready(serve=pair.loop.run_once)
        guest.load_balloon(serve=pair.loop.run_once)
        assert device.negotiated & 63 == 63 & ~int(dropped)
        assert device.config[POISON_VAL] == poison

        pair.until(lambda: device.stats.updates == 1)
        assert device.request_stats()
        pair.backend.deliver()
        pair.until(lambda: device.stats.updates == 2)
        total = device.stats.values["stat-total-memory"]
        assert total == guest.meminfo(serve=pair.loop.run_once)["MemTotal"]
        assert len(device.stats.values) >= 8

        # Linux leaves 32 blocks of 4 MiB alone before it reports any, so a small guest never does.
        pair.until(lambda: device.counters["bytes reported"] > 16 * MIB)
        assert device.counters["bytes discarded"] == device.counters["bytes reported"]

        device.set_target(4000)
        pair.backend.deliver()
        pair.until(lambda: device.actual == 4000)
        assert device.ballooned_pages == 4000
        device.set_target(1001)
        pair.backend.deliver()
        pair.until(lambda: device.actual == 1001)
        assert device.ballooned_pages == 1001

        before = time.monotonic()
        device.start_hinting()
        pair.backend.deliver()
        pair.until(lambda: device.hinting.state is HintState.STOP)
        device.finish_hinting()
        pair.backend.deliver()
        assert time.monotonic() - before < 10
        assert guest.alive(serve=pair.loop.run_once)
        assert not device.bad_requests

        # What was reported and dropped is used again, and holds what is written to it.
        copy = "dd if=/dev/urandom of=/fill/a bs=1M count=40 2>/dev/null && cp /fill/a /fill/b && cmp /fill/a /fill/b"
        reply = guest.run(f"{copy} && echo same; rm /fill/*", serve=pair.loop.run_once)
        assert "same" in reply.output
        guest.unload_balloon(serve=pair.loop.run_once)
        pair.until(lambda: device.ballooned_pages == 0)
    pair.backend.close()
    pair.loop.close()
