"""An unmodified Linux kernel (User-Mode Linux) uses our device over vhost-user: balloon, statistics, free page hints.

Needs Debian's `user-mode-linux` and `busybox-static`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from balloon_dev.device import SUPPORTED_FEATURES, BalloonDevice
from balloon_dev.hinting import HintState
from balloon_dev.profiles import LINUX
from host_qemu_side.linux_guest import LinuxGuest
from host_qemu_side.loop import Loop
from host_qemu_side.vhost_user import VhostUserBackend
from vring.errors import MissingFacility

MIB = 1 << 20


def main() -> int:
    loop = Loop()
    device = BalloonDevice(SUPPORTED_FEATURES, profile=LINUX)
    backend = VhostUserBackend(device, loop)
    hints: list[int] = []
    device.hint_sink = lambda command, addr, length: hints.extend(length.tolist())
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "balloon.sock"
        backend.listen(str(socket))
        try:
            guest = LinuxGuest(256 * MIB, Path(folder) / "uml", socket)
        except MissingFacility as missing:
            print(missing, file=sys.stderr)
            return 3
        with guest:
            guest.wait_ready(serve=loop.run_once)
            guest.load_balloon(serve=loop.run_once)
            print(f"Linux booted and took features {device.negotiated:#x}")

            device.set_target(10000)
            backend.deliver()
            loop.run_until(lambda: device.actual == 10000, 10, "the balloon to fill")
            print(f"balloon: {device.actual} pages, {guest.meminfo(serve=loop.run_once)['MemFree'] >> 20} MiB free")

            device.request_stats()
            backend.deliver()
            loop.run_until(lambda: device.stats.updates > 1, 10, "statistics")
            for name, value in sorted(device.stats.values.items()):
                print(f"  {name}: {value}")

            command = device.start_hinting()
            backend.deliver()
            loop.run_until(lambda: device.hinting.state is HintState.STOP, 10, "the end of the hints")
            print(f"hints under id {command:#x}: {len(hints)} blocks, {sum(hints) >> 20} MiB, with STOP at the end")
            device.finish_hinting()
            backend.deliver()
            assert guest.alive(serve=loop.run_once)
            print("DONE was said, and the guest goes on")
    backend.close()
    loop.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
