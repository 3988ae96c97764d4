"""Drift between filters: the published figure, and what the default repairs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from convscope.analysis.filter_drift import (
    Basis,
    Bins,
    CoefficientCounts,
    basis_arrays,
    basis_of,
    default_bins,
    drift,
    drift_matrix,
    layer_drift,
    load_basis,
    peak_normalised,
    published_bins,
)
from convscope.analysis.filter_statistics import FilterMoments
from convscope.core.errors import UserError

Array = NDArray[np.float64]
RNG = np.random.default_rng(1)
SMOOTH = RNG.standard_normal((3000, 9)) @ (np.eye(9) + 0.4)
ROUGH = RNG.standard_normal((2000, 9)) ** 3


def common_basis(*groups: Array) -> Basis:
    moments = FilterMoments(groups[0].shape[1])
    for group in groups:
        moments.update(peak_normalised(group))
    return basis_of(moments.eigenfilters())


def counted(filters: Array, basis: Basis, bins: Bins) -> Array:
    return CoefficientCounts(basis, bins).update(filters)


def notebook(groups: list[Array], sign: Array) -> float:
    """The published figure, step by step, with the components' signs as given."""
    scaled = [group / np.abs(group).max(axis=1, keepdims=True) for group in groups]
    pca = PCA(n_components=9).fit(np.concatenate(scaled))
    largest = np.take_along_axis(pca.components_, np.abs(pca.components_).argmax(axis=1)[:, None], axis=1)[:, 0]
    coefficients = [pca.transform(group) * np.sign(largest) * sign for group in scaled]
    every = np.concatenate(coefficients)
    total = 0.0
    for i, weight in enumerate(pca.explained_variance_ratio_):
        p, q = (np.histogram(c[:, i], 70, (every.min(), every.max()), density=True)[0] for c in coefficients)
        p, q = (np.where(each == 0, np.finfo(np.float32).eps, each) for each in (p, q))
        total += weight * (scipy.stats.entropy(p, q) + scipy.stats.entropy(q, p))
    return total


def flipped(basis: Basis, sign: Array) -> Basis:
    return replace(basis, components=basis.components * sign[:, None])


SIGNS = [np.ones(9), np.array([-1.0, 1, 1, -1, 1, 1, 1, 1, -1])]


@pytest.mark.parametrize("sign", SIGNS)
def test_published_figure(sign: Array) -> None:
    basis = flipped(common_basis(SMOOTH, ROUGH), sign)
    bins = published_bins([SMOOTH, ROUGH], basis)
    p, q = (bins.probabilities(counted(group, basis, bins)) for group in (SMOOTH, ROUGH))
    assert drift(p, q, basis.explained) == pytest.approx(notebook([SMOOTH, ROUGH], sign), rel=1e-6)


def test_default_does_not_depend_on_signs_but_the_published_figure_does() -> None:
    default, published = [], []
    groups = [SMOOTH + 2, ROUGH]  # lopsided, as trained filters are
    for sign in SIGNS:
        basis = flipped(common_basis(*groups), sign)
        for bins, figures in ((default_bins(basis), default), (published_bins(groups, basis), published)):
            p, q = (bins.probabilities(counted(group, basis, bins)) for group in groups)
            figures.append(drift(p, q, basis.explained))
    assert default[0] == pytest.approx(default[1], rel=1e-12)
    assert abs(published[0] / published[1] - 1) > 1e-4


def test_zero_filters_of_a_centred_basis_keep_the_symmetry() -> None:
    basis = replace(common_basis(SMOOTH), mean=np.zeros(9))
    bins = default_bins(basis)
    counts = counted(np.zeros((7, 9)), basis, bins)
    assert (counts[:, bins.count // 2] == 7).all()


def test_bins_follow_from_the_basis_and_hold_every_filter() -> None:
    basis = common_basis(SMOOTH, ROUGH)
    counter, whole = CoefficientCounts(basis, default_bins(basis)), CoefficientCounts(basis, default_bins(basis))
    extreme = np.sign(basis.components)  # what reaches farthest along each component
    parts = [counter.update(group) for group in (SMOOTH, ROUGH, extreme)]
    whole.update(np.concatenate([SMOOTH, ROUGH, extreme]))
    assert (sum(parts).sum(axis=1) == 5009).all()
    assert counter.density.sum() == 5009
    other = CoefficientCounts(basis, default_bins(basis))
    other.merge(counter)
    assert (other.fine == counter.fine).all()
    assert (other.density == counter.density).all()
    assert (counter.fine == whole.fine).all()
    assert (counter.density == whole.density).all()
    assert (counter.fine.reshape(9, 71, -1).sum(axis=2) == sum(parts)).all()


def test_density_is_of_the_first_two_coefficients() -> None:
    basis = common_basis(SMOOTH, ROUGH)
    bins = default_bins(basis)
    counter = CoefficientCounts(basis, bins)
    counter.update(ROUGH)
    coefficients = basis.coefficients(peak_normalised(ROUGH))[:, :2]
    span = (bins.low, bins.high)
    expected = np.histogram2d(*coefficients.T, bins=512, range=(span, span))[0]
    assert np.abs(counter.density - expected).sum() <= 2  # rounding at an edge


def test_large_kernels_are_resolved() -> None:
    filters = RNG.standard_normal((400, 15 * 15))
    basis = common_basis(filters)
    counts = counted(filters, basis, default_bins(basis))
    assert (counts[0] > 0).sum() > 15
    assert counts[:, [0, -1]].sum() < 0.001 * counts.sum()


def test_drift_of_two_distributions_by_hand() -> None:
    p, q = np.array([[0.5, 0.5], [0.9, 0.1]]), np.array([[0.25, 0.75], [0.9, 0.1]])
    first = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75) + 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    assert drift(p, q, np.array([0.7, 0.3])) == pytest.approx(0.7 * first)
    matrix = drift_matrix([p, q, p], np.array([0.7, 0.3]))
    np.testing.assert_allclose(matrix, 0.7 * first * np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]]))


def test_balanced_drift_lets_layers_count_alike() -> None:
    basis = common_basis(SMOOTH, ROUGH)
    bins = default_bins(basis)
    small, large = counted(SMOOTH[:300], basis, bins), counted(ROUGH, basis, bins)
    one, other = np.stack([small, large]), np.stack([small * 50, large])  # the same but for the first layer's size
    plain, balanced = (
        layer_drift(one, other, bins, basis.explained, balanced=each, paired=True).value for each in (False, True)
    )
    assert plain > 20 * balanced  # what is left are the counts that every bin starts with
    p = bins.probabilities(small / small[0].sum() * 1150 + large / large[0].sum() * 1150)
    assert layer_drift(one, one[:1], bins, basis.explained, balanced=True, paired=False).value == pytest.approx(
        drift(p, bins.probabilities(small), basis.explained)
    )


def test_intervals_draw_common_layers_together() -> None:
    basis = common_basis(SMOOTH, ROUGH)
    bins = default_bins(basis)
    layers = np.stack([counted(SMOOTH[i * 300 : (i + 1) * 300] * (1 + i), basis, bins) for i in range(8)])
    shifted = np.stack([counted(ROUGH[i * 200 : (i + 1) * 200], basis, bins) for i in range(8)])
    same = layer_drift(layers, layers, bins, basis.explained, paired=True)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    apart = layer_drift(layers, layers, bins, basis.explained, paired=False)
    assert apart.high is not None
    assert apart.high > 0
    far = layer_drift(layers, shifted, bins, basis.explained, paired=True)
    assert far.low is not None
    assert far.high is not None
    assert apart.high < far.low < far.value < far.high
    assert layer_drift(layers[:4], shifted, bins, basis.explained, paired=False).low is None


def test_basis_survives_its_file_and_has_a_hash(tmp_path: Path) -> None:
    basis = common_basis(SMOOTH)
    np.savez(tmp_path / "filters.npz", **basis_arrays({"3x3": basis}))
    (read,) = load_basis(tmp_path / "filters.npz").values()
    assert read.hash == basis.hash
    assert default_bins(read) == default_bins(basis)
    assert replace(basis, reach=basis.reach + 1e-9).hash != basis.hash
    np.savez(tmp_path / "other.npz", x=np.zeros(2))
    (tmp_path / "text.npz").write_text("no")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "filters.npz").read_bytes()[:-40])
    for name in ("other.npz", "text.npz", "cut.npz", "absent.npz"):
        with pytest.raises(UserError, match="holds no basis"):
            load_basis(tmp_path / name)


def test_alike_filters_have_a_basis_and_bins() -> None:
    filters = np.ones((5, 9))
    basis = common_basis(filters)
    for bins in (default_bins(basis), published_bins([filters], basis)):
        assert (counted(filters, basis, bins).sum(axis=1) == 5).all()
    assert basis.explained.sum() == 0
