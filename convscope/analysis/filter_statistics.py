"""Statistics of convolution filters: how many are used, how much they differ, how they lie to one another.

After CNN Filter DB (Gavrikov and Keuper 2022, sections 4 and 6), for kernels of any size. A filter is one k x k slice
of a layer's weight, so a layer has c_out * c_in / groups of them, each a point in d = k*k dimensions. Everything here
takes NumPy arrays or torch tensors, a chunk at a time where the number of filters has no bound.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from convscope.core.errors import UserError

Array = NDArray[Any]
Filters = Array | Tensor  # (n, d); (n, h, w); or a layer's weight (c_out, c_in / groups, h, w)
CHUNK = 16384  # filters at a time: 3x3 ones in float64 then fit into a core's cache
SPARSE = 100.0  # a filter below this fraction of its layer's largest weight does nothing
SAME = 1e-24  # variance below this share of the mean square is rounding: the filters are all alike
LOGISTIC = (1.2618047, 2.30436435, 0.88767525, -0.31050834)  # L, x0, k, b of the published threshold for 3x3
MARGIN = 0.02  # below the entropy of random filters
LOW_ENTROPY, HIGH_SPARSITY = 0.5, 0.14  # together: the layer has more filters than it needs
MAXIMUM_3X3 = math.log10(9)


class FilterMoments:
    """Count, mean and scatter of filters that come in chunks, in float64 and constant memory.

    Chunks and parts merge by the pairwise update of Chan, Golub and LeVeque (1983), so the result does not depend on
    how the filters were cut beyond rounding.

    Args:
        dimension: d, the number of weights of a filter.
    """

    def __init__(self, dimension: int) -> None:
        self.count = 0
        self.mean: Array = np.zeros(dimension)  # (d,)
        self.scatter: Array = np.zeros((dimension, dimension))  # (d, d): sum of (x - mean)(x - mean)'

    @property
    def dimension(self) -> int:
        """Number of weights of a filter."""
        return len(self.mean)

    def update(self, filters: Filters) -> None:
        """Add filters.

        Raises:
            UserError: filters of another size.
        """
        for chunk in chunks(filters):
            if chunk.shape[1] != self.dimension:
                raise UserError(f"filters have {chunk.shape[1]} weights each, the earlier ones {self.dimension}")
            mean = np.ones(len(chunk)) @ chunk / len(chunk)
            chunk -= mean
            self._add(len(chunk), mean, chunk.T @ chunk)

    def merge(self, other: "FilterMoments") -> None:
        """Add what another accumulator has seen.

        Raises:
            UserError: it is of filters of another size.
        """
        if other.dimension != self.dimension:
            raise UserError(f"filters have {other.dimension} weights each, the earlier ones {self.dimension}")
        self._add(other.count, other.mean, other.scatter)

    @property
    def covariance(self) -> Array:
        """Covariance (d, d) with the divisor n; zero where there is no filter."""
        return self.scatter / max(self.count, 1)

    @property
    def alike(self) -> bool:
        """Whether the filters differ by no more than rounding."""
        return bool(np.trace(self.scatter) <= SAME * self.count * (self.mean @ self.mean))

    def eigenfilters(self) -> "Eigenfilters":
        """Principal components of the filters."""
        variances, vectors = np.linalg.eigh(self.covariance)
        variances = np.where(self.alike, 0.0, variances[::-1].clip(min=0))
        return Eigenfilters(mean=self.mean.copy(), components=_signed(vectors.T[::-1]), variances=variances)

    def variance_entropy(self) -> float:
        """Entropy, base 10, of the shares of variance along the principal components (equation 3 of the paper).

        From 0, where filters differ along one direction or not at all, to log10 d, where all directions are alike.
        """
        return 0.0 if self.alike else entropy_of(np.linalg.eigvalsh(self.scatter))

    def _add(self, count: int, mean: Array, scatter: Array) -> None:
        total = self.count + count
        if total == 0:
            return
        step = mean - self.mean
        self.scatter = self.scatter + scatter + np.outer(step, step) * (self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total


@dataclass(frozen=True)
class Eigenfilters:
    """Principal components of filters, by falling variance; the largest weight of each is positive."""

    mean: Array  # (d,)
    components: Array  # (d, d), a component a row
    variances: Array  # (d,)

    @property
    def explained(self) -> Array:
        """Share of the variance along each component (d,); zero where there is none."""
        total = self.variances.sum()
        return self.variances / total if total > 0 else np.zeros_like(self.variances)


Kind = Literal["sound", "unknown", "zero", "alike", "random", "redundant"]
MEANINGS: dict[Kind, str] = {
    "sound": "filters differ more than noise does and are in use",
    "unknown": "pointwise, or too few filters to tell",
    "zero": "all weights are zero: it passes nothing on, and fine-tuning has to build it anew",
    "alike": "all filters are one kernel: it responds to one pattern only; fine-tune it from a fresh initialisation",
    "random": "filters vary as at random initialisation: it has learned little that could be transferred, and "
    "fine-tuning has to train it; more pretraining or a smaller network may help",
    "redundant": "few patterns and many filters near zero: more channels than it needs; it transfers, and can be "
    "pruned before or after fine-tuning",
}
DEGENERATE: tuple[Kind, ...] = ("zero", "alike", "random", "redundant")


def chunks(filters: Filters, rows: int = CHUNK) -> Iterator[Array]:
    """Filters as float64 copies (at most `rows`, d)."""
    flat = as_rows(filters)
    for start in range(0, len(flat), rows):
        yield flat[start : start + rows].astype(np.float64)


def as_rows(filters: Filters) -> Array:
    """Filters as (n, d), a view where possible."""
    if isinstance(filters, Tensor):
        values = filters.detach().cpu()
        filters = (values.float() if values.itemsize == 2 else values).numpy()
    size = math.prod(filters.shape[-2:]) if filters.ndim > 2 else filters.shape[-1]
    return filters.reshape(-1, size)


def variance_entropy(filters: Filters) -> float:
    """Variance entropy of all filters at once; see `FilterMoments.variance_entropy`."""
    moments = FilterMoments(as_rows(filters).shape[1])
    moments.update(filters)
    return moments.variance_entropy()


def entropy_of(variances: Array) -> float:
    """Entropy, base 10, of non-negative values (d,) divided by their sum; 0 log 0 = 0, and 0 where the sum is 0."""
    positive = variances[variances > 0]
    shares = positive / positive.sum()
    return float(-(shares * np.log10(shares)).sum()) + 0.0  # no -0.0


def entropy_threshold(count: int, dimension: int = 9) -> float | None:
    """Variance entropy that `count` random filters reach; None where nothing can be told from so few.

    For 3x3 kernels the published logistic fit (section 6); else the expectation for independent normal weights,
    log10 d - (d + 2)(d - 1) / (2 d (n - 1) ln 10), an expansion in d / n that holds to 0.005 from n = 1.5 d on.
    """
    if dimension == 9:
        largest, middle, slope, offset = LOGISTIC
        return largest / (1 + math.exp(-slope * (math.log2(count) - middle))) + offset if count >= 3 else None
    if dimension < 2 or count < 1.5 * dimension:
        return None
    lost = (dimension + 2) * (dimension - 1) / (2 * dimension * (count - 1) * math.log(10))
    return math.log10(dimension) - lost


def peaks(filters: Filters) -> Array:
    """Largest absolute weight of each filter (n,), float64."""
    flat = as_rows(filters)
    found = np.empty(len(flat))
    for start in range(0, len(flat), CHUNK):
        part = np.abs(flat[start : start + CHUNK])
        found[start : start + CHUNK] = np.ascontiguousarray(part.T).max(axis=0)  # 13 times as fast as along rows of 9
    return found


def sparsity(filters: Filters, ratio: float = SPARSE) -> float:
    """Share of a layer's filters whose largest weight is below 1 / `ratio` of the layer's largest (equation 2).

    1 for a layer without any weight but zero, of which the strict formula would say 0.
    """
    return sparsity_of(peaks(filters), ratio)


def sparsity_of(peaks: Array, ratio: float = SPARSE) -> float:
    """The same from the filters' largest weights (n,)."""
    largest = peaks.max(initial=0.0)
    return float(np.mean(peaks < largest / ratio)) if largest > 0 else 1.0


def orthogonality(weight: Filters) -> float | None:
    """Orthogonality of a layer's output channels (equation 5): 1 - sum |W W' - I| / (n (n - 1)).

    Rows of W (n, c_in / groups * k * k) have length 1; one of zeros stays. 1 where all are orthogonal, 0 where all
    are parallel; None for a single channel.
    """
    rows = as_rows(weight).reshape(weight.shape[0], -1).astype(np.float64)
    count = len(rows)
    if count < 2:
        return None
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.divide(rows, length, out=rows, where=length > 0)
    total = float(np.sum(length == 0))  # |0 - 1| on the diagonal, where the others have |1 - 1|
    for start in range(0, count, 1024):
        products = np.abs(rows[start : start + 1024] @ rows.T)
        diagonal = np.arange(len(products))
        products[diagonal, start + diagonal] = 0.0
        total += float(products.sum())
    return 1 - total / (count * (count - 1))


def verdict(
    moments: FilterMoments, sparsity: float, *, margin: float = MARGIN, high_sparsity: float = HIGH_SPARSITY
) -> Kind:
    """Whether a layer is degenerate, and how (section 6.3); what each kind means is in `MEANINGS`.

    The published limits are for 3x3 kernels; for others the entropies are taken as shares of their maximum log10 d.
    A pointwise layer has no pattern to judge, and a layer of one filter none to compare.
    """
    count, dimension = moments.count, moments.dimension
    if not np.any(moments.mean) and not np.any(moments.scatter):
        return "zero"
    if dimension == 1 or count < 2:
        return "unknown"
    if moments.alike:
        return "alike"
    entropy = moments.variance_entropy()
    if entropy < LOW_ENTROPY * _relative(dimension) and sparsity >= high_sparsity:
        return "redundant"
    random = is_random(entropy, count, dimension, margin)
    return "unknown" if random is None else "random" if random else "sound"


def is_random(entropy: float, count: int, dimension: int = 9, margin: float = MARGIN) -> bool | None:
    """Whether filters vary as random ones do, within `margin` of 3x3 kernels' entropy; None for too few to tell."""
    threshold = entropy_threshold(count, dimension)
    return None if threshold is None else entropy >= threshold - margin * _relative(dimension)


def _relative(dimension: int) -> float:
    """The largest entropy of filters of this size as a multiple of 3x3 ones'."""
    return math.log10(dimension) / MAXIMUM_3X3


def _signed(components: Array) -> Array:
    """An eigenvector's sign is arbitrary: the largest weight of each becomes positive."""
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
    return components * np.where(largest < 0, -1.0, 1.0)
