"""Programs that are run to their end: bounded in time and words, nothing is left, and an interrupt is not theirs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_support import script
from test_kill_program import MARKER, marked

from vring import programs
from vring.errors import MissingFacility
from vring.programs import Origin, origin_of, run_program, version_of


def test_what_it_wrote_and_how_it_ended(tmp_path: Path) -> None:
    ended = run_program([str(script(tmp_path / "x", "cat; echo out; printf 'err\\377' >&2; exit 3"))], 10.0)
    assert (ended.code, ended.out, ended.err, ended.whole) == (3, "out\n", "err\ufffd", True)
    long = run_program([str(script(tmp_path / "y", "head -c 500000 /dev/zero | tr '\\0' x; kill -TERM $$"))], 10.0)
    assert (long.code, len(long.out), long.whole) == (-signal.SIGTERM, 500000, True)
    silent = run_program(
        [script(tmp_path / "z", 'exec >&- 2>&-; sleep 0.2; echo "$X" >' + str(tmp_path / "said"))], 10.0
    )
    assert silent.whole
    with pytest.raises(FileNotFoundError):
        run_program([str(tmp_path / "none")], 1.0)


@pytest.mark.parametrize(
    ("text", "whole", "says"),
    [
        ("sleep 100 & sleep 100", False, "does not end"),
        ("sleep 100 & echo 9.8", True, "9.8"),
        ("yes 9.8", False, "does not end"),
        ("yes 9.8 >&2 & wait", False, "does not end"),
    ],
    ids=["hangs", "leaves a child", "writes for ever", "writes errors for ever"],
)
def test_it_is_bounded_and_nothing_is_left(
    tmp_path: Path, text: str, whole: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARKER, str(tmp_path))
    program = str(script(tmp_path / "x", text))
    monkeypatch.setattr(programs, "VERSION_TIMEOUT", 1.0)
    began = time.monotonic()
    if whole:
        assert version_of(program) == says
    else:
        with pytest.raises(MissingFacility, match=says):
            version_of(program)
    assert time.monotonic() - began < 5.0
    ended = run_program([program], 0.5)
    assert ended.whole == whole
    assert max(len(ended.out), len(ended.err)) <= programs.MOST_OUTPUT
    deadline = time.monotonic() + 5.0
    while marked(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert marked(str(tmp_path)) == []


def test_an_interrupt_is_not_for_it(tmp_path: Path) -> None:
    """What is sent to all of the group reaches who runs the program: it does not seem to have failed."""
    program = str(script(tmp_path / "x", "sleep 1; echo whole"))
    code = f"""
import signal, sys
signal.signal(signal.SIGINT, lambda *_: None)
from vring.programs import run_program
print("ready", flush=True)
print(run_program([{program!r}], 20.0))
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, process_group=0)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.3)
    os.killpg(child.pid, signal.SIGINT)
    assert "code=0, out='whole\\n'" in child.communicate(timeout=30)[0]


# -- origin -----------------------------------------------------------------------------------------------------------


def test_origin_of_a_packaged_file_and_of_a_copy_of_it(tmp_path: Path) -> None:
    origin = origin_of("/usr/bin/dpkg")
    assert origin.package.startswith("dpkg ")
    assert origin.clean is (not origin.problems)
    assert str(origin) == f"{origin.package}, dpkg -V {'clean' if origin.clean else 'NOT CLEAN'}"
    link = tmp_path / "link"
    link.symlink_to("/usr/bin/dpkg")
    assert origin_of(link) == origin
    copy = Path(shutil.copy("/usr/bin/dpkg", tmp_path / "dpkg"))
    assert origin_of(copy) == Origin("", None)
    assert str(origin_of(copy)) == "of no Debian package"
    assert origin_of("/usr/bin/dpkg", "/usr/bin/dpkg-query") == origin
    for other in (copy, "/bin/sh"):  # of none, and of another package
        assert origin_of("/usr/bin/dpkg", other) == Origin("", None)


def test_origin_is_of_that_very_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names dpkg is asked for are patterns to it, and it lists diversions as well."""
    answer = f"diversion by other from: {tmp_path}/x\nwrong: {tmp_path}/xyz\nright:amd64, other: {tmp_path}/x"
    script(tmp_path / "bin/dpkg-query", 'case "$1" in -S) echo "$ANSWER";; -W) echo "1.0-1 $4";; esac')
    script(tmp_path / "bin/dpkg", 'echo "??5?????? /x"; exit 1')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setenv("ANSWER", answer)
    (tmp_path / "x").touch()
    assert origin_of(tmp_path / "x") == Origin("right 1.0-1 right", False, ("??5?????? /x",))
    monkeypatch.setenv("ANSWER", f"wrong: {tmp_path}/xyz")
    assert origin_of(tmp_path / "x") == Origin("", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert origin_of("/usr/bin/dpkg") == Origin("", None)


@pytest.mark.parametrize("how", ["kill -KILL $$", "echo dpkg: error >&2; exit 2", "exit 1"])
def test_no_answer_is_no_verdict(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "bin/dpkg", how)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    origin = origin_of("/usr/bin/dpkg")
    assert (origin.clean, origin.problems) == (None, ())
    assert str(origin) == f"{origin.package}, dpkg -V gave no answer"
