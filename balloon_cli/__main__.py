"""The program ``balloon``: loads the commands, which takes half a second, and runs one."""

from __future__ import annotations

import os
import sys

__all__ = ["main"]

MISSING, INTERRUPTED = 3, 130


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit; see `balloon_cli.errors` for the exit codes."""
    try:
        from balloon_cli.commands import run

        code = run(arguments)
    except ImportError as error:
        print(f"balloon: not completely installed: {error}; run `pip install -e .` or ./run build", file=sys.stderr)
        code = MISSING
    except KeyboardInterrupt:
        print("balloon: interrupted", file=sys.stderr, flush=True)
        # Not sys.exit: a KeyboardInterrupt inside exec(), as dataclasses do it, makes CPython die of SIGINT.
        os._exit(INTERRUPTED)
    sys.exit(code)


if __name__ == "__main__":
    main()
