"""Builds ``guest_driver._page_alloc`` from ``csrc/page_alloc``."""

import sys
from pathlib import Path

from cffi import FFI

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "csrc"))
from cffi_header import CFLAGS, cdef, sources

ffibuilder = FFI()
ffibuilder.cdef(cdef("page_alloc/page_alloc_api.h"))
ffibuilder.set_source(
    "guest_driver._page_alloc",
    '#include "page_alloc/page_alloc.h"\n',
    sources=sources("page_alloc"),
    include_dirs=["csrc"],
    extra_compile_args=CFLAGS,
)
