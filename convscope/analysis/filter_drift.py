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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convscope.analysis.filter_statistics import Eigenfilters, Filters, chunks
from convscope.core.errors import UserError

Array = NDArray[Any]
BINS, PUBLISHED_BINS = 71, 70  # odd, so that 0 lies within a bin, whatever a component's sign
FINE = 8  # bins that each of the drift's is divided into, for drawing
RANGE = 4.0  # standard deviations along the first component; what lies outside counts in the outermost bins
PRIOR = 0.5  # counts that every bin starts with (Krichevsky and Trofimov 1981)
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
        found: Array = (filters - self.mean) @ self.components.T
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
    except (OSError, ValueError, KeyError, EOFError) as error:
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
    largest = np.abs(filters).max(axis=1, keepdims=True)
    return filters / np.where(largest == 0, 1.0, largest)


def coefficient_range(filters: Filters, basis: Basis) -> tuple[float, float]:
    """Smallest and largest coefficient of all components: the published bins' range, over all that is compared."""
    low, high = math.inf, -math.inf
    for chunk in chunks(filters):
        found = basis.coefficients(peak_normalised(chunk))
        low, high = min(low, float(found.min())), max(high, float(found.max()))
    return low, high


def coefficient_counts(
    filters: Filters, basis: Basis, bins: int = BINS * FINE, span: tuple[float, float] | None = None
) -> NDArray[np.int64]:
    """Histograms of the coefficients (d, bins); counts of several chunks add up.

    Args:
        filters: raw or folded; they are peak-normalised here.
        basis: that coefficients are taken in.
        bins: number of bins, of one width.
        span: first and last edge; (-reach, reach) by default, with what lies outside in the outermost bins.
    """
    low, high = span or (-basis.reach, basis.reach)
    counts = np.zeros((basis.dimension, bins), dtype=np.int64)
    for chunk in chunks(filters):
        found = basis.coefficients(peak_normalised(chunk)).clip(low, high)
        for component, values in enumerate(found.T):
            counts[component] += np.histogram(values, bins, (low, high))[0]
    return counts


def probabilities(counts: Array, *, prior: float = PRIOR) -> Array:
    """Probabilities of the bins (..., bins) from counts (..., bins), each bin `prior` counts richer."""
    richer = counts + prior
    return np.asarray(richer / richer.sum(axis=-1, keepdims=True))


def published_probabilities(counts: Array, span: tuple[float, float]) -> Array:
    """Probabilities as published: densities over `span`, with float32's epsilon for an empty bin, made to sum to 1."""
    width = (span[1] - span[0]) / counts.shape[-1]
    density = counts / counts.sum(axis=-1, keepdims=True) / width
    density = np.where(density == 0, EMPTY, density)
    return np.asarray(density / density.sum(axis=-1, keepdims=True))


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
