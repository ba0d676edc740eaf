"""A device type of one's own on `vring` alone: an entropy device (virtio type 4) behind virtio-mmio, with a driver.

`vring` knows nothing of balloons: whatever implements `vring.device.Device` goes behind any of its transports.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from vring.device import Device
from vring.features import CommonFeature, Status
from vring.memory import GuestMemory
from vring.mmio import MmioDevice
from vring.mmio_registers import QUEUE_SETTINGS, Register
from vring.split import SEG_WRITE, DeviceQueue, DriverQueue, QueueLayout

MIB = 1 << 20


class EntropyDevice:
    """Fills every device-writable byte with randomness. One queue, no config space."""

    device_id = 4
    offered_features = int(CommonFeature.VERSION_1 | CommonFeature.EVENT_IDX)
    queue_sizes: Sequence[int] = (64,)
    config_generation = 0

    def __init__(self) -> None:
        self.memory: GuestMemory | None = None
        self.queue: DeviceQueue | None = None
        self.call = False

    def set_memory(self, memory: GuestMemory | None) -> None:
        self.memory, self.queue = memory, None

    def set_features(self, features: int) -> bool:
        return not features & ~self.offered_features

    def read_config(self, offset: int, length: int) -> bytes:
        return bytes(length)

    def write_config(self, offset: int, data: bytes) -> None:
        pass

    def new_driver(self, index: int, *, sure: bool) -> None:
        """It keeps nothing of a driver."""

    def attach_queue(self, index: int, queue: DeviceQueue) -> None:
        self.queue = queue

    def detach_queue(self, index: int) -> None:
        self.queue = None

    def held_buffers(self, index: int) -> int:
        return 0

    def process(self, index: int) -> int:
        """Serve one batch. Raises `DriverError` if the ring is nonsense: the transport then says so to the driver."""
        if self.queue is None or self.memory is None:
            return 0
        batch = self.queue.pop()
        while not len(batch):
            if not self.queue.enable_notify():  # from here on the driver kicks
                return 0
            batch = self.queue.pop()  # something came while we looked
        for seg in batch.segs[batch.segs["flags"] & SEG_WRITE != 0]:  # every address was checked to be RAM by `pop`
            self.memory.write(int(seg["addr"]), os.urandom(int(seg["len"])))
        self.call |= self.queue.push(batch.heads.copy(), batch.chains["writable"])
        return len(batch)

    def take_config_change(self) -> bool:
        return False

    def take_calls(self) -> Sequence[int]:
        due, self.call = self.call, False
        return [0] if due else []

    def reset(self) -> None:
        self.queue, self.call = None, False


def main() -> None:
    ram = GuestMemory.create(MIB)
    device: Device = EntropyDevice()  # mypy checks that nothing is missing
    levels: list[int] = []
    mmio = MmioDevice(device, ram, irq=levels.append, features=0)

    def write(register: Register, value: int) -> None:
        mmio.write(register, 4, value)

    # The driver: reset, ACKNOWLEDGE, DRIVER, features, FEATURES_OK, one queue, DRIVER_OK.
    for status in (Status.RESET, Status.ACKNOWLEDGE, Status.ACKNOWLEDGE | Status.DRIVER):
        write(Register.Status, status)
    for word in (0, 1):
        write(Register.DriverFeaturesSel, word)
        write(Register.DriverFeatures, device.offered_features >> 32 * word & 0xFFFFFFFF)
    write(Register.Status, Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
    assert mmio.read(Register.Status, 4) & Status.FEATURES_OK
    layout = QueueLayout.place(0x1000, 16)
    queue = DriverQueue(ram, layout, event_idx=True)
    write(Register.QueueSel, 0)
    for register, (name, shift) in QUEUE_SETTINGS.items():
        write(register, getattr(layout, name) >> shift & 0xFFFFFFFF)
    write(Register.QueueReady, 1)
    write(Register.Status, mmio.read(Register.Status, 4) | Status.DRIVER_OK)

    # Four buffers of 8 bytes in one batch: one kick, one interrupt.
    segs = np.zeros(4, dtype=queue.segs.dtype)
    segs["addr"], segs["len"], segs["flags"] = 0x4000 + 8 * np.arange(4), 8, SEG_WRITE
    queue.add(segs, [1, 2, 3, 4], [1, 1, 1, 1])
    if queue.publish():
        write(Register.QueueNotify, 0)
    while mmio.waiting:
        mmio.poll()
    write(Register.InterruptACK, mmio.read(Register.InterruptStatus, 4))
    tokens, lens = queue.collect()
    for token, length in zip(tokens.tolist(), lens.tolist(), strict=True):
        print(f"buffer {token}: {length} bytes, {ram.read(0x4000 + 8 * (token - 1), length).hex()}")
    print(f"interrupt line: {levels}")
    print(mmio.dump())


if __name__ == "__main__":
    main()
