"""Free page hinting as the host sees it: one run of hints, as a table.

A run goes ``STOP -> REQUESTED -> START -> STOP ... -> DONE``. The host requests hints by publishing a new command id
in the config space; the guest answers with that id on the free page queue (START), then its free blocks, then a stop.
The host may stop a run (STOP: the guest keeps the blocks), request another with a new id, and finally says DONE (the
guest frees them). `TABLE` below is the whole behaviour; the diagram in ``docs/hinting.md`` is drawn from it.

No I/O, no clock, no memory: what a page of a hint is, others know.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Self

from balloon_dev.profiles import Profile
from balloon_dev.rules import Late, Rule
from vring.decode import U32, Fields, Refusal
from vring.errors import UsageError

__all__ = [
    "CMD_ID_DONE",
    "CMD_ID_STOP",
    "TABLE",
    "Action",
    "HintEvent",
    "HintRun",
    "HintState",
    "SavedHints",
    "Transition",
]

CMD_ID_STOP = 0
"""Command id 0: stop hinting, keep the pages hinted so far (VIRTIO 5.5.6.5)."""
CMD_ID_DONE = 1
"""Command id 1: all is over, hinted pages may be released."""


class HintState(Enum):
    """Where a run stands."""

    STOP = auto()
    REQUESTED = auto()
    START = auto()
    DONE = auto()


class HintEvent(Enum):
    """What can happen to a run."""

    HOST_START = "host starts a run"
    HOST_STOP = "host stops"
    HOST_DONE = "host is done"
    GUEST_ID = "guest sends the current id"
    GUEST_OTHER_ID = "guest sends any other command"
    GUEST_PAGES = "guest sends pages"
    RESET = "device reset"


class Action(Enum):
    """What the device does beside changing state."""

    NEW_ID = "take the next id, publish it, config interrupt"
    PUBLISH = "publish, config interrupt"
    APPLY = "apply the hint"
    NOTHING = "nothing"
    IGNORE = "return the buffer without effect"


@dataclass(frozen=True, slots=True)
class Transition:
    """One cell of the table."""

    next: HintState
    action: Action


def _table() -> dict[tuple[HintState, HintEvent], Transition]:
    state, event, act = HintState, HintEvent, Action
    table = {}
    for s in state:
        # What holds in every state unless a line below says otherwise.
        table[s, event.HOST_START] = Transition(state.REQUESTED, act.NEW_ID)
        table[s, event.HOST_STOP] = Transition(s, act.NOTHING)
        table[s, event.HOST_DONE] = Transition(state.DONE, act.PUBLISH)
        table[s, event.GUEST_ID] = Transition(s, act.IGNORE)
        table[s, event.GUEST_OTHER_ID] = Transition(s, act.IGNORE)
        table[s, event.GUEST_PAGES] = Transition(s, act.IGNORE)
        table[s, event.RESET] = Transition(state.STOP, act.NOTHING)
    table[state.DONE, event.HOST_DONE] = Transition(state.DONE, act.NOTHING)
    table[state.REQUESTED, event.HOST_STOP] = Transition(state.STOP, act.PUBLISH)
    table[state.START, event.HOST_STOP] = Transition(state.STOP, act.PUBLISH)
    table[state.REQUESTED, event.GUEST_ID] = Transition(state.START, act.NOTHING)
    table[state.START, event.GUEST_PAGES] = Transition(state.START, act.APPLY)
    # Any command during a run ends it: the guest is out of pages. A repeated id counts as such, as in QEMU.
    table[state.START, event.GUEST_ID] = Transition(state.STOP, act.NOTHING)
    table[state.START, event.GUEST_OTHER_ID] = Transition(state.STOP, act.NOTHING)
    return table


TABLE = _table()


@dataclass(frozen=True, slots=True)
class SavedHints:
    """What a migration carries of a `HintRun`."""

    state: HintState
    command_id: int

    @classmethod
    def from_json(cls, value: Any, refusal: Refusal = UsageError) -> Self:
        """Check what `to_json` returned.

        Raises
        ------
        VirtioError
            What `refusal` makes, if it is malformed.
        """
        said = Fields(value, "saved hint state", refusal)
        return cls(said.choice("state", dict(HintState.__members__)), said.integer("command_id", 0, U32))

    def to_json(self) -> dict[str, int | str]:
        """Return it as JSON values."""
        return {"state": self.state.name, "command_id": self.command_id}


class HintRun:
    """State of free page hinting in a device.

    Parameters
    ----------
    profile
        Decides the range of ids and what the config field shows during a run.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.state = HintState.STOP
        self.command_id = profile.id_initial
        """Id of the current or last run (before the first run: the counter's start)."""
        self.resets = 0
        """How often a driver was gone: a run that went on then ended without the guest."""
        self._issued = 0
        self._driver_id: int | None = None  # with which the driver opened a run last
        self._driver_sends = False  # whether the driver's last command opened a run, by its own lights

    def handle(self, event: HintEvent) -> Action:
        """Let `event` happen; return what the device has to do."""
        transition = TABLE[self.state, event]
        self.state = transition.next
        if transition.action is Action.NEW_ID:
            self.command_id = self.profile.id_min if self.command_id >= self.profile.id_max else self.command_id + 1
            self._issued += 1
        elif event is HintEvent.RESET:
            self.resets += 1
            self._driver_id, self._driver_sends = None, False
        return transition.action

    def guest_command(self, command_id: int) -> Action:
        """Let the guest's command happen: the current id, or any other."""
        return self.handle(HintEvent.GUEST_ID if command_id == self.command_id else HintEvent.GUEST_OTHER_ID)

    def scatter(self) -> None:
        """Let the ids go on from anywhere: the guest may have seen some that this device knows nothing of, and would
        take no notice of one that it has answered before.
        """
        self.command_id = self.profile.id_min + secrets.randbelow(self._ids)
        self._issued, self._driver_id, self._driver_sends = self._ids, None, True

    def judge_command(self, command_id: int) -> Rule | Late | None:
        """Tell what is wrong with a command, before `guest_command` lets it happen; None: nothing."""
        before, self._driver_id, self._driver_sends = self._driver_id, None, False
        if command_id == CMD_ID_STOP:
            self._driver_id = before
            return None if self.state is HintState.START else Late.COMMAND
        if not self._was_issued(command_id):
            return Rule.HINT_COMMAND_ID
        self._driver_id, self._driver_sends = command_id, True
        if command_id == before:
            return Rule.HINT_ID_TWICE
        if self.state is HintState.START:
            return Rule.HINT_COMMAND_ID
        return None if self.state is HintState.REQUESTED and command_id == self.command_id else Late.COMMAND

    def judge_pages(self) -> Rule | Late | None:
        """Tell what is wrong with pages that come now; None: nothing."""
        if self.state is HintState.START:
            return None
        return Late.HINT if self._driver_sends else Rule.HINT_OUTSIDE_RUN

    def _was_issued(self, command_id: int) -> bool:
        inside = self.profile.id_min <= command_id <= self.profile.id_max
        return inside and (self.command_id - command_id) % self._ids < self._issued

    @property
    def _ids(self) -> int:
        return self.profile.id_max - self.profile.id_min + 1

    @property
    def active(self) -> bool:
        """Whether hints may come in: requested or running."""
        return self.state in (HintState.REQUESTED, HintState.START)

    @property
    def config_value(self) -> int:
        """What ``free_page_hint_cmd_id`` in the config space reads."""
        if self.state is HintState.REQUESTED:
            return self.command_id
        if self.state is HintState.START and self.profile.config_shows_id_while_running:
            return self.command_id
        return CMD_ID_DONE if self.state is HintState.DONE else CMD_ID_STOP

    def save(self) -> SavedHints:
        """Return what a migration carries."""
        return SavedHints(self.state, self.command_id)

    def load(self, saved: SavedHints) -> None:
        """Take over saved state."""
        self.state, self.command_id = saved.state, saved.command_id
        # What the driver has sent is not told: it gets the benefit of the doubt.
        self._issued = (saved.command_id - self.profile.id_initial) % self._ids
        self._driver_id = saved.command_id if saved.state is HintState.START else None
        self._driver_sends = True
