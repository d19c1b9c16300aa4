"""A seeded order of rows that needs no memory: the i-th row of any epoch is computed, not stored.

A balanced Feistel network permutes the integers below a power of four; what lands outside [0, n) is
permuted again until it lands inside (cycle walking), which leaves a permutation of [0, n). The order
of ten billion rows costs nothing until it is asked for, and reading can start anywhere.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 6


class Shuffle:
    """The endless sequence of row indices: one permutation of range(n) per epoch, one after another.

    Args:
        n: number of rows, at least 1.
        seed: orders of different seeds, and of different epochs of one seed, are unrelated.
    """

    def __init__(self, n: int, seed: int):
        if n < 1:
            raise ValueError(f"n={n}: there is no row to shuffle")
        self.n, self.seed = n, seed
        self.half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))  # bits of one half
        self.mask = np.uint64((1 << int(self.half)) - 1)

    def rows(self, start: int, count: int) -> np.ndarray:
        """Row indices (count,) int64 at the places start … start + count − 1 of the sequence."""
        parts = []
        while count > 0:
            epoch, first = divmod(start, self.n)
            taken = min(count, self.n - first)
            parts.append(self._permute(np.arange(first, first + taken, dtype=np.uint64), epoch))
            start, count = start + taken, count - taken
        return np.concatenate(parts)

    def _permute(self, values: np.ndarray, epoch: int) -> np.ndarray:
        keys = np.random.default_rng([self.seed, epoch]).integers(0, 2**63, ROUNDS, dtype=np.uint64)
        values = self._feistel(values, keys)
        outside = np.flatnonzero(values >= self.n)
        while len(outside):
            values[outside] = self._feistel(values[outside], keys)
            outside = outside[values[outside] >= self.n]
        return values.astype(np.int64)

    def _feistel(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        left, right = values >> self.half, values & self.mask
        for key in keys:
            left, right = right, left ^ (mix(right + key) & self.mask)
        return (left << self.half) | right


def mix(z: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every bit of z reaches every other."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
