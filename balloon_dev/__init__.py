"""The balloon device type: features, config space, command ids, the hint table, the device model and the oracle."""

from vring import __version__

__all__ = ["__version__"]
