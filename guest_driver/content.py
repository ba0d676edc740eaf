"""What a page of a workload holds, in plain numpy: the reference that the C code is tested against.

A page is 512 little-endian 64-bit words made from (seed, pfn, version), all different and none of them zero.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from guest_driver._page_alloc import lib

__all__ = ["mix64", "page_content"]

_MASK = (1 << 64) - 1
_WORDS = int(lib.PA_PAGE_SIZE) // 8
_STEP = int(lib.PA_CONTENT_STEP)


def mix64(x: int) -> int:
    """Return the output function of splitmix64 for a 64-bit state."""
    x &= _MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31


def page_content(seed: int, pfn: int, version: int) -> npt.NDArray[np.uint64]:
    """Return the 512 words that page `pfn` holds at `version`, as described in ``page_alloc_api.h``."""
    key = mix64(mix64(seed ^ mix64(pfn + 1)) + version) | 1
    x = np.uint64(key) + np.arange(_WORDS, dtype=np.uint64) * np.uint64(_STEP)
    return x ^ x >> np.uint64(29)
