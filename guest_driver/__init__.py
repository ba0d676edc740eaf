"""The guest: memory manager, balloon driver, the transports it drives a device through, workloads, and the process."""

from vring import __version__

__all__ = ["__version__"]
