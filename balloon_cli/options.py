"""What the commands share: the type of a size, logging, and how findings end a command."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.logging import RichHandler

from balloon_cli.errors import INVARIANT
from vring.errors import UsageError
from vring.sizes import parse_size

if TYPE_CHECKING:
    _SizeBase = click.ParamType[int]
else:
    _SizeBase = click.ParamType  # not generic before click 8.4

__all__ = ["SIZE", "Size", "fail_if", "set_up_logging"]


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


SIZE = Size()


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
