"""The compiled extensions; everything else about the package is in pyproject.toml."""

from pathlib import Path

from setuptools import setup

# Each room that owns an extension names its sources in its own _build.py.
BUILDERS = ["vring/_build.py", "guest_driver/_build.py", "balloon_cli/_build.py"]

setup(cffi_modules=[f"{path}:ffibuilder" for path in BUILDERS if Path(path).exists()])
