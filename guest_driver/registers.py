"""What transports made of registers share (virtio-mmio, virtio-pci): initialisation, config space, interrupts.

The order of things is here; which register says what is in `guest_driver.mmio` and `guest_driver.pci`.
"""

from __future__ import annotations

from collections.abc import Callable

from guest_driver.transport import Interrupts
from vring.errors import DeviceError, UsageError
from vring.features import CommonFeature, Status

__all__ = ["POLLS", "RegisterTransport"]

POLLS = 1000
"""How often a register is read again before the driver gives up."""
UNKNOWN_FEATURES = CommonFeature.NOTIFICATION_DATA
"""Features that would change what these transports do, and that they do not have (basic.features.driver-4)."""


class RegisterTransport:
    """A `guest_driver.transport.Transport` but for the registers themselves and the queues.

    Parameters
    ----------
    running
        The guest was migrated and the device has taken over its state: nothing is initialised again, only checked.
    polls
        How often to read a register that has to change (reset, queue reset, generation, waiting for a buffer).
    pause
        Called between two such reads: lets time pass, or the other side work.
    """

    def __init__(self, running: bool, polls: int, pause: Callable[[], None] | None) -> None:
        self.polls = polls
        self._pause = pause
        self._begun = self._running = running
        self._settled = running
        self._live = False
        self._offered = self._features = 0
        self._pending = Interrupts()

    # -- the registers --------------------------------------------------------------------------------------------

    def _get_status(self) -> int:
        raise NotImplementedError

    def _set_status(self, value: int) -> None:
        raise NotImplementedError

    def _offered_word(self, word: int) -> int:
        """Return 32 of the offered feature bits."""
        raise NotImplementedError

    def _accept_word(self, word: int, bits: int) -> None:
        """Accept 32 feature bits."""
        raise NotImplementedError

    def _generation(self) -> int:
        raise NotImplementedError

    def _config(self, offset: int, width: int) -> int:
        """Read config space with one access."""
        raise NotImplementedError

    def _set_config(self, offset: int, width: int, value: int) -> None:
        """Write config space with one access."""
        raise NotImplementedError

    def _look(self) -> bool:
        """Note what is signalled, and acknowledge it; return whether buffers were used."""
        raise NotImplementedError

    # -- waiting --------------------------------------------------------------------------------------------------

    def _until_zero(self, read: Callable[[], int]) -> int:
        """Read a register until it is 0, `polls` times again at most; return what it was last."""
        value = read()
        for _ in range(self.polls):
            if not value:
                break
            if self._pause is not None:
                self._pause()
            value = read()
        return value

    # -- initialisation (VIRTIO 3.1.1) ----------------------------------------------------------------------------

    @property
    def status(self) -> Status:
        """The device status."""
        return Status(self._get_status())

    def _add_status(self, bits: Status) -> None:
        """Set bits, with all that are set already (basic.status.driver-2)."""
        self._set_status(self.status | bits)

    def device_features(self) -> int:
        """Return the offered feature bits; starts the initialisation if it has not begun (basic.init.driver-1)."""
        if not self._begun:
            self.reset()
            self._begun = True
            self._add_status(Status.ACKNOWLEDGE)
            self._add_status(Status.DRIVER)
        offered = sum(self._offered_word(word) << 32 * word for word in (0, 1))
        self._offered = offered & ~UNKNOWN_FEATURES
        return self._offered

    def set_driver_features(self, features: int) -> None:
        """Accept `features`, and read back that the device agreed.

        Raises
        ------
        UsageError
            If there are bits that were not offered (basic.features.driver-1).
        DeviceError
            If FEATURES_OK does not stay set; the device has been told FAILED (basic.init.driver-5).
        """
        if features & ~self._offered:
            raise UsageError(
                f"features {features & ~self._offered:#x} were not offered (or not read yet)",
                clause="basic.features.driver-1",
            )
        self._features = features
        if self._running:
            if not self.status & Status.FEATURES_OK:
                raise DeviceError(f"the device has not taken over the guest's state: its status reads {self.status!r}")
            return
        for word in (0, 1):
            self._accept_word(word, features >> 32 * word & 0xFFFFFFFF)
        self._add_status(Status.FEATURES_OK)
        status = self.status
        if not status & Status.FEATURES_OK:
            self._add_status(Status.FAILED)
            raise DeviceError(
                f"the device refuses features {features:#x}: its status reads {status!r}, without FEATURES_OK",
                clause="basic.features.device-2",
            )
        self._settled = True

    def driver_ok(self) -> None:
        """Let the device go to work.

        Raises
        ------
        DeviceError
            If the device of a migrated guest does not work.
        """
        if not self._running:
            self._add_status(Status.DRIVER_OK)
        elif not self.status & Status.DRIVER_OK:
            raise DeviceError(f"the device has not taken over the guest's state: its status reads {self.status!r}")
        self._live, self._running = True, False  # what is set up from now on is new

    def _check_live(self, index: int) -> None:
        """Raise `UsageError` for a notification before DRIVER_OK."""
        if not self._live:
            raise UsageError("a notification before DRIVER_OK", queue=index, clause="basic.init.driver-7")

    def _check_ring_reset(self, index: int) -> None:
        """Raise `UsageError` where RING_RESET was not negotiated."""
        if not self._features & CommonFeature.RING_RESET:
            raise UsageError("RING_RESET was not negotiated: only the whole device can be reset", queue=index)

    def reset(self) -> None:
        """Reset the device, and wait until it says so (basic.reset.driver-1).

        Raises
        ------
        DeviceError
            If its status does not come down to 0.
        """
        self._begun = self._running = self._settled = self._live = False
        self._features = 0
        self._pending = Interrupts()
        self._set_status(Status.RESET)
        status = self._until_zero(self._get_status)
        if status:
            raise DeviceError(f"reset: the device status still reads {status:#x}", clause="basic.reset.device-1")

    # -- config space ---------------------------------------------------------------------------------------------

    def read_config(self, offset: int, length: int) -> bytes:
        """Return bytes of the config space, all of one generation (basic.config.driver-2).

        They are read in the largest aligned pieces of 1, 2 or 4 bytes, which for a field or a row of 32-bit ones is
        the width the standard wants (mmio.regs.driver-5).

        Raises
        ------
        DeviceError
            If the generation never stays the same.
        """
        before = self._generation()
        for _ in range(self.polls):
            data = b"".join(
                (self._config(at, width) & (1 << 8 * width) - 1).to_bytes(width, "little")
                for at, width in _pieces(offset, length)
            )
            after = self._generation()
            if after == before:
                return data
            before = after
        raise DeviceError(
            f"the config generation changed during each of {self.polls} reads of {length} bytes at {offset}",
            clause="mmio.regs.device-6",
        )

    def write_config(self, offset: int, data: bytes) -> None:
        """Write bytes of the config space, in pieces as `read_config`.

        Raises
        ------
        UsageError
            Before the features are settled (basic.init.driver-3).
        """
        if not self._settled:
            raise UsageError("config written during feature negotiation", clause="basic.init.driver-3")
        for at, width in _pieces(offset, len(data)):
            piece = data[at - offset : at - offset + width]
            self._set_config(at, width, int.from_bytes(piece, "little"))

    # -- interrupts -----------------------------------------------------------------------------------------------

    def interrupts(self) -> Interrupts:
        """Return and forget what was signalled.

        Noting the events is all the handling there is, so they are acknowledged here, before queues and config are
        looked at: an event that comes while they are is signalled again.

        Raises
        ------
        DeviceError
            If the device says DEVICE_NEEDS_RESET.
        """
        self._look()
        pending, self._pending = self._pending, Interrupts()
        if pending.config and self._live and self.status & Status.DEVICE_NEEDS_RESET:
            raise DeviceError("the device status says DEVICE_NEEDS_RESET", clause="basic.status.device-3")
        return pending

    def wait(self, index: int) -> bool:
        """Look for an interrupt of the queues, `polls` times at most; `interrupts` reports it all the same.

        Returns
        -------
        bool
            Whether one came; the registers do not say of which queue.
        """
        for _ in range(self.polls):
            if self._look():
                return True
            if self._pause is not None:
                self._pause()
            elif self._live and self.status & Status.DEVICE_NEEDS_RESET:
                return False
        return False

    def filenos(self) -> list[int]:
        """No descriptor tells of interrupts: the embedder's interrupt line does, or looking."""
        return []

    # -- end ------------------------------------------------------------------------------------------------------

    def fail(self) -> None:
        """Tell the device that this driver has given up on it (basic.init.driver-5)."""
        self._add_status(Status.FAILED)

    def close(self) -> None:
        """Nothing to give back: the bus is its owner's."""


def _pieces(offset: int, length: int) -> list[tuple[int, int]]:
    """Split a range of config into aligned accesses: (offset, width)."""
    pieces, end = [], offset + length
    while offset < end:
        width = next(w for w in (4, 2, 1) if offset % w == 0 and offset + w <= end)
        pieces.append((offset, width))
        offset += width
    return pieces
