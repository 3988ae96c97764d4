"""Ridge regression against scikit-learn's, its figures against their definitions."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

from convscope.core.errors import UserError
from convscope.eval.features import Features
from convscope.eval.linear_heads import LinearProbeConfig, holdout_split
from convscope.eval.linear_probe import cached_probe, linear_probe
from convscope.eval.regression import fit_ridge, regression_figures

PENALTIES = (1e-4, 0.03, 2.0)


def numbers(count: int, seed: int = 0, noise: float = 1.0) -> Features:
    """Two numbers that are linear in seven correlated features, but for noise."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.randn(7, 7, generator=torch.Generator().manual_seed(5))
    x = 3 + torch.randn(count, 7, generator=generator) @ turn
    y = x @ turn[:, :2] + noise * torch.randn(count, 2, generator=generator) + 10
    return Features([str(i) for i in range(count)], x, y)


def config(**changes: object) -> LinearProbeConfig:
    values: dict[str, object] = {"device": "cpu", "penalties": PENALTIES, **changes}
    return LinearProbeConfig(**values)  # type: ignore[arg-type]


def test_every_penalty_equals_ridge_alone() -> None:
    data = numbers(60)
    assert data.y is not None
    x, y = data.x.double(), data.y.double()
    heads = fit_ridge(x, y, PENALTIES)
    z = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    for g, penalty in enumerate(PENALTIES):
        expected = Ridge(alpha=60 * penalty).fit(z, y.numpy()).predict(z)
        np.testing.assert_allclose(heads.logits(x)[..., g].numpy(), expected, rtol=1e-9)


def test_more_features_than_images() -> None:
    x = torch.randn(10, 30, generator=torch.Generator().manual_seed(0)).double()
    y = x[:, :1]
    z = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    expected = Ridge(alpha=10 * 1e-3).fit(z, y[:, 0].numpy()).predict(z)
    np.testing.assert_allclose(fit_ridge(x, y, [1e-3]).logits(x)[:, 0, 0].numpy(), expected, rtol=1e-8)


def test_figures_are_those_of_scikit_learn() -> None:
    data = numbers(50)
    assert data.y is not None
    predicted = data.y + torch.randn(50, 2, generator=torch.Generator().manual_seed(1))
    found = regression_figures(predicted, data.y, seed=0)
    truth, guess = data.y.double().numpy(), predicted.double().numpy()
    assert found["r2"].value == pytest.approx(r2_score(truth, guess))
    assert found["mse"].value == pytest.approx(mean_squared_error(truth, guess))
    assert found["mae"].value == pytest.approx(mean_absolute_error(truth, guess))
    rng = np.random.default_rng(0)
    draws = []
    for rows in (rng.integers(0, 50, 50) for _ in range(2000)):
        spread = ((truth[rows] - truth[rows].mean(0)) ** 2).sum(0)
        draws.append((1 - ((truth[rows] - guess[rows]) ** 2).sum(0) / spread).mean())
    assert (found["r2"].low, found["r2"].high) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])))
    with pytest.raises(UserError, match="target 1 is the same in every test image"):
        regression_figures(predicted, torch.stack([data.y[:, 0], torch.ones(50)], 1), seed=0)


def test_the_held_out_part_chooses_the_penalty() -> None:
    train, test = numbers(80, noise=6.0), numbers(200, seed=1, noise=6.0)
    found = linear_probe(train, test, config(), "regression")
    assert train.y is not None
    assert test.y is not None
    fitted, held = holdout_split(torch.zeros(80), 0)
    heads = fit_ridge(train.x[fitted], train.y[fitted], PENALTIES)
    guesses = heads.logits(train.x[held])
    scores = [r2_score(train.y[held].numpy(), guesses[..., g].numpy()) for g in range(3)]
    assert found.details["penalty"] == PENALTIES[int(np.argmax(scores))]
    assert found.details["holdout_r2"] == pytest.approx(max(scores), rel=1e-5)
    refitted = fit_ridge(train.x, train.y, [found.details["penalty"]]).logits(test.x)[..., 0]
    assert found.figures["r2"].value == pytest.approx(r2_score(test.y.numpy(), refitted.numpy()), rel=1e-5)
    every = cached_probe(train, test, config(), "regression").details["every_setting"]
    assert [row["penalty"] for row in every] == list(PENALTIES)
    assert every[PENALTIES.index(found.details["penalty"])]["r2"] == pytest.approx(found.figures["r2"].value, rel=1e-5)


def test_a_single_held_out_image_chooses_by_its_error() -> None:
    found = linear_probe(numbers(12), numbers(30, seed=1), config(), "regression")
    assert found.details["holdout_count"] == 1
    assert found.details["holdout_r2"] == 0.0
    assert found.details["penalty"] == PENALTIES[0]  # the noise is small


def test_what_cannot_be_predicted_is_told() -> None:
    train = numbers(40)
    assert train.y is not None
    with pytest.raises(UserError, match="NaN or infinite"):
        linear_probe(train, Features(train.keys, train.x, train.y / 0), config(), "regression")
    with pytest.raises(UserError, match="do not fit"):
        linear_probe(train, Features(train.keys, train.x, train.y[:, :1]), config(), "regression")
    with pytest.raises(UserError, match="hold NaN"):
        linear_probe(train, Features(train.keys, train.x / 0, train.y), config(), "regression")
    with pytest.raises(UserError, match="penalties"):
        config(penalties=(0.0,))
