"""The hint run as the documentation tells it, written down a second time; shares nothing with `balloon_dev.hinting`."""

from __future__ import annotations

from typing import Any


class HintModel:
    """Which state a device must be in, by what the host did and what came over the ring (a `RingTap`)."""

    def __init__(self) -> None:
        self.state = "STOP"
        self.id = 0x80000000
        self.blocks_that_count = 0

    def start(self) -> None:
        self.id = 0x80000000 if self.id == 0xFFFFFFFF else self.id + 1
        self.state = "REQUESTED"

    def stop(self) -> None:
        if self.state in ("REQUESTED", "START"):
            self.state = "STOP"

    def done(self) -> None:
        self.state = "DONE"

    def reset(self) -> None:
        self.state = "STOP"

    def command(self, command_id: int) -> None:
        if self.state == "START":
            self.state = "STOP"
        elif self.state == "REQUESTED" and command_id == self.id:
            self.state = "START"

    def pages(self, addr: Any, length: Any) -> None:
        if self.state == "START":
            self.blocks_that_count += len(addr)
