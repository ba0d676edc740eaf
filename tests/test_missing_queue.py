"""A queue that the device does not have: what the driver says of it, and that the device is left reset."""

from __future__ import annotations

import pytest
from mmio_pair import ALL, MmioPair, R

from balloon_dev.features import BalloonFeature
from balloon_dev.profiles import LINUX, QEMU, SPEC
from guest_driver.mmio import MmioTransport
from vring.errors import DeviceError


class Without(MmioTransport):
    """Sees registers in which one queue has no entries."""

    def __init__(self, bus, missing):
        super().__init__(bus, polls=20)
        self.missing = missing

    def queue_size_max(self, index):
        return 0 if index == self.missing else super().queue_size_max(index)


@pytest.mark.parametrize("profile", [SPEC, QEMU, LINUX], ids=lambda p: p.name)
def test_a_queue_that_every_policy_has(profile):
    """QueueSizeMax 0 on queue 0 is a device without inflateq, not one that counts in another way."""
    with MmioPair(profile=profile, probe=False) as pair:
        pair.driver.transport = Without(pair.mmio, 0)
        with pytest.raises(DeviceError, match="no queue 0 for the inflateq: its largest size reads 0") as caught:
            pair.driver.probe()
        assert "policy than" not in str(caught.value)
        assert caught.value.clause == "balloon.queues-1"
        assert pair.mmio.read(R.Status, 4) == 0


def test_a_queue_that_another_policy_has_elsewhere():
    """Without statistics, hinting is queue 3 by the standard and 2 by the others."""
    features = ALL & ~int(BalloonFeature.STATS_VQ)
    with MmioPair(features, accept=features, probe=False) as pair:
        pair.driver.transport = Without(pair.mmio, 3)
        with pytest.raises(DeviceError, match="another policy than fixed"):
            pair.driver.probe()
        assert pair.mmio.read(R.Status, 4) == 0
