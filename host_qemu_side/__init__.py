"""The hypervisor's side: vhost-user back end, live migration, discarding memory, launching guests."""

from vring import __version__

__all__ = ["__version__"]
