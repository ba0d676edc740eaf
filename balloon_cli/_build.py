"""Builds ``balloon_cli._bench``: the ring benchmarks, with ``csrc/vring`` linked in so that C calls C."""

import sys
from pathlib import Path

from cffi import FFI

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "csrc"))
from cffi_header import CFLAGS, cdef, sources

ffibuilder = FFI()
ffibuilder.cdef(cdef("bench/bench_api.h"))
ffibuilder.set_source(
    "balloon_cli._bench",
    '#include "bench/bench.h"\n',
    sources=sources("bench", "vring"),
    include_dirs=["csrc"],
    extra_compile_args=CFLAGS,
)
