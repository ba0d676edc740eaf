"""The program ``balloon``: loads the commands, which takes half a second, and runs one."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType

__all__ = ["main"]

MISSING, INTERRUPTED = 3, 130


def _interrupted(number: int = signal.SIGINT, frame: FrameType | None = None) -> None:
    """End at once. No sys.exit: after a KeyboardInterrupt in exec() (dataclasses do that) CPython dies of SIGINT."""
    with contextlib.suppress(OSError):
        os.write(2, b"balloon: interrupted\n")
    os._exit(INTERRUPTED)


def _reopen_closed() -> None:
    """Open what was closed of the three standard streams: whoever closed it means silence.

    Left closed, the next descriptor opened, here or in a program that is started, would take its place.
    """
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            # print(file=None), as with no standard error, would print to standard output.
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False))  # noqa: SIM115


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit; see `balloon_cli.errors` for the exit codes."""
    # Nothing here multiplies matrices; the threads numpy would start for that take address space (ulimit -v).
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        _reopen_closed()  # before modules are loaded, which opens files
        # No KeyboardInterrupt while modules load: one raised in a callback of the import system would be ignored there.
        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if usual:
            signal.signal(signal.SIGINT, _interrupted)
        from balloon_cli import streams
        from balloon_cli.commands import run

        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with streams.patient_streams():
            code = run(arguments)
    except (ImportError, OSError, MemoryError, SystemError) as error:  # of the modules: `run` has none left
        print(f"balloon: {_why_not_loaded(error)}", file=sys.stderr)
        code = MISSING
    except KeyboardInterrupt:
        _interrupted()
    sys.exit(code)


def _why_not_loaded(error: BaseException) -> str:
    """Return why the commands could not be loaded, and what to do; a lack of memory has many faces there."""
    said: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        said.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    text = " ".join(said)
    # SystemError is what Python itself makes of it now and then.
    if isinstance(error, (MemoryError, SystemError)) or "allocate memory" in text or "failed to map" in text:
        return "there is not enough memory even to begin: raise the limit (ulimit -v, control group)"
    if "Too many open files" in text:
        return "too few files may be open even to begin: raise the limit (ulimit -n)"
    first = next((line for line in said[-1].splitlines() if line.strip()), type(error).__name__)
    return f"not completely installed: {first}; run `pip install -e .` or ./run build"


if __name__ == "__main__":
    main()
