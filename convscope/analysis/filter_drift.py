"""How far two sets of filters lie apart: distributions of their coefficients in a common basis.

CNN Filter DB (Gavrikov and Keuper 2022, section 5): every filter is divided by its largest weight, projected on
principal components, and the histograms of two sets are compared by the symmetric Kullback-Leibler divergence,
component by component, weighted by the variance that each explains. As published, the bins span the smallest to the
largest coefficient, so that the figure changes with the arbitrary sign of a component, and an empty bin gets a density
of 1.2e-7, on which up to 40 % of the figure hangs. By default the range is symmetric and follows from the basis alone,
so that histograms of later checkpoints or of a stream have the same bins, and every bin starts with half a count.
"""

import hashlib
import math
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convscope.analysis.filter_statistics import Eigenfilters, Filters, chunks, peaks
from convscope.core.errors import UserError
from convscope.core.results import Figure

Array = NDArray[Any]
BINS, PUBLISHED_BINS = 71, 70  # odd, so that 0 lies within a bin, whatever a component's sign
FINE = 8  # bins that each of the drift's is divided into, for drawing
RANGE = 4.0  # standard deviations along the first component; what lies outside counts in the outermost bins
PRIOR = 0.5  # counts that every bin starts with (Krichevsky and Trofimov 1981)
GRID = 512  # cells a side of the joint density of the first two coefficients
MIN_LAYERS = 5  # fewer give no interval
RESAMPLES, DRAWN_AT_ONCE = 1000, 50
EMPTY = float(np.finfo(np.float32).eps)  # published density of an empty bin


@dataclass(frozen=True)
class Basis:
    """Principal components that coefficients are taken in, fixed for all that is compared."""

    mean: Array  # (d,)
    components: Array  # (d, d), a component a row
    explained: Array  # (d,), the components' weights in the drift
    reach: float  # of the default bins, which go from -reach to reach

    @property
    def dimension(self) -> int:
        """Number of weights of a filter."""
        return len(self.mean)

    @property
    def hash(self) -> str:
        """SHA-256 (first 16 hexadecimal digits) of all that the coefficients and bins depend on."""
        digest = hashlib.sha256()
        for values in (self.mean, self.components, self.explained, np.array(self.reach)):
            digest.update(np.ascontiguousarray(values, dtype="<f8").tobytes())
        return digest.hexdigest()[:16]

    def coefficients(self, filters: Array) -> Array:
        """Coefficients (n, d) of peak-normalised filters (n, d)."""
        centred = np.ascontiguousarray((filters - self.mean).T)  # (d, n): BLAS is ten times as fast this way round
        found: Array = (self.components @ centred).T
        return found


def basis_of(eigenfilters: Eigenfilters) -> Basis:
    """The basis of peak-normalised filters' principal components.

    No coefficient exceeds |v|_1 + |v mean|; where four standard deviations are less, as with large kernels, the bins
    span those.
    """
    bound = np.abs(eigenfilters.components).sum(axis=1) + np.abs(eigenfilters.components @ eigenfilters.mean)
    spread = RANGE * math.sqrt(float(eigenfilters.variances[0]))
    reach = min(float(bound.max()), spread) if spread > 0 else float(bound.max())
    return Basis(eigenfilters.mean, eigenfilters.components, eigenfilters.explained, reach)


def load_basis(path: Path) -> dict[str, Basis]:
    """Bases in a filters.npz, by the kernel's size such as "3x3".

    Raises:
        UserError: the file cannot be read or holds none.
    """
    try:
        with np.load(path) as stored:
            sizes = [name.removeprefix("basis_mean_") for name in stored.files if name.startswith("basis_mean_")]
            found = {
                size: Basis(
                    stored[f"basis_mean_{size}"],
                    stored[f"basis_components_{size}"],
                    stored[f"basis_explained_{size}"],
                    float(stored[f"basis_reach_{size}"]),
                )
                for size in sizes
            }
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} holds no basis; give the filters.npz of an earlier analysis") from error
    if not found:
        raise UserError(f"{path} holds no basis; give the filters.npz of an earlier analysis")
    return found


def basis_arrays(bases: dict[str, Basis]) -> dict[str, Array]:
    """What `load_basis` reads."""
    return {
        f"basis_{name}_{size}": np.asarray(getattr(basis, name))
        for size, basis in bases.items()
        for name in ("mean", "components", "explained", "reach")
    }


def peak_normalised(filters: Array) -> Array:
    """Filters (n, d) each divided by its largest absolute weight; those of zeros stay."""
    largest = peaks(filters)
    return filters / np.where(largest == 0, 1.0, largest)[:, None]


@dataclass(frozen=True)
class Bins:
    """Bins of one width that coefficients are counted in; what lies outside counts in the outermost ones."""

    low: float
    high: float
    count: int
    published: bool = False

    def probabilities(self, counts: Array) -> Array:
        """Probabilities (..., bins), all positive, from counts (..., bins)."""
        if not self.published:
            richer = counts + PRIOR
            return np.asarray(richer / richer.sum(axis=-1, keepdims=True))
        density = counts / (counts.sum(axis=-1, keepdims=True) * (self.high - self.low) / self.count)
        density = np.where(density == 0, EMPTY, density)
        return np.asarray(density / density.sum(axis=-1, keepdims=True))


def default_bins(basis: Basis) -> Bins:
    """A symmetric range that the basis alone sets."""
    return Bins(-basis.reach, basis.reach, BINS)


def published_bins(filters: Iterable[Filters], basis: Basis) -> Bins:
    """The smallest to the largest coefficient of all filters that are compared."""
    low, high = math.inf, -math.inf
    for part in filters:
        for chunk in chunks(part):
            found = basis.coefficients(peak_normalised(chunk))
            low, high = min(low, float(found.min())), max(high, float(found.max()))
    if not low < high:  # one filter, or several that are alike
        low, high = low - 0.5, high + 0.5
    return Bins(low, high, PUBLISHED_BINS, published=True)


class CoefficientCounts:
    """Histograms of filters' coefficients, in constant memory.

    Args:
        basis: that coefficients are taken in.
        bins: of the drift.
    """

    def __init__(self, basis: Basis, bins: Bins) -> None:
        self.basis, self.bins = basis, bins
        self.fine = np.zeros((basis.dimension, bins.count * FINE), dtype=np.int64)  # each bin cut into FINE
        self.density = np.zeros((GRID, GRID), dtype=np.int64)  # of the first coefficient (rows) and the second

    def update(self, filters: Filters) -> NDArray[np.int64]:
        """Count raw or folded filters, which are peak-normalised here; returns their own counts (d, bins)."""
        fine = np.zeros_like(self.fine)
        for chunk in chunks(filters):
            found = self.basis.coefficients(peak_normalised(chunk)).T  # (d, n)
            for component, cells in enumerate(self._cells(found, fine.shape[1])):
                fine[component] += np.bincount(cells, minlength=fine.shape[1])
            pair = self._cells(found[:2], GRID)
            np.add.at(self.density.reshape(-1), pair[0] * GRID + pair[-1], 1)
        self.fine += fine
        counts: NDArray[np.int64] = fine.reshape(len(fine), self.bins.count, FINE).sum(axis=2)
        return counts

    def _cells(self, coefficients: Array, count: int) -> NDArray[np.int64]:
        """Which of `count` cells over the bins' range each coefficient falls into; outside of it, the outermost."""
        low, high = self.bins.low, self.bins.high
        return ((coefficients - low) * (count / (high - low))).clip(0, count - 1).astype(np.int64)

    def merge(self, other: "CoefficientCounts") -> None:
        """Add what another one of the same basis and bins has counted."""
        self.fine += other.fine
        self.density += other.density


def drift(p: Array, q: Array, weights: Array) -> float:
    """Distribution shift D: the weighted sum over components of KL(P | Q) + KL(Q | P), in nats.

    Args:
        p: probabilities (d, bins), all positive.
        q: the others', on the same bins.
        weights: share of the variance that each component explains (d,).
    """
    return float(weights @ ((p - q) * np.log(p / q)).sum(axis=-1))


def drift_matrix(distributions: Sequence[Array], weights: Array) -> Array:
    """Drift of each pair (m, m): symmetric, zero on the diagonal."""
    found = np.zeros((len(distributions), len(distributions)))
    for i, p in enumerate(distributions):
        for j in range(i):
            found[i, j] = found[j, i] = drift(p, distributions[j], weights)
    return found


def layer_weights(counts: Array, *, balanced: bool) -> Array:
    """Weights (layers,) of layers' counts (layers, d, bins): 1 each, or such that all layers count alike."""
    sizes = counts[:, 0].sum(axis=-1)
    return np.asarray(sizes.mean() / sizes if balanced else np.ones(len(counts)))


def layer_drift(
    first: Array, second: Array, bins: Bins, weights: Array, *, balanced: bool = False, paired: bool, seed: int = 0
) -> Figure:
    """Drift between the filters of two networks, with its percentile bootstrap interval over their layers.

    Args:
        first: counts of each layer (layers, d, bins).
        second: the other's.
        bins: that they were counted in.
        weights: share of the variance that each component explains (d,).
        balanced: every layer counts alike, however many filters it has.
        paired: the two have the same layers, in the same order, which are drawn together.
        seed: of the bootstrap.
    """
    parts = [layer_weights(counts, balanced=balanced)[:, None, None] * counts for counts in (first, second)]
    shape = first.shape[1:]

    def measure(totals: Sequence[Array]) -> Array:
        p, q = (bins.probabilities(total) for total in totals)
        return np.asarray(((p - q) * np.log(p / q)).sum(axis=-1) @ weights)

    value = float(measure([part.sum(axis=0) for part in parts]))
    if min(len(first), len(second)) < MIN_LAYERS:
        return Figure(value, n=min(len(first), len(second)))
    rng = np.random.default_rng(seed)
    draws: list[Array] = []
    for _ in range(RESAMPLES // DRAWN_AT_ONCE):
        times = [rng.multinomial(len(part), np.full(len(part), 1 / len(part)), DRAWN_AT_ONCE) for part in parts]
        if paired:
            times[1] = times[0]
        drawn = [time @ part.reshape(len(part), -1) for time, part in zip(times, parts)]
        draws.append(measure([each.reshape(-1, *shape) for each in drawn]))
    low, high = np.percentile(np.concatenate(draws), [2.5, 97.5])
    return Figure(value, float(low), float(high), min(len(first), len(second)))
