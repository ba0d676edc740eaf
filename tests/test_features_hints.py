"""The hint run against a driver that sends any command at any time, and the table of bugs in the docs."""

import re
from pathlib import Path

import numpy as np
import pytest
from features_pair import ALL, Pair

from balloon_dev.config import CMD_ID
from balloon_dev.features import QueueRole
from balloon_dev.hinting import HintState
from balloon_dev.profiles import LINUX, QEMU, SPEC
from vring.split import SEG, SEG_WRITE

ROOT = Path(__file__).resolve().parents[1]
STATES = ["STOP", "REQUESTED", "START", "STOPPED", "DONE"]


def command(pair, value):
    """Send a command past the driver, which is not stepped in these tests."""
    queue = pair.queue(QueueRole.FREE_PAGE)
    slot = pair.memory.array(pair.driver._commands_gpa, 1, "<u4")
    slot[0] = value
    segment = np.zeros(1, SEG)
    segment["addr"], segment["len"] = pair.driver._commands_gpa, 4
    assert queue.add(segment, [1]) == 1
    queue.publish()
    assert pair.serve(QueueRole.FREE_PAGE) == 1
    queue.collect()


def pages(pair, addr, length):
    queue = pair.queue(QueueRole.FREE_PAGE)
    segment = np.zeros(1, SEG)
    segment["addr"], segment["len"], segment["flags"] = addr, length, SEG_WRITE
    queue.add(segment, [2])
    queue.publish()
    assert pair.serve(QueueRole.FREE_PAGE) == 1
    queue.collect()


def bring_to(pair, where):
    """Return the id that is current in that state."""
    device = pair.device
    if where == "STOP":
        return device.hinting.command_id
    current = device.start_hinting()
    if where in ("START", "STOPPED"):
        command(pair, current)
    if where == "STOPPED":
        device.stop_hinting()
    if where == "DONE":
        device.finish_hinting()
    return current


@pytest.mark.parametrize("where", STATES)
@pytest.mark.parametrize("which", ["current", "before", "after", "stop", "done", "highest"])
def test_only_the_id_requested_starts_a_run(where, which):
    """A guest could start a run again that the host had stopped, by repeating its id (number 28)."""
    with Pair(ALL) as pair:
        pair.settle()
        current = bring_to(pair, where)
        before = pair.device.hinting.state
        ids = {"current": current, "before": current - 1, "after": current + 1, "stop": 0, "done": 1}
        command(pair, ids.get(which, 0xFFFFFFFF))
        if where == "REQUESTED" and which == "current":
            assert pair.device.hinting.state is HintState.START
        elif where == "START":
            assert pair.device.hinting.state is HintState.STOP
        else:
            assert pair.device.hinting.state is before


def test_stop_of_an_old_run_does_not_end_the_next():
    """A late stop of run n ended run n+1, and ids began again at reset (number 48)."""
    with Pair(ALL) as pair:
        pair.settle()
        first = bring_to(pair, "START")
        second = pair.device.start_hinting()
        command(pair, 0)
        assert pair.device.hinting.state is HintState.REQUESTED
        command(pair, second)
        assert pair.device.hinting.state is HintState.START
        pair.transport.reset()
        pair.device.set_features(ALL)
        assert pair.device.start_hinting() not in (first, second)


@pytest.mark.parametrize("profile", [SPEC, QEMU, LINUX])
def test_config_shows_what_the_table_says_and_a_resize_changes_nothing(profile):
    """The config space read STOP in the middle of a run, so any other config interrupt ended it (number 44)."""
    with Pair(ALL, profile=profile) as pair:
        pair.settle()

        def shown():
            pair.device.set_target(pair.device.config[0] + 1)  # an interrupt that has nothing to do with hints
            return int.from_bytes(pair.device.read_config(CMD_ID, 4), "little")

        assert shown() == 0
        current = pair.device.start_hinting()
        assert shown() == current
        command(pair, current)
        assert shown() == (current if profile.config_shows_id_while_running else 0)
        pair.device.stop_hinting()
        assert shown() == 0
        pair.device.finish_hinting()
        assert shown() == 1


def test_pages_count_only_in_a_run():
    """balloon.hint.device-3, also where a range touches the end of RAM (number 33)."""
    with Pair(ALL) as pair:
        pair.settle()
        seen = []
        pair.device.hint_sink = lambda command_id, addr, length: seen.append((command_id, addr.tolist()))
        end = pair.host.end
        for where in STATES:
            pair.device.finish_hinting()
            current = bring_to(pair, where)
            pages(pair, end - 4096, 4096)
            assert seen == ([(current, [end - 4096])] if where == "START" else [])
            seen.clear()


@pytest.mark.parametrize("length", [0, 1, 3, 5, 8, 4096])
def test_command_of_another_length_has_no_effect(length):
    with Pair(ALL) as pair:
        pair.settle()
        current = pair.device.start_hinting()
        segment = np.zeros(1, SEG)
        segment["addr"], segment["len"] = pair.driver._commands_gpa, max(length, 1)
        if length in (0, 1):
            segment["len"] = 1
        pair.memory.write(pair.driver._commands_gpa, current.to_bytes(4, "little"))
        queue = pair.queue(QueueRole.FREE_PAGE)
        queue.add(segment, [1])
        queue.publish()
        pair.serve(QueueRole.FREE_PAGE)
        assert pair.device.hinting.state is HintState.REQUESTED
        assert sum(pair.device.bad_requests.values()) == 1


def test_every_test_named_in_the_bug_history_exists():
    text = (ROOT / "docs" / "bug-history.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    files = {path.stem: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    defined = {name for source in files.values() for name in re.findall(r"def (test_\w+)", source)} | set(files)
    assert named
    assert named <= defined, sorted(named - defined)
