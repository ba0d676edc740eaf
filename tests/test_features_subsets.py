"""Every set of the six feature bits negotiates, runs, and leaves nothing behind."""

import itertools

import pytest
from features_pair import ALL, Pair

from balloon_dev.device import SUPPORTED_FEATURES, BalloonDevice
from balloon_dev.features import (
    ALL_BALLOON_FEATURES,
    RING_FEATURES,
    BalloonFeature,
    QueueRole,
    feature_names,
    parse_features,
    role_feature,
)
from balloon_dev.profiles import LINUX, QEMU, SPEC
from guest_driver.memory_manager import Alloc, Owner
from vring.errors import DeviceError, DriverError, UsageError

HINT, STATS, REPORT = BalloonFeature.FREE_PAGE_HINT, BalloonFeature.STATS_VQ, BalloonFeature.REPORTING


def exercise(pair):
    """Inflate, deflate, statistics, reports and hints, as far as negotiated."""
    negotiated = pair.device.negotiated
    pair.target(700, now=0.0)
    assert pair.device.actual == pair.device.ballooned_pages == 700
    pair.agree()
    pair.target(100)
    assert pair.device.actual == pair.device.ballooned_pages == 100
    pair.agree()
    assert pair.device.request_stats() is bool(negotiated & STATS)
    pair.settle()
    assert bool(pair.device.stats.values) is bool(negotiated & STATS)
    pair.settle(now=10.0)
    assert bool(pair.manager.reported_blocks) is bool(negotiated & REPORT)
    if negotiated & HINT:
        assert pair.hint_run() > 5
    else:
        with pytest.raises(UsageError, match="FREE_PAGE_HINT"):
            pair.device.start_hinting()
    everything = pair.manager.alloc_pages_bulk(0, pair.manager.free_pages, Owner.WORKLOAD, Alloc.ATOMIC)
    one_more = pair.manager.alloc_pages(0, Owner.WORKLOAD)
    assert (one_more is not None) is bool(negotiated & BalloonFeature.DEFLATE_ON_OOM)
    if one_more is not None:
        pair.manager.free(one_more)
    pair.manager.free_bulk(everything)
    assert not pair.device.bad_requests


@pytest.mark.parametrize("bits", range(64))
def test_each_subset_offered_runs_and_is_removed(bits):
    """5790b533: some sets of features crashed, arrays of absent queues were not filled in (number 2)."""
    with Pair(bits | RING_FEATURES, poison=0xAAAAAAAA if bits & BalloonFeature.PAGE_POISON else None) as pair:
        assert pair.device.negotiated == bits | RING_FEATURES
        exercise(pair)
        pair.driver.remove()
        pair.unchanged()
        pair.driver.probe()
        pair.target(10)
        assert pair.device.actual == 10


@pytest.mark.parametrize("bits", range(64))
def test_each_subset_accepted_of_all_six(bits):
    """The driver may take any legal subset (basic.features.device-2)."""
    with Pair(ALL, accept=bits | RING_FEATURES, poison=0xAAAAAAAA, profile=QEMU) as pair:
        exercise(pair)
        pair.driver.remove()
        pair.unchanged()


@pytest.mark.parametrize("ring", [1 << 32, 1 << 32 | 1 << 29, 1 << 32 | 1 << 28])
def test_all_features_without_event_idx_or_indirect(ring):
    with Pair(ALL_BALLOON_FEATURES | ring) as pair:
        exercise(pair)


@pytest.mark.parametrize(
    ("driver", "device", "accept"), list(itertools.product((SPEC, QEMU, LINUX), (SPEC, QEMU, LINUX), range(8)))
)
def test_three_by_three_numbering_policies(driver, device, accept):
    """Reporting or hints land on another queue where the two sides count differently; it used to hang (numbers 3, 52).

    Equal numbers work; other numbers are told by one side with a clear error, within bounded steps.
    """
    bits = sum(int(b) for b, on in zip((STATS, HINT, REPORT), f"{accept:03b}", strict=True) if on == "1")
    offered = ALL
    negotiated = bits | RING_FEATURES
    same = all(
        driver.numbering.number(role, offered, negotiated) == device.numbering.number(role, offered, negotiated)
        for role in QueueRole
    )

    def run():
        with Pair(offered, accept=negotiated, profile=device, driver_profile=driver) as pair:
            pair.target(50, now=0.0)
            pair.device.request_stats()
            pair.settle(now=5.0)
            if bits & HINT:
                pair.device.start_hinting()
                pair.settle(now=9.0)

    if same:
        run()
    else:
        with pytest.raises((DriverError, DeviceError), match="policy") as caught:
            run()
        assert caught.value.clause == "balloon.queues-1"


@pytest.mark.parametrize("bits", range(64))
def test_config_size_is_a_table(bits):
    """The size of the config space once changed for all devices and broke migration between versions (number 35)."""
    poison, hint = bits & BalloonFeature.PAGE_POISON, bits & HINT
    assert BalloonDevice(bits).config.size == (16 if poison else 12 if hint else 8)


def test_number_of_queues_follows_what_is_offered():
    """Unrealize looked at the features of the guest, allocation at those of the host (number 34)."""
    for bits in range(64):
        with Pair(bits | RING_FEATURES, accept=RING_FEATURES, profile=QEMU) as pair:
            count = 2 + sum(bool(bits & role_feature(role)) for role in list(QueueRole)[2:])
            assert len(pair.device.queue_sizes) == count
            pair.driver.remove()
            assert len(pair.device.queue_sizes) == count
            pair.unchanged()


def test_unsupported_bits_are_refused():
    assert SUPPORTED_FEATURES == ALL
    with pytest.raises(UsageError, match="not served"):
        BalloonDevice(1 << 6)
    device = BalloonDevice(ALL & ~int(STATS))
    assert not device.set_features(int(STATS))


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("all", ALL),
        ("none", RING_FEATURES),
        ("hint,stats", 0b1010 | RING_FEATURES),
        ("all,-reporting", ALL & ~int(REPORT)),
        ("MUST_TELL_HOST, poison", 0b10001 | RING_FEATURES),
        ("0x2a", 0x2A),
    ],
)
def test_features_by_name(text, bits):
    assert parse_features(text) == bits
    assert parse_features(",".join(feature_names(bits)) or "none") == bits & 63 | RING_FEATURES


def test_unknown_feature_name():
    with pytest.raises(UsageError, match="deflate-on-oom"):
        parse_features("hints")
