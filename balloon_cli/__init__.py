"""The command line: thin. With tests, examples and benchmarks the only place that knows both guest and host."""

from vring import __version__

__all__ = ["__version__"]
