"""In which order samples are seen: a pure function of (seed, position), so that nothing needs to be saved to resume."""

import numpy as np
from numpy.typing import NDArray

from convscope.core.errors import UserError

ROUNDS = 6
SMALL = 1024  # up to this size an epoch is shuffled whole: a Feistel network reaches few orders of a tiny set


class Order:
    """Maps positions of an endless stream to samples; each epoch of `size` positions is a fresh permutation.

    A Feistel network permutes the numbers below a power of four; applying it until the result is below `size` permutes
    those below `size` (cycle walking; Black and Rogaway 2002), so memory does not grow with `size`.

    Raises:
        UserError: there are no samples, or the seed is negative.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise UserError("there are no samples to draw from")
        if seed < 0:
            raise UserError(f"a seed must be 0 or more, got {seed}")
        self.size, self.seed = size, seed
        self._half_bits = np.uint64(((size - 1).bit_length() + 1) // 2)
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample indices (N,) at the given positions (N,) >= 0."""
        epochs, offsets = np.divmod(np.asarray(positions, dtype=np.int64), self.size)
        indices = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indices[chosen] = self._permute(offsets[chosen].astype(np.uint64), int(epoch))
        return indices

    def _permute(self, values: NDArray[np.uint64], epoch: int) -> NDArray[np.int64]:
        keys = np.random.SeedSequence((self.seed, epoch)).generate_state(ROUNDS, np.uint64).astype(np.uint64)
        if self.size <= SMALL:
            return _mix(_mix(np.arange(self.size, dtype=np.uint64) + keys[0]) ^ keys[1]).argsort()[values]
        found = self._encrypt(values, keys)
        while (outside := found >= self.size).any():
            found[outside] = self._encrypt(found[outside], keys)
        return found.astype(np.int64)

    def _encrypt(self, values: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half_bits, values & self._mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half_bits) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64: every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
