"""The guest's console over two pipes: commands out, output and exit codes back. Never blocks, no threads.

The guest's ``init.sh`` frames each command's output by lines that begin with the byte 0x1e and carry a tag which is
used once, so that output, kernel messages and answers of commands nobody waits for any more are told apart.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass

from vring.backing import close_with
from vring.errors import PeerVanished, UsageError

__all__ = ["CommandResult", "Console"]

_MARK = re.compile(rb"\n?\x1e([RBE]) ([^\n\x1e]*)\n")
_KEEP = 64 << 10
_BEFORE_PANIC = 3
_MOST_TROUBLE = 6
_TROUBLE = re.compile(
    r"\b(err(no|or)?\b|fail|unable|cannot|can't|denied|not permitted|no such|refus|kill|segfault|out of memory)", re.I
)
_HARMLESS = ("Failed to initialize ubd device", "mmapper_init - find_iomem", "zswap: pool creation failed")
"""Beginnings of what a guest without disks says each time it boots."""
_DUMP = re.compile(r"\s*(\[<[0-9a-f]+>\]|([0-9a-f]{8,16}\s*)+$|(Call Trace|Stack|CPU|RIP|Modules linked in|Pid|PID):)")
"""Lines of a kernel's dump of its stack and registers."""


@dataclass(frozen=True, slots=True)
class CommandResult:
    """What a command in the guest gave."""

    command: str
    """The command line."""
    code: int
    """Exit code."""
    output: str
    """Standard output and error, in the order written."""


class Console:
    """Host end of the console pipes.

    Parameters
    ----------
    read_fd, write_fd
        Ends of the pipes from and to the guest; owned by this object from now on and made non-blocking.
    """

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read, self._write = read_fd, write_fd
        self._close_fds = close_with(self, (read_fd, write_fd))
        for fd in (read_fd, write_fd):
            os.set_blocking(fd, False)
        self._buffer = bytearray()
        self._out = bytearray()
        self._transcript = bytearray()
        self._waiting: dict[str, str] = {}
        self._results: dict[str, CommandResult] = {}
        self._serial = 0
        self._from = 0
        self.release: str | None = None
        """Kernel release, once the guest's init runs and takes commands."""
        self.closed = False
        """Whether the guest closed its end: it ended."""

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when the guest wrote something; -1 after `close`."""
        return self._read

    @property
    def transcript(self) -> str:
        """The last 64 KiB the guest wrote, for error messages."""
        return self._transcript.decode(errors="replace")

    def send(self, command: str) -> str:
        """Queue a command line; return the tag to ask `result` for.

        Raises
        ------
        UsageError
            If the command has a line break in it.
        PeerVanished
            If the guest ended.
        """
        if "\n" in command or "\0" in command:
            raise UsageError("a guest command is one line; separate commands by semicolons")
        if self.closed:
            raise PeerVanished(f"the guest ended; its last words: {self.last_words()}")
        self._serial += 1
        tag = f"c{self._serial}"
        self._waiting[tag] = command
        self._out += f"{tag} {command}\n".encode()
        self.pump()
        return tag

    def result(self, tag: str) -> CommandResult | None:
        """Return, once, the result of the command with that tag; None while it is not there."""
        return self._results.pop(tag, None)

    def pump(self) -> bool:
        """Write what is queued, read what is there; return whether anything moved."""
        moved = False
        try:
            while self._out:
                del self._out[: os.write(self._write, self._out)]
                moved = True
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._out.clear()
        with contextlib.suppress(BlockingIOError):
            while not self.closed:
                data = os.read(self._read, 1 << 16)
                self.closed = not data
                self._buffer += data
                self._transcript += data
                moved = True
        if moved:
            del self._transcript[:-_KEEP]
            self._parse()
        return moved

    def _parse(self) -> None:
        # _from: where a marker may still begin, so that long output is not searched again and again
        while match := _MARK.search(self._buffer, max(0, self._from - 1)):
            kind, words = match.group(1), match.group(2).decode(errors="replace").split(" ")
            if kind == b"R":
                self.release = words[0]
            elif kind == b"E" and words[0] in self._waiting and len(words) == 2 and words[1].isdigit():
                text = bytes(self._buffer[: match.start()]).decode(errors="replace")
                command = self._waiting.pop(words[0])
                self._results[words[0]] = CommandResult(command, int(words[1]), text)
            elif not (kind == b"B" and words[0] in self._waiting):
                self._from = match.end()  # looks like a marker, is output
                continue
            del self._buffer[: match.end()]
            self._from = 0
        last = self._buffer.rfind(b"\x1e")
        self._from = last if last >= 0 else len(self._buffer)
        if not self._waiting and self.release is not None:
            self._buffer.clear()
            self._from = 0

    def last_words(self) -> str:
        """Return, on one line, the end (of a kernel that panicked: until the panic) and what told of failure before.

        A panic often says only that the first program ended; why stands before it, sometimes far before it.
        """
        text = self.transcript.replace("\x1e", "")
        lines = [line.strip() for line in text.splitlines() if line.strip() and not _DUMP.match(line)]
        panic = next((i for i, line in enumerate(lines) if "Kernel panic" in line), None)
        first, end = (len(lines) - 6, len(lines)) if panic is None else (panic - _BEFORE_PANIC, panic + 1)
        first = max(0, first)
        trouble = [line for line in lines[:first] if _TROUBLE.search(line) and not line.startswith(_HARMLESS)]
        return " | ".join([*trouble[-_MOST_TROUBLE:], *lines[first:end]]) or "(none)"

    def close(self) -> None:
        """Close both pipes."""
        self._close_fds()
        self._read = self._write = -1
        self.closed = True
