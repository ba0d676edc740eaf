"""What takes long to make, such as a booted guest, shared by tests; made anew where a test has left it broken."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

from vring.errors import VirtioError

T = TypeVar("T")


class Shared(Generic[T]):
    """One thing at a time, made when it is first wanted. A context manager: at its end the thing is ended.

    Parameters
    ----------
    make
        Returns a context manager of a new one.
    check
        Raises an error if one that was used cannot be used by another test.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[T]], check: Callable[[T], object]) -> None:
        self._make, self._check = make, check
        self._held: T | None = None
        self._end = contextlib.ExitStack()

    def get(self) -> T:
        """Return one that is sound."""
        if self._held is not None:
            try:
                self._check(self._held)
            except (AssertionError, OSError, VirtioError):
                self._held = None
                with contextlib.suppress(Exception):  # how a broken one ends is no matter of the test that comes next
                    self._end.close()
        if self._held is None:
            self._held = self._end.enter_context(self._make())
        return self._held

    def __enter__(self) -> Shared[T]:
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.close()
