"""What virtio-mmio's device side does: status, features, queues, interrupts. The registers are in `vring.mmio`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from vring.device import Device, HearsStatus
from vring.errors import DriverError, GuestAddressError, UsageError, VirtioError
from vring.features import CommonFeature, Status
from vring.memory import GuestMemory
from vring.mmio_queues import QueueRegisters
from vring.mmio_registers import CONFIG_OFFSET, VERSION, VERSIONS, Interrupt

__all__ = ["TRANSPORT_FEATURES", "VENDOR_ID", "WINDOW_BYTES", "MmioCore"]

VENDOR_ID = int.from_bytes(b"vrng", "little")
WINDOW_BYTES = 0x200
"""Bytes of the window, as QEMU has it: registers and 256 bytes of config."""
TRANSPORT_FEATURES = CommonFeature.RING_RESET | CommonFeature.NOTIFICATION_DATA
"""Features that are the transport's business; it can offer them for any device."""
BUFFERS = 1 << 16
"""Buffers served in one call at most, so that a guest that never stops adding does not hold its emulator; for what is
left then see `MmioCore.waiting`."""
FROM_DRIVER = Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK | Status.FEATURES_OK | Status.FAILED
SETTLED = Status.FEATURES_OK | Status.DRIVER_OK


class MmioCore:
    """State and behaviour; `vring.mmio.MmioDevice` has the registers, and the parameters."""

    def __init__(
        self,
        device: Device,
        memory: GuestMemory,
        *,
        irq: Callable[[int], None] | None = None,
        features: int = CommonFeature.RING_RESET,
        on_notify: bool = True,
        version: int = VERSION,
        vendor_id: int = VENDOR_ID,
        window: int = WINDOW_BYTES,
    ) -> None:
        if features & ~TRANSPORT_FEATURES or window < CONFIG_OFFSET:
            raise UsageError(f"transport features {features:#x} or a window of {window} bytes cannot be had")
        if version not in VERSIONS:
            raise UsageError(f"virtio-mmio version {version}, there are {' and '.join(map(str, VERSIONS))}")
        self.device, self.memory = device, memory
        self.window, self.version = window, version
        self.bad_accesses: Counter[str] = Counter()
        """Accesses without effect, by what was wrong with them."""
        self.last_error: VirtioError | None = None
        """Why the device needs a reset."""
        self.held = False
        """Whether queues are left alone until `release`."""
        self.interrupt_status = 0
        """The InterruptStatus register."""
        self.status = Status.RESET
        """The Status register."""
        self.queues = [QueueRegisters(i, size) for i, size in enumerate(device.queue_sizes)]
        """Registers of all queues, by number."""
        self._irq = irq
        self._line = 0
        self._transport_features = features
        self._on_notify = on_notify
        self._vendor_id = vendor_id
        self._busy = self._reset_due = False
        self._after: list[Callable[[], None]] = []
        self._clear()
        device.set_memory(memory)

    def _clear(self) -> None:
        """Registers as after a reset."""
        self.status = Status.RESET
        self.driver_features = 0
        self.interrupt_status = 0
        self.last_error = None
        self._selected = {"device": 0, "driver": 0, "queue": 0}
        for queue in self.queues:
            queue.clear()

    @property
    def offered_features(self) -> int:
        """What DeviceFeatures reads: the device's features and the transport's."""
        return self.device.offered_features & ~int(TRANSPORT_FEATURES) | self._transport_features

    @property
    def irq_level(self) -> int:
        """Level of the interrupt line."""
        return int(self.interrupt_status != 0)

    def _bad(self, why: str) -> int:
        self.bad_accesses[why] += 1
        return 0

    # -- interrupts -----------------------------------------------------------------------------------------------

    def _raise(self, causes: int) -> None:
        self.interrupt_status |= causes
        self._update_line()

    def _update_line(self, *, again: bool = False) -> None:
        level = self.irq_level
        if level != self._line or again:
            self._line = level
            if self._irq is not None:
                self._irq(level)

    def poll(self) -> int:
        """Do what waits (see `waiting`): carry out a reset, serve queues; return how many buffers that was.

        For an emulator that keeps such work out of the guest's register writes, see `on_notify`.
        """
        served = 0
        if self._reset_due:
            self.reset()
        for queue in self.queues:
            if queue.kicked and not self.held:
                served += self._serve(queue)
        self.deliver()
        return served

    @property
    def waiting(self) -> bool:
        """Whether there is something to do that only `poll` does: call it soon, nobody else may.

        With `on_notify` that is what one notification left because it was too much for one call; the guest need not
        notify again. Without, it is every notification, and a reset under version 3.
        """
        kicked = any(queue.kicked and queue.ring is not None for queue in self.queues)
        return self._reset_due or (kicked and not self.held)

    def deliver(self) -> None:
        """Notify the driver of what the device has to say. Call it after changing the device from the host's side.

        Nothing is said before DRIVER_OK (basic.status.device-2) or of a queue that is not in use
        (basic.vqreset.device-2); a config change waits until then.
        """
        calls = self.device.take_calls()
        if not self.status & Status.DRIVER_OK:
            return
        causes = 0
        if any(self.queues[index].ring is not None for index in calls if index < len(self.queues)):
            causes |= Interrupt.USED_BUFFER
        if self.device.take_config_change():
            causes |= Interrupt.CONFIG_CHANGE
        self._raise(causes)

    # -- status and features --------------------------------------------------------------------------------------

    def _write_features(self, word: int, value: int) -> None:
        if self.status & SETTLED:
            self._bad("DriverFeatures after FEATURES_OK")
        elif word < 4:
            self.driver_features = self.driver_features & ~(0xFFFFFFFF << 32 * word) | value << 32 * word
        elif value:
            self._bad("DriverFeatures beyond bit 127")

    def _write_status(self, value: int) -> None:
        """Take the driver's progress: in any order, but no bit goes away other than by a reset."""
        if value == 0:
            if self.version == VERSION or self._on_notify or not self.status:
                self.reset()
            else:
                self._reset_due = True
            return
        if self._reset_due:
            self._bad("Status during a reset")
            return
        if self.status & FROM_DRIVER & ~value:
            self._bad("Status without a bit that was set")
        new = Status(value) & FROM_DRIVER & ~self.status
        if new & SETTLED and not self.status & SETTLED and not self._settle_features():
            self._bad("features refused")
            new &= ~SETTLED
        self._set_status(self.status | new)
        if new & Status.DRIVER_OK:
            for queue in self.queues:
                self._start(queue)

    def _set_status(self, status: Status) -> None:
        self.status = status
        if isinstance(self.device, HearsStatus):
            self.device.set_status(status)

    def _settle_features(self) -> bool:
        """Ask the device; False leaves FEATURES_OK reading 0 (basic.features.device-3)."""
        features = self.driver_features
        modern = features & CommonFeature.VERSION_1 or not self.offered_features & CommonFeature.VERSION_1
        if features & ~self.offered_features or not modern:
            return False
        return self.device.set_features(features & ~int(TRANSPORT_FEATURES))

    def reset(self) -> None:
        """Reset transport and device, as a write of 0 to Status does (mmio.regs.device-5 and -8)."""
        self._when_idle(self._reset)

    def _reset(self) -> None:
        self._reset_due = False
        self.device.reset()
        self.device.take_calls()
        self._clear()
        self._update_line()

    def _broke(self, queue: QueueRegisters, error: VirtioError) -> None:
        """A ring that cannot be trusted: leave it, and say so (basic.status.device-3 and -4)."""
        if queue.ring is not None:
            queue.ring = None
            self.device.detach_queue(queue.index)
        queue.broken, queue.kicked = True, False
        self.last_error = error
        self.status |= Status.DEVICE_NEEDS_RESET
        if self.status & Status.DRIVER_OK:
            self._raise(Interrupt.CONFIG_CHANGE)

    # -- queues ---------------------------------------------------------------------------------------------------

    @property
    def _in_force(self) -> int:
        """Negotiated features: none before FEATURES_OK, or DRIVER_OK of a driver that skips that."""
        return self.driver_features if self.status & SETTLED else 0

    def _start(self, queue: QueueRegisters) -> None:
        """Let the device use a queue, if both sides are ready for that."""
        if not queue.ready or queue.ring is not None or queue.broken or not self.status & Status.DRIVER_OK:
            return
        try:
            self.device.attach_queue(queue.index, queue.make_ring(self.memory, self.driver_features))
        except VirtioError as error:
            self._broke(queue, error)

    def _stop(self, queue: QueueRegisters) -> None:
        """The device touches the ring no more (mmio.regs.device-7); it goes on from here if it is only made ready."""
        queue.base = queue.next_base(self.device)
        queue.ready = queue.kicked = False
        if queue.ring is not None:
            queue.ring = None
            self.device.detach_queue(queue.index)

    def _reset_queue(self, queue: QueueRegisters) -> None:
        self._stop(queue)
        queue.clear()

    def _notify(self, value: int) -> None:
        index = value & 0xFFFF if self._in_force & CommonFeature.NOTIFICATION_DATA else value
        if index >= len(self.queues) or not self.queues[index].ready:
            self._bad("QueueNotify of a queue that is not ready")
            return
        if not self.status & Status.DRIVER_OK:
            self._bad("QueueNotify before DRIVER_OK")  # it is served then
        self.queues[index].kicked = True

    def _serve_kicked(self) -> None:
        """Serve what was notified, now or earlier and left, if that is to be done while the guest writes a register."""
        if self._on_notify and not self._busy and not self.held:
            for queue in self.queues:
                if queue.kicked:
                    self._serve(queue)

    def _serve(self, queue: QueueRegisters) -> int:
        """Serve a queue until it is empty, or for `BUFFERS`; return how many buffers that was."""
        if queue.ring is None or self._busy:
            return 0
        served, n = 0, 1
        self._busy = True
        try:
            while n and served < BUFFERS:
                n = self.device.process(queue.index)
                served += n
            queue.kicked = n > 0
        except (DriverError, GuestAddressError) as error:  # the guest's doing; other errors are the embedder's
            self._broke(queue, error)
        finally:
            self._busy = False
            after, self._after = self._after, []
            for work in after:
                work()
        return served

    def _when_idle(self, work: Callable[[], None]) -> None:
        """Do it now, or, asked from within the serving of a queue, when that is over: registers tell meanwhile that
        it has not happened yet (mmio.regs.device-11).
        """
        if self._busy:
            self._after.append(work)
        else:
            work()

    # -- pausing --------------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Serve no queue until `release`: the VM is paused. A reset that waits is carried out first."""
        if self._reset_due:
            self.reset()
        self.held = True

    def release(self) -> None:
        """Go on serving; the level of the interrupt line is told again."""
        self.held = False
        self._update_line(again=True)
        self.poll()
