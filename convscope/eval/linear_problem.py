"""What a linear probe is asked to predict: classes, several labels, or numbers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from convscope.core.distributed import pick_device
from convscope.core.errors import UserError
from convscope.core.results import Figure, Samples
from convscope.eval.average_precision import average_precision, mean_average_precision
from convscope.eval.classes import accuracies, hits_of, labelled, rank_of_truth, require_fit
from convscope.eval.features import Features
from convscope.eval.linear_heads import (
    CHUNK,
    Heads,
    LinearProbeConfig,
    Score,
    Setting,
    fit_heads,
    score_heads,
    score_multi_label_heads,
)
from convscope.eval.regression import fit_ridge, regression_figures
from convscope.eval.targets import Targets


class Problem(ABC):
    """Train and test features on the device, their targets, and how heads are fitted to them and scored.

    Args:
        train: features.
        test: features.
        y: targets of both, as the heads take them.
        config: how heads are trained.
    """

    measure: str  # name of the first part of a score

    def __init__(self, train: Features, test: Features, y: tuple[Tensor, Tensor], config: LinearProbeConfig) -> None:
        self.config, self.device = config, pick_device(config.device)
        self.x = _floats(train.x).to(self.device)
        self.y = y[0].to(self.device)
        self.test_x, self.test_y = test.x, y[1]

    @property
    def outputs(self) -> int:
        """Classes, or numbers to predict."""
        return int(self.y.shape[1])

    @property
    def settings(self) -> list[Setting]:
        """Of the heads that are tried."""
        return self.config.grid

    @property
    def strata(self) -> Tensor:
        """Of each train image (N,), on the CPU; a held-out part is spread evenly over them."""
        return torch.zeros(len(self.x), dtype=torch.int64)

    def fit(self, index: Tensor | None, settings: Sequence[Setting]) -> Heads:
        """One head for each setting, on the train images at `index` or on all."""
        x, y = (self.x, self.y) if index is None else (self.x[index], self.y[index])
        return fit_heads(x, y, self.outputs, settings, self.config)

    def score(self, heads: Heads, index: Tensor) -> list[Score]:
        """Each head's score on the train images at `index`."""
        return self._score(heads, self.x[index], self.y[index])

    def predict(self, head: Heads) -> Tensor:
        """What one head says of the test images (N, C), on the CPU."""
        chunks = torch.split(self.test_x, CHUNK)
        return torch.cat([head.logits(_floats(x).to(self.device))[..., 0].cpu() for x in chunks])

    def test_shares(self, heads: Heads) -> list[float | None]:
        """The measure of each head on the test images; None of one that diverged."""
        scores = self._score(heads, _floats(self.test_x).to(self.device), self.test_y.to(self.device))
        return [share if math.isfinite(share) else None for share, _ in scores]

    def details(self, predicted: Tensor) -> dict[str, Any]:
        """What a result says of the test predictions besides the figures."""
        return {}

    def samples(self, predicted: Tensor) -> Samples:
        """What each test image adds to a figure; nothing where figures are no means over images."""
        return {}

    def describe(self, setting: Setting) -> dict[str, Any]:
        """A setting as a result names it, and whether it lies at an edge of those tried."""
        lr, decay = setting
        lrs, decays = zip(*self.settings)
        return {
            "lr": lr,
            "lr_at_edge": lr in (min(lrs), max(lrs)),
            "weight_decay": decay,
            "weight_decay_at_edge": decay > 0 and decay in (min(decays), max(decays)),
        }

    @abstractmethod
    def figures(self, predicted: Tensor) -> dict[str, Figure]:
        """Test figures with intervals of predictions (N, C)."""

    @abstractmethod
    def _score(self, heads: Heads, x: Tensor, y: Tensor) -> list[Score]: ...


class Classification(Problem):
    """Softmax regression on one class an image."""

    measure = "top1"

    def __init__(self, train: Features, test: Features, config: LinearProbeConfig) -> None:
        part = labelled(train, test)
        super().__init__(train, test, (part.train_y, part.test_y), config)
        self.classes = part.classes

    @property
    def outputs(self) -> int:
        """Classes."""
        return self.classes

    @property
    def strata(self) -> Tensor:
        """The classes."""
        return self.y.cpu()

    def figures(self, predicted: Tensor) -> dict[str, Figure]:
        """Accuracies."""
        return accuracies(rank_of_truth(predicted, self.test_y), self.classes, self.config.seed)

    def samples(self, predicted: Tensor) -> Samples:
        """Hits."""
        return hits_of(rank_of_truth(predicted, self.test_y), self.classes)

    def _score(self, heads: Heads, x: Tensor, y: Tensor) -> list[Score]:
        return score_heads(heads, x, y)


class MultiLabel(Problem):
    """A logistic regression for each of several labels."""

    measure = "map"

    def __init__(self, train: Features, test: Features, config: LinearProbeConfig) -> None:
        super().__init__(train, test, _float_targets(train, test), config)
        if wrong := sorted(set(torch.unique(self.y).tolist()) - {-1.0, 0.0, 1.0}):
            raise UserError(f"multi-label targets are 1, 0 or -1, got {wrong[0]:g}")
        if not (self.y == 1).any():
            raise UserError("no class is present in any train image; are these the right targets?")

    def figures(self, predicted: Tensor) -> dict[str, Figure]:
        """Mean average precision."""
        return {"map": mean_average_precision(predicted, self.test_y, seed=self.config.seed)}

    def details(self, predicted: Tensor) -> dict[str, Any]:
        """Average precision of each class; None for one that no test image has."""
        found = average_precision(predicted, self.test_y)
        return {"average_precision": [None if value != value else value for value in found.tolist()]}

    def _score(self, heads: Heads, x: Tensor, y: Tensor) -> list[Score]:
        if not (y == 1).any():
            raise UserError("no held-out train image has any label; a linear probe needs more of them")
        return score_multi_label_heads(heads, x, y)


class Regression(Problem):
    """Ridge regression."""

    measure = "r2"

    def __init__(self, train: Features, test: Features, config: LinearProbeConfig) -> None:
        super().__init__(train, test, _float_targets(train, test), config)
        if not self.y.isfinite().all() or not self.test_y.isfinite().all():
            raise UserError("a number to predict is NaN or infinite")

    @property
    def settings(self) -> list[Setting]:
        """Penalties, as weight decays."""
        return [(0.0, penalty) for penalty in self.config.penalties]

    def fit(self, index: Tensor | None, settings: Sequence[Setting]) -> Heads:
        """In closed form."""
        x, y = (self.x, self.y) if index is None else (self.x[index], self.y[index])
        return fit_ridge(x, y, [penalty for _, penalty in settings])

    def describe(self, setting: Setting) -> dict[str, Any]:
        """The penalty."""
        penalties = self.config.penalties
        return {"penalty": setting[1], "penalty_at_edge": setting[1] in (min(penalties), max(penalties))}

    def figures(self, predicted: Tensor) -> dict[str, Figure]:
        """R2 and errors."""
        return regression_figures(predicted, self.test_y, seed=self.config.seed)

    def _score(self, heads: Heads, x: Tensor, y: Tensor) -> list[Score]:
        predicted = torch.cat([heads.logits(part) for part in torch.split(x, CHUNK)]).double()  # (N, T, G)
        truth = y.double()[..., None]
        spread = (truth - truth.mean(0)).square().mean(0)  # (T, 1), 0 for one held-out image: then the error chooses
        error = (predicted - truth).square().mean(0)  # (T, G)
        r2 = torch.where(spread > 0, 1 - error / spread.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
        return list(zip(r2.mean(0).tolist(), (-error.mean(0)).tolist()))


PROBLEMS: dict[Targets, type[Classification] | type[MultiLabel] | type[Regression]] = {
    "classes": Classification,
    "multi-label": MultiLabel,
    "regression": Regression,
}


def _floats(x: Tensor) -> Tensor:
    """Features as they are computed with; they may be stored in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def _float_targets(train: Features, test: Features) -> tuple[Tensor, Tensor]:
    require_fit(train, test)
    assert train.y is not None
    assert test.y is not None
    if train.y.ndim != 2 or test.y.ndim != 2 or train.y.shape[1] != test.y.shape[1]:
        raise UserError(f"train targets {tuple(train.y.shape)} and test targets {tuple(test.y.shape)} do not fit")
    return train.y.float(), test.y.float()
