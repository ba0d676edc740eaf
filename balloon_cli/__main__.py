"""The program ``balloon``: loads the commands, which takes half a second, and runs one."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

__all__ = ["main"]

MISSING, INTERRUPTED = 3, 130


def _interrupted(number: int = signal.SIGINT, frame: FrameType | None = None) -> None:
    """End at once. No sys.exit: after a KeyboardInterrupt in exec() (dataclasses do that) CPython dies of SIGINT."""
    os.write(2, b"balloon: interrupted\n")
    os._exit(INTERRUPTED)


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit; see `balloon_cli.errors` for the exit codes."""
    for fd in range(3):
        # Whoever closed one of them means silence; left closed, the next descriptor opened, here or in a program that
        # is started, would take its place.
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            # print(file=None), as with no standard error, would print to standard output.
            name = ("stdin", "stdout", "stderr")[fd]
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False))  # noqa: SIM115
    try:
        # No KeyboardInterrupt while modules load: one raised in a callback of the import system would be ignored there.
        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if usual:
            signal.signal(signal.SIGINT, _interrupted)
        from balloon_cli.commands import run

        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = run(arguments)
    except ImportError as error:
        print(f"balloon: not completely installed: {error}; run `pip install -e .` or ./run build", file=sys.stderr)
        code = MISSING
    except KeyboardInterrupt:
        _interrupted()
    sys.exit(code)


if __name__ == "__main__":
    main()
