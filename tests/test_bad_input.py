"""Bad input to QEMU's device and to ours, side by side; docs/bad-input.md has the table that is checked here.

``BALLOON_WRITE_DOCS=1 pytest tests/test_bad_input.py`` writes it anew.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_input import PAGE, ROWS, Reaction, Row
from raw_driver import INFLATE, MEMORY, OurPeer, Peer, QemuPeer, RawDriver

from guest_driver.qemu import QemuMachine, QemuOptions
from vring.memory import PAGE_SIZE

PAGE_OF_DOCS = Path(__file__).parents[1] / "docs" / "bad-input.md"
BEGIN, END = "<!-- measured -->", "<!-- end -->"
HEAD = "| what the driver does | QEMU | ours | why ours may be laxer |\n|---|---|---|---|\n"


def react(peer: Peer, row: Row) -> Reaction:
    """Do one thing wrong; then see that a reset brings the device back to work."""
    raw = RawDriver(peer)
    raw.start()
    reaction = row.act(raw)
    raw.start()
    assert not raw.needs_reset
    raw.junk(PAGE * PAGE_SIZE)
    assert raw.send(INFLATE, raw.pfns(PAGE)) == 1
    assert raw.dropped(PAGE * PAGE_SIZE) == 1
    return reaction


@pytest.fixture
def qemu() -> Iterator[QemuPeer]:
    with QemuMachine(QemuOptions(memory=MEMORY)) as machine:
        peer = QemuPeer(machine)
        yield peer
        peer.close()


def documented() -> dict[str, list[str]]:
    """Return the cells of the table in the docs by name of the row."""
    text = PAGE_OF_DOCS.read_text()
    table = text[text.index(BEGIN) : text.index(END)]
    cells = [re.split(r"\s*\|\s*", line.strip("| ")) for line in table.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in cells}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_ours_does_what_the_docs_say(row: Row) -> None:
    assert react(OurPeer(), row).text == documented()[row.name][1]


@pytest.mark.qemu
def test_side_by_side(qemu: QemuPeer) -> None:
    """Every row to both devices: never laxer than QEMU but where a reason is given, and the docs have it all."""
    found = [(row, react(qemu, row), react(OurPeer(), row)) for row in ROWS]
    laxer = [row.name for row, theirs, ours in found if ours.strictness < theirs.strictness and not row.why_laxer]
    assert not laxer
    needless = [row.name for row, theirs, ours in found if ours.strictness >= theirs.strictness and row.why_laxer]
    assert not needless
    table = HEAD + "".join(f"| {r.name} | {q.text} | {o.text} | {r.why_laxer} |\n" for r, q, o in found)
    text = PAGE_OF_DOCS.read_text()
    wanted = f"{text[: text.index(BEGIN)]}{BEGIN}\n{table}{text[text.index(END) :]}"
    if os.environ.get("BALLOON_WRITE_DOCS"):
        PAGE_OF_DOCS.write_text(wanted)
    else:
        assert text.splitlines() == wanted.splitlines()
