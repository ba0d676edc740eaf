"""A qtest client: reads and writes of a QEMU machine's address spaces, and its interrupt lines, over a socket.

One text line a command, one line an answer; lines beginning with ``IRQ`` come at any time.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence

from vring.errors import DeviceError, PeerVanished

__all__ = ["MemoryBus", "QtestClient"]

_SUFFIX = {1: "b", 2: "w", 4: "l", 8: "q"}
PIPELINED = 256
"""Commands sent before their answers are read: both directions stay within any socket buffer."""


class QtestClient:
    """The client's end of a qtest connection. Addresses are guest physical, values unsigned.

    Parameters
    ----------
    connection
        Connected socket; owned from now on.
    timeout
        Seconds to wait for any answer.
    """

    def __init__(self, connection: socket.socket, *, timeout: float = 20.0) -> None:
        self._socket = connection
        self._socket.settimeout(timeout)
        self._data = b""
        self._lines: list[bytes] = []
        self._high: set[int] = set()
        self.commands = 0
        """Commands sent so far."""

    # -- lines ----------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        try:
            data = self._socket.recv(1 << 16)
        except BlockingIOError:
            raise
        except TimeoutError as error:
            raise PeerVanished("qtest: QEMU does not answer") from error
        except OSError as error:
            raise PeerVanished(f"qtest: {error.strerror or error}") from error
        if not data:
            raise PeerVanished("qtest: QEMU closed the connection")
        *lines, self._data = (self._data + data).split(b"\n")
        for line in lines:
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

    def _send(self, text: str) -> None:
        self.commands += 1
        try:
            self._socket.sendall(text.encode())
        except OSError as error:
            raise PeerVanished(f"qtest: {error.strerror or error}") from error

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
        self._send(text + "\n")
        return self._answer(text)

    def commands_in_one(self, texts: Iterable[str]) -> None:
        """Send many commands whose answers say nothing but OK."""
        batch = list(texts)
        for at in range(0, len(batch), PIPELINED):
            part = batch[at : at + PIPELINED]
            self._send("\n".join(part) + "\n")
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

    def look(self) -> None:
        """Take in what has arrived without waiting."""
        timeout = self._socket.gettimeout()
        self._socket.setblocking(False)
        try:
            while True:
                self._receive()
        except BlockingIOError:
            pass
        finally:
            self._socket.settimeout(timeout)

    def is_high(self, line: int) -> bool:
        """Whether an intercepted line is up, as far as was heard."""
        return line in self._high

    @property
    def any_high(self) -> bool:
        """Whether any intercepted line is up, as far as was heard."""
        return bool(self._high)

    def fileno(self) -> int:
        """Return the descriptor, to wait for interrupts."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


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
