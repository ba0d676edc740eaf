"""The commands and their options. What they do is in the other modules."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console

from balloon_cli import doctor as doctor_module
from balloon_cli import report
from balloon_cli.bench import bench
from balloon_cli.ctl import ctl
from balloon_cli.doctor import DoctorOptions
from balloon_cli.drive_commands import compare, drive
from balloon_cli.errors import MISSING, USAGE, VANISHED, exit_code, message
from balloon_cli.guests import check_linux_guest, check_python_guest, require_descriptors, require_memory
from balloon_cli.live import LiveProgress, make_progress
from balloon_cli.migrate import MigrateOptions, migrate_all, places
from balloon_cli.options import (
    SIZE,
    chosen_folder,
    fail_if,
    limit_options,
    linux_options,
    naming,
    profile_option,
    qemu_option,
    set_up_logging,
)
from balloon_cli.receive import ReceiveOptions, receive_guest
from balloon_cli.serve import serve
from balloon_cli.streams import result
from balloon_dev.profiles import profile_named
from host_qemu_side.migration import Limits
from host_qemu_side.migration.address import parse_address
from host_qemu_side.migration.output import try_name
from vring import __version__
from vring.errors import PeerVanished, UsageError, VirtioError
from vring.sizes import format_size
from vring.unix_socket import why_misnamed

__all__ = ["cli", "run"]


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  balloon doctor                            what this machine can do
  balloon migrate                           a 1 GiB guest, without and with hints
  balloon migrate --help                    all options, more examples

\b
Exit codes: 0 success, 1 an invariant failed, 2 usage, 3 the machine lacks something,
4 the peer broke the protocol, 5 a peer vanished, 130 interrupted.
""",
)
@click.version_option(__version__, prog_name="balloon", message="%(prog)s %(version)s")
def cli() -> None:
    """Both halves of virtio-balloon with free page hints, and the live migration they are for.

    Results go to stdout, progress and errors to stderr. Every command that has a result prints it with --json as one
    JSON object.
    """


@cli.command(
    epilog="""\b
Workloads (joined by '+'):
  idle               does nothing
  churn[:10%[@16M]]  fills all memory, then frees all but a share, in pieces of that mean size
  writer:64M@20M     rewrites random pages of a working set, bytes per second
  build[:64M]        allocates, writes and frees small blocks, with a page cache that grows

\b
Destinations:
  spawn              a receiver in a process of its own (default)
  unix:PATH          a `balloon receive unix:PATH` that listens
  tcp:HOST:PORT      the same over TCP
  file:PATH          a file; it is read back and judged, too

\b
Examples:
  balloon migrate                                            without and with hints, compared
  balloon migrate --memory 4G --bandwidth 1G --hints on
  balloon migrate --workload churn+writer:64M@20M -v         with each round
  balloon migrate --to file:guest.vbm --hints on             keep the stream
  balloon migrate --memory 256M --json > result.json         progress still on stderr
  NO_COLOR=1 balloon migrate                                 no colours

The first Ctrl-C cancels and leaves the guest whole at the source, the second kills.
Exit code 1 says that the oracle or the resumed guest found a wrong page.
"""
)
@click.option(
    "--guest",
    type=click.Choice(["python", "linux"]),
    default="python",
    show_default=True,
    help="The embedded guest in Python, or an unmodified Linux kernel (User-Mode Linux).",
)
@click.option("--memory", type=SIZE, default="1G", show_default=True, help="RAM of the guest, such as 512M or 4G.")
@click.option("--workload", default="churn", show_default=True, help="What the guest does with its memory; see below.")
@click.option(
    "--hints",
    type=click.Choice(["on", "off", "both"]),
    default="both",
    show_default=True,
    help="With free page hints, without, or both after one another, with two guests (to a socket: on, if not given).",
)
@click.option("--to", default="spawn", show_default=True, metavar="DESTINATION", help="Where to; see below.")
@limit_options(warm_up=1.0)
@click.option(
    "--free-at",
    type=click.Choice(["done", "stop"]),
    default="done",
    show_default=True,
    help="When the guest frees its hinted pages: 'stop' breaks the rule, to see what it costs.",
)
@click.option(
    "--dirty-log",
    type=click.Choice(["auto", "wp-async", "software", "cachestat"]),
    default="auto",
    show_default=True,
    help="How written pages are found; see `balloon doctor`.",
)
@profile_option
@click.option(
    "--work-dir",
    metavar="FOLDER",
    help="For the Linux guest's RAM file: a folder on ext4 or xfs that others cannot change. Default: in /var/tmp.",
)
@linux_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout.")
@click.option("-v", "--verbose", count=True, help="Show each round; twice: log everything.")
@click.pass_context
def migrate(ctx: click.Context, /, **options: Any) -> None:
    """Migrate a running guest live, with and without free page hints.

    A guest boots in a process of its own and runs a workload; then its memory is sent in rounds while it runs, and
    another process goes on with it. An oracle that shares nothing with the migration compares every page.
    """
    as_json, verbose = options.pop("as_json"), options.pop("verbose")
    _check_values(ctx, options)
    console = Console(stderr=True)
    title = f"{format_size(options['memory'])} {options['guest']} guest, {options['workload']}, seed {options['seed']}"
    progress = make_progress(title, console, verbose=verbose)
    set_up_logging(verbose, console if isinstance(progress, LiveProgress) else None)
    limits = Limits(float(options.pop("bandwidth")), options.pop("downtime_limit"), options.pop("max_rounds"))
    profile = profile_named(options.pop("profile"))
    found = migrate_all(MigrateOptions(limits=limits, profile=profile, verbose=verbose > 0, **options), progress)
    with result() as out:
        if as_json:
            print(json.dumps(found))
        else:
            report.print_migration(found, out, verbose=verbose)
    fail_if(report.findings(found))


def _check_values(ctx: click.Context, options: dict[str, Any]) -> None:
    """Refuse what cannot work before anything is started, first of all for what is written wrongly."""
    linux = options["guest"] == "linux"
    for name in () if linux else ("linux", "modules", "work_dir"):
        if options[name]:
            raise click.BadParameter("it is for --guest linux", param_hint=f"--{name.replace('_', '-')}")
    if options["dirty_log"] not in ("auto", *(("cachestat",) if linux else ("software", "wp-async"))):
        other = "linux" if options["dirty_log"] == "cachestat" else "python"
        raise click.BadParameter(f"{options['dirty_log']} is for --guest {other}", param_hint="--dirty-log")
    (check_linux_guest if linux else check_python_guest)(options["memory"], options["workload"])
    if options["work_dir"] is not None:
        chosen_folder(options["work_dir"], "--work-dir")
    options["work_dir"] = options["work_dir"] or ""
    if options["to"] != "spawn":
        _check_destination(ctx, options)
    require_descriptors()
    require_memory(
        options["memory"],
        options["workload"],
        linux=linux,
        hints=options["hints"] == "on",
        here=options["to"].startswith(("spawn", "file")),
    )


def _check_destination(ctx: click.Context, options: dict[str, Any]) -> None:
    with naming("--to"):
        address = parse_address(options["to"])
        if address.kind == "file":
            for place in {options["to"], *places(options["to"], options["hints"]).values()}:
                try_name(parse_address(place).path)
        elif address.kind == "unix" and (why := why_misnamed(address.path)):
            raise UsageError(f"{options['to']}: {why}")
        elif address.kind == "tcp" and not address.port:
            raise UsageError(f"{options['to']}: nobody can be reached at port 0")
    if address.kind != "file" and options["hints"] == "both":
        if ctx.get_parameter_source("hints") is ParameterSource.COMMANDLINE:
            raise click.BadParameter(
                "both are two guests and a receiver takes one: choose on or off with --to a socket",
                param_hint="--hints",
            )
        options["hints"] = "on"


@cli.command(
    epilog="""\b
Addresses:
  unix:PATH      listen on a unix socket; a left-over socket that nobody serves is removed
  tcp:HOST:PORT  listen on TCP; port 0 takes a free one and says which
  file:PATH      read a file that `balloon migrate --to file:PATH` wrote

\b
Examples:
  balloon receive unix:/tmp/balloon.sock           then: balloon migrate --to unix:/tmp/balloon.sock
  balloon receive tcp:0.0.0.0:4444 --keep          keep the guest running until Ctrl-C
  balloon receive file:guest.vbm --no-resume       only check that the file is whole
  balloon receive file:guest.vbm --json

The stream is neither encrypted nor authenticated: listen where you trust who can connect.
"""
)
@click.argument("address")
@click.option("--keep", is_flag=True, help="After the checks keep the guest running until Ctrl-C.")
@click.option(
    "--no-resume",
    is_flag=True,
    help="Check the stream, do not go on with the guest. (From a socket this ends the guest: the source let go of it.)",
)
@click.option(
    "--start", is_flag=True, help="Let a guest that was stopped at the source run here; else it stays stopped."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors; without --json no result either.")
@click.option("-v", "--verbose", count=True, help="Log more.")
@click.option("--die-with-parent", is_flag=True, hidden=True)
@click.option("--digests", "digests_fd", type=int, default=-1, hidden=True)
def receive(
    address: str,
    keep: bool,
    no_resume: bool,
    start: bool,
    as_json: bool,
    quiet: bool,
    verbose: int,
    die_with_parent: bool,
    digests_fd: int,
) -> None:
    """Receive a guest, check every page it has allocated, and go on with it.

    ADDRESS is unix:PATH, tcp:HOST:PORT or file:PATH. One guest is received, then the command ends.
    """
    with naming("ADDRESS"):
        where = parse_address(address)
    for given, option in ((keep, "--keep"), (start, "--start")):
        if given and no_resume:
            raise click.UsageError(f"{option} and --no-resume exclude each other")
    require_descriptors()
    set_up_logging(verbose, None)

    def say(text: str) -> None:
        if not quiet:
            print(f"balloon: {text}", file=sys.stderr, flush=True)

    options = ReceiveOptions(where, not no_resume, start, keep, digests_fd, die_with_parent)
    try:
        facts = receive_guest(options, say)
    except PeerVanished:
        if die_with_parent and where.kind == "fd":
            sys.exit(VANISHED)  # the source started this process: it knows, and says so
        raise
    with result() as out:
        if as_json:
            print(json.dumps(facts))
        elif not quiet:
            report.print_reception(facts, out)
    fail_if(report.resumed_findings(facts["resumed"]))


@cli.command(
    epilog="""\b
Examples:
  balloon doctor
  balloon doctor --work-dir ~/guests --json
"""
)
@click.option(
    "--work-dir",
    metavar="FOLDER",
    default="/var/tmp",
    show_default=True,
    help="Where the memory files of Linux guests would lie.",
)
@linux_options
@qemu_option
@click.option("--json", "as_json", is_flag=True, help="Print the findings as one JSON object on stdout.")
@click.pass_context
def doctor(ctx: click.Context, /, as_json: bool, **options: Any) -> None:
    """Try what this machine can do, and say what to install for the rest.

    Small guests of both kinds boot and are migrated with hints, which takes some seconds. Exit code 0 if that worked
    with the embedded Python guest, 3 if not even that.
    """

    def say(text: str) -> None:
        print(f"balloon: {text}", file=sys.stderr, flush=True)

    if ctx.get_parameter_source("work_dir") is ParameterSource.COMMANDLINE:
        chosen_folder(options["work_dir"], "--work-dir")
    require_descriptors()
    options["work_dir"] = Path(options["work_dir"])
    found = doctor_module.examine(DoctorOptions(**options), say)
    with result() as out:
        if as_json:
            print(json.dumps(found))
        else:
            doctor_module.print_findings(found, out)
    if not found["usable"]:
        sys.exit(MISSING)


cli.add_command(bench)
cli.add_command(serve)
cli.add_command(ctl)
cli.add_command(drive)
cli.add_command(compare)


def run(arguments: list[str] | None = None) -> int:
    """Run a command; errors become a line on stderr. Return the exit code."""
    try:
        # Without standalone mode click returns the code of `ctx.exit`, as --help and --version call it.
        return int(cli.main(args=arguments, prog_name="balloon", standalone_mode=False) or 0)
    except click.ClickException as error:
        return _usage(error)
    except click.Abort:  # what click makes of KeyboardInterrupt
        raise KeyboardInterrupt from None
    except (VirtioError, OSError, MemoryError) as error:
        print(f"balloon: {message(error)}", file=sys.stderr)
        return exit_code(error)


def _usage(error: click.ClickException) -> int:
    """Say what is wrong in one line; without arguments, click's help is the message."""
    context = getattr(error, "ctx", None)
    if isinstance(error, click.UsageError) and type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        command = context.command_path if context is not None else "balloon"
        print(f"{command}: {error.format_message()} (see {command} --help)", file=sys.stderr)
    return USAGE
