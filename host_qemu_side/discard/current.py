"""The discarder of a device whose memory and driver come and go with its front end."""

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

    What is known of large host pages of which parts are in the balloon is kept when the memory changes, as far as its
    pages are still there; it is forgotten by `reset`, and as soon as the driver does not tell.

    Parameters
    ----------
    memory
        Returns the guest's memory as it is now, None if there is none.
    tells_host
        Whether the driver, as it is now, tells before it takes a page back (MUST_TELL_HOST): only then may a host page
        bigger than 4 KiB be put together from several requests, else a page in use could be dropped with it
        (balloon.operation.driver-8).
    """

    def __init__(self, memory: Callable[[], GuestMemory | None], tells_host: Callable[[], bool]) -> None:
        self._memory, self._tells_host = memory, tells_host
        self._current: Discarder | None = None

    @property
    def current(self) -> Discarder | None:
        """The discarder of the present memory and driver."""
        memory, before = self._memory(), self._current
        if memory is None:
            self._current = None
        elif before is None or before.memory is not memory:
            known = before.partial if before is not None else None
            self._current = Discarder(memory, partial=self._partial(memory, known), on_refusal="count")
        elif before.partial is None or not self._tells_host():
            before.partial = self._partial(memory, None)
        return self._current

    def _partial(self, memory: GuestMemory, known: PartialPages | None) -> PartialPages | None:
        big = any(region.page_size > PAGE_SIZE for region in memory.regions)
        return PartialPages(memory, known) if big and self._tells_host() else None

    def __call__(self, addr: U64, length: U64) -> None:
        """Drop pages, see `Discarder.__call__`."""
        if (current := self.current) is not None:
            current(addr, length)

    def deflate(self, addr: U64, length: U64) -> None:
        """Take note of pages the guest takes back."""
        if (current := self.current) is not None:
            current.deflate(addr, length)

    def reset(self) -> None:
        """Forget what is in the balloon: the device was reset, or it is in doubt. Nothing is dropped by that."""
        if self._current is not None:
            self._current.reset()
