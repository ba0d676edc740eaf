"""``balloon serve``: our device for any vhost-user front end, with a monitor."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import click

from balloon_cli.errors import INTERRUPTED
from balloon_dev.device import DEFAULT_FEATURES
from balloon_dev.features import BalloonFeature, parse_features
from balloon_dev.profiles import PROFILES, profile_named
from host_qemu_side.loop import Loop
from host_qemu_side.serve import ServeOptions, Server
from vring.sizes import parse_size

__all__ = ["FEATURES", "serve"]

FEATURES = DEFAULT_FEATURES | int(BalloonFeature.STATS_VQ | BalloonFeature.DEFLATE_ON_OOM)
"""Offered unless others are asked for: hints, and what costs a guest nothing."""

EXAMPLES = """\b
Examples:
  balloon serve /tmp/b.sock --monitor /tmp/m.sock                  for front ends that others start
  python -m guest_driver --socket /tmp/b.sock --memory 256M          such a front end
  linux virtio_uml.device=/tmp/b.sock:5 ...                          another one (use --profile linux)
  balloon serve /tmp/b.sock --monitor /tmp/m.sock --guest python --memory 256M
  balloon ctl /tmp/m.sock migrate uri=unix:/tmp/d.sock               that guest can be migrated
"""


@contextlib.contextmanager
def stop_on_signal(loop: Loop) -> Iterator[list[int]]:
    """Within the block the first Ctrl-C or SIGTERM goes into the list and wakes the loop; the second one kills."""
    asked: list[int] = []
    mine, theirs = socket.socketpair()
    mine.setblocking(False)
    theirs.setblocking(False)

    def first(number: int, frame: object) -> None:
        asked.append(number)
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, signal.SIG_DFL)

    def woken() -> None:
        with contextlib.suppress(BlockingIOError):
            mine.recv(64)

    old = {which: signal.signal(which, first) for which in (signal.SIGINT, signal.SIGTERM)}
    old_fd = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    loop.watch(mine.fileno(), woken)
    try:
        yield asked
    finally:
        signal.set_wakeup_fd(old_fd)
        for which, handler in old.items():
            signal.signal(which, handler)
        loop.unwatch(mine.fileno())
        mine.close()
        theirs.close()


def _teller(json_log: bool, quiet: bool) -> Callable[[str, dict[str, Any]], None]:
    began = time.time()

    def tell(name: str, facts: dict[str, Any]) -> None:
        now = time.time()
        if json_log:
            line = {"schema_version": 1, "time": round(now, 6), "event": name, "data": facts}
            print(json.dumps(line, default=str), flush=True)
        elif not quiet:
            words = " ".join(f"{key}={_plain(value)}" for key, value in facts.items() if value is not None)
            print(f"{now - began:9.3f} {name} {words}".rstrip(), file=sys.stderr, flush=True)

    return tell


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


@click.command(epilog=EXAMPLES)
@click.argument("socket", metavar="SOCKET")
@click.option("--monitor", metavar="PATH", help="Unix socket that speaks QMP: for `balloon ctl` and QEMU's tools.")
@click.option("--profile", type=click.Choice(sorted(PROFILES)), default="spec", show_default=True)
@click.option("--features", metavar="LIST", help="Such as hint,stats or all; default: hint,stats,deflate-on-oom.")
@click.option("--target", metavar="SIZE", help="What a guest is to have; the balloon takes the rest.")
@click.option("--guest", type=click.Choice(["python"]), help="Start a guest too; it can be paused and migrated.")
@click.option("--memory", metavar="SIZE", default="256M", show_default=True, help="RAM of that guest.")
@click.option("--workload", default="churn", show_default=True, help="What that guest does.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of that guest.")
@click.option("--json-log", is_flag=True, help="One JSON object a line on stdout for everything that happens.")
@click.option("-q", "--quiet", is_flag=True, help="Tell nothing.")
def serve(**options: Any) -> None:
    """Serve a balloon device on a vhost-user SOCKET until Ctrl-C; front ends may come and go.

    The first Ctrl-C (or SIGTERM) cancels a migration, lets the guest have its hinted pages back, removes the sockets
    and exits with 130 (0); the second one kills.
    """
    profile = profile_named(options["profile"])
    features = FEATURES if options["features"] is None else parse_features(options["features"])
    arguments = None
    resume = {"profile": profile.name, "batch": 64, "free_at": "done", "dirty_log": "auto"}
    if options["guest"] is not None:
        arguments = ["--memory", str(parse_size(options["memory"])), "--workload", options["workload"]]
        arguments += ["--seed", str(options["seed"]), "--features", hex(features)]
        arguments += [text for name, value in resume.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    serve_options = ServeOptions(
        socket=options["socket"],
        monitor=options["monitor"],
        profile=profile,
        features=features,
        target=None if options["target"] is None else parse_size(options["target"]),
        guest_arguments=arguments,
        resume=resume,
    )
    with (
        Server(serve_options, _teller(options["json_log"], options["quiet"])) as server,
        stop_on_signal(server.loop) as asked,
    ):
        server.run(lambda: bool(asked))
        number = asked[0] if asked else None
    if number == signal.SIGINT:
        sys.exit(INTERRUPTED)
