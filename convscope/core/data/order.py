"""In which order samples are seen: a pure function of (seed, position), so that nothing needs to be saved to resume."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from convscope.core.errors import UserError

Positions = NDArray[np.int64]
ROUNDS = 6
SMALL = 1024  # up to this size an epoch is shuffled whole: a Feistel network reaches few orders of a tiny set
DEALT = 10_000  # positions over which the shares of a mixture are exact
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # the step of splitmix64


class Order(Protocol):
    """Maps positions of an endless stream (N,) >= 0 to sample indices (N,)."""

    size: int  # positions in an epoch
    reach: int  # positions within which the neighbours of a sample in its shard are seen

    def __call__(self, positions: Positions) -> Positions:
        """Sample indices at the given positions."""


class Shuffled:
    """Each epoch of `size` positions is a fresh permutation of all samples.

    A Feistel network permutes the numbers below a power of four; applying it until the result is below `size` permutes
    those below `size` (cycle walking; Black and Rogaway 2002), so memory does not grow with `size`.

    Raises:
        UserError: there are no samples, or the seed is negative.
    """

    def __init__(self, size: int, seed: int) -> None:
        _check(size, seed)
        self.size = self.reach = size
        self.seed = seed

    def __call__(self, positions: Positions) -> Positions:
        """Sample indices (N,) at the given positions (N,)."""
        epochs, offsets = np.divmod(np.asarray(positions, dtype=np.int64), self.size)
        indices = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indices[chosen] = permute(offsets[chosen], self.size, (self.seed, int(epoch)))
        return indices


class ShuffledInGroups:
    """For shards that have to be fetched: each epoch deals them in random groups, and shuffles samples within a group.

    Args:
        sizes: samples in each shard.
        seed: of both shuffles.
        group: shards in a group, which have to be on disk together.

    Raises:
        UserError: there are no samples, or the seed is negative.
    """

    def __init__(self, sizes: Sequence[int], seed: int, group: int) -> None:
        _check(sum(sizes), seed)
        self.sizes, self.seed, self.group = np.asarray(sizes, dtype=np.int64), seed, group
        self.first = np.cumsum([0, *sizes])
        self.size = int(self.first[-1])
        self.reach = max(1, self.size * min(group, len(sizes)) // len(sizes))
        self._epoch: tuple[int, tuple[Positions, Positions, Positions]] | None = None  # the last one asked for

    def __call__(self, positions: Positions) -> Positions:
        """Sample indices (N,) at the given positions (N,)."""
        epochs, offsets = np.divmod(np.asarray(positions, dtype=np.int64), self.size)
        indices = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            shards, ends, bounds = self._dealt(int(epoch))
            groups = np.searchsorted(bounds, offsets, "right") - 1
            for group in np.unique(groups[epochs == epoch]):
                chosen = (epochs == epoch) & (groups == group)
                low, high = int(bounds[group]), int(bounds[group + 1])
                dealt = low + permute(offsets[chosen] - low, high - low, (self.seed, int(epoch), int(group)))
                place = np.searchsorted(ends, dealt, "right")
                shard = shards[place]
                indices[chosen] = self.first[shard] + dealt - (ends[place] - self.sizes[shard])
        return indices

    def _dealt(self, epoch: int) -> tuple[Positions, Positions, Positions]:
        """Shards in their order, where each ends, and where groups begin (and the last one ends)."""
        if self._epoch is not None and self._epoch[0] == epoch:
            return self._epoch[1]
        shards = np.random.default_rng((self.seed, epoch)).permutation(len(self.sizes)).astype(np.int64)
        ends = self.sizes[shards].cumsum()
        starts = np.concatenate([[0], ends])
        self._epoch = epoch, (shards, ends, np.unique(np.append(starts[:: self.group], self.size)))
        return self._epoch[1]


class Mixed:
    """Several sources by weight: each block of 10 000 positions has each source's exact share, at random places.

    Args:
        orders: of each source.
        weights: of each source, of any sum.
        seed: of the places.

    Raises:
        UserError: weights that are not positive, or too small to be dealt at all.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], seed: int) -> None:
        if len(weights) != len(orders):
            raise UserError(f"{len(weights)} weights were given for {len(orders)} sources")
        if not all(np.isfinite(weight) and weight > 0 for weight in weights):
            raise UserError(f"weights must be positive, got {' '.join(map(str, weights))}")
        self.orders, self.seed = list(orders), seed
        self.shares = _whole_shares(np.asarray(weights, dtype=np.float64), DEALT)
        if not self.shares.all():
            raise UserError(f"the smallest weight is below 1 in {DEALT}; leave that source out")
        self.first = np.cumsum([0, *(order.size for order in orders)])
        self.size = int(self.first[-1])
        self.reach = max(int(order.reach * DEALT / share) for order, share in zip(orders, self.shares))

    def __call__(self, positions: Positions) -> Positions:
        """Sample indices (N,) at the given positions (N,); those of a source follow those of the ones before it."""
        sources, own = self._own(np.asarray(positions, dtype=np.int64))
        indices = np.empty_like(own)
        for source in np.unique(sources):
            chosen = sources == source
            indices[chosen] = self.first[source] + self.orders[source](own[chosen])
        return indices

    def dealt(self, position: int) -> list[int]:
        """How many of the positions before `position` each source had."""
        blocks, rest = divmod(position, DEALT)
        sources, _ = _block(self.seed, blocks, tuple(self.shares.tolist()))
        counts = np.bincount(sources[:rest], minlength=len(self.shares))
        return [int(count) for count in blocks * self.shares + counts]

    def _own(self, positions: Positions) -> tuple[Positions, Positions]:
        """The source at each position, and the position in that source's own stream."""
        blocks, offsets = np.divmod(positions, DEALT)
        sources, own = np.empty_like(positions), np.empty_like(positions)
        for block in np.unique(blocks):
            chosen = blocks == block
            names, ranks = _block(self.seed, int(block), tuple(self.shares.tolist()))
            sources[chosen] = names[offsets[chosen]]
            own[chosen] = block * self.shares[sources[chosen]] + ranks[offsets[chosen]]
        return sources, own


@lru_cache(maxsize=8)
def _block(seed: int, block: int, shares: tuple[int, ...]) -> tuple[Positions, Positions]:
    """The source of each position of a block, and how many of that source the block had before it."""
    sources = np.random.default_rng((seed, block)).permutation(np.repeat(np.arange(len(shares)), shares))
    ranks = np.empty_like(sources)
    for source, share in enumerate(shares):
        ranks[sources == source] = np.arange(share)
    return sources, ranks


def _whole_shares(weights: NDArray[np.float64], total: int) -> Positions:
    """Whole numbers in proportion to `weights` that add up to `total`, by largest remainder."""
    exact = weights / weights.sum() * total
    shares: Positions = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]] += 1
    return shares


def uniform_at(seed: int, positions: Positions, count: int) -> NDArray[np.float32]:
    """Random numbers (N, count) in [0, 1) that belong to positions (N,): splitmix64, started anew at each of them."""
    key = np.random.SeedSequence((seed, count)).generate_state(1, np.uint64)
    starts = _mix(np.asarray(positions).astype(np.uint64) + key)
    draws = _mix(starts[:, None] + GOLDEN * np.arange(1, count + 1, dtype=np.uint64))
    return (draws >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)


def permute(values: Positions, size: int, key: tuple[int, ...]) -> Positions:
    """Where a permutation of the numbers below `size`, chosen by `key`, sends `values`."""
    keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64).astype(np.uint64)
    if size <= SMALL:
        shuffled = _mix(_mix(np.arange(size, dtype=np.uint64) + keys[0]) ^ keys[1]).argsort()
        return np.asarray(shuffled[values], dtype=np.int64)
    half_bits = np.uint64(((size - 1).bit_length() + 1) // 2)
    found = _encrypt(values.astype(np.uint64), keys, half_bits)
    while (outside := found >= size).any():
        found[outside] = _encrypt(found[outside], keys, half_bits)
    return np.asarray(found, dtype=np.int64)


def _check(size: int, seed: int) -> None:
    if size < 1:
        raise UserError("there are no samples to draw from")
    if seed < 0:
        raise UserError(f"a seed must be 0 or more, got {seed}")


def _encrypt(values: NDArray[np.uint64], keys: NDArray[np.uint64], half_bits: np.uint64) -> NDArray[np.uint64]:
    mask = np.uint64((1 << int(half_bits)) - 1)
    left, right = values >> half_bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half_bits) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64: every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
