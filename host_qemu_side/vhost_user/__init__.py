"""A vhost-user back end: `backend` speaks with the front end, `rings` serves what it has set up."""

from host_qemu_side.vhost_user.backend import VhostUserBackend

__all__ = ["VhostUserBackend"]
