"""Everything virtio that is not balloon: guest memory, dirty logs, split virtqueues, vhost-user messages."""

__version__ = "0.1.0"
"""Of the whole distribution: pyproject.toml and the other packages take it from here."""
