"""Migrate an emulator with its balloon, with free page hints, to a second process that goes on with the guest.

The whole recipe: RAM, a dirty log, virtio-mmio registers, `DeviceHints` for the migration, the device's state in the
stream, an oracle that compares every page, and the other end. The "emulator" runs a guest of this project; yours runs
machine code. ``--to ADDRESS`` sends to a receiver that is there already, such as `balloon receive --no-resume`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from balloon_dev.device import SUPPORTED_FEATURES, BalloonDevice
from guest_driver.balloon import BalloonDriver
from guest_driver.memory_manager import Alloc, MemoryManager, Owner
from guest_driver.mmio import MmioTransport
from host_qemu_side.destination import accept, receive
from host_qemu_side.migration import DeviceHints, Limits, Migration, Receiver, ReceiverState
from host_qemu_side.migration.address import parse_address
from host_qemu_side.migration.connecting import connect
from host_qemu_side.migration.records import Ready
from host_qemu_side.witness import Witness
from vring.dirty.combined import CombinedLog
from vring.dirty.software import SoftwareDirtyLog
from vring.memory import GuestMemory
from vring.mmio import MmioDevice

MIB = 1 << 20


class Emulator:
    """A machine with RAM and a balloon behind virtio-mmio."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory, self.running = memory, True
        self.device = BalloonDevice(SUPPORTED_FEATURES)
        self.mmio = MmioDevice(self.device, memory)
        self.log = self.device.dirty_log = SoftwareDirtyLog.for_memory(memory)

    def boot(self) -> None:
        """Start a guest: half of its RAM in use, the rest free, all of it full of what was there before."""
        self.manager = MemoryManager.create(self.memory)
        self.transport = MmioTransport(self.mmio)
        self.driver = BalloonDriver(self.manager, self.transport)
        self.driver.probe()
        self.manager.use_dirty_log(self.log.bits)  # the guest's stores are marked, as an emulator's are
        self.mine = self.manager.alloc_pages_bulk(0, self.manager.free_pages, Owner.WORKLOAD, Alloc.NORETRY).copy()
        self.manager.write(self.mine, 0)
        self.manager.free_bulk(self.mine[len(self.mine) // 2 :], 0)
        self.mine = self.mine[: len(self.mine) // 2]

    def step(self) -> None:
        """A slice of instructions: some stores, the driver's work, and what the device left for later."""
        if not self.running:
            return
        self.manager.write(self.mine[:16], 0)
        self.driver.interrupt(self.transport.interrupts())
        self.driver.step()
        if self.mmio.waiting:
            self.mmio.poll()

    # -- what a migration wants: `GuestControl`, and the device's state -----------------------------------------------

    def freeze(self) -> None:
        """Not one more store, and no queue is served."""
        self.running = False
        self.mmio.hold()

    def thaw(self) -> None:
        """Go on, here after all."""
        self.mmio.release()
        self.running = True

    def save(self) -> dict[str, Any]:
        """Return what the other end needs beside RAM: JSON values."""
        return {"device": self.device.save(), "mmio": self.mmio.save()}

    @classmethod
    def load(cls, memory: GuestMemory, state: dict[str, Any]) -> Emulator:
        """Return the machine that another one saved, still frozen: RAM is there, the device comes first."""
        there = cls(memory)
        there.device.load(state["device"])
        there.mmio.load(state["mmio"])
        there.transport = MmioTransport(there.mmio, running=True)
        there.manager = MemoryManager.attach(memory)
        there.driver = BalloonDriver.attach(there.manager, there.transport, {})
        there.mine = there.manager.owned(Owner.WORKLOAD)[0]
        return there


def send(address: str) -> None:
    """The source: migrate to whoever listens there."""
    emulator = Emulator(GuestMemory.create(64 * MIB))
    emulator.boot()
    # The guest's kernel writes its own structures without marks; an emulator marks every store and needs no `always`.
    log = CombinedLog("emulator", [emulator.log], always=[(0, emulator.manager.kernel.size)])
    witness = Witness(emulator.memory, emulator.device)
    migration = Migration(
        emulator.memory,
        log,
        connect(address),
        emulator,
        hints=DeviceHints(emulator.device, deliver=emulator.mmio.deliver, serve=emulator.mmio.poll),
        limits=Limits(bandwidth=256 * MIB),
        state=emulator.save,
        observer=witness,
    )
    while not migration.finished:
        emulator.step()
        migration.step(witness.clock())
    pages = migration.result.pages()
    print(f"sent: {len(migration.result.rounds)} rounds, {migration.result.bytes_sent >> 20} MiB, pages {pages}")
    verdict = witness.verdict()
    print(
        f"oracle: {verdict.pages_checked} pages compared, {verdict.pages_wrong} wrong, "
        f"{verdict.pages_skipped} differ and may"
    )
    assert not verdict.pages_wrong, verdict.as_dict()
    assert pages["skipped"], "the hints spared nothing"


def take(address: str) -> None:
    """The destination: everything that can fail is done before READY, the guest runs only after COMMIT."""
    machines: list[Emulator] = []

    def build(receiver: Receiver) -> Ready:
        assert receiver.memory is not None
        machines.append(Emulator.load(receiver.memory, dict(receiver.device_state)))
        return Ready()

    receiver = Receiver(inspect=build)
    source = accept(parse_address(address), receiver.hello())
    receive(source, receiver)
    assert receiver.state is ReceiverState.COMMITTED, receiver.cancelled
    there = machines[0]
    there.thaw()
    while there.driver.hinted_blocks:  # DONE is in the config space that came along
        there.step()
    found = there.manager.check_owned(Owner.WORKLOAD)
    there.device.start_hinting()
    there.mmio.deliver()
    while there.driver.statistics()["runs"] < 2:
        there.step()
    print(f"there: {found.pages} pages of the guest checked, {found.wrong} wrong; it answers another run of hints")
    assert not found.wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--receive", metavar="ADDRESS")
    parser.add_argument("--to", metavar="ADDRESS")
    options = parser.parse_args()
    if options.receive:
        take(options.receive)
    elif options.to:
        send(options.to)
    else:
        with tempfile.TemporaryDirectory() as folder:
            address = f"unix:{folder}/migration"
            with subprocess.Popen([sys.executable, __file__, "--receive", address]) as other:
                while not Path(folder, "migration").is_socket() and other.poll() is None:
                    time.sleep(0.02)
                send(address)
            assert other.returncode == 0


if __name__ == "__main__":
    main()
