"""Every feature of QEMU's balloon but hinting, used once by the guest driver: does the real device do its part?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from balloon_dev.features import ALL_BALLOON_FEATURES, BalloonFeature, feature_names
from guest_driver.balloon.state import REPORT_DELAY
from guest_driver.memory_manager import HINT_ORDER, Alloc, Owner
from guest_driver.qemu.guest import QemuGuest
from vring import bitmap
from vring.contents import populated
from vring.features import CommonFeature

__all__ = ["Exercise", "exercise"]

TIMEOUT = 20.0


@dataclass(slots=True)
class Exercise:
    """What was done and what the device did; pages have 4096 bytes."""

    features: list[str]
    """Balloon features negotiated."""
    ring_features: list[str]
    """Ring features negotiated."""
    inflated_pages: int = 0
    """In the balloon, by QEMU's ``query-balloon``."""
    dropped_pages: int = 0
    """Of these without memory behind them any more: QEMU discarded them."""
    deflated_pages: int = 0
    statistics_match: bool = False
    """QEMU's ``guest-stats`` are what the guest said."""
    reported_pages: int = 0
    """Reported free and acknowledged; 0 without that feature."""
    reported_dropped_pages: int = 0
    oom_deflated_pages: int = 0
    """Taken back from the balloon because memory had run out; 0 without that feature."""

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    def findings(self) -> list[str]:
        """Return what is wrong, one line each."""
        found = []
        if not self.inflated_pages or self.dropped_pages != self.inflated_pages:
            found.append(f"of {self.inflated_pages:,} pages in the balloon QEMU dropped {self.dropped_pages:,}")
        if self.deflated_pages != self.inflated_pages:
            found.append(f"{self.deflated_pages:,} of {self.inflated_pages:,} pages came out of the balloon")
        if "stats" in self.features and not self.statistics_match:
            found.append("QEMU's statistics are not what the guest said")
        if "reporting" in self.features and (
            not self.reported_pages or self.reported_dropped_pages != self.reported_pages
        ):
            found.append(f"of {self.reported_pages:,} reported pages QEMU dropped {self.reported_dropped_pages:,}")
        if "deflate-on-oom" in self.features and not self.oom_deflated_pages:
            found.append("no page came out of the balloon when memory ran out")
        return found


def exercise(guest: QemuGuest, pages: int = 4096) -> Exercise:
    """Inflate, deflate, statistics, reporting and deflate on OOM, as far as negotiated; leaves the balloon empty.

    Parameters
    ----------
    guest
        Booted, with an idle workload.
    pages
        Size of the balloon.

    Raises
    ------
    PeerVanished
        If the device does not do its part in time.
    """
    driver, features = guest.driver, guest.driver.features
    rings = [f.name or "" for f in CommonFeature if features & f]
    done = Exercise(feature_names(features & ALL_BALLOON_FEATURES), rings)
    _fill(guest)
    _inflate(guest, pages)
    done.inflated_pages = guest.machine.balloon_pages()
    done.dropped_pages = _holes(guest, guest.manager.bitmap(Owner.BALLOON))
    _inflate(guest, 0)
    done.deflated_pages = done.inflated_pages - guest.machine.balloon_pages()
    if features & BalloonFeature.STATS_VQ:
        done.statistics_match = _statistics(guest)
    if features & BalloonFeature.REPORTING:
        _fill(guest)
        before, holes = driver.statistics()["reported"], _holes(guest, guest.manager.bitmap(free=True))
        guest.skip(REPORT_DELAY + 0.1)
        guest.run_until(lambda: driver.statistics()["reported"] > before, TIMEOUT, "a report to be acknowledged")
        guest.run_until(lambda: not guest.driver.step(), TIMEOUT, "the pass of reports to end")
        done.reported_pages = (driver.statistics()["reported"] - before) << HINT_ORDER
        done.reported_dropped_pages = _holes(guest, guest.manager.bitmap(free=True)) - holes
    if features & BalloonFeature.DEFLATE_ON_OOM:
        done.oom_deflated_pages = _out_of_memory(guest, pages)
    guest.manager.verify()
    return done


def _fill(guest: QemuGuest) -> None:
    """Have memory behind every free page."""
    manager = guest.manager
    blocks = manager.alloc_pages_bulk(HINT_ORDER, manager.free_blocks(HINT_ORDER), Owner.KERNEL, Alloc.NORETRY)
    manager.write(blocks, HINT_ORDER)
    manager.free_bulk(blocks.copy(), HINT_ORDER)


def _inflate(guest: QemuGuest, pages: int) -> None:
    guest.machine.set_balloon(pages)
    guest.run_until(lambda: guest.machine.balloon_pages() == pages, TIMEOUT, f"a balloon of {pages} pages")


def _holes(guest: QemuGuest, pages: bitmap.Bitmap) -> int:
    """Return how many of these pages have no memory behind them."""
    memory = guest.memory
    wanted = memory.page_layout.pick(bitmap.to_bools(pages, memory.page_span))
    return int(np.count_nonzero(wanted & ~populated(memory).to_bools()))


def _statistics(guest: QemuGuest) -> bool:
    machine, driver = guest.machine, guest.driver
    before = driver.statistics()["stats_sent"]
    machine.ask_for_statistics()
    guest.run_until(lambda: driver.statistics()["stats_sent"] > before, TIMEOUT, "QEMU to ask for statistics")
    machine.ask_for_statistics(0)
    said = machine.statistics()["stats"]
    truth = {tag.name: value for tag, value in driver.memory_statistics().items()}
    names = {"FREE_MEMORY": "stat-free-memory", "TOTAL_MEMORY": "stat-total-memory"}
    return all(said[qemu] == truth[mine] for mine, qemu in names.items())


def _out_of_memory(guest: QemuGuest, pages: int) -> int:
    """Fill the balloon, then allocate more than is left; return how many pages came out of the balloon for that."""
    manager, driver = guest.manager, guest.driver
    _inflate(guest, pages)
    before = driver.statistics()["oom_deflated"]
    rest = manager.alloc_pages_bulk(0, manager.free_pages, Owner.KERNEL, Alloc.NORETRY)
    more = manager.alloc_pages_bulk(0, 256, Owner.KERNEL)
    manager.free_bulk(more.copy())
    manager.free_bulk(rest.copy())
    _inflate(guest, 0)
    return driver.statistics()["oom_deflated"] - before
