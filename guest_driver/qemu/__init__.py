"""An unmodified QEMU as the device: its registers through qtest, its monitor through QMP, its RAM shared.

There is no guest kernel and no virtual CPU that runs: the embedded guest takes their place. `qtest` and `qmp` are the
two clients, `package` finds the binary, `launch` starts it, `machine` is one running QEMU with its balloon, `guest` the
embedded guest on it, and `migration` takes the guest from one QEMU to another.
"""

from guest_driver.qemu.guest import QemuGuest
from guest_driver.qemu.launch import QemuOptions
from guest_driver.qemu.machine import QemuMachine
from guest_driver.qemu.migration import MigrationOutcome, migrate
from guest_driver.qemu.package import QemuBinary, find_qemu
from guest_driver.qemu.qmp import QmpClient, QmpError
from guest_driver.qemu.qtest import QtestClient

__all__ = [
    "MigrationOutcome",
    "QemuBinary",
    "QemuGuest",
    "QemuMachine",
    "QemuOptions",
    "QmpClient",
    "QmpError",
    "QtestClient",
    "find_qemu",
    "migrate",
]
