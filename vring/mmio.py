"""The device's side of virtio-mmio: a register file for any `vring.device.Device`.

An emulator needs three calls: `MmioDevice.read`, `MmioDevice.write` and its own ``irq(level)``. There is no thread,
clock or descriptor here, one call at a time, and nothing a guest writes raises into the emulator.
"""

from __future__ import annotations

from typing import Any

from vring.errors import UsageError, VirtioError
from vring.features import CommonFeature, Status
from vring.mmio_core import FROM_DRIVER, SETTLED, TRANSPORT_FEATURES, VENDOR_ID, WINDOW_BYTES, MmioCore
from vring.mmio_queues import QueueRegisters
from vring.mmio_registers import (
    CONFIG_OFFSET,
    MAGIC,
    QUEUE_SETTINGS,
    READABLE,
    REGISTER_BYTES,
    WRITABLE,
    Interrupt,
    Register,
    register_name,
)
from vring.mmio_saved import SavedRegisters

__all__ = ["TRANSPORT_FEATURES", "VENDOR_ID", "WINDOW_BYTES", "MmioDevice"]


class MmioDevice(MmioCore):
    """One device behind virtio-mmio registers.

    Parameters
    ----------
    device
        The device type.
    memory
        The guest's RAM; the device meets the driver in the same bytes.
    irq
        Called with the new level, 0 or 1, whenever the interrupt line changes. Level-triggered: it is 1 as long as a
        bit of InterruptStatus is set.
    features
        Transport features to offer, of `TRANSPORT_FEATURES`.
    on_notify
        Whether a QueueNotify is served before `write` returns. If not, the emulator calls `poll` when it likes.
    version
        What Version reads, 2 or 3. With 3 and without `on_notify`, a reset that the guest asks for is left to `poll`
        too, so that no write holds up its processor; Status reads 0 when it is done.
    vendor_id
        What VendorID reads.
    window
        Bytes of the window, at least 0x100; accesses past it are refused.
    """

    # -- the emulator's calls -------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Return what the guest reads: `size` bytes at `offset` of the window, little-endian; 0 for a bad access."""
        if not self._allowed(offset, size, READABLE, "read"):
            return 0
        if offset >= CONFIG_OFFSET:
            try:
                return int.from_bytes(self.device.read_config(offset - CONFIG_OFFSET, size), "little")
            except VirtioError as error:
                return self._bad(f"config read: {error.message}")
        return self._read_register(Register(offset)) & 0xFFFFFFFF

    def write(self, offset: int, size: int, value: int) -> None:
        """Take what the guest writes: `size` bytes at `offset` of the window. A bad access is ignored."""
        if not self._allowed(offset, size, WRITABLE, "write"):
            return
        value &= (1 << 8 * size) - 1
        if offset >= CONFIG_OFFSET:
            try:
                self.device.write_config(offset - CONFIG_OFFSET, value.to_bytes(size, "little"))
            except VirtioError as error:
                self._bad(f"config write: {error.message}")
        else:
            self._write_register(Register(offset), value)
        self._serve_kicked()
        self.deliver()

    # -- registers ------------------------------------------------------------------------------------------------

    def _allowed(self, offset: int, size: int, registers: frozenset[Register], what: str) -> bool:
        """Whether an access is one that the standard has; if not, it is counted."""
        if size not in (1, 2, 4) or offset % size or not 0 <= offset <= self.window - size:
            self._bad(f"{what} of {size} bytes, unaligned or outside the window" if size in (1, 2, 4) else "bad width")
            return False
        if offset >= CONFIG_OFFSET:
            return True
        if size != REGISTER_BYTES:
            self._bad(f"{what} of a register, {size} bytes wide")
            return False
        if offset not in registers:
            self._bad(f"{what} of {register_name(offset)}")
            return False
        return True

    @property
    def _queue(self) -> QueueRegisters | None:
        """The queue that QueueSel selects, None if there is no such queue."""
        selected = self._selected["queue"]
        return self.queues[selected] if selected < len(self.queues) else None

    def _read_register(self, register: Register) -> int:
        queue = self._queue
        match register:
            case Register.MagicValue:
                return MAGIC
            case Register.Version:
                return self.version
            case Register.DeviceID:
                return self.device.device_id
            case Register.VendorID:
                return self._vendor_id
            case Register.DeviceFeatures:
                word = self._selected["device"]
                return self.offered_features >> 32 * word if word < 4 else 0
            case Register.QueueSizeMax:
                return queue.largest if queue else 0
            case Register.QueueReady:
                return int(queue.ready) if queue else 0
            case Register.QueueReset:
                return int(queue.resetting) if queue else 0
            case Register.InterruptStatus:
                return self.interrupt_status
            case Register.Status:
                return self.status
            case Register.ConfigGeneration:
                return self.device.config_generation
            case _:  # no shared memory region has a length or base of all ones
                return 0xFFFFFFFF

    def _write_register(self, register: Register, value: int) -> None:
        match register:
            case Register.DeviceFeaturesSel:
                self._selected["device"] = value
            case Register.DriverFeaturesSel:
                self._selected["driver"] = value
            case Register.QueueSel:
                self._selected["queue"] = value
            case Register.DriverFeatures:
                self._write_features(self._selected["driver"], value)
            case Register.QueueNotify:
                self._notify(value)
            case Register.InterruptACK:
                if value & ~int(Interrupt.USED_BUFFER | Interrupt.CONFIG_CHANGE):
                    self._bad("InterruptACK of undefined bits")
                self.interrupt_status &= ~value
                self._update_line()
            case Register.Status:
                self._write_status(value)
            case Register.SHMSel:
                pass
            case _ if self._queue is None:
                self._bad(f"{register.name} of a queue that does not exist")
            case _:
                self._write_queue(self._queue, register, value)

    def _write_queue(self, queue: QueueRegisters, register: Register, value: int) -> None:
        if register in QUEUE_SETTINGS:
            if queue.ready:
                self._bad(f"{register.name} of a queue that is ready")
            else:
                queue.set_part(*QUEUE_SETTINGS[register], value)
        elif register is Register.QueueReady:
            if value == 0:
                self._when_idle(lambda: self._stop(queue))
            elif value == 1 and not queue.resetting:
                queue.ready = True
                self._start(queue)
            else:
                self._bad("QueueReady of a value other than 0 and 1, or during a reset")
        elif not self._in_force & CommonFeature.RING_RESET or value != 1:
            self._bad("QueueReset without RING_RESET, or of a value other than 1")
        else:
            queue.resetting = True
            self._when_idle(lambda: self._reset_queue(queue))

    # -- saving ---------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """Return the registers for a migration; the device's own state is the device's to save. Call it while held."""
        if self._busy or self._reset_due:
            raise UsageError("the registers cannot be saved while a queue is being served or a reset waits for `poll`")
        queues = tuple(queue.save(self.device) for queue in self.queues)
        return SavedRegisters(int(self.status), self.driver_features, dict(self._selected), queues).to_json()

    def load(self, saved: dict[str, Any]) -> None:
        """Take over what `save` returned, after the device has loaded its state and RAM is there.

        The device is held until `release`. Notifications do not travel: every queue counts as kicked, and both
        interrupts are pending, which is what a driver has to cope with anyway.

        Raises
        ------
        UsageError
            If it is malformed, or from a device with other features or queues; the device is reset then, and held only
            if it was. Also if it is asked for while a queue is being served; then nothing has changed.
        """
        if self._busy:
            raise UsageError("registers cannot be loaded while a queue is being served")
        held = self.held
        try:
            self._load(SavedRegisters.from_json(saved))
        except VirtioError:
            self.held = held
            self.reset()
            raise

    def _load(self, saved: SavedRegisters) -> None:
        if len(saved.queues) != len(self.queues):
            raise UsageError(f"saved registers are of a device with {len(saved.queues)} queues, not {len(self.queues)}")
        status = Status(saved.status) & (FROM_DRIVER | Status.DEVICE_NEEDS_RESET)
        for queue in self.queues:
            self._stop(queue)
        self._clear()
        self.held = True
        self.driver_features, self._selected = saved.features, dict(saved.selected)
        for queue, state in zip(self.queues, saved.queues, strict=True):
            queue.load(state)
        if status & SETTLED and not self._settle_features():
            raise UsageError(f"saved features {saved.features:#x}, this device offers {self.offered_features:#x}")
        self._set_status(status)
        for queue in self.queues:
            self._start(queue)
            queue.kicked = queue.ring is not None
        if status & Status.DRIVER_OK:
            self.interrupt_status = int(Interrupt.USED_BUFFER | Interrupt.CONFIG_CHANGE)

    def dump(self) -> str:
        """Return the registers in words, for a human."""
        lines = [f"status {self.status!r}, interrupts {Interrupt(self.interrupt_status)!r}"]
        if self.waiting:
            lines.append("something waits for poll()")
        lines.append(f"features {self.driver_features:#x} of {self.offered_features:#x}")
        for q in self.queues:
            state = "broken" if q.broken else "live" if q.ring is not None else "ready" if q.ready else "not ready"
            where = f"desc {q.desc:#x} avail {q.avail:#x} used {q.used:#x}"
            lines.append(f"queue {q.index}: {state}, size {q.size} of {q.largest}, {where}")
        lines += [f"bad accesses: {why}: {count}" for why, count in self.bad_accesses.items()]
        return "\n".join(lines)
