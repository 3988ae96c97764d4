"""Filter statistics against slow references, on tensors that break careless code."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from convscope.analysis.filter_statistics import (
    FilterMoments,
    entropy_threshold,
    is_random,
    orthogonality,
    sparsity,
    variance_entropy,
    verdict,
)
from convscope.core.errors import UserError

Array = NDArray[np.float64]
RNG = np.random.default_rng(0)
PATTERN = RNG.standard_normal((5, 5))
WEIGHTS = {
    "random 3x3": RNG.standard_normal((8, 6, 3, 3)).astype(np.float32),
    "pointwise": RNG.standard_normal((8, 6, 1, 1)),
    "random 7x7": RNG.standard_normal((4, 3, 7, 7)),
    "one row of 7": RNG.standard_normal((6, 4, 1, 7)),
    "depthwise": RNG.standard_normal((12, 1, 5, 5)),
    "one channel": RNG.standard_normal((1, 9, 3, 3)),
    "one filter": RNG.standard_normal((1, 1, 3, 3)),
    "rank 1": RNG.standard_normal((6, 4, 1, 1)) * PATTERN,
    "large mean": RNG.standard_normal((8, 8, 3, 3)) + 1e5,
    "tiny": RNG.standard_normal((8, 8, 3, 3)) * 1e-20,
    "all zero": np.zeros((4, 3, 3, 3)),
    "repeated": np.tile(np.float32(PATTERN / 3), (6, 5, 1, 1)),
    "half zero": RNG.standard_normal((8, 6, 3, 3)) * (np.arange(8) % 2)[:, None, None, None],
}


def slow_entropy(weight: Array) -> float:
    """By singular values, in the paper's words."""
    filters = weight.astype(np.float64).reshape(-1, weight.shape[2] * weight.shape[3])
    singular = np.linalg.svd(filters - filters.mean(axis=0), compute_uv=False)
    if singular.max() <= 1e-9 * np.abs(filters).max(initial=0):
        return 0.0
    shares = singular**2 / (singular**2).sum()
    return -sum(p * math.log10(p) for p in shares if p > 0)


@pytest.mark.parametrize("name", WEIGHTS)
def test_entropy_is_that_of_the_singular_values(name: str) -> None:
    weight = WEIGHTS[name]
    assert variance_entropy(weight) == pytest.approx(slow_entropy(weight), abs=1e-6)
    assert variance_entropy(torch.from_numpy(weight)) == variance_entropy(weight)


def test_entropy_of_known_shares() -> None:
    axes = np.zeros((8, 4))
    axes[np.arange(8), np.arange(8) // 2] = [1, -1] * 4  # the same variance along four axes
    assert variance_entropy(axes) == pytest.approx(math.log10(4), abs=1e-12)
    axes[2:] = 0
    assert variance_entropy(axes) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", WEIGHTS)
def test_sparsity_and_orthogonality_are_those_of_the_formulas(name: str) -> None:
    weight = WEIGHTS[name].astype(np.float64)
    filters = weight.reshape(-1, weight.shape[2] * weight.shape[3])
    largest = max(abs(value) for value in weight.ravel())
    small = sum(max(abs(value) for value in each) < largest / 100 for each in filters)
    assert sparsity(weight) == (1.0 if largest == 0 else small / len(filters))
    rows = [row / (np.linalg.norm(row) or 1.0) for row in weight.reshape(len(weight), -1)]
    if len(rows) == 1:
        assert orthogonality(weight) is None
        return
    total = sum(abs(a @ b - (i == j)) for i, a in enumerate(rows) for j, b in enumerate(rows))
    assert orthogonality(weight) == pytest.approx(1 - total / (len(rows) * (len(rows) - 1)), abs=1e-9)


def test_a_filter_at_the_limit_is_in_use() -> None:
    weight = np.array([[7.0], [700.0], [6.999], [0.0]])
    assert sparsity(weight) == 0.5
    assert [sparsity(weight, ratio) for ratio in (2, 100, 1000)] == [0.75, 0.5, 0.25]


def test_orthogonal_and_parallel_channels() -> None:
    assert orthogonality(np.eye(9).reshape(9, 1, 3, 3)) == 1.0
    parallel = np.arange(1, 5)[:, None] * np.ones(18)
    assert orthogonality(parallel.reshape(4, 2, 3, 3)) == pytest.approx(0, abs=1e-12)
    many = RNG.standard_normal((1500, 1, 3, 3))  # more rows than are multiplied at once
    rows = many.reshape(1500, 9) / np.linalg.norm(many.reshape(1500, 9), axis=1, keepdims=True)
    expected = 1 - np.abs(rows @ rows.T - np.eye(1500)).sum() / (1500 * 1499)
    assert orthogonality(many) == pytest.approx(expected, abs=1e-9)


def test_parts_merge_to_the_whole() -> None:
    filters = RNG.standard_normal((40_000, 9)) * np.arange(1, 10) + 50
    whole, other, parts = FilterMoments(9), FilterMoments(9), FilterMoments(9)
    whole.update(filters)
    for cut in np.split(filters[:25_001], [1, 2, 20_000]):
        parts.update(cut)
    other.update(filters[25_001:])
    other.merge(FilterMoments(9))
    parts.merge(other)
    assert parts.count == 40_000
    np.testing.assert_allclose(parts.mean, filters.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(parts.covariance, np.cov(filters.T, bias=True), rtol=1e-10, atol=1e-10)
    assert parts.variance_entropy() == pytest.approx(whole.variance_entropy(), abs=1e-12)


def test_eigenfilters_are_principal_components() -> None:
    filters = RNG.standard_normal((500, 9)) @ np.diag(np.arange(9, 0, -1.0)) + 2
    moments = FilterMoments(9)
    moments.update(filters)
    found, expected = moments.eigenfilters(), PCA().fit(filters)
    np.testing.assert_allclose(np.abs((found.components * expected.components_).sum(axis=1)), 1, rtol=1e-9)
    np.testing.assert_allclose(found.explained, expected.explained_variance_ratio_, rtol=1e-9)
    np.testing.assert_allclose(found.mean, expected.mean_, rtol=1e-12)
    assert (found.components.max(axis=1) == np.abs(found.components).max(axis=1)).all()


def test_halves_and_bfloat16_are_taken_and_other_sizes_refused() -> None:
    weight = torch.randn(4, 4, 3, 3)
    assert variance_entropy(weight.bfloat16()) == variance_entropy(weight.bfloat16().float())
    with pytest.raises(UserError, match="25 weights each, the earlier ones 9"):
        FilterMoments(9).update(np.ones((2, 25)))
    with pytest.raises(UserError, match="25 weights each"):
        FilterMoments(9).merge(FilterMoments(25))


def test_threshold_as_published() -> None:
    assert entropy_threshold(100) == pytest.approx(1.2618047 / (1 + math.exp(-0.88767525 * 4.3394919)) - 0.31050834)
    assert entropy_threshold(2) is None
    assert entropy_threshold(10**9) == pytest.approx(1.2618047 - 0.31050834, abs=1e-6)
    assert entropy_threshold(100, 1) is None


@pytest.mark.parametrize(("side", "times"), [(2, 1.5), (3, 1.5), (5, 1.5), (7, 2)])
def test_threshold_of_other_sizes_is_what_random_filters_reach(side: int, times: float) -> None:
    dimension = side**2
    count = math.ceil(times * dimension)
    drawn = [variance_entropy(RNG.standard_normal((count, dimension))) for _ in range(100)]
    expected = math.log10(dimension) - (dimension + 2) * (dimension - 1) / (2 * dimension * (count - 1) * math.log(10))
    error = np.std(drawn) / math.sqrt(len(drawn))
    assert np.mean(drawn) == pytest.approx(expected, abs=0.005 + 3 * error)
    assert error < 0.008
    if side != 3:
        assert entropy_threshold(count, dimension) == pytest.approx(expected, abs=1e-12)


def judged(filters: Array, **limits: float) -> str:
    moments = FilterMoments(filters.shape[1])
    moments.update(filters)
    return verdict(moments, sparsity(filters), **limits)


def test_verdicts() -> None:
    random = RNG.standard_normal((4000, 9))
    patterns = RNG.standard_normal((4000, 2)) @ RNG.standard_normal((2, 9))
    unused = patterns * np.where(np.arange(4000) % 5 == 0, 1e-4, 1)[:, None]
    assert judged(random) == "random"
    assert judged(RNG.standard_normal((4000, 49))) == "random"
    assert judged(patterns) == "sound"
    assert judged(unused) == "redundant"
    assert judged(unused, high_sparsity=0.3) == "sound"
    assert judged(np.zeros((50, 9))) == "zero"
    assert judged(np.full((50, 9), 0.1)) == "alike"
    assert judged(random[:, :1]) == judged(random[:1]) == judged(RNG.standard_normal((60, 49))) == "unknown"
    mixed = random * np.array([1, 1, 1, 1, 1, 1, 0.6, 0.6, 0.6])
    assert judged(mixed) == "sound"
    assert judged(mixed, margin=0.1) == "random"
    assert is_random(0.9, 4000) is False
