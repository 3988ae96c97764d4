"""Data scaling: nested balanced subsets, the line's formulas written out, the files."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convscope.core.errors import UserError
from convscope.core.results import load_result
from convscope.eval.data_scaling import (
    DataScalingCommand,
    DataScalingConfig,
    balanced_order,
    data_scaling,
    fit_line,
    run,
    subset_sizes,
)
from convscope.eval.features import Features
from convscope.eval.logistic_regression import LogRegConfig, logistic_regression


def clusters(count: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 3
    x = torch.eye(3, 6)[y] + 0.8 * torch.randn(count, 6, generator=generator)
    return Features([str(i) for i in range(count)], x, y)


def test_every_beginning_is_balanced() -> None:
    y = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    order = balanced_order(y, 1)
    assert sorted(order.tolist()) == list(range(100))
    assert torch.equal(order, balanced_order(y, 1))
    assert not torch.equal(order, balanced_order(y, 2))
    assert torch.bincount(y[order[:3]]).tolist() == [1, 1, 1]
    assert torch.bincount(y[order[:6]]).tolist() == [2, 2, 2]
    for count in (20, 50, 80):
        found = torch.bincount(y[order[:count]]) - count * torch.tensor([0.6, 0.3, 0.1])
        assert found.abs().max() <= 4  # of which two are the early ones
    members = [int(i) for i in balanced_order(torch.zeros(40, dtype=torch.int64), 5)]
    assert members != sorted(members)


def test_line_and_its_interval() -> None:
    counts, values = [10, 100, 1000, 10000], [0.2, 0.45, 0.5, 0.8]
    slope, intercept = fit_line(counts, values)
    x = [1.0, 2.0, 3.0, 4.0]
    sxx = sum((one - 2.5) ** 2 for one in x)
    b = sum((one - 2.5) * (value - 0.4875) for one, value in zip(x, values)) / sxx
    a = 0.4875 - b * 2.5
    noise = sum((value - a - b * one) ** 2 for one, value in zip(x, values)) / 2
    t = 4.302653  # Student's 97.5 % with two degrees of freedom
    assert (slope.value, intercept.value) == pytest.approx((b, a))
    assert slope.high == pytest.approx(b + t * math.sqrt(noise / sxx), abs=1e-6)
    flat, _ = fit_line([10, 20, 40], [1.0, 1.0, 1.0])
    assert (flat.low, flat.value, flat.high) == pytest.approx((0, 0, 0), abs=1e-9)
    assert intercept.low == pytest.approx(a - t * math.sqrt(noise * (1 / 4 + 2.5**2 / sxx)), abs=1e-6)


def test_each_point_is_the_probe_on_that_beginning() -> None:
    train, test = clusters(120, 0), clusters(60, 1)
    assert train.y is not None
    found = data_scaling(train, test, DataScalingConfig(counts=(12, 30, 120), device="cpu"))
    assert list(found.by_count) == [12, 30, 120]
    chosen = balanced_order(train.y, 0)[:30]
    subset = Features([train.keys[i] for i in chosen.tolist()], train.x[chosen], train.y[chosen])
    assert found.by_count[30] == logistic_regression(subset, test, LogRegConfig(device="cpu")).figures["top1"]
    assert list(found.figures)[-2:] == ["slope", "intercept"]


def test_sizes() -> None:
    config = DataScalingConfig(shares=(0.5, 0.1, 1.0))
    assert subset_sizes(50, config) == [5, 25, 50]
    with pytest.raises(UserError, match="needs three subsets"):
        subset_sizes(50, DataScalingConfig(counts=(10, 20)))
    with pytest.raises(UserError, match="larger than train, which has 50"):
        subset_sizes(50, DataScalingConfig(counts=(10, 20, 51)))
    with pytest.raises(UserError, match="5 images is too small for 3 classes"):
        data_scaling(clusters(50, 0), clusters(9, 1), config)
    with pytest.raises(UserError, match="--shares"):
        DataScalingConfig(shares=(0.0,))
    with pytest.raises(UserError, match="--counts"):
        DataScalingConfig(counts=(0,))


def test_command(small_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "scaling.json"
    shared: dict[str, Any] = {"model": "timm:resnet10t@random", "data": small_shards, "device": "cpu", "workers": 0}
    run(DataScalingCommand(**shared, output=output, counts=(12, 20, 32)))
    result = load_result(output)
    assert list(result.figures) == ["top1 n=12", "top1 n=20", "top1 n=32", "slope", "intercept"]
    arrays = np.load(output.with_suffix(".npz"))
    assert arrays["counts"].tolist() == [12, 20, 32]
    assert arrays["pooled"][:, 0] == pytest.approx([result.figures[f"top1 n={n}"].value for n in (12, 20, 32)])
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert output.with_suffix(".svg").read_bytes().startswith(b"<?xml")
    assert "a decade" in capsys.readouterr().out
