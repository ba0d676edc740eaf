"""The hint table, cell by cell, written out a second time from the documentation; ids; what the config space shows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from balloon_dev.hinting import TABLE, Action, HintEvent, HintRun, HintState, SavedHints
from balloon_dev.profiles import LINUX, PROFILES, QEMU, SPEC
from vring.errors import UsageError

# Rows: states. Columns: events. Each cell: next state and what happens.
WRITTEN = """
host:      starts             stops         is done
guest:                                                     that id       another command   pages             reset
STOP       REQUESTED/new_id   STOP/-        DONE/publish   STOP/ignore   STOP/ignore       STOP/ignore       STOP/-
REQUESTED  REQUESTED/new_id   STOP/publish  DONE/publish   START/-       REQUESTED/ignore  REQUESTED/ignore  STOP/-
START      REQUESTED/new_id   STOP/publish  DONE/publish   STOP/-        STOP/-            START/apply       STOP/-
DONE       REQUESTED/new_id   DONE/-        DONE/-         DONE/ignore   DONE/ignore       DONE/ignore       STOP/-
"""
EVENTS = [
    HintEvent.HOST_START,
    HintEvent.HOST_STOP,
    HintEvent.HOST_DONE,
    HintEvent.GUEST_ID,
    HintEvent.GUEST_OTHER_ID,
    HintEvent.GUEST_PAGES,
    HintEvent.RESET,
]
ACTIONS = {
    "new_id": Action.NEW_ID,
    "publish": Action.PUBLISH,
    "apply": Action.APPLY,
    "ignore": Action.IGNORE,
    "-": Action.NOTHING,
}
CELLS = []
for row in WRITTEN.strip().splitlines()[2:]:
    state, *cells = row.split()
    for event, cell in zip(EVENTS, cells, strict=True):
        following, action = cell.split("/")
        CELLS.append((HintState[state], event, HintState[following], ACTIONS[action]))


@pytest.mark.parametrize(("state", "event", "following", "action"), CELLS)
def test_cell(state, event, following, action):
    """Every cell of the table is what the documentation says."""
    run = HintRun(SPEC)
    run.state = state
    assert run.handle(event) is action
    assert run.state is following


def test_table_is_complete():
    """No state lacks an event, and the test above has seen them all."""
    assert set(TABLE) == {(s, e) for s in HintState for e in HintEvent} == {(s, e) for s, e, _, _ in CELLS}


def test_first_id_and_wrap():
    """The first id is 0x80000001; after 0xffffffff comes 0x80000000; no event but a start moves it."""
    run = HintRun(SPEC)
    run.handle(HintEvent.HOST_START)
    assert run.command_id == 0x80000001
    for event in EVENTS[1:]:
        run.handle(event)
    assert run.command_id == 0x80000001
    run.command_id = 0xFFFFFFFE
    ids = []
    for _ in range(3):
        run.handle(HintEvent.HOST_START)
        ids.append(run.command_id)
    assert ids == [0xFFFFFFFF, 0x80000000, 0x80000001]


def test_ids_stay_in_the_range_of_the_profile():
    """Another range is a matter of the profile."""
    run = HintRun(replace(SPEC, id_min=2, id_max=3, id_initial=1))
    ids = []
    for _ in range(4):
        run.handle(HintEvent.HOST_START)
        ids.append(run.command_id)
    assert ids == [2, 3, 2, 3]


def test_command_of_the_guest_is_compared_with_the_current_id():
    """An id of an earlier run does not open this one, and the id sent twice ends it."""
    run = HintRun(SPEC)
    run.handle(HintEvent.HOST_START)
    run.handle(HintEvent.HOST_START)
    run.guest_command(0x80000001)
    assert run.state is HintState.REQUESTED
    run.guest_command(0x80000002)
    assert run.state is HintState.START
    run.guest_command(0x80000002)
    assert run.state is HintState.STOP


@pytest.mark.parametrize(
    ("profile", "while_running"), [(SPEC, 0x80000001), (LINUX, 0x80000001), (QEMU, 0)], ids=["spec", "linux", "qemu"]
)
def test_config_value(profile, while_running):
    """What free_page_hint_cmd_id reads through a run: the id, the profile's choice while it runs, 0, then 1."""
    run = HintRun(profile)
    seen = [run.config_value]
    for event in (HintEvent.HOST_START, HintEvent.GUEST_ID, HintEvent.GUEST_OTHER_ID, HintEvent.HOST_DONE):
        run.handle(event)
        seen.append(run.config_value)
    run.handle(HintEvent.RESET)
    assert [*seen, run.config_value] == [0, 0x80000001, while_running, 0, 1, 0]


def test_active_is_requested_or_started():
    run = HintRun(SPEC)
    active = {}
    for state in HintState:
        run.state = state
        active[state.name] = run.active
    assert active == {"STOP": False, "REQUESTED": True, "START": True, "DONE": False}


@pytest.mark.parametrize("profile", PROFILES.values(), ids=list(PROFILES))
@pytest.mark.parametrize("state", HintState)
def test_saved_and_loaded(state, profile):
    run, other = HintRun(profile), HintRun(profile)
    run.state, run.command_id = state, 0x80001234
    other.load(SavedHints.from_json(run.save().to_json()))
    assert (other.state, other.command_id, other.config_value) == (state, 0x80001234, run.config_value)


@pytest.mark.parametrize(
    "saved",
    [
        {},
        {"state": "RUNNING", "command_id": 0x80000001},
        {"state": "STOP"},
        {"state": "STOP", "command_id": -1},
        {"state": "STOP", "command_id": 1 << 32},
        {"state": "STOP", "command_id": "many"},
        {"state": "STOP", "command_id": None},
        [],
    ],
)
def test_malformed_saved_state(saved):
    """What no `save` returned is refused."""
    with pytest.raises(UsageError, match="saved hint state"):
        SavedHints.from_json(saved)
