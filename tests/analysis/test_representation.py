"""Rank, spread and similarity of features: slow references, identities, and the traps of collapse."""

import math
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from convscope.analysis import representation as r
from convscope.analysis.representation_command import RepresentationCommand, run
from convscope.core.errors import UserError
from convscope.core.results import load_result


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_cka(x: Tensor, y: Tensor) -> float:
    """Definition: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with K = X X', L = Y Y' and centring matrices."""
    n = len(x)
    h = torch.eye(n, dtype=torch.float64) - 1 / n

    def hsic(k: Tensor, other: Tensor) -> Tensor:
        return (k @ h @ other @ h).trace()

    k, other = x.double() @ x.double().T, y.double() @ y.double().T
    return float(hsic(k, other) / (hsic(k, k) * hsic(other, other)).sqrt())


@pytest.mark.parametrize(("n", "d", "e"), [(30, 5, 7), (9, 40, 31)])
def test_cka_is_its_definition_and_blind_to_rotation_scale_and_shift(n: int, d: int, e: int) -> None:
    x, y = noise(n, d), noise(n, e, seed=1) + 3
    assert r.linear_cka(x, y) == pytest.approx(gram_cka(x, y), abs=1e-12)
    turn = torch.linalg.qr(noise(d, d, seed=2))[0]
    assert r.linear_cka(x, 5 * x @ turn + 2) == pytest.approx(1, abs=1e-12)
    assert math.isnan(r.linear_cka(x, torch.ones(n, 3)))


def unbiased_hsic(x: Tensor, y: Tensor) -> float:
    """Mean over all ordered quadruples of different images (Song et al. 2012, section 3)."""
    k, other = x @ x.T, y @ y.T
    total, count = 0.0, 0
    for i, j, q, p in permutations(range(len(x)), 4):
        total += float(k[i, j] * (other[i, j] + other[q, p] - 2 * other[i, q]))
        count += 1
    return total / count


def test_unbiased_cka_is_the_mean_over_quadruples_and_sums_over_batches() -> None:
    layers = [noise(14, 3), noise(14, 6, seed=1) + 100, noise(14, 3).square()]
    batches = [slice(0, 7), slice(7, 14)]
    cka = r.MinibatchCka()
    for rows in batches:
        cka.update([layer[rows] for layer in layers])
    found = cka.result()
    hsic = [[sum(unbiased_hsic(a[rows], b[rows]) for rows in batches) for a in layers] for b in layers]
    for i in range(3):
        for j in range(3):
            assert float(found[i, j]) == pytest.approx(hsic[i][j] / math.sqrt(hsic[i][i] * hsic[j][j]), abs=1e-9)
    with pytest.raises(UserError, match="at least 4 images, got 3"):
        cka.update([noise(3, 2)])
    with pytest.raises(UserError, match="at least one batch"):
        r.MinibatchCka().result()


def test_independent_features_are_alike_only_to_the_biased_measure() -> None:
    x, y = noise(50, 400), noise(50, 400, seed=1)
    cka = r.MinibatchCka()
    cka.update([x, y])
    assert r.linear_cka(x, y) > 0.8
    assert abs(float(cka.result()[0, 1])) < 0.1


def test_ranks_of_known_spectra() -> None:
    basis = torch.linalg.qr(noise(64, 8))[0]
    assert r.effective_rank(r.singular_values(basis)) == pytest.approx(8, rel=1e-4)
    assert r.effective_rank(torch.tensor([3.0, 0, 0], dtype=torch.float64)) == pytest.approx(1, abs=1e-4)
    shares = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert r.effective_rank(8 * shares) == pytest.approx(2**1.5, rel=1e-5)  # an entropy of 1.5 bits
    assert r.nesum(8 * shares) == pytest.approx(2)


def test_alpha_of_a_power_law_in_its_window() -> None:
    ranks = torch.arange(1, 101, dtype=torch.float64)
    law = r.alpha_req(7 * ranks**-1.3)
    assert law is not None
    assert law.window == (11, 50)
    assert law.alpha == pytest.approx(1.3, abs=1e-10)
    assert law.r2 == pytest.approx(1, abs=1e-10)
    bent = torch.where(ranks < 60, ranks**-1.0, 60.0**2 * ranks**-3)
    assert r.alpha_req(bent, (60, 100)).alpha == pytest.approx(3, abs=1e-6)  # type: ignore[union-attr]
    slope = np.polyfit(np.log(np.arange(40, 81)), np.log(bent[39:80].numpy()), 1)[0]
    assert r.alpha_req(bent, (40, 80)).alpha == pytest.approx(-slope, abs=1e-9)  # type: ignore[union-attr]
    assert r.alpha_req(ranks[:6] ** -2.0).window == (1, 6)  # type: ignore[union-attr]
    assert r.alpha_req(torch.tensor([1.0, 0.5, 0, 0])) is None


def test_uniformity_and_alignment_are_means_over_pairs() -> None:
    x, y = noise(6, 3), noise(6, 3, seed=1)
    unit = [row / row.norm() for row in x]
    pairs = [math.exp(-2 * float((a - b).square().sum())) for i, a in enumerate(unit) for b in unit[:i]]
    distances = r.squared_distances(x)
    assert float(r.uniformity(distances)) == pytest.approx(math.log(sum(pairs) / len(pairs)), abs=1e-12)
    assert float(r.uniformity(r.squared_distances(torch.ones(5, 2)))) == pytest.approx(0, abs=1e-12)
    chosen = [0, 0, 2, 3, 5, 5]  # as a resampling may have it
    weights = torch.tensor([[2, 0, 1, 1, 0, 2]])
    different = [math.exp(-2 * float((unit[i] - unit[j]).square().sum())) for i in chosen for j in chosen if i != j]
    assert float(r.uniformity(distances, weights)[0]) == pytest.approx(math.log(np.mean(different)), abs=1e-12)
    expected = [float((a / a.norm() - b / b.norm()).square().sum()) for a, b in zip(x, y)]
    assert r.alignment(x, y).tolist() == pytest.approx(expected, abs=1e-12)


def test_lidar_is_the_rank_of_the_whitened_scatter_between_images() -> None:
    views = noise(12, 1, 4) * torch.tensor([3.0, 1, 1, 0.1]) + 0.2 * noise(12, 5, 4, seed=1)
    means = views.mean(1)
    within = sum(torch.outer(view - mean, view - mean) for group, mean in zip(views, means) for view in group) / (
        12 * 4
    ) + r.LIDAR_DELTA * torch.eye(4)
    between = sum(torch.outer(mean - means.mean(0), mean - means.mean(0)) for mean in means) / 11
    values, vectors = torch.linalg.eigh(within)
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    shares = torch.linalg.eigvalsh(root @ between @ root)
    shares = shares / shares.sum() + r.LIDAR_EPSILON
    assert r.lidar(views) == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-9)


def test_collapse_is_seen_where_centred_rank_is_blind() -> None:
    """A constant with noise of a millionth: nearly full rank once centred."""
    x = 1 + 1e-6 * noise(1000, 64)
    assert r.effective_rank(r.singular_values(r.centred(x))) > 60
    assert r.effective_rank(r.singular_values(x)) < 1.1
    assert r.verdict(x)[0] == "collapsed"
    assert r.verdict(torch.zeros(10, 4))[0] == "collapsed"
    assert r.verdict(noise(200, 64))[0] == "spread out"
    assert r.verdict(noise(200, 1) @ noise(1, 64, seed=1))[0] == "narrow"
    assert r.spread(noise(5000, 16)).numpy() == pytest.approx(np.ones(16), abs=0.05)


def test_command_writes_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = ("timm:test_resnet@random", "timm:test_vit@random")
    run(RepresentationCommand(models=models, size=32, n_images=12, untrained=True, output_dir=tmp_path, device="cpu"))
    names = {"representation.json", "representation.npz", "representation.csv", "representation-cka.csv"}
    names |= {f"representation{part}{suffix}" for part in ("", "-cka") for suffix in (".png", ".svg")}
    assert {file.name for file in tmp_path.iterdir()} == names
    result = load_result(tmp_path / "representation.json")
    arrays = np.load(tmp_path / "representation.npz")
    layers = result.details["layers"]
    assert arrays["cka"].shape == arrays["cka_biased"].shape == (len(layers), len(layers))
    assert arrays["cka"].diagonal() == pytest.approx(np.ones(len(layers)))
    assert arrays["cka_biased"] == pytest.approx(arrays["cka_biased"].T)
    assert [len(arrays[f"std_{index}"]) for index in range(len(layers))] == [row["width"] for row in layers]
    assert set(arrays["models"]) == {*models, *(f"{model} (untrained)" for model in models)}
    figure = result.figures[f"{models[0]}: uniformity"]
    assert figure.low is not None
    assert figure.low <= figure.value <= figure.high <= 0  # type: ignore[operator]
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("RankMe", "R2", "pooled", "images differ", *models))


def test_smaller_batches_change_neither_features_nor_figures(tmp_path: Path) -> None:
    def figures(name: str, batch: int) -> dict[str, float]:
        folder = tmp_path / name
        model = ("timm:test_resnet@random",)
        run(RepresentationCommand(models=model, size=32, n_images=9, batch_size=batch, output_dir=folder, device="cpu"))
        return {key: figure.value for key, figure in load_result(folder / "representation.json").figures.items()}

    assert figures("one", 2) == pytest.approx(figures("other", 9), rel=1e-4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"n_images": 3}, "n-images must be at least 4"),
        ({"views": 1}, "nothing to be aligned with"),
        ({"cka_batch_size": 2}, "at least 4"),
        ({"alpha_window": (5, 6)}, "three ranks"),
    ],
)
def test_settings_that_mean_nothing_are_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        RepresentationCommand(models=("timm:test_vit@random",), **given)  # type: ignore[arg-type]
