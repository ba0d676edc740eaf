"""``balloon``: the commands."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import click

from balloon_cli.ctl import ctl
from balloon_cli.errors import INVARIANT, exit_code
from balloon_cli.migrate import MigrateOptions, Progress, migrate_all
from balloon_cli.serve import serve
from balloon_dev.profiles import PROFILES, profile_named
from host_qemu_side.migration.engine import Limits
from vring.errors import UsageError, VirtioError
from vring.sizes import parse_size


class Size(click.ParamType[int]):
    """A size such as 4G."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse it."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


SIZE = Size()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Both halves of virtio-balloon with free page hints, and the live migration they are for."""


@cli.command()
@click.option("--guest", type=click.Choice(["python", "linux"]), default="python", show_default=True)
@click.option("--memory", type=SIZE, default="1G", show_default=True, help="RAM of the guest.")
@click.option("--workload", default="churn", show_default=True)
@click.option("--hints", type=click.Choice(["on", "off", "both"]), default="both", show_default=True)
@click.option("--to", default="spawn", show_default=True)
@click.option("--bandwidth", type=SIZE, default="128M", show_default=True, help="Bytes per second, 0 for no limit.")
@click.option("--downtime-limit", type=float, default=0.3, show_default=True, help="Seconds.")
@click.option("--max-rounds", type=click.IntRange(1), default=30, show_default=True)
@click.option("--free-at", type=click.Choice(["done", "stop"]), default="done", show_default=True)
@click.option("--dirty-log", type=click.Choice(["auto", "wp-async", "software"]), default="auto", show_default=True)
@click.option("--work-dir", default="", help="Folder for the Linux guest's RAM file, on ext4 or xfs.")
@click.option("--profile", type=click.Choice(sorted(PROFILES)), default="spec", show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--batch", type=click.IntRange(1, 1024), default=64, show_default=True)
@click.option("--json", "as_json", is_flag=True)
@click.option("-v", "--verbose", count=True)
def migrate(**options: Any) -> None:
    """Migrate a running guest live, with and without free page hints."""
    as_json, verbose = options.pop("as_json"), options.pop("verbose")
    logging.basicConfig(
        level=[logging.WARNING, logging.INFO, logging.DEBUG][min(verbose, 2)], format="%(name)s: %(message)s"
    )
    limits = Limits(float(options.pop("bandwidth")), options.pop("downtime_limit"), options.pop("max_rounds"))
    profile = profile_named(options.pop("profile"))
    result = migrate_all(MigrateOptions(limits=limits, profile=profile, **options), Progress())
    if as_json:
        print(json.dumps(result))
    else:
        print(json.dumps(result, indent=1))
    if any(run["oracle"] and run["oracle"]["pages_wrong"] for run in result["runs"]):
        sys.exit(INVARIANT)


@cli.command()
@click.argument("address")
@click.option("--quiet", is_flag=True)
@click.option("--die-with-parent", is_flag=True, hidden=True)
@click.option("--json", "as_json", is_flag=True)
def receive(address: str, quiet: bool, die_with_parent: bool, as_json: bool) -> None:
    """Receive a guest."""
    from balloon_cli.receive import receive_guest

    receive_guest(address, quiet=quiet, die_with_parent=die_with_parent, as_json=as_json)


cli.add_command(serve)
cli.add_command(ctl)


def main(arguments: list[str] | None = None) -> None:
    """Run a command; errors become one line on stderr and an exit code."""
    try:
        cli.main(args=arguments, prog_name="balloon", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.Abort:
        print("balloon: interrupted", file=sys.stderr)
        sys.exit(130)
    except (VirtioError, OSError, KeyboardInterrupt) as error:
        print(f"balloon: {error or 'interrupted'}", file=sys.stderr)
        sys.exit(exit_code(error))


if __name__ == "__main__":
    main()
