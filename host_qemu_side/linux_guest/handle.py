"""The Linux guest as a migration sees it: frozen, thawed, watched, with a dirty log."""

from __future__ import annotations

import contextlib

from host_qemu_side.linux_guest.launch import LinuxGuest
from host_qemu_side.vhost_user import VhostUserBackend
from vring.dirty import DirtyLog
from vring.dirty.cachestat import CachestatLog
from vring.dirty.combined import CombinedLog
from vring.dirty.digest import DigestLog
from vring.dirty.software import SoftwareDirtyLog
from vring.errors import MissingFacility, PeerVanished
from vring.memory import GuestMemory

__all__ = ["LinuxGuestHandle"]


class LinuxGuestHandle:
    """Joins a `LinuxGuest` with the back end of its balloon.

    Parameters
    ----------
    guest
        Started, with its vhost-user device at `backend`.
    backend
        In the same loop as everything else.
    """

    def __init__(self, guest: LinuxGuest, backend: VhostUserBackend) -> None:
        self.guest, self.backend = guest, backend

    def serve(self) -> None:
        """Answer whatever the guest's device driver asks, without waiting."""
        self.backend.loop.run_once(0.0)

    @property
    def memory(self) -> GuestMemory:
        """The guest's RAM as the device has it mapped."""
        if self.backend.memory is None:
            raise PeerVanished("the Linux guest has not shared its memory: its balloon driver is not loaded")
        return self.backend.memory

    def freeze(self) -> None:
        """Stop the guest's kernel, then hold its queues."""
        self.guest.freeze(self.serve)
        self.check_alive()
        self.backend.hold()

    def thaw(self) -> None:
        """Let both go on."""
        self.backend.release()
        self.guest.thaw(self.serve)

    def check_alive(self) -> None:
        """Raise `PeerVanished` if the guest is gone."""
        self.guest.pump()
        if self.guest.end_reason is not None:
            raise PeerVanished(f"the Linux guest is gone: {self.guest.end_reason}")
        if not self.backend.connected:
            # Its kernel may be ending: then that is what is to be told.
            with contextlib.suppress(PeerVanished):
                self.guest.alive(self.serve, 1.0)
            reason = self.guest.end_reason or f"the connection to its device is lost: {self.backend.last_error}"
            raise PeerVanished(f"the Linux guest is gone: {reason}")

    def dirty_log(self, device_log: SoftwareDirtyLog) -> tuple[DirtyLog, str | None]:
        """Return the log of what the guest and the device write, and why it is no ground for hints (None: it is).

        `cachestat` is tried first, with the guest frozen; where it cannot be trusted pages are compared, which is right
        without hints. What the device writes reaches the page cache through its own mapping, which `cachestat` sees
        too; its log is beside it so that nothing depends on that.
        """
        log = CachestatLog(self.memory)
        try:
            log.prepare()
            self.freeze()
            try:
                log.start()
            finally:
                self.thaw()
        except MissingFacility as error:
            return CombinedLog("digest", [DigestLog(self.memory), device_log]), error.message
        finally:
            log.stop()
        return CombinedLog("cachestat", [log, device_log]), None
