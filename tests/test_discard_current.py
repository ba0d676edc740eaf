"""The discarder of a device whose memory and driver change: what is known of large host pages, and for how long."""

from __future__ import annotations

import os

import pytest
from discard_support import fill, ranges, wrong_pages, zero_pages

from balloon_dev.device import SUPPORTED_FEATURES, BalloonDevice
from balloon_dev.features import BalloonFeature
from host_qemu_side.discard import Discarder, PartialPages
from host_qemu_side.discard.current import CurrentDiscarder
from vring.memory import GuestMemory, Region

PAGE = 4096
BIG = 1 << 16
MIB = 1 << 20
TELLS = SUPPORTED_FEATURES
KEEPS_QUIET = SUPPORTED_FEATURES & ~int(BalloonFeature.MUST_TELL_HOST)


def big_pages(fd, *places):
    """Memory of host pages of 64 KiB, as on arm64: (gpa, size, offset) of each region, all in one object."""
    return GuestMemory.from_fds([Region(gpa, size, fd, offset, page_size=BIG) for gpa, size, offset in places])


@pytest.fixture
def ram():
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 4 * MIB)
    yield fd
    os.close(fd)


class Host:
    """A device, its discarder and its memory, as a back end has them."""

    def __init__(self, memory):
        self.device = BalloonDevice(SUPPORTED_FEATURES)
        self.discard = self.device.discard = CurrentDiscarder(
            lambda: self.memory, lambda: bool(self.device.negotiated & BalloonFeature.MUST_TELL_HOST)
        )
        self.change(memory)

    def change(self, memory):
        self.memory = memory
        self.device.set_memory(memory)

    def driver(self, features):
        self.device.reset()
        assert self.device.set_features(features)

    def inflate(self, first, end):
        self.discard(*ranges((first * PAGE, (end - first) * PAGE)))

    def deflate(self, first, end):
        self.discard.deflate(*ranges((first * PAGE, (end - first) * PAGE)))


@pytest.fixture
def host(ram):
    with big_pages(ram, (0, MIB, 0)) as memory:
        fill(memory)
        yield Host(memory)


@pytest.mark.parametrize("before", [[], [TELLS], [TELLS, TELLS], [KEEPS_QUIET], [TELLS, KEEPS_QUIET]])
@pytest.mark.parametrize("after", [TELLS, KEEPS_QUIET])
def test_each_driver_is_taken_by_what_it_negotiated(host, before, after):
    """One that takes pages back without telling loses none, whoever came before it; for one that tells parts are put
    together, but not with parts that an earlier driver gave."""
    for features in before:
        host.driver(features)
        host.inflate(0, 15)
    host.driver(after)
    host.inflate(15, 16)
    assert not zero_pages(host.memory)
    host.inflate(16, 20)
    host.inflate(20, 31)
    host.memory.write(19 * PAGE, b"in use again")  # only one that keeps quiet may
    if after == TELLS:
        host.memory.write(19 * PAGE, b"\0" * 12)
        host.inflate(31, 32)
        assert zero_pages(host.memory) == set(range(16, 32))
    else:
        host.inflate(31, 32)
        assert not zero_pages(host.memory)
        assert host.memory.read(19 * PAGE, 12) == b"in use again"


def test_whole_pages_of_one_request_need_no_telling(host):
    host.driver(KEEPS_QUIET)
    host.inflate(3, 40)
    assert zero_pages(host.memory) == set(range(16, 32))


def test_bits_that_change_without_a_reset(host):
    """What was put together while the driver told is forgotten as soon as it does not."""
    host.driver(TELLS)
    host.inflate(0, 15)
    assert host.device.set_features(KEEPS_QUIET)
    host.deflate(3, 4)
    assert host.device.set_features(TELLS)
    host.inflate(15, 16)
    assert not zero_pages(host.memory)


@pytest.mark.parametrize("how", ["reset", "_forget_balloon"])
def test_forgotten(host, how):
    host.driver(TELLS)
    host.inflate(0, 15)
    getattr(host.device, how)(**({"sure": False} if how == "_forget_balloon" else {}))
    host.device.set_features(TELLS)
    host.inflate(15, 16)
    assert not zero_pages(host.memory)
    host.inflate(0, 15)
    assert zero_pages(host.memory) == set(range(16))


def test_a_table_change_keeps_what_is_still_there(ram, host):
    """Memory comes, memory goes, and parts given before count with those given after."""
    host.driver(TELLS)
    host.inflate(0, 15)
    host.device.ballooned_pages = host.device._ballooned.set_run(0, 15)
    with big_pages(ram, (0, MIB, 0), (1 << 40, MIB, MIB)) as more:
        fill(more)
        host.change(more)
        assert host.device.ballooned_pages == 15
        host.inflate((1 << 28) + 1, (1 << 28) + 16)
        with big_pages(ram, (0, MIB // 4, 0), (1 << 40, MIB, MIB)) as less:
            host.change(less)
            assert host.device.ballooned_pages == 15
            assert host.device.save()["ballooned"] == [[0, 15]]
            host.inflate(15, 16)
            host.inflate(1 << 28, (1 << 28) + 1)
            assert zero_pages(less) == {*range(16), *range(1 << 28, (1 << 28) + 16)}


def test_parts_do_not_outlive_the_balloon_of_memory_that_goes(ram, host):
    """It may come back as other memory, in use: a page that parts of before completed would be lost."""
    host.driver(TELLS)
    host.inflate(128, 143)
    host.device._ballooned.set_run(128, 15)
    host.device.ballooned_pages = 15
    whole = host.memory
    with big_pages(ram, (0, MIB // 4, 0)) as less:
        host.change(less)
        assert host.device.ballooned_pages == 0
        host.change(whole)
        host.inflate(143, 144)
        assert not zero_pages(whole)


def test_no_memory_means_nothing_is_known(host):
    host.driver(TELLS)
    host.device._ballooned.set_run(0, 15)
    memory = host.memory
    host.change(None)
    assert host.device.ballooned_pages == 0
    host.inflate(0, 15)
    host.deflate(0, 15)
    host.change(memory)
    assert host.device.save()["ballooned"] == []


@pytest.mark.parametrize("partial", [False, True])
def test_host_pages_cut_by_a_hole(ram, partial):
    """RAM of which a hole cuts host pages: those are kept, however much of them is given, and their neighbours go."""
    # a: host page 0 whole, page 1 to its middle; b: from the middle of page 2; c: what of page 2 comes before b.
    places = [(0, 24 * PAGE, 0), (MIB, 24 * PAGE, 2 * BIG + 8 * PAGE), (2 * MIB, 8 * PAGE, 2 * BIG)]
    with big_pages(ram, *places) as memory:
        fill(memory)
        discard = Discarder(memory, partial=PartialPages(memory) if partial else None, verify=True)
        for gpa, size, _ in places:
            discard(*ranges((gpa, size)))
        whole = set(range(16)) | {(MIB >> 12) + page for page in range(8, 24)}
        assert zero_pages(memory) == whole
        assert not wrong_pages(memory)
        assert discard.bytes_discarded == 2 * BIG
        if discard.partial is not None:
            assert (discard.partial.pages, discard.partial.waiting) == (56, 24)


def test_pins_in_host_pages_cut_by_a_hole(ram):
    with big_pages(ram, (MIB, 40 * PAGE, 8 * PAGE)) as memory:
        fill(memory)
        discard = Discarder(memory)
        discard.pin(MIB + 10 * PAGE, 1)
        discard(*ranges((MIB, 40 * PAGE)))
        assert zero_pages(memory) == {(MIB >> 12) + page for page in range(24, 40)}
