"""Builds ``vring._vring`` from ``csrc/vring``, ``csrc/dirty`` and ``csrc/peer``."""

import sys
from pathlib import Path

from cffi import FFI

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "csrc"))
from cffi_header import CFLAGS, cdef, sources

ffibuilder = FFI()
ffibuilder.cdef(cdef("vring/vring_api.h", "dirty/dirty_api.h", "peer/peer_api.h"))
ffibuilder.set_source(
    "vring._vring",
    '#include "vring/vring.h"\n#include "dirty/dirty.h"\n#include "peer/peer.h"\n',
    sources=sources("vring", "dirty", "peer"),
    include_dirs=["csrc"],
    extra_compile_args=CFLAGS,
)
