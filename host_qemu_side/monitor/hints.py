"""Commands for a run of free page hints outside a migration: start, stop, done, state, and one that does it all."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from host_qemu_side.monitor.dispatch import Command, Deferred, Param
from host_qemu_side.monitor.framing import ErrorClass, QmpError
from host_qemu_side.monitor.host import IDLE, Host

__all__ = ["HintCommands"]

U64 = npt.NDArray[np.uint64]
DEADLINE = 10.0
MAX_DEADLINE = 3600.0


@dataclass(slots=True)
class _Run:
    """A run that one of these commands started."""

    command_id: int
    began: float
    resets: int
    """How many drivers were gone when it began."""
    blocks: int = 0
    bytes: int = 0
    seconds: float = 0.0
    ended_by: str | None = None


class HintCommands:
    """The group.

    Parameters
    ----------
    host
        The device.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._run: _Run | None = None
        self._state = host.device.hinting.state
        self._since = time.time()
        self._waiting: Deferred | None = None
        self._deadline = 0.0
        self.held = False
        """Whether the guest may hold pages of a run: one was started, and DONE was not said since."""

    def commands(self) -> list[Command]:
        """Return the commands."""
        deadline = Param("number", required=False, help=f"seconds, {DEADLINE:g} if left out")
        return [
            Command("hint-start", self.start, "start a run of hints; the guest keeps its pages until hint-done"),
            Command("hint-stop", self.stop, "end the run; the guest keeps the pages it has hinted"),
            Command("hint-done", self.done, "let the guest free the pages it has hinted"),
            Command("query-hint", self.query, "state of the run of hints"),
            Command("hint-run", self.run, "a whole run: start, wait for its end, done", {"deadline": deadline}),
        ]

    # -- commands -------------------------------------------------------------------------------------------------

    def _refuse_migration(self) -> None:
        if self._host.migrating():
            raise QmpError("a migration is going on: hinting is its own until it has ended")

    def start(self) -> dict[str, Any]:
        """Start a run; return its command id."""
        host = self._host
        host.memory()
        self._refuse_migration()
        if host.guest is not None and host.guest.paused:
            raise QmpError("the guest is stopped and cannot answer: `cont` first")
        if not host.device.hinting_negotiated:
            raise QmpError("the driver did not accept FREE_PAGE_HINT", ErrorClass.DEVICE_NOT_ACTIVE)
        if not host.backend.can_tell_config:
            raise QmpError(
                "the front end takes no config change notifications: it would not hear of a run",
                ErrorClass.DEVICE_NOT_ACTIVE,
            )
        if not host.backend.running:
            raise QmpError(
                "the driver's rings are stopped, so it would not hear of a run: its machine is paused, or it is gone",
                ErrorClass.DEVICE_NOT_ACTIVE,
            )
        if host.device.hinting.active:
            raise QmpError("a run is going on (query-hint); end it by hint-stop or hint-done first")
        host.device.hint_sink = self._hint
        hinting = host.device.hinting
        self._run = _Run(host.device.start_hinting(), time.monotonic(), hinting.resets)
        self.held = True
        host.backend.deliver()
        return {"command-id": self._run.command_id}

    def stop(self) -> None:
        """End the run, if one is going on."""
        self._refuse_migration()
        self._host.memory()
        self._end("host")
        self._host.device.stop_hinting()
        self._host.backend.deliver()

    def done(self) -> None:
        """Say DONE."""
        self._refuse_migration()
        self._host.memory()
        self.finish()

    def finish(self) -> None:
        """End the run if there is one, and let the guest have its pages."""
        self._end("host")
        self._host.device.finish_hinting()
        self._host.backend.deliver()
        self.held = False

    def query(self) -> dict[str, Any]:
        """Return state (stop, requested, start, done), command id, blocks, bytes, when the state was entered."""
        run, hinting = self._run, self._host.device.hinting
        answer = {
            "state": hinting.state.name.lower(),
            "running": hinting.active,
            "since": round(self._since, 6),
            "migration": self._host.migrating(),
            "command-id": None,
            "blocks": 0,
            "bytes": 0,
            "seconds": 0.0,
            "ended-by": None,
        }
        theirs = self._host.migration_run() if self._host.migrating() else None
        if theirs is not None:
            answer |= {"command-id": theirs.command_id, "blocks": theirs.blocks, "bytes": theirs.bytes}
            answer["seconds"] = round(theirs.seconds, 6)
        elif run is not None:
            answer |= {"command-id": run.command_id, "blocks": run.blocks, "bytes": run.bytes}
            answer |= {"seconds": round(self._seconds(run), 6), "ended-by": run.ended_by}
        return answer | self._host.at_rest()

    def run(self, deadline: float = DEADLINE) -> Deferred:
        """Start a run; the result comes when the guest has ended it and DONE was said, or at the deadline."""
        if not 0 < deadline <= MAX_DEADLINE:
            raise QmpError(f"Parameter 'deadline' expects more than 0 and at most {MAX_DEADLINE:g} seconds")
        self.start()
        self._waiting, self._deadline = Deferred(), time.monotonic() + deadline
        return self._waiting

    # -- what happens ---------------------------------------------------------------------------------------------

    @staticmethod
    def _seconds(run: _Run) -> float:
        return run.seconds if run.ended_by is not None else time.monotonic() - run.began

    def _hint(self, command_id: int, addr: U64, length: U64) -> None:
        """Count; nothing is done with the pages: to drop them while the guest runs is never safe."""
        if self._run is not None and command_id == self._run.command_id:
            self._run.blocks += len(addr)
            self._run.bytes += int(length.sum())

    def _end(self, by: str) -> None:
        run = self._run
        if run is not None and run.ended_by is None:
            run.seconds, run.ended_by = time.monotonic() - run.began, by
            self._host.device.hint_sink = None

    def _result(self, run: _Run) -> dict[str, Any]:
        return {
            "completed": run.ended_by == "guest",
            "ended-by": run.ended_by,
            "command-id": run.command_id,
            "blocks": run.blocks,
            "bytes": run.bytes,
            "seconds": round(run.seconds, 6),
        }

    def front_end_gone(self) -> None:
        """Forget the run of a guest that is gone."""
        self._end("reset")
        self.held = False
        if self._waiting is not None:
            self._waiting.fail(QmpError("the front end went away during the run", ErrorClass.DEVICE_NOT_ACTIVE))
            self._waiting = None

    def tick(self, now: float) -> float:
        """See whether the guest has ended the run, or its time is up."""
        host, run = self._host, self._run
        if run is not None and host.device.hinting.resets != run.resets:
            self._end("reset")
            self.held = False  # the driver that held the pages is gone
        if run is not None and run.ended_by is None and not host.device.hinting.active:
            self._end("guest")  # who ended it on this side has said so before
        if self._waiting is not None and run is not None:
            if run.ended_by is None and now >= self._deadline:
                self._end("deadline")
                host.device.stop_hinting()
            if run.ended_by is not None:
                if run.ended_by in ("guest", "deadline"):
                    self.finish()
                self._waiting.resolve(self._result(run))
                self._waiting = None
        if host.device.hinting.state is not self._state:
            self._state, self._since = host.device.hinting.state, time.time()
            host.emit("HINT_STATE", self.query())
        return IDLE if self._waiting is None else min(max(self._deadline - now, 0.0), IDLE)
