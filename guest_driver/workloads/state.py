"""What a workload keeps in guest RAM: one block of words, and a random sequence whose whole state is two of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from guest_driver.content import mix64

__all__ = ["Random", "Words"]

Words = npt.NDArray[np.uint64]
"""A piece of the state block, over guest RAM itself."""

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class Random:
    """Counter-based random numbers (splitmix64): number n is a function of the seed and n alone.

    Parameters
    ----------
    words
        Two words of guest RAM: seed and counter.
    """

    def __init__(self, words: Words) -> None:
        self._words = words

    def seed(self, seed: int) -> None:
        """Start the sequence of `seed`."""
        self._words[0] = mix64(seed)
        self._words[1] = 0

    def next(self) -> int:
        """Return the next number, 64 bits."""
        count = int(self._words[1]) + 1
        self._words[1] = count
        return mix64(int(self._words[0]) + count * _GAMMA)

    def uniform(self) -> float:
        """Return a number in (0, 1]."""
        return ((self.next() >> 11) + 1) / (1 << 53)

    def below(self, limit: int, n: int) -> npt.NDArray[np.uint64]:
        """Return `n` numbers in [0, limit), limit up to 2^32: the same ones as `n` calls for one each."""
        count = int(self._words[1])
        self._words[1] = count + n
        first = (int(self._words[0]) + (count + 1) * _GAMMA) & _MASK
        x = np.uint64(first) + np.arange(n, dtype=np.uint64) * np.uint64(_GAMMA)
        x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        x = x ^ x >> np.uint64(31)
        return (x >> np.uint64(32)) * np.uint64(limit) >> np.uint64(32)
