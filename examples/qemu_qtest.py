"""Drive the balloon of an unmodified QEMU without a guest kernel: inflate, statistics, deflate, a hint run.

QEMU is started with qtest, a text protocol that reads and writes its registers; RAM is a memfd that both map, so the
driver's rings lie where QEMU looks for them. Needs the package qemu-system-x86; says so and ends with 3 without it.
"""

from __future__ import annotations

import sys

from guest_driver.qemu import QemuGuest, QemuMachine, QemuOptions, migrate
from vring.errors import MissingFacility

MIB = 1 << 20


def main() -> None:
    """Start QEMU, use its balloon, and migrate to a second QEMU."""
    options = {"memory": 64 * MIB, "reporting": False, "poison": False}
    with QemuMachine(QemuOptions(**options)) as machine, QemuMachine(QemuOptions(incoming=True, **options)) as second:
        print(f"{machine.binary.version}, {machine.binary.path}")
        guest = QemuGuest.boot(machine, workload="churn:15%@4M")

        machine.set_balloon(1000)
        guest.run_until(lambda: machine.balloon_pages() == 1000, 5, "the balloon")
        print(f"inflated: QEMU says {machine.balloon_pages()} pages")

        machine.ask_for_statistics()
        guest.run_until(lambda: guest.driver.statistics()["stats_sent"] > 0, 5, "statistics")
        print(f"statistics: {machine.statistics()['stats']['stat-free-memory'] >> 20} MiB free")

        machine.set_balloon(0)
        guest.run_until(lambda: machine.balloon_pages() == 0, 5, "the balloon")

        outcome = migrate(guest, second)
        hinted = sum(run.blocks for run in outcome.hinted) * 4
        print(
            f"migrated: {outcome.bytes_sent >> 20} MiB sent, {hinted} MiB hinted, {outcome.verdict.pages_wrong} wrong"
        )

        guest = QemuGuest.attach(second)
        second.qmp.execute("cont")
        guest.run_until(lambda: guest.driver.hinted_blocks == 0, 5, "DONE")
        print(f"goes on there: {guest.manager.free_pages >> 8} MiB free")


if __name__ == "__main__":
    try:
        main()
    except MissingFacility as error:
        print(error, file=sys.stderr)
        sys.exit(3)
