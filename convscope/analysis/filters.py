"""What a network's convolution filters look like, layer by layer and as distributions that can be compared.

The definitions are in `filter_statistics` and `filter_drift`; here they meet the layers of networks, of which only one
at a time is looked at.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convscope.analysis.conv_layers import Layer
from convscope.analysis.filter_drift import (
    Basis,
    Bins,
    CoefficientCounts,
    basis_of,
    default_bins,
    drift_matrix,
    layer_weights,
    published_bins,
)
from convscope.analysis.filter_statistics import (
    HIGH_SPARSITY,
    MARGIN,
    SPARSE,
    FilterMoments,
    Kind,
    as_rows,
    chunks,
    entropy_threshold,
    orthogonality,
    peaks,
    sparsity_of,
    verdict,
)
from convscope.core.errors import UserError

Array = NDArray[Any]
DECILES = 10  # of the depth


@dataclass(frozen=True, kw_only=True)
class FiltersConfig:
    """How filters are judged."""

    normalise: bool = False
    """Judge layers by filters divided by their largest weight, not by the stored ones."""
    sparse_ratio: float = SPARSE
    """A filter whose largest weight is below the layer's largest by this factor counts as unused."""
    sparse_ratios: tuple[float, ...] = (10, 30, 100, 300, 1000)
    """Further factors that the share of unused filters is given for."""
    margin: float = MARGIN
    """How far below random filters' variance entropy a layer still counts as random."""
    high_sparsity: float = HIGH_SPARSITY
    """Share of unused filters from which a layer with few patterns counts as redundant."""
    seed: int = 0
    """Of the bootstrap and of untrained twins."""

    def __post_init__(self) -> None:
        if not self.sparse_ratios or min(self.sparse_ratio, *self.sparse_ratios) <= 1:
            raise UserError("filters: every sparse-ratio must be above 1")
        if self.margin < 0 or not 0 <= self.high_sparsity <= 1:
            raise UserError("filters: margin must be at least 0, and high-sparsity a share between 0 and 1")
        if self.seed < 0:
            raise UserError(f"filters: seed must be at least 0, got {self.seed}")


class NotFiniteError(UserError):
    """A layer that nothing can be said of."""


@dataclass(frozen=True)
class LayerStatistics:
    """The figures of one layer."""

    name: str
    size: str  # "3x3"
    depth: int
    depth_norm: float
    filters: int
    out_channels: int
    groups: int
    entropy: float  # variance entropy of the weights as they are
    entropy_normalised: float  # of the filters each divided by its largest weight
    threshold: float | None  # of random filters
    sparsity: float
    sparsities: tuple[float, ...]  # at config.sparse_ratios
    orthogonality: float | None
    kind: Kind
    moments: FilterMoments  # of the normalised filters

    @property
    def dimension(self) -> int:
        """Number of weights of a filter."""
        return self.moments.dimension


def layer_statistics(layer: Layer, config: FiltersConfig) -> LayerStatistics:
    """Measure a layer.

    Raises:
        NotFiniteError: weights that are not finite.
    """
    weight = layer.weight  # once: it may be on disk
    filters = as_rows(weight)
    dimension = filters.shape[1]
    raw, normalised, peak = filter_moments(filters)
    if not np.isfinite(peak).all():
        raise NotFiniteError(f"filters: the weights of {layer.name} are not finite; the training may have diverged")
    sparsity = sparsity_of(peak, config.sparse_ratio)
    judged = normalised if config.normalise else raw
    return LayerStatistics(
        name=layer.name,
        size=layer.size,
        depth=layer.depth,
        depth_norm=layer.depth_norm,
        filters=len(filters),
        out_channels=weight.shape[0],
        groups=layer.groups,
        entropy=raw.variance_entropy(),
        entropy_normalised=normalised.variance_entropy(),
        threshold=entropy_threshold(len(filters), dimension),
        sparsity=sparsity,
        sparsities=tuple(sparsity_of(peak, ratio) for ratio in config.sparse_ratios),
        orthogonality=orthogonality(weight),
        kind=verdict(judged, sparsity, margin=config.margin, high_sparsity=config.high_sparsity),
        moments=normalised,
    )


def filter_moments(filters: Array) -> tuple[FilterMoments, FilterMoments, Array]:
    """Moments of filters (n, d) as they are and each divided by its largest weight, and those largest weights (n,)."""
    raw, normalised = FilterMoments(filters.shape[1]), FilterMoments(filters.shape[1])
    largest: list[Array] = []
    for chunk in chunks(filters):
        largest.append(peaks(chunk))
        raw.update(chunk)
        normalised.update(chunk / np.where(largest[-1] == 0, 1.0, largest[-1])[:, None])
    return raw, normalised, np.concatenate(largest)


@dataclass(frozen=True)
class Distribution:
    """The coefficients of one network's filters of one size."""

    layers: tuple[str, ...]
    depth_norm: Array  # (layers,)
    counts: NDArray[np.int64]  # (layers, d, bins)
    total: CoefficientCounts

    def deciles(self) -> list[Array | None]:
        """Counts (d, bins) of the layers in each tenth of the depth; None where there are none."""
        tenth = (np.ceil((self.depth_norm * DECILES).round(9)).astype(int) - 1).clip(min=0)
        return [self.counts[tenth == i].sum(axis=0) if (tenth == i).any() else None for i in range(DECILES)]


@dataclass(frozen=True)
class Comparison:
    """Networks' filters of one size in one basis."""

    size: str
    basis: Basis
    bins: Bins
    distributions: Mapping[str, Distribution]  # by the network's label

    def drifts(self, *, balanced: bool = False) -> Array:
        """Drift of each pair of networks (m, m)."""
        totals = [
            np.tensordot(layer_weights(one.counts, balanced=balanced), one.counts, axes=1)
            for one in self.distributions.values()
        ]
        return drift_matrix([self.bins.probabilities(total) for total in totals], self.basis.explained)

    def depth_drifts(self, label: str) -> Array:
        """Drift of each pair of tenths of a network's depth (10, 10); NaN where one has no layer."""
        return self._matrix(self.distributions[label].deciles())

    def from_whole(self, label: str) -> Array:
        """Drift of each tenth of a network's depth from all of its filters (10,)."""
        one = self.distributions[label]
        return self._matrix([*one.deciles(), one.counts.sum(axis=0)])[:-1, -1]

    def from_other(self, label: str, other: str) -> Array:
        """Drift between the same tenth of two networks' depths (10,)."""
        tenths = [self.distributions[each].deciles() for each in (label, other)]
        return np.array([self._matrix(list(pair))[0, 1] for pair in zip(*tenths)])

    def _matrix(self, counts: Sequence[Array | None]) -> Array:
        known = [i for i, each in enumerate(counts) if each is not None]
        found = np.full((len(counts), len(counts)), math.nan)
        parts = [self.bins.probabilities(each) for each in counts if each is not None]
        found[np.ix_(known, known)] = drift_matrix(parts, self.basis.explained)
        return found


def pooled_moments(statistics: Iterable[LayerStatistics], size: str) -> FilterMoments | None:
    """Moments of all normalised filters of a size; None where there are none."""
    pooled: FilterMoments | None = None
    for layer in statistics:
        if layer.size == size:
            pooled = pooled or FilterMoments(layer.moments.dimension)
            pooled.merge(layer.moments)
    return pooled


def compare(networks: Mapping[str, Iterable[Layer]], size: str, basis: Basis, *, published: bool = False) -> Comparison:
    """Count the coefficients of networks' filters of one size, one layer at a time.

    Args:
        networks: layers by the network's label, read twice with `published`; those without such filters are left out.
        size: of the kernel, such as "3x3".
        basis: principal components of normalised filters of that size.
        published: bins as in the paper's notebook.
    """
    bins = default_bins(basis)
    if published:
        every = (layer.filters for layers in networks.values() for layer in layers if layer.size == size)
        bins = published_bins(every, basis)
    found: dict[str, Distribution] = {}
    for label, layers in networks.items():
        total = CoefficientCounts(basis, bins)
        counted = [(one.name, one.depth_norm, total.update(one.filters)) for one in layers if one.size == size]
        if counted:
            names, depths, counts = zip(*counted)
            found[label] = Distribution(names, np.array(depths), np.stack(counts), total)
    return Comparison(size, basis, bins, found)


def pooled_basis(statistics: Iterable[LayerStatistics], size: str) -> Basis:
    """Principal components of all normalised filters of a size, which have to exist."""
    pooled = pooled_moments(statistics, size)
    assert pooled is not None
    return basis_of(pooled.eigenfilters())
