"""The docs agree with the code, and what they tell a reader to type works as it stands."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from cli_support import BALLOON
from click.testing import CliRunner

from balloon_cli.commands import cli

ROOT = Path(__file__).parents[1]
ROOMS = ("csrc", "vring", "balloon_dev", "guest_driver", "host_qemu_side", "balloon_cli", "tests")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CLAUSE = re.compile(r"\b(?:basic|feat|split|mmio|balloon|ring)\.[a-z]+(?:\.[a-z]+)?-\d+\b")

SHELL = ("sh", "console")
NOT_TYPED = ("mermaid",)
"""Languages of blocks that nobody types."""
NOT_RUN = {
    "./run test": "it is what runs this",
    "./run behind-qemu": "it needs a QEMU that Debian's stable releases do not have",
    "qemu-system-x86_64 ": "the same",
    "./run migrate-linux": "it may install packages; the tests marked uml migrate that guest",
    "sudo ": "changes the machine",
    "pip install ": "fetches from the network; what is installed so is in the extra that tests need",
}
"""How commands begin that are not run here, and why. Everything else is."""
SERVES = {
    "balloon serve": "guest-ready",
    "balloon receive": "waiting for a migration",
}
"""How commands begin that go on until they are ended, and what they say when others may come."""
SLOW = ("README.md",)
ACTIVATE = ". .venv/bin/activate"


def test_generated_parts_are_up_to_date() -> None:
    """What docs/generate.py draws from the code is what stands in the docs."""
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_clause_named_is_listed() -> None:
    """A clause id in an error, a comment or a test can be looked up in docs/clauses.md."""
    listed = set(CLAUSE.findall((ROOT / "docs" / "clauses.md").read_text()))
    used: dict[str, str] = {}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.[pch]*"):
            if path.suffix in (".py", ".c", ".h"):
                for clause in CLAUSE.findall(path.read_text()):
                    used.setdefault(clause, str(path.relative_to(ROOT)))
    missing = {clause: where for clause, where in used.items() if clause not in listed}
    assert not missing


# -- what a reader types ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page."""

    where: str
    language: str
    text: str

    @property
    def typed(self) -> str:
        """What is typed: in a block of language console what follows the prompt."""
        if self.language != "console":
            return self.text
        return "".join(f"{line[2:]}\n" for line in self.text.splitlines() if line.startswith("$ "))

    @property
    def shown(self) -> list[str]:
        """What the page shows of the answer."""
        return [line for line in self.text.splitlines() if not line.startswith("$ ")] * (self.language == "console")

    def found_in(self, table: dict[str, str]) -> list[str | None]:
        """Return for each line typed what the table says of how it begins."""
        starts = [[start for start in table if line.startswith(start)] for line in self.typed.splitlines()]
        return [table[found[0]] if found else None for found in starts]


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(f"{page.name}:{text.count(chr(10), 0, found.start()) + 1}", found[1], found[2])
        for found in re.finditer(r"^```(.*)\n((?s:.*?))^```$", text, re.MULTILINE)
    ]


def test_every_block_is_run_or_listed() -> None:
    """No block is overlooked, is in a language that nobody knows, or hides commands behind one that is not run."""
    found = [block for page in PAGES for block in blocks(page)]
    assert sum(page.read_text().count("```") for page in PAGES) == 2 * len(found)
    assert [block.where for block in found if block.language not in (*SHELL, *NOT_TYPED, "python")] == []
    assert [block.where for block in found if len(set(map(bool, block.found_in(NOT_RUN)))) > 1] == []
    assert [block.where for block in found if any(block.found_in(SERVES)) and len(block.found_in(SERVES)) > 1] == []
    starts = [start for start in (*NOT_RUN, *SERVES) if not any(any(b.found_in({start: "yes"})) for b in found)]
    assert starts == [], "no page has this any more"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like the repository after `./run build`; what is made there is not made in the repository."""
    made = tmp_path / "clone"
    (made / ".venv").mkdir(parents=True)
    for entry in ROOT.iterdir():
        if entry.name not in (".git", ".venv"):
            (made / entry.name).symlink_to(entry)
    for entry in Path(sys.prefix).iterdir():
        if not entry.name.startswith(".built"):
            (made / ".venv" / entry.name).symlink_to(entry)
    (made / ".venv" / ".built").touch()
    if not (made / ACTIVATE.split()[1]).exists():
        pytest.skip("these tests run in no virtual environment, and the pages tell of one")
    return made


def plain_environment() -> dict[str, str]:
    """The environment of a reader who has not activated anything.

    The virtual environment is the one these tests run in: should `./run` want to build after all, pip changes nothing.
    """
    kept = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH", "COLUMNS")}
    ours = os.path.join(sys.prefix, "bin")
    path = os.pathsep.join(p for p in kept["PATH"].split(os.pathsep) if p != ours)
    return kept | {"PATH": path, "PIP_DRY_RUN": "1"}


class Reader:
    """Types what a page says, each block in a shell of its own that was prepared as the page told so far."""

    def __init__(self, clone: Path) -> None:
        self.clone = clone
        self.prepared = ""
        self.serving: list[tuple[Block, subprocess.Popen[str]]] = []

    def shell(self, typed: str) -> list[str]:
        return ["bash", "-ec", f"{{ {self.prepared}:\n}} >/dev/null\n{typed}"]

    def types(self, block: Block) -> None:
        """Run a block; what the page shows of its answer must come."""
        if ACTIVATE in block.typed:
            self.prepared += block.typed
        done = subprocess.run(
            self.shell(block.typed),
            cwd=self.clone,
            env=plain_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
            check=False,
        )
        skip_if_lacking(done.returncode == 3, done.stdout)
        assert done.returncode == 0, f"{block.where}\n{block.typed}{done.stdout}"
        compare(block, done.stdout)

    def serves(self, block: Block, ready: str) -> None:
        """Start a block that goes on, and wait until it is ready."""
        log = self.clone / f"serving-{len(self.serving)}.log"
        with log.open("w") as output:
            program = subprocess.Popen(
                self.shell(f"exec {block.typed}"),
                cwd=self.clone,
                env=plain_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                text=True,
            )
        self.serving.append((block, program))
        deadline = time.monotonic() + 30
        while ready not in log.read_text():
            assert program.poll() is None, f"{block.where}\n{log.read_text()}"
            assert time.monotonic() < deadline, f"{block.where} does not say {ready!r}\n{log.read_text()}"
            time.sleep(0.05)

    def ends(self) -> None:
        """Press Ctrl-C where something still serves."""
        for block, program in self.serving:
            if program.poll() is None:
                program.send_signal(signal.SIGINT)
            assert program.wait(20) in (0, 130), block.where


@contextmanager
def reading(clone: Path) -> Iterator[Reader]:
    reader = Reader(clone)
    try:
        yield reader
        reader.ends()
    finally:
        for _, program in reader.serving:
            program.kill()
            program.wait()


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=[pytest.mark.slow] if page.name in SLOW else [])
        for page in PAGES
        if any(block.language not in NOT_TYPED for block in blocks(page))
    ],
)
def test_what_a_page_tells_to_type_works(page: Path, clone: Path) -> None:
    """From top to bottom; the Python blocks of a page are one program, run where the last of them stands."""
    found = blocks(page)
    python = [block for block in found if block.language == "python"]
    with reading(clone) as reader:
        for block in found:
            if block.language in NOT_TYPED or all(block.found_in(NOT_RUN)):
                continue
            if block.language == "python":
                if block is python[-1]:
                    runs_python(page, "".join(part.text for part in python), clone)
            elif ready := block.found_in(SERVES)[0]:
                reader.serves(block, ready)
            else:
                reader.types(block)


def runs_python(page: Path, program: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    skip_if_lacking("errors.MissingFacility: " in done.stderr, done.stderr)
    assert done.returncode == 0, f"{page.name}: {done.stderr}"


def skip_if_lacking(lacking: bool, output: str) -> None:
    if lacking:
        pytest.skip(f"this machine lacks something: {output.splitlines()[-1]}")


# -- what a page shows of the answer ----------------------------------------------------------------------------------

TIME = re.compile(r"\b\d+(\.\d+)? (ns|us|ms|s)\b|(?<=seconds\": )[\d.]+")
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?![\w.])")
TOLERANCE = 0.1


def figures(line: str) -> tuple[str, list[str]]:
    """Return a line without its times, and with its other figures apart."""
    timeless = TIME.sub("TIME", " ".join(re.sub(r"([━─])\1+", r"\1", line).split()))
    return NUMBER.sub("#", timeless), NUMBER.findall(timeless)


def agrees(shown: str, answered: str) -> bool:
    """Whether two lines say the same, on machines of different speed: a fraction beside times may be their ratio."""
    (words, ours), (other_words, theirs) = figures(shown), figures(answered)
    if words != other_words:
        return False
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if "TIME" not in words or "." not in a + b]
    return all(math.isclose(*(float(n.replace(",", "")) for n in pair), rel_tol=TOLERANCE) for pair in pairs)


def compare(block: Block, answer: str) -> None:
    """Every line shown is in the answer, in this order."""
    rest = iter(answer.splitlines())
    for line in block.shown:
        assert any(agrees(line, answered) for answered in rest), f"{block.where}: no line as\n{line}\nin\n{answer}"


@pytest.mark.parametrize(
    ("shown", "answered", "same"),
    [
        ("sent │ 1018.0 MiB │ 138.9 MiB", "sent │  1017.5 MiB │ 139.0 MiB", True),
        ("sent │ 1018.0 MiB", "sent │ 500.1 MiB", False),
        ("total time │ 7.70 s │ 821 ms │ 0.107", "total time │ 9.10 s │ 1.12 s │ 0.123", True),
        ('"blocks": 12, "seconds": 0.002103}', '"blocks": 12, "seconds": 0.7}', True),
        ('"blocks": 12, "seconds": 0.002103}', '"blocks": 40, "seconds": 0.002103}', False),
        ("Linux 6.1.176", "Linux 6.1.177", False),
        ("┌──────┐", "┌───┐", True),
        ("none wrong", "2 wrong", False),
    ],
)
def test_an_answer_is_compared_but_for_its_times(shown: str, answered: str, same: bool) -> None:
    assert agrees(shown, answered) is same


# -- what is said of the command line ---------------------------------------------------------------------------------


def commands(group: click.Group = cli, name: str = "balloon") -> Iterator[tuple[str, click.Command]]:
    """Yield every command with the name it is typed by."""
    for word, command in group.commands.items():
        yield f"{name} {word}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} {word}")


def parameters(command: click.Command) -> list[click.Option]:
    """Return the options of a command, and of its subcommands."""
    own = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    inner = command.commands.values() if isinstance(command, click.Group) else []
    return own + [parameter for one in inner for parameter in parameters(one)]


def spelled(command: click.Command) -> set[str]:
    return {word for parameter in parameters(command) for word in parameter.opts if not parameter.hidden}


def mentioned() -> Iterator[tuple[str, str]]:
    """Yield commands that are named in the middle of a page's sentence, or among the examples of a help text."""
    for page in PAGES:
        for span in re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```$", "", page.read_text())):
            yield page.name, span
    for name, command in commands():
        for line in re.findall(r"(?m)^ *(balloon .*?)(?:  |$)", f"{command.help}\n{command.epilog}"):
            yield f"{name} --help", line


def test_commands_that_are_mentioned_exist() -> None:
    known = dict(commands())
    wrong = []
    for where, text in mentioned():
        if script := re.match(r"\S*python (\S+\.py)", text):
            good = (ROOT / script[1]).exists()
        elif re.match(r"balloon [^-]", text):
            named = [name for name in known if f"{text} ".startswith(f"{name} ")]
            used = set(re.findall(r" (--?[a-z][a-z-]*)", text)) - {"--help"}
            good = bool(named) and used <= spelled(known[named[-1]])
        else:
            continue
        wrong += [] if good else [(where, text)]
    assert not wrong


SECTIONS = dict(re.findall(r"(?ms)^## (balloon \w+)\n(.*?)(?=^## |\Z)", (ROOT / "docs/cli.md").read_text()))


@pytest.mark.parametrize("name", [name for name, _ in commands() if name in SECTIONS])
def test_reference_of_a_command(name: str) -> None:
    """Its section has its options and no others, or says whose they are, and the defaults they have."""
    command, section = dict(commands())[name], SECTIONS[name]
    listed = set(re.findall(r"`(--?[a-z][a-z-]*)", section))
    like = re.search(r"Options as for `(balloon \w+)`", section)
    assert listed <= spelled(command)
    assert spelled(command) - listed <= (spelled(dict(commands())[like[1]]) if like else set())
    for parameter in parameters(command):
        row = re.search(rf"(?m)^\| `{parameter.opts[-1]}\b[^|]*\| `([^`]*)` \|", section)
        if row and isinstance(parameter.default, str | int | float) and parameter.default != "":
            assert row[1] == str(parameter.default), parameter.opts


def test_every_command_has_its_section() -> None:
    assert set(SECTIONS) == {f"balloon {word}" for word in cli.commands}


@pytest.mark.parametrize("name", ["balloon", *(name for name, _ in commands())])
def test_help_has_examples_and_json(name: str) -> None:
    """As docs/cli.md says; a command that only has subcommands leaves that to them."""
    for flag in ("--help", "-h"):
        done = CliRunner().invoke(cli, [*name.split()[1:], flag])
        assert done.exit_code == 0
        if name != "balloon bench":
            assert "Examples:" in done.output
            assert "--json" in done.output


def test_report_of_the_ring_benchmark_is_documented() -> None:
    """Every field has its word in docs/cli.md."""
    command = [*BALLOON, "bench", "ring", "--buffers", "1024", "--repeats", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    skip_if_lacking(done.returncode == 3, done.stderr)
    report = json.loads(done.stdout)
    fields = {*report, *report["cases"]["reference"], *report["bars"][0]}
    assert {field for field in fields if f"`{field}`" not in SECTIONS["balloon bench"]} == set()
