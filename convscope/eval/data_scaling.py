"""How accuracy grows with the number of labels: a probe on nested subsets of train, and a line over log10(n)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from convscope.core.errors import UserError
from convscope.core.files import atomic_write
from convscope.core.log import info
from convscope.core.results import Figure
from convscope.eval.best_layer import settings_of
from convscope.eval.classes import labelled
from convscope.eval.common import (
    EvalSettings,
    FrozenFeatures,
    extract_both,
    figures_by_layer,
    frozen_result,
    open_both,
    percent,
    print_table,
    require_two_splits,
    save_at,
)
from convscope.eval.features import Features
from convscope.eval.linear_heads import LinearProbeConfig
from convscope.eval.linear_probe import linear_probe
from convscope.eval.logistic_regression import LogRegConfig, logistic_regression

TASK = "data-scaling"
PROTOCOL = "data-scaling/1"


@dataclass(frozen=True, kw_only=True)
class DataScalingConfig(EvalSettings):
    """Which subsets, and what learns from them."""

    shares: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    """Parts of train."""
    counts: tuple[int, ...] = ()
    """Numbers of images, in place of shares."""
    probe: Literal["logreg", "linear-probe"] = "logreg"
    """What is trained on every subset, with its own defaults and its own held-out tenth."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(not 0 < share <= 1 for share in self.shares):
            raise UserError(f"--shares must be above 0 and at most 1, got {self.shares}")
        if any(count < 1 for count in self.counts):
            raise UserError(f"--counts must be at least 1, got {self.counts}")


@dataclass(frozen=True, kw_only=True)
class DataScalingCommand(FrozenFeatures, DataScalingConfig):
    """A probe on nested subsets of train, and the line through its accuracies over log10(n)."""

    def __post_init__(self) -> None:
        FrozenFeatures.__post_init__(self)
        DataScalingConfig.__post_init__(self)


@dataclass(frozen=True)
class DataScaling:
    """Accuracy by number of images, and accuracy = intercept + slope log10(n)."""

    by_count: Mapping[int, Figure]
    slope: Figure  # per decade
    intercept: Figure

    @property
    def figures(self) -> dict[str, Figure]:
        """`top1 n=N` for every subset, then `slope` and `intercept`."""
        named = {f"top1 n={count}": figure for count, figure in self.by_count.items()}
        return {**named, "slope": self.slope, "intercept": self.intercept}


def run(config: DataScalingCommand) -> None:
    """Load, evaluate, print a table, and write the result, its arrays (.npz) and its plot (.png, .svg)."""
    backbone, train, test = open_both(config)
    require_two_splits(train, test)
    both = extract_both(backbone, train, test, config, config.device)
    found = {layer: data_scaling(*parts, config) for layer, parts in both.items()}
    result = frozen_result(
        backbone,
        train,
        test,
        config,
        task=TASK,
        protocol=f"{PROTOCOL} {config.probe}",
        figures=figures_by_layer({layer: one.figures for layer, one in found.items()}),
        details={
            "layers": list(found),
            "settings": settings_of(config, DataScalingConfig),
            "fit": "least squares, Student's 95 % interval",
        },
        seed=config.seed,
    )
    rows = [[layer, *map(percent, one.by_count.values()), percent(one.slope)] for layer, one in found.items()]
    counts = next(iter(found.values())).by_count
    print_table(f"{TASK} {config.model}", ["layer", *(f"n={count}" for count in counts), "a decade"], rows)
    _draw(save_at(result, config.output, config.model), found)


def data_scaling(train: Features, test: Features, config: DataScalingConfig) -> DataScaling:
    """The probe's test accuracy on every subset, with its interval over test images, and the line through them.

    Raises:
        UserError: what the probe refuses; fewer than three subsets, or one that is larger than train or too small.
    """
    part = labelled(train, test)
    counts = subset_sizes(len(part.train_x), config)
    if counts[0] < 2 * part.classes:
        raise UserError(
            f"a subset of {counts[0]} images is too small for {part.classes} classes; the least is {2 * part.classes}"
        )
    order = balanced_order(part.train_y, config.seed)
    by_count = {}
    for count in counts:
        info(f"{TASK}: {config.probe} on {count} train images")
        chosen = order[:count]
        subset = Features([train.keys[i] for i in chosen.tolist()], part.train_x[chosen], part.train_y[chosen])
        by_count[count] = _probe(subset, Features(test.keys, part.test_x, part.test_y), config)
    slope, intercept = fit_line(list(by_count), [figure.value for figure in by_count.values()])
    return DataScaling(by_count, slope, intercept)


def subset_sizes(total: int, config: DataScalingConfig) -> list[int]:
    """Numbers of images, ascending.

    Raises:
        UserError: fewer than three, or more than there are.
    """
    counts = sorted(set(config.counts or (max(1, round(share * total)) for share in config.shares)))
    if len(counts) < 3:
        raise UserError(f"a line with an interval needs three subsets of different size, got {counts}")
    if counts[-1] > total:
        raise UserError(f"a subset of {counts[-1]} images is larger than train, which has {total}")
    return counts


def balanced_order(y: Tensor, seed: int) -> Tensor:
    """A random order whose every beginning has the classes in their shares, and all of them twice as soon as it can.

    Args:
        y: classes (N,).
        seed: of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    place = torch.empty(len(y), dtype=torch.float64)
    for label in torch.unique(y):
        members = torch.nonzero(y == label)[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        offset = torch.rand((), generator=generator, dtype=torch.float64)
        own = (torch.arange(len(members)) + offset) / len(members)
        own[:2] = torch.tensor([-2.0, -1.0])[: len(members)] + 0.5 * offset
        place[members] = own
    return torch.argsort(place)


def fit_line(counts: Sequence[int], values: Sequence[float]) -> tuple[Figure, Figure]:
    """Slope and intercept of values over log10(counts) by least squares, with Student's 95 % intervals.

    Args:
        counts: at least three.
        values: as many.
    """
    x, y = np.log10(counts), np.asarray(values)
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / spread)
    intercept = float(y.mean() - slope * x.mean())
    noise = float(((y - intercept - slope * x) ** 2).sum()) / (len(x) - 2)
    quantile = float(stats.t.ppf(0.975, len(x) - 2))

    def figure(value: float, variance: float) -> Figure:
        half = quantile * variance**0.5
        return Figure(value, value - half, value + half, len(x))

    return figure(slope, noise / spread), figure(intercept, noise * (1 / len(x) + float(x.mean()) ** 2 / spread))


def _probe(train: Features, test: Features, config: DataScalingConfig) -> Figure:
    if config.probe == "linear-probe":
        return linear_probe(train, test, LinearProbeConfig(device=config.device, seed=config.seed)).figures["top1"]
    return logistic_regression(train, test, LogRegConfig(device=config.device, seed=config.seed)).figures["top1"]


def _draw(path: Path, found: Mapping[str, DataScaling]) -> None:
    """Write the arrays and the plot beside the result."""
    from convscope.plots.data_scaling import Curve, draw_data_scaling

    arrays: dict[str, Any] = {"counts": np.array(list(next(iter(found.values())).by_count))}
    for layer, one in found.items():  # a row a subset: value, low, high
        arrays[layer] = np.array([[row.value, row.low, row.high] for row in one.by_count.values()], dtype=float)
    with atomic_write(path.with_suffix(".npz")) as file:
        np.savez_compressed(file, **arrays)
    curves = {layer: Curve(one.by_count, one.intercept.value, one.slope.value) for layer, one in found.items()}
    draw_data_scaling(curves).save(path.with_suffix(".png"), path.with_suffix(".svg"))
