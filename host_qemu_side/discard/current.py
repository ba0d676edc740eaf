"""The discarder of a device whose memory comes and goes with its front end."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from host_qemu_side.discard.discarder import Discarder
from host_qemu_side.discard.partial import PartialPages
from vring.memory import PAGE_SIZE, GuestMemory

__all__ = ["CurrentDiscarder"]

U64 = npt.NDArray[np.uint64]


class CurrentDiscarder:
    """Passes on to one `Discarder` for as long as the memory stays the same.

    Parameters
    ----------
    memory
        Returns the guest's memory as it is now, None if there is none.
    tells_host
        Whether the driver tells before it takes a page back (MUST_TELL_HOST): only then may a host page bigger than
        4 KiB be put together from several requests, else a page in use could be dropped with it
        (balloon.operation.driver-8).
    """

    def __init__(self, memory: Callable[[], GuestMemory | None], tells_host: Callable[[], bool]) -> None:
        self._memory, self._tells_host = memory, tells_host
        self._current: Discarder | None = None

    @property
    def current(self) -> Discarder | None:
        """The discarder of the present memory."""
        memory = self._memory()
        if memory is None:
            self._current = None
        elif self._current is None or self._current.memory is not memory:
            big = any(region.page_size > PAGE_SIZE for region in memory.regions)
            partial = PartialPages(memory) if big and self._tells_host() else None
            self._current = Discarder(memory, partial=partial, on_refusal="count")
        return self._current

    def __call__(self, addr: U64, length: U64) -> None:
        """Drop pages, see `Discarder.__call__`."""
        if (current := self.current) is not None:
            current(addr, length)

    def deflate(self, addr: U64, length: U64) -> None:
        """Take note of pages the guest takes back."""
        if (current := self.current) is not None:
            current.deflate(addr, length)

    def reset(self) -> None:
        """Forget the balloon."""
        if self._current is not None:
            self._current.reset()
