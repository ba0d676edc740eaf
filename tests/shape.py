"""The small parts of the harness: what kind of guest and host, what came of a migration, what must not happen."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from wire import Destination

from balloon_dev.device import DEFAULT_FEATURES as DEVICE_FEATURES
from balloon_dev.oracle import Verdict
from balloon_dev.profiles import SPEC, Profile
from guest_driver.balloon import DEFAULT_FEATURES as DRIVER_FEATURES
from guest_driver.balloon import BalloonDriver, FreeAt
from vring.errors import DeviceError, DriverError

MIB = 1 << 20
SMALL_QUEUES = (4, 4, 4, 8, 4)
"""So small that a run of hints does not fit its queue."""
SMALL = replace(SPEC, queue_sizes=SMALL_QUEUES)


class Violation(AssertionError):
    """Something that must always hold does not."""


@dataclass(frozen=True)
class Shape:
    """What kind of guest and host."""

    profile: Profile = SMALL
    regions: tuple[tuple[int, int], ...] = ((0, 48 * MIB),)
    """The first 4 MiB are the kernel's, so that all the rest is whole blocks."""
    device_features: int = DEVICE_FEATURES
    driver_features: int = DRIVER_FEATURES
    batch: int = 4
    free_at: FreeAt = FreeAt.DONE
    driver: type[BalloonDriver] = BalloonDriver
    frees_early: bool = False
    """The driver lets hinted pages go before DONE."""
    log: str = "software"
    model: bool = True
    """Compare the device with the reference table at each step. Off: only the oracles judge."""


PLAIN = Shape()


@dataclass
class FakeClock:
    """Time as the test says; `excluded` is where a witness puts its own."""

    now: float = 0.0
    excluded: float = 0.0


@dataclass
class Arrived:
    """What a migration left behind at its end."""

    phase: str
    verdict: Verdict | None = None
    error: BaseException | None = None
    destination: Destination | None = None


@dataclass
class Tee:
    """Gives what comes over the ring to the reference model and, during a migration, to the oracle."""

    taps: list[Any] = field(default_factory=list)

    def command(self, command_id: int) -> None:
        for tap in self.taps:
            tap.command(command_id)

    def pages(self, addr: Any, length: Any) -> None:
        for tap in self.taps:
            tap.pages(addr, length)


class SoundRing:
    """Both sides are ours: neither may find the other's ring broken."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, DriverError | DeviceError):
            raise Violation(f"a ring broke: {error}") from error
