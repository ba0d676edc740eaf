"""Workloads: what the guest does with its memory while it is migrated.

A workload is given as text (`parse_workload`), set up in bounded steps, and then stepped. Its position and random state
are in guest RAM, so the guest that goes on elsewhere does what this one would have done next.
"""

from __future__ import annotations

import math

from guest_driver.content import mix64
from guest_driver.memory_manager import CheckResult, MemoryManager, Owner, Pfns
from guest_driver.workloads.parts import Part, make_part, words_of
from guest_driver.workloads.spec import (
    FORMS,
    BuildSpec,
    ChurnSpec,
    IdleSpec,
    PartSpec,
    WriterSpec,
    parse_workload,
)
from guest_driver.workloads.state import Words
from vring.errors import UsageError, VirtioError

__all__ = [
    "FORMS",
    "BuildSpec",
    "ChurnSpec",
    "IdleSpec",
    "PartSpec",
    "Workload",
    "WriterSpec",
    "parse_workload",
]

PIECE = "workload"
MAGIC = int.from_bytes(b"VBWORKLD", "little")
MAX_WORDS = (64 << 10) // 8
_SEED, _AT, _BYTES, _TEXT, _PARTS = 1, 2, 3, 8, 64


class Workload:
    """A workload over a guest's memory. Make one with `create` or `attach`."""

    def __init__(self, manager: MemoryManager, text: str, words: Words) -> None:
        self.manager = manager
        self.text = text
        """As given to `create`."""
        self._words = words
        self.parts: list[Part] = []
        at = _PARTS
        for i, spec in enumerate(parse_workload(text)):
            self.parts.append(make_part(manager, spec, words[at : at + words_of(spec)], 1 + 2 * i))
            at += words_of(spec)
        self._next = [-math.inf] * len(self.parts)

    @classmethod
    def create(cls, manager: MemoryManager, text: str, *, seed: int = 0) -> Workload:
        """Begin a workload; call `setup` or `setup_step` next.

        Parameters
        ----------
        manager
            The guest's memory; 2 to 36 KiB of its kernel area are used.
        text
            Such as ``churn+writer:64M@20M``; see `FORMS`.
        seed
            64 bits.

        Raises
        ------
        UsageError
            If the text makes no sense, the guest has a workload already, or the kernel area is full.
        """
        size = _PARTS + sum(words_of(spec) for spec in parse_workload(text))
        if size > MAX_WORDS:
            raise UsageError(f"workload {text!r} needs {size * 8} bytes of state, at most {MAX_WORDS * 8} are kept")
        gpa = manager.kernel.reserve(PIECE, size * 8, 64)
        words = manager.memory.array(gpa, size, "<u8")
        raw = text.encode()
        words[_SEED] = seed & (1 << 64) - 1
        words[_BYTES] = len(raw)
        words[_TEXT : _TEXT + 32].view("u1")[: len(raw)] = list(raw)
        words[0] = MAGIC
        workload = cls(manager, text, words)
        for i, part in enumerate(workload.parts):
            part.random.seed(mix64(seed) + i)
        return workload

    @classmethod
    def attach(cls, manager: MemoryManager) -> Workload:
        """Go on with the workload in this RAM, from the very step where it was.

        Raises
        ------
        VirtioError
            If there is none, or it is damaged.
        """
        piece = manager.kernel.pieces.get(PIECE)
        if piece is None:
            raise VirtioError("this guest has no workload to go on with")
        words = manager.memory.array(piece[0], piece[1] // 8, "<u8")
        length = int(words[_BYTES])
        if int(words[0]) != MAGIC or length > 256:
            raise VirtioError("the workload state of this guest is damaged")
        text = words[_TEXT : _TEXT + 32].view("u1")[:length].tobytes().decode(errors="replace")
        workload = cls(manager, text, words)
        if workload.is_set_up:
            workload._ready()
        return workload

    @property
    def seed(self) -> int:
        """As given to `create`, 64 bits."""
        return int(self._words[_SEED])

    @property
    def is_set_up(self) -> bool:
        """Whether setup is finished."""
        return int(self._words[_AT]) == len(self.parts)

    @property
    def pages_written(self) -> int:
        """Pages written since setup."""
        return sum(part.done for part in self.parts)

    def setup_step(self) -> bool:
        """Do a piece of the setup that takes up to about 2 ms; return whether all of it is finished.

        Raises
        ------
        UsageError
            If memory is too small.
        """
        if self.is_set_up:
            return True
        at = int(self._words[_AT])
        if not self.parts[at].setup_step():
            return False
        self._words[_AT] = at + 1
        if at + 1 < len(self.parts):
            return False
        self._ready()
        return True

    def setup(self) -> None:
        """Do all of the setup; parts in the order given."""
        while not self.setup_step():
            pass

    def _ready(self) -> None:
        for part in self.parts:
            part.ready()

    def step(self, now: float) -> float:
        """Do a piece of work that takes up to about 2 ms per part.

        Parameters
        ----------
        now
            Seconds on any clock that does not go back. It may be another clock after `attach`.

        Returns
        -------
        float
            When to be called next, seconds on that clock; infinity for never.

        Raises
        ------
        UsageError
            If setup is not finished.
        """
        if not self.is_set_up:
            raise UsageError("a workload steps only after its setup is finished")
        for i, part in enumerate(self.parts):
            if self._next[i] <= now:
                self._next[i] = part.step(now)
        return min(self._next)

    def pages(self) -> Pfns:
        """Return the first pages of all blocks it owns, ascending."""
        pfns, _ = self.manager.owned(Owner.WORKLOAD)
        return pfns

    def check(self) -> CheckResult:
        """Compare every page it owns with the version and content it should have."""
        return self.manager.check_owned(Owner.WORKLOAD)

    def rewrite_same(self, pfns: Pfns) -> int:
        """Store the content that pages have already once more (still a write to any dirty log). Returns pages."""
        return self.manager.write(pfns, bump=0)
