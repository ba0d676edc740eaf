"""A qtest client: reads and writes of a QEMU machine's address spaces, and its interrupt lines, over a socket.

One text line a command, one line an answer; lines beginning with ``IRQ`` come at any time.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence

from guest_driver.qemu.lines import LineConnection
from vring.errors import DeviceError

__all__ = ["MemoryBus", "QtestClient"]

_SUFFIX = {1: "b", 2: "w", 4: "l", 8: "q"}
PIPELINED = 256
"""Commands sent before their answers are read: both directions stay within any socket buffer."""


class QtestClient(LineConnection):
    """The client's end of a qtest connection. Addresses are guest physical, values unsigned.

    Parameters
    ----------
    connection
        Connected socket; owned from now on.
    timeout
        Seconds to wait for any answer.
    """

    def __init__(self, connection: socket.socket, *, timeout: float = 20.0) -> None:
        super().__init__(connection, "qtest", timeout)
        self._lines: list[bytes] = []
        self._high: set[int] = set()
        self.commands = 0
        """Commands sent so far."""

    # -- lines ----------------------------------------------------------------------------------------------------

    def _line(self, line: bytes) -> None:
        if line.startswith(b"IRQ "):
            self._interrupt(line)
        else:
            self._lines.append(line)

    def _interrupt(self, line: bytes) -> None:
        _, what, number = line.split()
        if what == b"raise":
            self._high.add(int(number))
        else:
            self._high.discard(int(number))

    def _say(self, text: str) -> None:
        self.commands += 1
        self._send(text.encode())

    def _answer(self, command: str) -> list[str]:
        while not self._lines:
            self._receive()
        words = self._lines.pop(0).decode().split()
        if not words or words[0] != "OK":
            raise DeviceError(f"qtest: {command!r} was answered {' '.join(words)!r}")
        return words[1:]

    def command(self, text: str) -> list[str]:
        """Send one command; return the words of its answer after OK.

        Raises
        ------
        DeviceError
            If QEMU refuses it.
        PeerVanished
            If QEMU is gone.
        """
        self._say(text + "\n")
        return self._answer(text)

    def commands_in_one(self, texts: Iterable[str]) -> None:
        """Send many commands whose answers say nothing but OK."""
        batch = list(texts)
        for at in range(0, len(batch), PIPELINED):
            part = batch[at : at + PIPELINED]
            self._say("\n".join(part) + "\n")
            for text in part:
                self._answer(text)

    # -- memory and ports -----------------------------------------------------------------------------------------

    def read(self, address: int, size: int) -> int:
        """Read 1, 2, 4 or 8 bytes with one access of that width."""
        return int(self.command(f"read{_SUFFIX[size]} {address:#x}")[0], 0)

    def write(self, address: int, size: int, value: int) -> None:
        """Write 1, 2, 4 or 8 bytes with one access of that width."""
        self.command(f"write{_SUFFIX[size]} {address:#x} {value & (1 << 8 * size) - 1:#x}")

    def read_port(self, port: int, size: int) -> int:
        """Read an I/O port: 1, 2 or 4 bytes."""
        return int(self.command(f"in{_SUFFIX[size]} {port:#x}")[0], 0)

    def write_port(self, port: int, size: int, value: int) -> None:
        """Write an I/O port: 1, 2 or 4 bytes."""
        self.command(f"out{_SUFFIX[size]} {port:#x} {value:#x}")

    def write_bytes(self, writes: Sequence[tuple[int, int]]) -> None:
        """Write many ``(address, byte)``, one byte each."""
        self.commands_in_one(f"writeb {address:#x} {byte:#x}" for address, byte in writes)

    def clock_step(self, nanoseconds: int) -> None:
        """Let QEMU's virtual clock go on; with ``-accel qtest`` it stands still otherwise."""
        self.command(f"clock_step {nanoseconds}")

    # -- interrupts -----------------------------------------------------------------------------------------------

    def intercept(self, path: str) -> None:
        """Be told of the input lines of an interrupt controller, such as ``/machine/ioapic``; once per machine."""
        self.command(f"irq_intercept_in {path}")

    def is_high(self, line: int) -> bool:
        """Whether an intercepted line is up, as far as was heard."""
        return line in self._high

    @property
    def any_high(self) -> bool:
        """Whether any intercepted line is up, as far as was heard."""
        return bool(self._high)


class MemoryBus:
    """A window of the machine's memory as a bus of registers."""

    def __init__(self, qtest: QtestClient, base: int) -> None:
        self.qtest = qtest
        self.base = base

    def read(self, offset: int, size: int) -> int:
        """Return `size` bytes at `offset`."""
        return self.qtest.read(self.base + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Store `size` bytes at `offset`."""
        self.qtest.write(self.base + offset, size, value)
