"""What the device counts: rules that a driver breaks, each by its clause, and apart from them what merely came late."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from mmio_pair import Raw
from raw_driver import DATA, HINT, INFLATE, REPORT, STATS, WRITE, Desc, OurPeer, RawDriver

from balloon_dev.config import CMD_ID, NUM_PAGES, POISON_VAL
from balloon_dev.device import BalloonDevice
from balloon_dev.features import QueueRole
from balloon_dev.hinting import HintEvent, HintRun
from balloon_dev.profiles import SPEC
from balloon_dev.rules import BadRequest, Late, Rule, as_json
from vring.memory import GuestMemory
from vring.mmio import MmioDevice
from vring.mmio_registers import CONFIG_OFFSET, Register

FREE_PAGE = QueueRole.FREE_PAGE
PAGE = Desc(0x1000000, 4096, WRITE)


@pytest.fixture
def driver():
    made = RawDriver(OurPeer())
    made.start()
    yield made
    made.memory.close()


def counted(driver):
    """What was counted since the last look: rules by queue, and lateness."""
    device = driver.peer.device
    found = dict(device.bad_requests), dict(device.late)
    device.bad_requests.clear()
    device.late.clear()
    return found


def hint_rule(rule, times=1):
    return {BadRequest(rule, FREE_PAGE): times}, {}


def ask(driver):
    driver.peer.device.start_hinting()
    return driver.command_id()


# -- hints: an offence, or only late ------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["stop_hinting", "finish_hinting", "start_hinting"])
def test_what_was_on_its_way_when_the_host_ended_the_run_is_late(driver, end):
    """Hints, and the driver's own stop: it cannot know yet."""
    driver.command(ask(driver))
    driver.send(HINT, PAGE)
    getattr(driver.peer.device, end)()
    driver.send(HINT, PAGE)
    driver.put(HINT, replace(PAGE, flags=WRITE | 1, next=1), PAGE)
    driver.offer(HINT, 0)
    driver.kick(HINT)
    driver.command(0)
    assert counted(driver) == ({}, {Late.HINT: 3, Late.COMMAND: 1})
    driver.send(HINT, PAGE)  # but it has said itself that there are no more
    assert counted(driver) == hint_rule(Rule.HINT_OUTSIDE_RUN)


@pytest.mark.parametrize("end", ["stop_hinting", "finish_hinting", "start_hinting"])
def test_a_run_that_was_ended_before_it_was_opened_is_late_as_a_whole(driver, end):
    number = ask(driver)
    getattr(driver.peer.device, end)()
    driver.command(number)
    driver.send(HINT, PAGE)
    driver.command(0)
    assert counted(driver) == ({}, {Late.HINT: 1, Late.COMMAND: 2})
    if end == "start_hinting":
        driver.command(driver.command_id())
        driver.send(HINT, PAGE)
        assert counted(driver) == ({}, {})


def test_a_driver_that_keeps_the_rules_has_nothing_counted(driver):
    for _ in range(3):
        driver.command(ask(driver))
        driver.send(HINT, PAGE)
        driver.command(0)
        driver.peer.device.stop_hinting()
    driver.peer.device.finish_hinting()
    assert counted(driver) == ({}, {})


def test_hints_outside_any_run(driver):
    driver.send(HINT, PAGE)
    ask(driver)
    driver.send(HINT, PAGE)
    assert counted(driver) == hint_rule(Rule.HINT_OUTSIDE_RUN, 2)


def test_a_run_under_id_0_is_none(driver):
    """A driver that takes 0 for a request: to the device it says that it is out of pages, then sends some."""
    driver.command(ask(driver))
    driver.command(0)
    driver.command(0)
    driver.send(HINT, PAGE)
    assert counted(driver) == ({BadRequest(Rule.HINT_OUTSIDE_RUN, FREE_PAGE): 1}, {Late.COMMAND: 1})


@pytest.mark.parametrize("number", [1, 2, 0x7FFFFFFF, 0x80000000, 0x80000005, 0xFFFFFFFF])
def test_an_id_that_was_never_issued(driver, number):
    for _ in range(3):
        ask(driver)
    driver.command(number)
    driver.send(HINT, PAGE)
    bad, late = counted(driver)
    assert bad == {BadRequest(rule, FREE_PAGE): 1 for rule in (Rule.HINT_COMMAND_ID, Rule.HINT_OUTSIDE_RUN)}
    assert not late
    assert driver.peer.hinted() == 0


@pytest.mark.parametrize("between", ["nothing", "stop_hinting", "start_hinting"])
def test_an_id_sent_twice(driver, between):
    number = ask(driver)
    driver.command(number)
    if between != "nothing":
        getattr(driver.peer.device, between)()
    driver.command(number)
    assert counted(driver) == hint_rule(Rule.HINT_ID_TWICE)


def test_an_older_id_after_a_newer_one(driver):
    first, second = ask(driver), ask(driver)
    driver.command(second)
    driver.command(first)
    assert counted(driver) == hint_rule(Rule.HINT_COMMAND_ID)


def test_the_id_before_the_counter_wraps_is_known_after_it():
    run = HintRun(replace(SPEC, id_min=10, id_max=12, id_initial=10))
    assert run.judge_command(10) is Rule.HINT_COMMAND_ID
    for _ in range(3):
        run.handle(HintEvent.HOST_START)
    assert run.command_id == 10
    assert run.judge_command(12) is Late.COMMAND
    assert run.judge_command(13) is Rule.HINT_COMMAND_ID


def test_another_driver_may_send_the_id_its_forerunner_sent(driver):
    """After a reset nothing is known of what the driver sent."""
    number = ask(driver)
    driver.command(number)
    driver.start()
    driver.command(number)
    assert counted(driver) == ({}, {Late.COMMAND: 1})


def test_a_run_that_was_moved_gets_the_benefit_of_the_doubt(driver):
    driver.command(ask(driver))
    driver.peer.device.stop_hinting()
    moved = HintRun(SPEC)
    moved.load(driver.peer.device.hinting.save())
    assert moved.judge_pages() is Late.HINT
    assert moved.judge_command(0) is Late.COMMAND
    assert moved.judge_pages() is Rule.HINT_OUTSIDE_RUN


# -- the other queues ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queue", "desc", "rule", "clause"),
    [
        (HINT, Desc(DATA, 8), Rule.HINT_COMMAND_SIZE, "balloon.hint.driver-1"),
        (INFLATE, Desc(DATA, 4, WRITE), Rule.PFNS_BUFFER, "balloon.pfn-1"),
        (INFLATE, Desc(DATA, 3), Rule.PFNS_LENGTH, "balloon.pfn-1"),
        (REPORT, Desc(0x1000000, 4096), Rule.REPORT_BUFFER, None),
        (REPORT, Desc(0x1000000, 100, WRITE), Rule.REPORT_RANGE, None),
        (STATS, Desc(DATA, 10, WRITE), Rule.STATS_WRITABLE, "balloon.stats-entry"),
        (STATS, Desc(DATA, 13), Rule.STATS_LENGTH, "balloon.stats.driver-5"),
        (STATS, Desc(0x1000000, 4000), Rule.STATS_ENTRIES, None),
    ],
)
def test_each_rule_with_its_clause(driver, queue, desc, rule, clause):
    role = list(QueueRole)[queue]
    driver.put(queue, desc)
    driver.offer(queue, 0)
    driver.set(Register.QueueNotify, queue)
    bad, late = counted(driver)
    assert (bad, late) == ({BadRequest(rule, role): 1}, {})
    assert rule.clause == clause
    assert str(*bad).startswith(f"{role.value}: {rule.what}")
    assert clause is None or str(*bad).endswith(f"({clause})")


def test_as_json():
    device = BalloonDevice()
    device._bad(Rule.PFN_OUTSIDE_RAM, QueueRole.INFLATE, 3)
    device._bad(Rule.CONFIG_READ_ONLY)
    device.late[Late.HINT] += 7
    shown = json.loads(json.dumps(as_json(device.bad_requests, device.late)))
    assert shown == {
        "bad-requests": [
            {"queue": "inflateq", "what": "PFN outside RAM", "clause": "balloon.pfn-1", "count": 3},
            {"queue": None, "what": "config write to a read-only field", "clause": "balloon.config-1", "count": 1},
        ],
        "late": {"hint of a run that is over": 7},
    }


# -- config space and status --------------------------------------------------------------------------------------


def test_poison_val_is_constant_while_driver_ok_is_set(driver):
    """balloon.poison.driver-3. Written again unchanged it is nothing, after a reset it may be something else."""
    driver.start(ok=False)
    driver.set_poison(0xAA)
    driver.set(Register.Status, 15)
    driver.set_poison(0xAA)
    assert counted(driver) == ({}, {})
    driver.set_poison(0xBB)
    assert counted(driver) == ({BadRequest(Rule.POISON_CHANGED): 1}, {})
    driver.start(ok=False)
    driver.set_poison(0xCC)
    assert counted(driver) == ({}, {})


@pytest.mark.parametrize("offset", [NUM_PAGES, CMD_ID])
def test_fields_that_are_not_the_drivers(driver, offset):
    driver.peer.write(CONFIG_OFFSET + offset, 4, 7)
    assert counted(driver) == ({BadRequest(Rule.CONFIG_READ_ONLY): 1}, {})


@pytest.fixture
def fresh():
    with GuestMemory.create(1 << 20) as memory:
        device = BalloonDevice(0x1_0000_003F)
        yield device, Raw(MmioDevice(device, memory))


def test_config_is_not_written_during_negotiation(fresh):
    device, raw = fresh
    raw[Register.Status] = 1
    raw[Register.Status] = 3
    raw[CONFIG_OFFSET + POISON_VAL] = 5
    assert device.bad_requests == {BadRequest(Rule.CONFIG_UNSETTLED): 1}


def test_a_driver_that_has_its_features_not_confirmed(fresh):
    """It is served, as QEMU does, and counted once."""
    device, raw = fresh
    for status in (0, 1, 3):
        raw[Register.Status] = status
    raw[Register.DriverFeaturesSel], raw[Register.DriverFeatures] = 1, 1
    raw[Register.Status] = 7
    raw[Register.Status] = 7
    assert raw[Register.Status] == 7
    assert device.bad_requests == {BadRequest(Rule.FEATURES_NOT_CONFIRMED): 1}
    raw[Register.Status] = 0
    assert raw.negotiate()
    raw[Register.Status] = 15
    assert device.bad_requests.total() == 1
