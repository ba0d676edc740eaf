"""Our device inside a CPU emulator: machine code of two architectures drives it, on Unicorn (`pip install unicorn`).

Everything an emulator has to give is here: its RAM (shared, nothing is copied), two callbacks for the register window,
a look at the interrupt line, and a mark in a dirty log for each store. The guests are in ``guests/*.s``: bare-metal
drivers that initialise the device, wait for a command id, send ``start``, two free blocks, ``stop``, and wait for DONE.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from balloon_dev.device import BalloonDevice
from balloon_dev.hinting import HintState
from vring.dirty.software import SoftwareDirtyLog
from vring.features import Status
from vring.memory import PAGE_SIZE, GuestMemory
from vring.mmio import MmioDevice
from vring.pages import PageSet

try:
    from unicorn import UC_ARCH_ARM64, UC_ARCH_X86, UC_HOOK_MEM_WRITE, UC_MODE_64, UC_MODE_ARM, UC_PROT_ALL, Uc
    from unicorn.arm64_const import UC_ARM64_REG_PC, UC_ARM64_REG_X19, UC_ARM64_REG_X20
    from unicorn.x86_const import UC_X86_REG_RBX, UC_X86_REG_RIP, UC_X86_REG_RSI
except ImportError:
    print("this example needs the emulator: pip install unicorn", file=sys.stderr)
    sys.exit(3)

RAM, RAM_BYTES = 0x80000000, 2 << 20
REGISTERS, REGISTERS_BYTES = 0x10000000, 0x1000
CODE, RESULT = RAM + 0x2000, RAM + 0x1300
SLICE = 200
MACHINES = {
    "x86_64": (UC_ARCH_X86, UC_MODE_64, UC_X86_REG_RIP, UC_X86_REG_RBX, UC_X86_REG_RSI),
    "aarch64": (UC_ARCH_ARM64, UC_MODE_ARM, UC_ARM64_REG_PC, UC_ARM64_REG_X19, UC_ARM64_REG_X20),
}


class Machine:
    """A CPU, its RAM, and one virtio-mmio device."""

    def __init__(self, name: str) -> None:
        arch, mode, self.pc, registers, ram = MACHINES[name]
        self.memory = GuestMemory.create([(RAM, RAM_BYTES)])
        self.device = BalloonDevice()
        self.mmio = MmioDevice(self.device, self.memory, irq=self.irq)
        self.log = self.device.dirty_log = SoftwareDirtyLog.for_memory(self.memory)
        self.interrupts = 0
        self.cpu = Uc(arch, mode)
        self.cpu.mem_map_ptr(RAM, RAM_BYTES, UC_PROT_ALL, self.memory.host_address(RAM, RAM_BYTES))
        self.cpu.mmio_map(REGISTERS, REGISTERS_BYTES, self.read, None, self.write, None)
        # Called before each store; the log is looked at only between slices, so the mark is never too early.
        self.cpu.hook_add(UC_HOOK_MEM_WRITE, self.stored, begin=RAM, end=RAM + RAM_BYTES - 1)
        code = bytes.fromhex((Path(__file__).parent / "guests" / f"{name}.hex").read_text())
        self.memory.write(CODE, code)
        self.end = CODE + len(code)
        self.cpu.reg_write(registers, REGISTERS)
        self.cpu.reg_write(ram, RAM)
        self.cpu.reg_write(self.pc, CODE)

    def read(self, cpu: Uc, offset: int, size: int, data: object) -> int:
        return self.mmio.read(offset, size)

    def write(self, cpu: Uc, offset: int, size: int, value: int, data: object) -> None:
        self.mmio.write(offset, size, value)

    def irq(self, level: int) -> None:
        """Where an emulator tells its interrupt controller; these guests poll InterruptStatus."""
        self.interrupts += level

    def stored(self, cpu: Uc, access: int, address: int, size: int, value: int, data: object) -> None:
        self.log.mark_range(address, size)

    def run(self, slices: int) -> bool:
        """Run some instructions. Return whether the guest has come to its end."""
        for _ in range(slices):
            if self.cpu.reg_read(self.pc) == self.end:
                return True
            self.cpu.emu_start(self.cpu.reg_read(self.pc), self.end, count=SLICE)
            if self.mmio.waiting:  # a notification brought more than is served in one register write
                self.mmio.poll()
        return False


def main() -> None:
    for name in MACHINES:
        machine = Machine(name)
        device, hints = machine.device, []
        device.hint_sink = lambda command, addr, length, hints=hints: hints.extend(
            zip(addr.tolist(), length.tolist(), strict=True)
        )
        machine.run(5)
        assert machine.mmio.status & Status.DRIVER_OK, machine.mmio.dump()
        command = device.start_hinting()
        machine.mmio.deliver()
        machine.run(5)
        assert device.hinting.state is HintState.STOP, device.hinting.state
        print(f"{name}: {(machine.end - CODE)} bytes of code took features {device.negotiated:#x}")
        for addr, length in hints:
            print(f"  hint under {command:#x}: {addr:#x}, {length >> 10} KiB")
        device.finish_hinting()
        machine.mmio.deliver()
        assert machine.run(5), "the guest does not end"
        used = int(machine.memory.array(RESULT, 1, np.uint32)[0])
        assert used == 4, f"the guest says {used:#x}"
        assert not machine.mmio.bad_accesses, machine.mmio.bad_accesses
        dirty = PageSet(machine.memory.page_layout)
        machine.log.sync(dirty)
        pages = [f"RAM+{page * PAGE_SIZE - RAM:#x}" for page in dirty.numbers().tolist()]
        print(f"  {used} buffers used, {machine.interrupts} interrupts, pages written: {', '.join(pages)}")


if __name__ == "__main__":
    main()
