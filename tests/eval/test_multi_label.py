"""Several labels an image: heads against plain loops, choice by mean average precision; every setting of `cached`."""

import math

import pytest
import torch
from torch import Tensor

from convscope.core.errors import UserError
from convscope.eval.average_precision import average_precision
from convscope.eval.features import Features
from convscope.eval.linear_heads import (
    LinearProbeConfig,
    fit_heads,
    holdout_split,
    score_heads,
    score_multi_label_heads,
)
from convscope.eval.linear_probe import cached_probe, linear_probe

GRID = [(0.1, 0.0), (0.1, 0.05), (1.0, 1e-3)]


def labels(count: int, seed: int = 0, noise: float = 1.0) -> Features:
    """Three labels by the signs of three directions; a tenth is unknown."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(5, 3, generator=torch.Generator().manual_seed(9))
    x = torch.randn(count, 5, generator=generator)
    y = (x @ directions + noise * torch.randn(count, 3, generator=generator) > 0.5).float()
    y[torch.rand(count, 3, generator=generator) < 0.1] = -1
    return Features([str(i) for i in range(count)], x, y)


def config(**changes: object) -> LinearProbeConfig:
    values: dict[str, object] = {"epochs": 3, "min_steps": 20, "sgd_batch_size": 64, "device": "cpu", **changes}
    return LinearProbeConfig(**values)  # type: ignore[arg-type]


def plain_loop(x: Tensor, y: Tensor, lr: float, weight_decay: float, steps: int) -> tuple[Tensor, Tensor]:
    """One head by autograd and torch.optim.SGD, all samples a step; unknown labels are left out of the loss."""
    x = (x - x.mean(0)) / x.std(0, correction=0)
    weight = torch.zeros(x.shape[1], y.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(y.shape[1], dtype=x.dtype, requires_grad=True)
    groups = [{"params": [weight], "weight_decay": weight_decay}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    known = y >= 0
    for _ in range(steps):
        optimizer.zero_grad()
        logits = (x @ weight + bias)[known]
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, y[known], reduction="sum")
        (losses / len(x)).backward()
        optimizer.step()
        schedule.step()
    return weight.detach(), bias.detach()


def test_every_head_equals_a_plain_loop() -> None:
    data = labels(50)
    assert data.y is not None
    x, y = data.x.double(), data.y.double()
    heads = fit_heads(x, y, 3, GRID, config(sgd_batch_size=1000, epochs=25))
    for g, (lr, weight_decay) in enumerate(GRID):
        weight, bias = plain_loop(x, y, lr, weight_decay, steps=25)
        torch.testing.assert_close(heads.weight[..., g], weight, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(heads.bias[..., g], bias, rtol=1e-9, atol=1e-12)


def test_scores_are_mean_average_precision_and_likelihood() -> None:
    data = labels(60)
    assert data.y is not None
    heads = fit_heads(data.x, data.y, 3, [*GRID, (1e30, 1e30)], config())
    scores = score_multi_label_heads(heads, data.x, data.y)
    assert scores.pop() == (-math.inf, -math.inf)
    for g, (share, likelihood) in enumerate(scores):
        logits, known = heads.logits(data.x)[..., g], data.y >= 0
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits[known], data.y[known])
        assert share == pytest.approx(float(average_precision(logits, data.y).mean()))
        assert likelihood == pytest.approx(-loss.item(), rel=1e-5)


def test_held_out_mean_average_precision_chooses() -> None:
    train, test = labels(200, noise=2.0), labels(100, seed=1, noise=2.0)
    settings = config(lrs=(1e-4, 0.1, 3.0), weight_decays=(0.0, 0.3))
    found = linear_probe(train, test, settings, "multi-label")
    assert train.y is not None
    assert test.y is not None
    fitted, held = holdout_split(torch.zeros(200), 0)
    heads = fit_heads(train.x[fitted], train.y[fitted], 3, settings.grid, settings)
    scores = score_multi_label_heads(heads, train.x[held], train.y[held])
    assert found.holdout == max(scores)
    best = settings.grid[scores.index(max(scores))]
    assert (found.details["lr"], found.details["weight_decay"]) == best
    logits = fit_heads(train.x, train.y, 3, [best], settings).logits(test.x)[..., 0]
    expected = average_precision(logits, test.y)
    assert found.details["average_precision"] == pytest.approx(expected.tolist())
    assert found.figures["map"].value == pytest.approx(float(expected.mean()))
    assert found.details["holdout_map"] == max(scores)[0]


def test_a_class_that_no_test_image_has_is_null() -> None:
    train, test = labels(60), labels(30, seed=1)
    assert test.y is not None
    test.y[:, 1] = 0
    found = linear_probe(train, test, config(), "multi-label").details["average_precision"]
    assert found[1] is None
    assert all(isinstance(value, float) for value in (found[0], found[2]))


def test_cached_reports_every_setting_trained_on_all() -> None:
    def classes(part: Features) -> Features:
        assert part.y is not None
        return Features(part.keys, part.x, (part.y[:, 0] == 1).long())

    train, test = classes(labels(200, noise=2.0)), classes(labels(100, seed=1, noise=2.0))
    settings = config(lrs=(1e-4, 0.1, 3.0), weight_decays=(0.0, 0.3))
    found = cached_probe(train, test, settings)
    assert train.y is not None
    assert test.y is not None
    heads = fit_heads(train.x, train.y, 2, settings.grid, settings)
    expected = [
        {"lr": lr, "weight_decay": decay, "top1": share}
        for (lr, decay), (share, _) in zip(settings.grid, score_heads(heads, test.x, test.y))
    ]
    assert found.details["every_setting"] == expected
    chosen = linear_probe(train, test, settings)  # the same choice
    assert found.holdout == chosen.holdout
    assert found.details["lr"] == chosen.details["lr"]
    assert found.figures["top1"].value == pytest.approx(
        next(
            row["top1"]
            for row in expected
            if (row["lr"], row["weight_decay"]) == (chosen.details["lr"], chosen.details["weight_decay"])
        )
    )
    one = cached_probe(train, test, config(lrs=(0.1,), weight_decays=(0.0,)))
    assert one.holdout is None  # nothing to choose: nothing held out
    assert "holdout_top1" not in one.details
    few = Features(train.keys[:6], train.x[:6], torch.arange(6) % 2)
    assert cached_probe(few, test, config(lrs=(0.1,), weight_decays=(0.0,))).figures["top1"].n == 100


def test_what_cannot_be_probed_is_told() -> None:
    train = labels(40)
    assert train.y is not None
    with pytest.raises(UserError, match="targets are 1, 0 or -1, got 2"):
        linear_probe(Features(train.keys, train.x, train.y + 1), train, config(), "multi-label")
    with pytest.raises(UserError, match="present in any train image"):
        linear_probe(Features(train.keys, train.x, -train.y.abs()), train, config(), "multi-label")
    with pytest.raises(UserError, match="diverged"):
        cached_probe(train, train, config(lrs=(1e30,), weight_decays=(1e30,)), "multi-label")
    with pytest.raises(UserError, match="one class an image"):
        linear_probe(train, train, config())
