"""An emulator of one's own: its device's hints for a migration, both ends of a stream, and the oracle."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections import deque

import numpy as np
import pytest
from mmio_pair import MmioPair

from guest_driver.memory_manager import Owner
from host_qemu_side.destination import accept, receive
from host_qemu_side.migration import DeviceHints, Limits, Migration, Phase, Receiver, ReceiverState, StreamError
from host_qemu_side.migration.address import parse_address
from host_qemu_side.migration.connecting import connect
from host_qemu_side.migration.output import SocketOutput
from host_qemu_side.migration.stream import Kind, StreamReader, StreamWriter
from host_qemu_side.witness import Witness
from vring.dirty.combined import CombinedLog
from vring.dirty.software import SoftwareDirtyLog
from vring.memory import GuestMemory


class Machine(MmioPair):
    """The pair behind registers as an emulator: it can be frozen, and knows what was written."""

    def __init__(self, **options):
        super().__init__(mib=32, **options)
        self.running = True
        self.log = self.device.dirty_log = SoftwareDirtyLog.for_memory(self.memory)
        self.manager.use_dirty_log(self.log.bits)
        pages = self.manager.alloc_pages_bulk(0, 6000, Owner.WORKLOAD).copy()
        self.manager.write(pages, 0)
        self.pages = pages[:1000]
        self.manager.free_bulk(pages[1000:], 0)  # and full of content

    def freeze(self):
        self.running = False
        self.mmio.hold()

    def thaw(self):
        self.mmio.release()
        self.running = True

    def step(self):
        if self.running:
            self.manager.write(self.pages[:5], 0)
            self.driver.interrupt(self.transport.interrupts())
            self.driver.step()

    def migrate(self, output, *, witness=None, bandwidth=0, **options):
        log = CombinedLog("test", [self.log], always=[(0, self.manager.kernel.size)])
        hints = DeviceHints(self.device, deliver=self.mmio.deliver, serve=self.mmio.poll)
        limits = Limits(bandwidth=bandwidth, answer=60)
        return Migration(self.memory, log, output, self, hints=hints, limits=limits, observer=witness, **options)

    def run(self, migration, clock):
        while not migration.finished:
            self.step()
            migration.step(clock())
        return migration.result


class Receiving:
    """A receiver behind a socket, in a thread; `say` is what it says first."""

    def __init__(self, say=None):
        self.receiver = Receiver()
        here, there = socket.socketpair()
        self.output, self._there, self.error = SocketOutput(here), there, None
        self.address = parse_address(f"fd:{there.fileno()}")
        there.detach()
        self._say = self.receiver.hello() if say is None else say
        self._thread = threading.Thread(target=self._receive)
        self._thread.start()

    def _receive(self):
        try:
            source = accept(self.address, self._say)
            receive(source, self.receiver)
            source.close()
        except Exception as error:
            self.error = error

    def join(self):
        self.output.close()
        self._thread.join(10)
        return self.receiver


@pytest.mark.parametrize("on_notify", [True, False])
def test_hints_of_a_device_behind_mmio(on_notify):
    """The port of the library and both ends as the documentation connects them; every page is judged."""
    with Machine(on_notify=on_notify) as machine:
        there = Receiving()
        witness = Witness(machine.memory, machine.device)
        migration = machine.migrate(there.output, witness=witness, bandwidth=128 << 20)
        result = machine.run(migration, witness.clock)
        receiver = there.join()
        assert there.error is None
        assert receiver.state is ReceiverState.COMMITTED
        assert result.hint_runs[0].blocks > 2
        verdict = witness.verdict()
        assert verdict.pages_checked == machine.memory.size // 4096
        assert verdict.pages_wrong == 0, verdict.as_dict()
        assert verdict.pages_skipped > 500
        assert machine.device.hint_sink is None
        assert not machine.device.hinting.active
        receiver.memory.close()


def test_the_oracle_sees_a_page_that_is_wrong():
    with Machine() as machine:
        there = Receiving()
        witness = Witness(machine.memory, machine.device)
        machine.run(machine.migrate(there.output, witness=witness), witness.clock)
        digests = witness.destination.copy()
        there.join().memory.close()
        wrong = int(machine.pages[7])
        digests[wrong] ^= np.uint64(1)
        verdict = witness.verdict(digests)
        assert verdict.pages_wrong == 1
        assert verdict.wrong[0].page == wrong


def test_the_oracle_without_digests_says_so():
    memory = GuestMemory.create(1 << 20)
    verdict = Witness(memory, None).verdict()
    assert verdict.pages_wrong == 256
    assert "0 and 256" in verdict.wrong[0].why or "256 and 0" in verdict.wrong[0].why
    memory.close()


def test_a_driver_that_takes_no_hints():
    """`start` says that nobody is there; the migration goes without."""
    with Machine(accept=1 << 32) as machine:
        assert DeviceHints(machine.device, deliver=machine.mmio.deliver).start() is None
        there = Receiving()
        witness = Witness(machine.memory, machine.device)
        result = machine.run(machine.migrate(there.output, witness=witness), witness.clock)
        there.join().memory.close()
        assert not result.hint_runs
        assert witness.verdict().pages_wrong == 0


def test_a_failed_migration_gives_everything_back():
    with Machine() as machine:
        migration = machine.migrate(deque)  # no output at all
        with pytest.raises(AttributeError):
            machine.run(migration, lambda: 0.0)
        assert migration.phase is Phase.FAILED
        machine.settle()
        assert machine.running
        assert machine.driver.hinted_blocks == 0


# -- HELLO --------------------------------------------------------------------------------------------------------


class Slow:
    """An output into a receiver in this process, which greets when the test says."""

    two_way = True

    def __init__(self, greet_at):
        self.receiver, self.greet_at = Receiver(), list(greet_at)
        self._there, self._back = StreamReader(), StreamReader()

    def _greet(self, what):
        if what in self.greet_at:
            self.greet_at.remove(what)
            for part in self.receiver.hello():
                self._back.feed(part)

    def send(self, buffers):
        for buffer in buffers:
            self._there.feed(buffer)
        while (record := self._there.next()) is not None:
            self._greet(record.kind.name)
            for part in self.receiver.handle(record):
                self._back.feed(part)

    def flush(self):
        return True

    def answer(self):
        return self._back.next()

    def finish(self):
        pass


@pytest.mark.parametrize("greet_at", [[], ["HEADER"], ["PAGES"], ["STATE"], ["END"]])
def test_a_receiver_may_greet_when_it_has_come_to_it(greet_at):
    """A stream may be out before the receiver has accepted its connection; one in this process need not greet."""
    with Machine() as machine:
        output = Slow(greet_at)
        machine.run(machine.migrate(output), lambda: 0.0)
        assert output.receiver.state is ReceiverState.COMMITTED
        output.receiver.memory.close()


def test_it_greets_once():
    with Machine() as machine, pytest.raises(StreamError, match="HELLO"):
        machine.run(machine.migrate(Slow(["HEADER", "END"])), lambda: 0.0)


def test_a_receiver_of_another_version_is_refused():
    with Machine() as machine:
        there = Receiving(StreamWriter().json(Kind.HELLO, {"version": 99}))
        with pytest.raises(StreamError, match="version"):
            machine.run(machine.migrate(there.output), lambda: 0.0)
        there.join()
        assert machine.running


def test_against_the_command(tmp_path):
    """`balloon receive` takes an emulator's stream and checks it, with no more than `connect` and `Migration`."""
    path = tmp_path / "socket"
    command = [sys.executable, "-m", "balloon_cli", "receive", f"unix:{path}", "--no-resume"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert "waiting" in said, said
        with Machine() as machine:
            witness = Witness(machine.memory, machine.device)
            output = connect(f"unix:{path}")
            machine.run(machine.migrate(output, witness=witness), witness.clock)
            rest = process.stdout.read()
            output.close()
        assert process.wait(30) == 0, rest
    assert witness.verdict().pages_wrong == 0
