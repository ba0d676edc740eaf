"""``balloon ctl``: the monitor of ``balloon serve`` for people."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import click

from balloon_cli.monitor_client import CommandFailed, CommandHelp, MonitorClient, described
from balloon_cli.options import SECONDS
from balloon_cli.streams import result
from host_qemu_side.migration import Cancelled
from vring.decode import Fields, parse_json, visible
from vring.errors import DeviceError, MissingFacility, PeerVanished, UsageError, VirtioError, quoted
from vring.sizes import MAX_SECONDS, format_size, parse_size

__all__ = ["ctl", "render"]

MAX_TEXT = 4096
"""Characters shown of one text."""
MAX_TIME = 1 << 33
"""No time stamp, in seconds, is later: what is larger is shown as a number."""
_KINDS: dict[str, type[VirtioError]] = {
    "usage": UsageError,
    "missing": MissingFacility,
    "vanished": PeerVanished,
    "protocol": VirtioError,
}
BYTES = {"bytes", "actual", "memory", "transferred", "remaining", "total", "normal-bytes", "max-bandwidth"}
"""Members shown as sizes."""
SIZES = {"value", "max-bandwidth"}
"""Arguments that may be written as sizes."""


EXAMPLES = """\b
Examples:
  balloon ctl /tmp/m.sock
  balloon ctl /tmp/m.sock balloon value=192M
  balloon ctl /tmp/m.sock hint-run deadline=2
  balloon ctl /tmp/m.sock qom-get property=guest-stats
  balloon ctl /tmp/m.sock migrate uri=unix:/tmp/d.sock --wait
"""


def parse_argument(text: str) -> tuple[str, Any]:
    """Return name and value of ``key=value``: JSON where it is such, sizes where bytes are meant, else text."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"{quoted(text)} is no argument; write key=value")
    if key in SIZES:
        with contextlib.suppress(UsageError):
            return key, parse_size(value)
    try:
        return key, parse_json(value, key)
    except UsageError:
        return key, value


def render(value: Any, indent: str = "") -> Iterator[str]:
    """Yield a result, decoded by `vring.decode`, as lines for a person; nothing in it reaches a terminal unseen."""
    if isinstance(value, dict):
        width = max((len(visible(key)) for key in value), default=0)
        for key, item in value.items():
            if item and isinstance(item, dict | list) and not _flat(item):
                yield f"{indent}{visible(key)}:"
                yield from render(item, indent + "  ")
            else:
                yield f"{indent}{visible(key):<{width}}  {_word(key, item)}"
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, dict):
                yield indent + "  ".join(f"{visible(key)} {_word(key, part)}" for key, part in item.items())
            else:
                yield from render(item, indent)
    else:
        yield f"{indent}{_word('', value)}"


def _flat(value: Any) -> bool:
    return isinstance(value, list) and not any(isinstance(item, dict | list) for item in value)


def _word(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key == "since" and isinstance(value, int | float) and 0 <= value < MAX_TIME:
        return time.strftime("%H:%M:%S", time.localtime(value))
    if isinstance(value, int) and "id" in key.split("-"):
        return f"{value:#x}"
    if isinstance(value, int) and (key in BYTES or (key.startswith("stat-") and key.endswith(("-memory", "-caches")))):
        return f"{value} ({format_size(value)})" if value >= 1024 else str(value)
    if isinstance(value, dict):
        return ", ".join(f"{visible(name)} {_word(name, item)}" for name, item in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(_word("", item) for item in value) or "-"
    return visible(str(value), MAX_TEXT)


def _commands(commands: list[CommandHelp]) -> Iterator[str]:
    width = max((len(command.name) for command in commands), default=0)
    for command in commands:
        yield f"{command.name:<{width}}  {command.help}".rstrip()
        for argument in command.arguments:
            yield f"{'':<{width}}    {argument.form}  {argument.help}".rstrip()


def _wait_migration(client: MonitorClient) -> dict[str, Any]:
    """Ask until the migration has ended; progress goes to stderr where that is a terminal."""
    while True:
        state = client.migration()
        if sys.stderr.isatty():
            text = f"{state.status}: {format_size(state.transferred)} sent, {format_size(state.remaining)} left"
            print(f"\r{text}   ", end="\n" if state.ended else "", file=sys.stderr, flush=True)
        if state.ended:
            return state.said
        time.sleep(0.05)


@click.command(epilog=EXAMPLES)
@click.argument("monitor", metavar="MONITOR")
@click.argument("command", required=False)
@click.argument("arguments", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--wait", is_flag=True, help="With migrate: wait until it has ended.")
@click.option(
    "--timeout", type=SECONDS, metavar="SECONDS", default=30.0, show_default=True, help="Seconds to wait for a reply."
)
def ctl(monitor: str, command: str | None, arguments: tuple[str, ...], **options: Any) -> None:
    """Send a COMMAND to the monitor of `balloon serve` at the socket MONITOR; without one, list the commands.

    Exit codes: 0 done, 2 the command was refused, 4 the other end does not speak QMP, 5 nobody is there, the guest is
    not, or it did not answer in time. With --wait those of `balloon migrate`, 130 if it was cancelled.
    """
    command, as_json = command or "query-commands", options["as_json"]
    given = dict(parse_argument(text) for text in arguments)
    timeout = options["timeout"]
    deadline = given.get("deadline")
    if command == "hint-run" and isinstance(deadline, int | float) and 0 <= deadline < MAX_SECONDS - 10:
        timeout = max(timeout, deadline + 10)
    if command in ("qom-get", "qom-set"):
        given.setdefault("path", "/machine/peripheral/balloon0")
    client = MonitorClient(monitor, timeout)
    try:
        try:
            found = client.execute(command, given)
            if command == "migrate" and options["wait"]:
                found = _wait_migration(client)
        except CommandFailed as error:
            kind = {"DeviceNotActive": PeerVanished}.get(error.kind, UsageError)
            hint = f"; `balloon ctl {monitor}` lists the commands" if error.kind == "CommandNotFound" else ""
            if str(error).startswith(("Parameter", "Invalid parameter")):
                hint = client.arguments_of(command)
            raise kind(f"{command}: {error}{hint}") from error
    finally:
        client.close()
    lines = (
        [json.dumps({"schema_version": 1, "command": command, "return": found})] if as_json else _shown(command, found)
    )
    with result():
        for line in lines:
            print(line)
    _judge(command, options["wait"], found)


def _shown(command: str, found: Any) -> list[str]:
    """Return a result as lines for a person."""
    if command == "query-commands":
        return list(_commands(described(found)))
    if isinstance(found, dict) and set(found) == {"human-readable-text"}:
        return [visible(line, MAX_TEXT) for line in str(found["human-readable-text"]).splitlines()]
    return [] if found in ({}, []) else list(render(found))


def _judge(command: str, waited: bool, found: Any) -> None:
    """Raise where the result is not what was asked for."""
    if command == "hint-run":
        run = Fields(found, "the monitor's hint-run", DeviceError)
        if not run.boolean("completed"):
            by = visible(run.text("ended-by"))
            raise PeerVanished("the guest did not end the run in time" if by == "deadline" else f"ended by the {by}")
    if command == "migrate" and waited:
        state = Fields(found, "the monitor's query-migrate", DeviceError)
        status = visible(state.text("status", default="none"))
        if status == "cancelled":
            raise Cancelled("the migration was cancelled")
        if status != "completed":
            text = f"the migration has {status}: {visible(state.text('error-desc', default='no reason given'))}"
            raise state.choice("error-kind", _KINDS, default="protocol")(text)
