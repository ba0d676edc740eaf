"""``python -m guest_driver``: run the embedded guest against a vhost-user balloon device."""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
from collections.abc import Callable
from typing import TypeVar

from balloon_dev.features import parse_features
from balloon_dev.profiles import PROFILES, profile_named
from guest_driver.balloon import DEFAULT_FEATURES, FreeAt
from guest_driver.fitting import check_memory, check_workload
from guest_driver.process import GuestOptions, GuestProcess, die_with_parent
from guest_driver.workloads import FORMS
from vring.errors import DeviceError, MissingFacility, PeerVanished, UsageError, VirtioError, quoted
from vring.sizes import parse_seconds, parse_size

EXIT = {UsageError: 2, MissingFacility: 3, DeviceError: 4, PeerVanished: 5}
LACKING = 3


_T = TypeVar("_T")


def _said(parse: Callable[[str], _T]) -> Callable[[str], _T]:
    """Return a parser whose errors argparse repeats as they are."""

    def parsed(text: str) -> _T:
        try:
            return parse(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def _number(least: int, most: int) -> Callable[[str], int]:
    """Return a parser of whole numbers, in any base as Python writes them."""

    def parse(text: str) -> int:
        try:
            number = int(text, 0)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise UsageError(f"{quoted(text)} is no whole number from {least} to {most}")
        return number

    return _said(parse)


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody may be there to read it
        print(f"guest: {text}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Parse the arguments, run a guest, return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m guest_driver", description=__doc__, epilog=f"Workloads: {FORMS}")
    parser.add_argument("--socket", required=True, help="vhost-user socket of the balloon device: a path, or fd:N")
    parser.add_argument("--memory", default="1G", type=_said(parse_size), help="RAM, such as 512M or 1G")
    parser.add_argument("--workload", default="churn", help="what the guest does with its memory")
    parser.add_argument(
        "--seed", default=1, type=_number(0, (1 << 64) - 1), help="of contents and of the workload's choices"
    )
    parser.add_argument("--profile", default="spec", choices=sorted(PROFILES), help="how queues are numbered")
    parser.add_argument(
        "--features",
        default=DEFAULT_FEATURES,
        type=_said(parse_features),
        help="features to accept: all, hint,stats or a number",
    )
    parser.add_argument(
        "--poison", default=None, type=_number(0, (1 << 32) - 1), help="value that freed pages are filled with"
    )
    parser.add_argument(
        "--batch", default=64, type=_number(1, 1024), help="hint blocks allocated and published at a time"
    )
    parser.add_argument("--free-at", default="done", choices=["done", "stop"], help="when hinted blocks are freed")
    parser.add_argument("--dirty-log", default="auto", choices=["auto", "wp-async", "software"])
    parser.add_argument(
        "--reconnect",
        default=0.0,
        type=_said(parse_seconds),
        metavar="SECONDS",
        help="when the device goes away, do without it and try to reach it again for so long; default: end",
    )
    parser.add_argument("--control-fd", default=-1, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ram-fd", default=-1, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--die-with-parent", action="store_true", help="be killed when the parent process dies")
    parser.add_argument("-v", "--verbose", action="count", default=0)
    args = parser.parse_args(arguments)
    if args.reconnect and args.socket.startswith("fd:"):
        parser.error("--reconnect needs --socket with a path: a descriptor connects once")
    if args.die_with_parent:
        die_with_parent()
    logging.basicConfig(level=logging.DEBUG if args.verbose else logging.WARNING, format="%(name)s: %(message)s")
    if args.control_fd >= 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the host: it decides what becomes of the guest
    options = GuestOptions(
        socket=args.socket,
        memory=args.memory,
        workload=args.workload,
        seed=args.seed,
        profile=profile_named(args.profile),
        features=args.features,
        poison=args.poison,
        batch=args.batch,
        free_at=FreeAt[args.free_at.upper()],
        dirty_log=args.dirty_log,
        reconnect=args.reconnect,
        control=args.control_fd,
        ram=args.ram_fd,
    )
    guest = None
    try:
        if args.ram_fd < 0:
            check_memory(args.memory)
            check_workload(args.workload, args.memory)
        guest = GuestProcess(options)
        guest.boot()
        guest.run()
    except KeyboardInterrupt:
        return 130
    except VirtioError as error:
        if not (args.control_fd >= 0 and isinstance(error, PeerVanished)):  # the host knows that it is gone
            _tell(str(error))
        return next((code for kind, code in EXIT.items() if isinstance(error, kind)), 1)
    except (OSError, MemoryError) as error:  # what the system refuses: memory, descriptors
        _tell(getattr(error, "strerror", None) or str(error) or "there is not enough memory")
        return LACKING
    finally:
        if guest is not None:
            guest.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
