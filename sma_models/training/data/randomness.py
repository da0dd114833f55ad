"""Random numbers that are a pure function of (seed, purpose, index), on every machine and version of numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sma.errors import ConfigError

# Purposes: different uses of one seed must not see the same numbers.
ORDER, WINDOW, SPLIT, LISTOPS = range(1, 5)


class Draws:
    """A counter-based generator. Only raw 64-bit words of Philox are used: numpy promises never to change those,
    while it reserves the right to change how they become floats, integers and permutations.

    Args:
        seed: any non-negative integer below 2**63.
        purpose: one of the constants of this module.
        index: the number of the epoch, window, ... ; neighbours are independent.

    Raises:
        ConfigError: the seed is out of range.
    """

    def __init__(self, seed: int, purpose: int, index: int = 0) -> None:
        if not 0 <= seed < 2**63:
            raise ConfigError(f"seed: must be at least 0 and below 2**63, got {seed!r}")
        key = np.array([seed, purpose], dtype=np.uint64)
        counter = np.array([0, 0, 0, index], dtype=np.uint64)
        self._words = np.random.Philox(key=key, counter=counter)

    def raw(self, count: int) -> NDArray[np.uint64]:
        """``(count,)`` uniform 64-bit words."""
        return np.asarray(self._words.random_raw(count), dtype=np.uint64)

    def below(self, bound: int, count: int) -> NDArray[np.int64]:
        """``(count,)`` integers in 0..bound-1; the bias of the remainder is below bound / 2**64."""
        return (self.raw(count) % np.uint64(bound)).astype(np.int64)

    def uniform(self, count: int) -> NDArray[np.float64]:
        """``(count,)`` floats in [0, 1)."""
        return (self.raw(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def permutation(self, count: int) -> NDArray[np.int64]:
        """``(count,)`` the numbers 0..count-1 in random order."""
        return np.argsort(self.raw(count), kind="stable").astype(np.int64)
