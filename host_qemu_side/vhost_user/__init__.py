"""A vhost-user back end: `backend` has the connection, `messages` does what is said, `rings` serves what is set up."""

from host_qemu_side.vhost_user.backend import VhostUserBackend

__all__ = ["VhostUserBackend"]
