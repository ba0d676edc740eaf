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
from click.core import ParameterSource

from balloon_cli.errors import INTERRUPTED
from balloon_cli.guests import check_python_guest, require_descriptors, require_memory
from balloon_cli.options import SEED, SIZE, naming, profile_option
from balloon_cli.signals import next_one_kills
from balloon_cli.streams import nobody_reads
from balloon_dev.device import DEFAULT_FEATURES
from balloon_dev.features import BalloonFeature, parse_features
from balloon_dev.profiles import profile_named
from host_qemu_side.loop import Loop
from host_qemu_side.serve import ServeOptions, Server
from vring.peer import survive_lost_memory
from vring.unix_socket import socket_path

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
        next_one_kills((signal.SIGINT, signal.SIGTERM))

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
            try:
                print(json.dumps(line, default=str), flush=True)
            except OSError as error:  # a full disk, say, is no reason to let go of a guest
                print(f"balloon: an event could not be logged: {error.strerror}", file=sys.stderr)
        elif not quiet:
            words = " ".join(f"{key}={_plain(value)}" for key, value in facts.items() if value is not None)
            print(f"{now - began:9.3f} {name} {words}".rstrip(), file=sys.stderr, flush=True)

    return tell


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _check_values(ctx: click.Context, options: dict[str, Any]) -> int:
    """Refuse what cannot work before anything is started; return the features."""
    with naming("SOCKET"):
        socket_path(options["socket"])
    if options["monitor"] is not None:
        with naming("--monitor"):
            socket_path(options["monitor"])
    if options["target"] == 0:
        raise click.BadParameter("a guest cannot be without memory", param_hint="--target")
    if options["guest"] is None:
        for name in ("memory", "workload", "seed"):
            if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise click.BadParameter("it is for --guest python", param_hint=f"--{name}")
    else:
        check_python_guest(options["memory"], options["workload"])
    with naming("--features"):
        features = FEATURES if options["features"] is None else parse_features(options["features"])
    require_descriptors()
    if options["guest"] is not None:
        require_memory(options["memory"], options["workload"], here=False)
    return features


@click.command(epilog=EXAMPLES)
@click.argument("socket", metavar="SOCKET")
@click.option("--monitor", metavar="PATH", help="Unix socket that speaks QMP: for `balloon ctl` and QEMU's tools.")
@profile_option
@click.option("--features", metavar="LIST", help="Such as hint,stats or all; default: hint,stats,deflate-on-oom.")
@click.option("--target", type=SIZE, help="What a guest is to have; the balloon takes the rest.")
@click.option("--guest", type=click.Choice(["python"]), help="Start a guest too; it can be paused and migrated.")
@click.option("--memory", type=SIZE, default="256M", show_default=True, help="RAM of that guest.")
@click.option("--workload", default="churn", show_default=True, help="What that guest does.")
@click.option("--seed", type=SEED, default=1, show_default=True, help="Of that guest.")
@click.option("--json-log", is_flag=True, help="One JSON object a line on stdout for everything that happens.")
@click.option("-q", "--quiet", is_flag=True, help="Tell nothing.")
@click.pass_context
def serve(ctx: click.Context, /, **options: Any) -> None:
    """Serve a balloon device on a vhost-user SOCKET until Ctrl-C; front ends may come and go.

    The first Ctrl-C (or SIGTERM) cancels a migration, lets the guest have its hinted pages back, removes the sockets
    and exits with 130 (0); the second one kills.
    """
    profile = profile_named(options["profile"])
    features = _check_values(ctx, options)
    arguments = None
    resume = {"profile": profile.name, "batch": 64, "free_at": "done", "dirty_log": "auto"}
    if options["guest"] is not None:
        arguments = ["--memory", str(options["memory"]), "--workload", options["workload"]]
        arguments += ["--seed", str(options["seed"]), "--features", hex(features)]
        arguments += [text for name, value in resume.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    serve_options = ServeOptions(
        socket=options["socket"],
        monitor=options["monitor"],
        profile=profile,
        features=features,
        target=options["target"],
        guest_arguments=arguments,
        resume=resume,
    )
    survive_lost_memory()
    with (
        Server(serve_options, _teller(options["json_log"], options["quiet"])) as server,
        stop_on_signal(server.loop) as asked,
    ):
        # Who reads the log ends the server by going, as he would end any program in a pipe.
        server.run(lambda: bool(asked) or (options["json_log"] and nobody_reads()))
        number = asked[0] if asked else None
    if number == signal.SIGINT:
        sys.exit(INTERRUPTED)
