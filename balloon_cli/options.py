"""What the commands share: the types of a size and of a time, logging, and how findings end a command."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.logging import RichHandler

from balloon_cli.errors import INVARIANT
from balloon_dev.profiles import PROFILES
from guest_driver.qemu.package import QEMU_ENVIRONMENT
from host_qemu_side.linux_guest.kernel import KERNEL_ENVIRONMENT, MODULES_ENVIRONMENT
from host_qemu_side.migration import MIN_BANDWIDTH
from vring.errors import UsageError, quoted
from vring.sizes import parse_seconds, parse_size

if TYPE_CHECKING:
    _SizeBase = click.ParamType[int]
    _SecondsBase = click.ParamType[float]
else:
    _SizeBase = _SecondsBase = click.ParamType  # not generic before click 8.4

__all__ = [
    "BANDWIDTH",
    "SECONDS",
    "SEED",
    "SIZE",
    "Seconds",
    "Size",
    "chosen_folder",
    "fail_if",
    "limit_options",
    "linux_options",
    "naming",
    "profile_option",
    "qemu_option",
    "set_up_logging",
]

Command = Callable[..., Any]


class Size(_SizeBase):
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


class Seconds(_SecondsBase):
    """A time such as 0.3; neither negative nor longer than the system can wait, nor no number."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse it."""
        try:
            return parse_seconds(str(value))
        except UsageError as error:
            self.fail(str(error), param, ctx)


class Bandwidth(Size):
    """Bytes per second, such as 128M, or 0 for no limit."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse it, and see that a migration can have it."""
        size = super().convert(value, param, ctx)
        if 0 < size < MIN_BANDWIDTH:
            self.fail(f"{size} bytes per second are too few, at least {MIN_BANDWIDTH}, or 0 for no limit", param, ctx)
        return size


SIZE = Size()
BANDWIDTH = Bandwidth()
SECONDS = Seconds()
SEED = click.IntRange(0, (1 << 64) - 1)


def limit_options(warm_up: float) -> Callable[[Command], Command]:
    """Return what adds the options of every command that migrates.

    Parameters
    ----------
    warm_up
        Default of ``--warm-up``, in seconds.
    """
    options = [
        click.option("--bandwidth", type=BANDWIDTH, default="128M", show_default=True, help="Bytes/s; 0: no limit."),
        click.option(
            "--downtime-limit",
            type=SECONDS,
            default=0.3,
            show_default=True,
            metavar="SECONDS",
            help="Freeze the guest when what is left can be sent in this time.",
        ),
        click.option(
            "--max-rounds",
            type=click.IntRange(1),
            default=30,
            show_default=True,
            metavar="N",
            help="Freeze the guest after so many rounds however much is left.",
        ),
        click.option(
            "--warm-up",
            type=SECONDS,
            default=warm_up,
            show_default=True,
            metavar="SECONDS",
            help="Let the workload run before the migration begins.",
        ),
        click.option(
            "--batch",
            type=click.IntRange(1, 1024),
            default=64,
            show_default=True,
            metavar="N",
            help="Blocks the guest hints at a time.",
        ),
        click.option(
            "--seed", type=SEED, default=1, show_default=True, metavar="N", help="Of the guest's contents and choices."
        ),
    ]

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def profile_option(command: Command) -> Command:
    """Add the option that chooses a profile; `profile_named` takes its value."""
    return click.option(
        "--profile",
        type=click.Choice(sorted(PROFILES)),
        default="spec",
        show_default=True,
        help="Whose reading of the standard the device follows.",
    )(command)


def linux_options(command: Command) -> Command:
    """Add the options that choose the Linux guest's kernel; `find_kernel` takes their values."""
    modules = click.option(
        "--modules",
        default="",
        metavar="FOLDER",
        help=f"Where the modules of that kernel are. Default: ${MODULES_ENVIRONMENT}, or as installed with it.",
    )
    linux = click.option(
        "--linux",
        default="",
        metavar="PATH",
        help=f"Kernel of the Linux guest, a User-Mode Linux. Default: ${KERNEL_ENVIRONMENT}, or linux.uml.",
    )
    return linux(modules(command))


def qemu_option(command: Command) -> Command:
    """Add the option that chooses a QEMU; `find_qemu` takes its value."""
    return click.option(
        "--qemu",
        default="",
        metavar="PATH",
        help=f"QEMU's program, or the folder that has it. Default: ${QEMU_ENVIRONMENT}, or as installed.",
    )(command)


@contextlib.contextmanager
def naming(option: str) -> Iterator[None]:
    """Within the block a `UsageError` is about this option, or argument, and becomes click's error that names it."""
    try:
        yield
    except UsageError as error:
        raise click.BadParameter(str(error), param_hint=option) from error


def chosen_folder(folder: str, option: str) -> None:
    """See that a folder somebody named is there and can be written in; none is made for him, he may have mistyped it.

    Raises
    ------
    click.BadParameter
        If it is not.
    """
    try:
        if not folder:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        text = f"no file can be made in {quoted(folder)}: {why}; name a folder that exists and is yours"
        raise click.BadParameter(text, param_hint=option) from error


def set_up_logging(verbose: int, console: Console | None) -> None:
    """Log to stderr, above a live view if there is one."""
    handler: logging.Handler = logging.StreamHandler()
    if console is not None:
        handler = RichHandler(console=console, show_time=False, show_path=False)
    level = logging.DEBUG if verbose > 1 else logging.WARNING
    logging.basicConfig(level=level, format="%(name)s: %(message)s", handlers=[handler])


def fail_if(found: list[str]) -> None:
    """Print what is wrong, if anything is, and end with the code for a failed invariant."""
    for line in found:
        print(f"balloon: {line}", file=sys.stderr)
    if found:
        sys.exit(INVARIANT)
