"""The command line: what it prints where, its exit codes, its JSON, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_support import (
    BALLOON,
    HINT_RUN,
    MIGRATE,
    NUMBER,
    ORACLE,
    RECEIVED,
    RESULT,
    RESUMED,
    ROUND,
    RUN,
    all_gone,
    descendants,
    has_schema,
    run,
)
from click.testing import CliRunner

from balloon_cli.commands import cli
from balloon_cli.report import findings


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any], str]]:
    """A migration into a file: its path, the result, and what was said on stderr."""
    path = tmp_path_factory.mktemp("stream") / "guest.vbm"
    done = subprocess.run(
        [*MIGRATE, "--hints", "on", "--to", f"file:{path}", "--json"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    yield path, json.loads(done.stdout), done.stderr
    path.unlink()


# -- migrate ----------------------------------------------------------------------------------------------------------


def test_json_of_migrate_has_the_documented_fields() -> None:
    done = run("migrate", "--memory", "256M", "--workload", "churn", "--seed", "7", "--warm-up", "0.1", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    has_schema(result, RESULT)
    assert (result["schema_version"], result["memory_bytes"], result["seed"]) == (1, 256 << 20, 7)
    assert [r["hints"] for r in result["runs"]] == [False, True]
    has_schema(result["ratio"], {"bytes": float, "seconds": float})
    for one in result["runs"]:
        has_schema(one, RUN)
        has_schema(one["pages"], {"normal": int, "zero": int, "skipped": int})
        for r in one["rounds"]:
            has_schema(r, ROUND)
        for h in one["hint_runs"]:
            has_schema(h, HINT_RUN)
        has_schema(one["oracle"], ORACLE)
        has_schema(one["resumed"], RESUMED)
        has_schema(one["resumed"]["hint_run"], {"command_id": int, "blocks": int, "seconds": NUMBER})
        assert sum(r["bytes_sent"] for r in one["rounds"]) <= one["bytes_sent"]
        assert one["oracle"]["pages_checked"] == 65536
    off, on = result["runs"]
    assert not off["hint_runs"]
    assert on["hint_runs"][0]["blocks"] > 40
    assert result["ratio"]["bytes"] == on["bytes_sent"] / off["bytes_sent"] < 0.3
    # Every option the JSON names is in the reference, and so is every field.
    text = (Path(__file__).parents[1] / "docs" / "cli.md").read_text()
    for schema in (RESULT, RUN, ROUND, HINT_RUN, ORACLE, RESUMED, RECEIVED):
        for key in schema:
            assert f"`{key}`" in text, f"docs/cli.md does not explain {key}"


def test_every_option_is_in_the_reference() -> None:
    text = (Path(__file__).parents[1] / "docs" / "cli.md").read_text()
    for name, command in cli.commands.items():
        assert f"balloon {name}" in text
        for option in command.params:
            if not getattr(option, "hidden", False):
                for spelled in option.opts:
                    assert f"{spelled}" in text, f"balloon {name} {spelled}"


def test_without_a_terminal_progress_is_plain_lines_on_stderr_and_the_table_is_on_stdout() -> None:
    done = subprocess.run([*MIGRATE, "--hints", "on", "-v"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert all(line.startswith("balloon: ") for line in lines)
    for what in ("guest boots", "round 1: ", "hint run 0x80000001: ", "guest frozen", "handed over"):
        assert sum(what in line for line in lines) == 1, what
    for what in ("seed 1", "with hints", "downtime", "pages spared", "oracle, with hints: good", "resumed guest: good"):
        assert what in done.stdout, what
    assert "without hints" not in done.stdout


def test_what_is_wrong_makes_exit_code_1_and_is_named(stream: tuple[Path, dict[str, Any], str]) -> None:
    assert findings(stream[1]) == []
    bad = json.loads(json.dumps(stream[1]))
    bad["runs"][0]["oracle"] |= {"pages_wrong": 2, "wrong": ["page 0x1: differs"]}
    bad["runs"][0]["resumed"] |= {"pages_wrong_again": 3, "hinted_pages_left": 1024}
    found = "\n".join(findings(bad))
    for what in ("2 of", "page 0x1", "3 of", "1,024 hinted"):
        assert what in found


# -- wrong use --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["migrate", "--workload", "nonsense"], "churn[:SHARE%"),
        (["migrate", "--workload", "writer:64M"], "writer:256M@50M"),
        (["migrate", "--memory", "3X"], "512M"),
        (["migrate", "--memory", "1M"], "at least 16M"),
        (["migrate", "--to", "nowhere"], "unix:PATH"),
        (["migrate", "--to", "tcp:host"], "tcp:HOST:PORT"),
        (["migrate", "--to", "unix:/tmp/x", "--hints", "both"], "choose on or off"),
        (["migrate", "--to", "file:/nonexistent/x", "--memory", "16M", "--warm-up", "0"], "/nonexistent/x"),
        (["migrate", "--profile", "windows"], "'spec'"),
        (["migrate", "--max-rounds", "0"], "--max-rounds"),
        (["migrate", "--downtime-limit", "nan"], "no time in seconds"),
        (["migrate", "--warm-up", "-1"], "no time in seconds"),
        (["drive", "--warm-up", "soon"], "no time in seconds"),
        (["migrate", "--dirty-log", "cachestat"], "--guest linux"),
        (["migrate", "--nonsense"], "--nonsense"),
        (["receive", "nowhere"], "unix:PATH"),
        (["receive", "file:/nonexistent"], "/nonexistent: No such file"),
        (["receive", "unix:/nonexistent/x"], "No such file"),
        (["receive", "file:x", "--keep", "--no-resume"], "--keep"),
        (["nonsense"], "nonsense"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from balloon_cli.__main__ import main

    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    out, err = capfd.readouterr()
    assert stopped.value.code == 2, err
    assert not out
    assert says in err
    assert err.startswith("balloon")
    assert "Traceback" not in err
    assert err.count("\n") == 1


def test_help_and_version() -> None:
    assert re.fullmatch(r"balloon \d+\.\d+\.\d+\n", run("--version").stdout)
    for command in ("migrate", "receive", "doctor", "bench"):
        shown = CliRunner().invoke(cli, [command, "--help"])
        assert shown.exit_code == 0
        assert "Examples:" in shown.output or command == "bench"
    assert run().returncode == 2


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_judged_as_a_socket_is(stream: tuple[Path, dict[str, Any], str]) -> None:
    path, result, said = stream
    only = result["runs"][0]
    has_schema(only, RUN)
    has_schema(only["oracle"], ORACLE)
    has_schema(only["resumed"], RESUMED)
    assert only["oracle"]["pages_checked"] == 16384
    assert only["oracle"]["pages_skipped"] > 0
    assert only["oracle"]["pages_wrong"] == 0
    assert "reads the file back" in said
    done = run("receive", f"file:{path}", "--json")
    assert done.returncode == 0, done.stderr
    received = json.loads(done.stdout)
    has_schema(received, RECEIVED)
    has_schema(received["resumed"], RESUMED)
    assert received["state"] == "committed"
    assert received["pages_received"] == only["pages"]["normal"]


def test_verdict_of_a_file_sees_a_page_that_is_not_the_sources(tmp_path: Path) -> None:
    """The file's verdict comes from the file: a well-formed stream with another guest's memory is red."""
    script = f"""
import sys
from balloon_cli import migrate as m, read_back
real = m.read_back
def other(path, tick):
    digests, facts = real(path, tick)
    digests = digests.copy(); digests[digests.nonzero()[0][:3]] ^= 1
    return digests, facts
m.read_back = other
from balloon_cli.__main__ import main
main(["migrate", "--memory", "32M", "--warm-up", "0", "--hints", "off", "--to", "file:{tmp_path}/f"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "WRONG: 3 of" in done.stdout
    assert "3 of 8,192 pages are wrong" in done.stderr


@pytest.mark.parametrize(
    ("damage", "code", "says"),
    [
        (lambda d: d[:0], 5, "before the first record"),
        (lambda d: d[:5], 5, "before the first record"),
        (lambda d: d[: len(d) // 2], 5, "cut off after record"),
        (lambda d: d[:-1], 5, "cut off after record"),
        (lambda d: d[:3] + b"?" + d[4:], 4, "not a migration stream"),
        (lambda d: d[:12] + b"?" + d[13:], 4, "damaged"),
        (lambda d: d[: len(d) // 2] + bytes([d[len(d) // 2] ^ 1]) + d[len(d) // 2 + 1 :], 4, "checksum of record"),
        (lambda d: b"root:x:0:0:root:/root:/bin/bash\n" * 9, 4, "is it a file that `balloon migrate"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(
    stream: tuple[Path, dict[str, Any], str],
    tmp_path: Path,
    damage: Any,
    code: int,
    says: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from balloon_cli.__main__ import main

    path = tmp_path / "damaged.vbm"
    path.write_bytes(damage(stream[0].read_bytes()))
    with pytest.raises(SystemExit) as stopped:
        main(["receive", "-q", f"file:{path}"])
    out, err = capfd.readouterr()
    assert stopped.value.code == code, err
    assert err.startswith(f"balloon: {path}: ")
    assert says in err
    assert "balloon migrate" in err, "what to do"
    assert err.count("\n") == 1
    assert not out


# -- sockets ----------------------------------------------------------------------------------------------------------


def receiver(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    """Start a receiver; return it and the address it says."""
    process = subprocess.Popen(
        [*BALLOON, "receive", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.search(r"waiting for a migration at (\S+)", line)
    assert found, line
    return process, found[1]


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_receive_on_a_socket(kind: str, tmp_path: Path) -> None:
    if kind == "unix":
        left_over = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        left_over.bind(str(tmp_path / "s"))
        left_over.close()  # the name stays, nobody serves it
    process, address = receiver(f"unix:{tmp_path}/s" if kind == "unix" else "tcp:127.0.0.1:0", "--json")
    done = subprocess.run([*MIGRATE, "--to", address, "--json"], capture_output=True, text=True, timeout=60)
    out, err = process.communicate(timeout=30)
    assert done.returncode == 0, done.stderr
    assert process.returncode == 0, err
    received, result = json.loads(out), json.loads(done.stdout)
    assert [r["hints"] for r in result["runs"]] == [True], "a socket takes one guest: with hints, if nothing is said"
    assert result["runs"][0]["oracle"]["pages_wrong"] == 0
    assert result["runs"][0]["resumed"] == received["resumed"]
    assert not (tmp_path / "s").exists()


def test_two_receivers_do_not_share_a_socket_and_a_file_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    process, address = receiver(f"unix:{path}")
    second = run("receive", address)
    assert second.returncode == 2
    assert "another process listens there" in second.stderr
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=5)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not path.exists()
    path.write_text("precious")
    assert "is no socket" in run("receive", f"unix:{path}").stderr
    assert path.read_text() == "precious"


def test_a_second_receiver_on_a_port_is_refused() -> None:
    """Not even at another address of the same name: sources would reach the first."""
    process, address = receiver("tcp:localhost:0")
    second = run("receive", address)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert second.returncode == 2
    assert f"cannot listen on {address}: Address already in use" in second.stderr


def test_keep_runs_until_ctrl_c_and_ends_well(stream: tuple[Path, dict[str, Any], str]) -> None:
    process = subprocess.Popen(
        [*BALLOON, "receive", f"file:{stream[0]}", "--keep", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    while "runs on; Ctrl-C" not in (line := process.stderr.readline()):
        assert line, process.poll()
    children = descendants(process.pid)
    assert children, "the guest runs"
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert time.monotonic() - began < 5
    assert process.returncode == 0, err
    assert json.loads(out)["resumed"]["pages_wrong"] == 0
    assert all_gone(children)


def test_a_source_that_vanishes_and_a_stranger_are_told_apart(tmp_path: Path) -> None:
    for data, code in ((b"V", 5), (b"GET / HTTP/1.1\r\n\r\n", 4)):
        process, address = receiver(f"unix:{tmp_path}/s")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
            peer.connect(address.removeprefix("unix:"))
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            _, err = process.communicate(timeout=10)
        assert process.returncode == code, err
        assert "Traceback" not in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_who_connects_and_goes_does_not_end_a_receiver(host: str) -> None:
    """Somebody who looks whether the port is open, before the source comes; and a name with several addresses."""
    process, address = receiver(f"tcp:{host}:0", "--json")
    port = int(address.rpartition(":")[2])
    for how in (socket.SHUT_WR, socket.SHUT_RDWR, None):
        with socket.create_connection((host.strip("[]"), port)) as peer:
            if how is None:  # a reset, as of a scanner
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                peer.shutdown(how)
        assert process.stderr is not None
        assert "still waiting for a migration" in process.stderr.readline()
    with socket.create_connection((host.strip("[]"), port)):  # and who only stays, without a word, is in nobody's way
        done = subprocess.run([*MIGRATE, "--to", address], capture_output=True, text=True, timeout=60)
        out, err = process.communicate(timeout=30)
    assert done.returncode == 0, done.stderr
    assert process.returncode == 0, err
    assert json.loads(out)["resumed"]["pages_wrong"] == 0
    assert json.loads(out)["from"] == f"tcp:{host}:0"


def test_a_slow_link_is_only_slow(tmp_path: Path) -> None:
    """10 KiB/s: pieces of 1 MiB would take longer than a destination waits for a word."""
    command = [*BALLOON, "migrate", "--memory", "16M", "--workload", "idle", "--warm-up", "0", "--hints", "on"]
    done = subprocess.run([*command, "--bandwidth", "10K", "--json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)["runs"]
    assert result["oracle"]["pages_wrong"] == 0
    first = result["rounds"][0]
    assert 0 < first["bytes_sent"] < (10 << 10) * (first["seconds"] + 2)


def test_a_folder_for_temporary_files_that_is_too_long_is_named(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    command = [*BALLOON, "migrate", "--guest", "linux", "--memory", "64M", "--work-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(folder)})
    assert done.returncode == 2
    assert "bytes are too long for the path of a Unix socket" in done.stderr
    assert "TMPDIR in the environment names another" in done.stderr
    assert list(folder.iterdir()) == []


def test_no_destination_is_exit_code_5_and_the_guest_goes_on(tmp_path: Path) -> None:
    done = subprocess.run([*MIGRATE, "--to", f"unix:{tmp_path}/none"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 5
    assert "start `balloon receive" in done.stderr
    assert "guest goes on" in done.stderr
