"""The command line in a terminal: frames with a map of guest RAM, and everything left as it was."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import time
from typing import Any

import numpy as np
import pytest
from cli_support import MIGRATE

from balloon_cli.live import CELLS, FREE, HINTED, SENT, SOME, TO_SEND, RamMap
from guest_driver.waiting import wait_readable
from host_qemu_side.migration.ram import RamState
from vring.memory import PAGE_SIZE, GuestMemory


def in_terminal(*arguments: str, **environment: str) -> tuple[bytes, int, list[Any], list[Any]]:
    """Run in a pseudo-terminal of 100 by 40; return what it wrote, its exit code, and termios before and after."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    before = termios.tcgetattr(slave)
    names = {"NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "CI", "TTY_COMPATIBLE", "TTY_INTERACTIVE"}
    env = {k: v for k, v in os.environ.items() if k not in names}
    env |= {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **environment}
    process = subprocess.Popen(arguments, stdin=slave, stdout=slave, stderr=slave, env=env)
    data, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        if wait_readable([master], 0.1):
            data += os.read(master, 1 << 16)
        elif process.poll() is not None:
            break
    process.kill()
    code = process.wait()
    after = termios.tcgetattr(slave)
    os.close(master)
    os.close(slave)
    return data, code, before, after


@pytest.mark.parametrize("colour", [True, False])
def test_a_terminal_shows_frames_with_a_map_and_is_left_as_it_was(colour: bool) -> None:
    command = [*MIGRATE, "--hints", "on", "--bandwidth", "8M"]
    data, code, before, after = in_terminal(*command, **({} if colour else {"NO_COLOR": "1"}))
    text = data.decode()
    assert code == 0, text
    assert after == before
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l"), "the cursor is visible"
    assert text.count("/cell") >= 3, "frames"
    assert text.count("/cell") < 60, "no more than about eight per second"
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]", text)) is colour
    for kind in CELLS:
        assert kind[0] in text
    for what in ("hint run 0x80000001", "round 1", "left", "/s", "sent"):
        assert what in text
    assert "oracle, with hints: good" in re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_map_of_ram_shows_what_is_in_the_bitmaps() -> None:
    with GuestMemory.create([(0, 1 << 20), (4 << 20, 1 << 20)]) as memory:
        memory.write(0, b"\x01" * (1 << 20))
        ram = RamState(memory)
        shown = RamMap(ram, 8)
        assert shown.chunk_bytes == 256 << 10
        assert shown.cells().tolist() == [TO_SEND] * 4 + [FREE] * 4
        ram.hint(np.array([256 << 10], np.uint64), np.array([256 << 10], np.uint64))
        ram.to_send.clear_run(128, 64)
        ram.to_send.clear_run(192, 60)
        assert shown.cells().tolist() == [TO_SEND, HINTED, SENT, SOME] + [FREE] * 4
        assert shown.pages == [256, 64, 124, 68]
        assert RamMap(ram, 1).chunk_bytes >= 2 << 20
        assert sum(shown.pages) * PAGE_SIZE == memory.size
