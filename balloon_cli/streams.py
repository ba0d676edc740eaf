"""Standard output and standard error of the program: what becomes of words that nobody reads or that find no room.

Whoever closes the pipe of a result has read enough, so that is no error, and what the exit code says stays true. Words
on standard error may get lost without any harm to what goes on.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from rich.console import Console

from vring.errors import MissingFacility

__all__ = ["nobody_reads", "patient_streams", "result"]


class _Patient(io.FileIO):
    """A descriptor that drops what it cannot write, for some reasons or for any."""

    def __init__(self, fd: int, reasons: tuple[int, ...] | None) -> None:
        super().__init__(fd, "wb", closefd=False)
        self.reasons = reasons
        self.gone = False

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self.gone:
            return size
        try:
            # None: the pipe is full, and somebody has asked that nobody wait for it. A result does.
            while (written := super().write(data)) is None and self.reasons is not None:
                select.select([], [self.fileno()], [])
        except OSError as error:
            self.gone = error.errno == errno.EPIPE
            if self.reasons is None or error.errno in self.reasons:
                return size
            raise
        return size if written is None else written


def _patient(usual: TextIO | None, fd: int, reasons: tuple[int, ...] | None) -> TextIO | None:
    """Return a stream in the place of Python's own, or that itself if somebody has replaced it already."""
    try:
        if usual is None or usual.fileno() != fd:
            return usual
    except (OSError, ValueError, AttributeError):
        return usual
    lines = fd == 2 or usual.isatty()
    # No result fails for a name that this terminal cannot show.
    raw = io.BufferedWriter(_Patient(fd, reasons))
    return io.TextIOWrapper(raw, usual.encoding, "backslashreplace", line_buffering=lines)


@contextlib.contextmanager
def patient_streams() -> Iterator[None]:
    """Within the block a reader of standard output who has gone ends nothing, nor whatever befalls standard error."""
    usual = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = ours = _patient(sys.stdout, 1, (errno.EPIPE,)), _patient(sys.stderr, 2, None)
    try:
        yield
    finally:
        for stream in ours:
            try:
                if stream is not None:
                    stream.flush()
            except OSError:  # which `result` has told
                _drop_output()
        sys.stdout, sys.stderr = usual


def nobody_reads() -> bool:
    """Return whether the reader of standard output has gone."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return isinstance(raw, _Patient) and raw.gone


@contextlib.contextmanager
def result() -> Iterator[Console]:
    """Within the block a result is printed, on the console it gets or with `print`, and nothing else is done.

    Raises
    ------
    MissingFacility
        If it finds no room; the message says why.
    """
    try:
        yield Console()
        sys.stdout.flush()
    except OSError as error:
        _drop_output()
        raise MissingFacility(f"cannot write the result to standard output: {error.strerror}") from error


def _drop_output() -> None:
    """Send what comes now, and what is kept for it already, nowhere: Python would write it when it ends, and fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
