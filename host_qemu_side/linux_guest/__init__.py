"""The unmodified Linux guest: how it is started, spoken to, frozen and ended, and what runs in it.

`launch` is the front door; `tags` judges memory images of a guest that runs ``guest_tool tagger``.
"""

from host_qemu_side.linux_guest.launch import LinuxGuest, Serve

__all__ = ["LinuxGuest", "Serve"]
