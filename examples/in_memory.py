"""Driver and device of a balloon in one process, joined by virtio-mmio registers: no threads, no sockets."""

from balloon_dev.device import SUPPORTED_FEATURES, BalloonDevice
from guest_driver.balloon import BalloonDriver
from guest_driver.memory_manager import MemoryManager
from guest_driver.mmio import MmioTransport
from vring.memory import GuestMemory
from vring.mmio import MmioDevice

ram = GuestMemory.create(64 << 20)
device = BalloonDevice(SUPPORTED_FEATURES)
registers = MmioDevice(device, ram)  # an emulator would call registers.read and registers.write for its guest
transport = MmioTransport(registers)
driver = BalloonDriver(MemoryManager.create(ram), transport)
driver.probe()


def settle() -> None:
    """Tell the driver what changed on the host's side, and let it work until it rests."""
    registers.deliver()
    driver.interrupt(transport.interrupts())
    while driver.step() or registers.waiting:
        registers.poll()
        driver.interrupt(transport.interrupts())


device.set_target(2560)
settle()
print(f"the balloon holds {device.actual} pages; the device saw {device.ballooned_pages} of them")

device.hint_sink = lambda command, addr, length: print(f"  {len(addr)} hints, from {addr[0]:#x} on")
print(f"asked for hints with id {device.start_hinting():#x}:")
settle()
print(f"the guest gave {driver.hinted_blocks} blocks of 4 MiB and keeps them; the device is in {device.hinting.state}")
device.finish_hinting()
settle()
print(f"after DONE the guest holds back {driver.hinted_blocks} blocks")
