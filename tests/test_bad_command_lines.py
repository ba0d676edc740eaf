"""Wrong command lines: each option of each command with what people, scripts and accidents put there.

Each ends in one or two lines that name what is wrong, with the code of the documentation, and nothing is made.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from cli_support import BALLOON

from balloon_cli.__main__ import main
from balloon_cli.commands import cli

LATIN = "\udcff\udcfe"
"""Two bytes that are no UTF-8, as Python passes them on."""
LONG = "9" * 400
NO_NUMBER = ["", "x", LATIN, "²", "1,5", "4\u212a"]
"""The last one has the sign of the kelvin, which is a K where case does not matter."""
SIZES = [*NO_NUMBER, "-1", LONG, "999999999999T", "1e999", "4X", "nan"]
COUNTS = [*NO_NUMBER, "-1", "1.5", "1" + LONG * 12, "1e3"]
SECONDS = [*NO_NUMBER, "-1", "1e999", LONG, "nan", "inf"]
CHOICES = ["", "nonsense", LATIN, LONG]
WORKLOADS = ["", "nonsense", LATIN, "x" * 300, "churn:", f"churn:{LONG}%", "churn:-1%", "churn:10%@", "churn:10%@1",
             "writer", "writer:64M", "writer:1T@1M", "writer:64M@0", f"writer:{LONG}@1M", f"build:{LONG}", "idle:1",
             "churn+", "idle+idle+idle+idle+idle", "writer:٣M@1M"]  # fmt: skip
FOLDERS = ["", "/typo/a/b", "typo", "/sys", "/etc/passwd", LATIN, "x" * 5000]
PROGRAMS = ["/typo/a", "/etc/passwd", "/etc/passwd/x", LATIN, "x" * 5000]
PLACES = ["", "nowhere", LATIN, "tcp:", "tcp:h", "tcp:h:²", "tcp:h:-1", "tcp:h:99999", f"tcp:h:{LONG}", "tcp::1",
          f"tcp:{'a' * 300}:1", f"tcp:{LATIN}:1", "tcp:a..b:1", "fd:²", f"fd:{LONG}", "unix:", f"unix:{'x' * 200}",
          "unix:/typo/x", "file:", "file:/typo/a/b"]  # fmt: skip
SOCKETS = ["", "/typo/x", "/sys/x", "/etc/passwd", "/etc", "x" * 200, "/etc/passwd/x"]

BAD: dict[str, dict[str, list[str]]] = {
    "migrate": {
        "--guest": CHOICES,
        "--memory": [*SIZES, "0", "1M", "17000001"],
        "--workload": WORKLOADS,
        "--hints": CHOICES,
        "--to": [*PLACES, "tcp:h:0", "file:/sys/x", "file:/dev/full", "file:/etc", f"file:{'x' * 300}"],
        "--bandwidth": [*SIZES, "1", "1023"],
        "--downtime-limit": SECONDS,
        "--max-rounds": [*COUNTS, "0"],
        "--warm-up": SECONDS,
        "--free-at": CHOICES,
        "--dirty-log": [*CHOICES, "cachestat"],
        "--profile": CHOICES,
        "--work-dir": FOLDERS,
        "--linux": PROGRAMS,
        "--modules": ["/typo/a", "/etc/passwd", LATIN],
        "--seed": [*COUNTS, "18446744073709551616"],
        "--batch": [*COUNTS, "0", "1025"],
    },
    "receive": {
        "ADDRESS": [
            *PLACES,
            "file:/typo",
            "file:/etc",
            "unix:/sys/x",
            "unix:/etc/passwd",
            "fd:977",
            "tcp:203.0.113.1:1",
        ]
    },
    "doctor": {"--work-dir": FOLDERS},
    "serve": {
        "SOCKET": SOCKETS,
        "--monitor": SOCKETS,
        "--profile": CHOICES,
        "--features": ["", "nonsense", LATIN, "hint,", "-5", f"0x1{LONG}", LONG * 20],
        "--target": [*SIZES, "0"],
        "--guest": [*CHOICES, "linux"],
        "--memory": [*SIZES, "0", "1M", "17000001"],
        "--workload": WORKLOADS,
        "--seed": COUNTS,
    },
    "ctl": {
        "MONITOR": ["", "/typo/x", "x" * 200, "/etc/passwd/x"],
        "KEY=VALUE": ["", "nonsense", "=1", LATIN],
        "--timeout": [*SECONDS, "1e300"],
    },
    "drive": {
        "--memory": [*SIZES, "0", "16M", "17000001", "64M1", "3G"],
        "--workload": WORKLOADS,
        "--hints": CHOICES,
        "--bandwidth": [*SIZES, "1"],
        "--transport": CHOICES,
        "--qemu": ["/typo/a", "/etc/passwd", "/etc", LATIN],
        "--downtime-limit": SECONDS,
        "--max-rounds": [*COUNTS, "0"],
        "--warm-up": SECONDS,
        "--dirty-log": CHOICES,
        "--batch": [*COUNTS, "0"],
        "--seed": COUNTS,
    },
    "compare": {"--repeats": [*COUNTS, "0"]},
    "bench ring": {"--buffers": [*COUNTS, "0", LONG], "--repeats": [*COUNTS, "0"]},
}
BAD["compare"] |= BAD["drive"]
GOES_WITH = {
    ("migrate", "--work-dir"): ["--guest", "linux"],
    ("migrate", "--linux"): ["--guest", "linux"],
    ("migrate", "--modules"): ["--guest", "linux"],
    ("migrate", "--to"): ["--hints", "on"],
    ("serve", "--memory"): ["--guest", "python"],
    ("serve", "--workload"): ["--guest", "python"],
    ("serve", "--seed"): ["--guest", "python"],
}
FINDINGS = {("doctor", "--linux"), ("doctor", "--modules"), ("doctor", "--qemu")}
"""What these name is what the doctor is asked about: that it is not there is in the report."""
NEEDED = {"receive": ["file:/typo"], "serve": ["s"], "ctl": ["m", "command"]}
TOGETHER: list[tuple[list[str], str]] = [
    (["serve", "s", "--memory", "1G"], "--guest python"),
    (["serve", "s", "--workload", "idle"], "--guest python"),
    (["serve", "s", "--seed", "1"], "--guest python"),
    (["serve", "s", "--monitor", "s"], "another process listens there"),
    (["receive", "file:x", "--keep", "--no-resume"], "--keep"),
    (["migrate", "--to", "unix:s", "--hints", "both"], "choose on or off"),
    (["migrate", "--to", "file:s", "--linux", "/bin/true"], "--guest linux"),
    (["migrate", "--work-dir", "/tmp"], "--guest linux"),
    (["migrate", "--guest", "linux", "--dirty-log", "software"], "--guest python"),
    (["migrate", "--guest", "linux", "--memory", "65M"], "steps of 4 MiB"),
    (["migrate", "--guest", "linux", "--memory", "32M"], "at least 64 MiB"),
    (["migrate", "--guest", "linux", "--workload", "build"], "no 'build'"),
    (["migrate", "--guest", "linux", "--workload", "writer:1T@1M"], "working sets"),
    (["migrate", "--to", "unix:/etc/passwd"], "it is no socket"),
    (["migrate", "--to", "file:new/", "--hints", "on"], "new/"),
    (["migrate", "extra"], "extra"),
    (["migrate", "--nonsense"], "--nonsense"),
    (["migrate", "--memory"], "--memory"),
    (["receive"], "ADDRESS"),
    (["serve"], "SOCKET"),
    (["ctl"], "MONITOR"),
    (["bench", "nonsense"], "nonsense"),
    (["nonsense"], "nonsense"),
    ([LATIN], "\\udcff"),
    ([""], "''"),
]


def lines() -> Iterator[tuple[list[str], tuple[str, ...]]]:
    """Each command line, and what its error must name, in one of these ways: the option, or the value."""
    for command, options in BAD.items():
        for option, values in options.items():
            for value in values:
                needed = NEEDED.get(command, [])
                if option in ("ADDRESS", "SOCKET", "MONITOR"):
                    given = ["--", value, *needed[1:]]
                elif option == "KEY=VALUE":
                    given = [*needed, value]
                else:
                    given = [*needed, f"{option}={value}", *GOES_WITH.get((command, option), [])]
                bare = value.removeprefix("file:").removeprefix("unix:")
                yield [*command.split(), *given], (option, ascii(value)[:20], bare[:20] or "''", "no argument")
    for given, said in TOGETHER:
        yield given, (said,)


LINES = list(lines())


def outcome(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run a command line in this process: hundreds in one second."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    out, err = capfd.readouterr()
    return int(stopped.value.code or 0), out, err


def shortened(arguments: list[str]) -> str:
    return " ".join(part if len(part) < 40 else f"{part[:30]}...{len(part)}" for part in arguments).encode(
        "ascii", "backslashreplace"
    ).decode()  # fmt: skip


@pytest.mark.parametrize(("arguments", "names"), LINES, ids=[shortened(arguments) for arguments, _ in LINES])
def test_one_or_two_lines_and_code_2(
    arguments: list[str],
    names: tuple[str, ...],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = outcome(arguments, capfd)
    assert code == 2, err
    assert out == ""
    assert 1 <= err.count("\n") <= 2, err
    assert all(line.startswith("balloon") for line in err.splitlines())
    assert "Traceback" not in err
    assert any(name in err for name in names), err
    assert list(tmp_path.iterdir()) == []


def test_there_are_many_and_none_is_left_out() -> None:
    """Whoever adds an option says here what is bad for it."""
    assert len(LINES) > 123
    for name, command in commands(cli):
        for param in command.params:
            if getattr(param, "hidden", False) or getattr(param, "is_flag", False) or getattr(param, "count", False):
                continue
            known = BAD[name].keys()
            if (name, param.opts[0]) in FINDINGS:
                continue
            if isinstance(param, click.Option):
                assert param.opts[0] in known, f"balloon {name} {param.opts[0]}"
            elif param.required:
                assert param.make_metavar(click.Context(command)) in known, f"balloon {name}: {param.name}"


def commands(group: click.Group, above: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{above}{name} ")
        else:
            yield above + name, command


def test_every_option_has_help() -> None:
    for name, command in commands(cli):
        for param in command.params:
            if isinstance(param, click.Option) and not param.hidden:
                assert param.help, f"balloon {name} {param.opts[0]}"
        shown = command.get_help(click.Context(command, info_name=name, max_content_width=100))
        assert "Examples:" in shown, name
        assert "\\b" not in shown
        assert "\b" not in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["migrate", "--memory", "1T"],
        ["migrate", "--memory", "8T", "--workload", "idle"],
        ["migrate", "--memory", "1T", "--guest", "linux"],
        ["migrate", "--memory", "1T", "--workload", "writer:900G@1M", "--to", "tcp:127.0.0.1:1"],
        ["serve", "s", "--guest", "python", "--memory", "1T"],
    ],
)
def test_memory_that_is_not_there_is_code_3_before_a_guest_boots(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = outcome(arguments, capfd)
    assert code == 3, err
    assert err.count("\n") == 1
    assert "of memory" in err
    assert "left: give it less with --memory" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([b"migrate", b"--workload", b"\xff\xfe"], 2),
        ([b"migrate", b"--memory", b"9" * 400], 2),
        ([b"migrate", b"--to", b"tcp:h:\xc2\xb2"], 2),
        ([b"migrate", b"--guest", b"linux", b"--work-dir", b"/typo/\xff"], 2),
        ([b"receive", b"file:\xff\xfe"], 2),
        ([b"ctl", b"\xff\xfe"], 5),
        ([b"\xff"], 2),
    ],
)
@pytest.mark.parametrize("locale", ["C.UTF-8", "POSIX"])
def test_bytes_as_the_system_passes_them(arguments: list[bytes], code: int, locale: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [*(part.encode() for part in BALLOON), *arguments],
        capture_output=True,
        cwd=tmp_path,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "LC_ALL": locale},
    )
    assert done.returncode == code, done.stderr
    assert done.stdout == b""
    assert done.stderr.count(b"\n") == 1
    assert b"Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
