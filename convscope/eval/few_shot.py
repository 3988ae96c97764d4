"""Accuracy with a few labels of each class: the mean over random draws of them, on frozen features."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from convscope.core.distributed import pick_device
from convscope.core.errors import UserError
from convscope.core.log import progress
from convscope.core.neighbours import neighbours
from convscope.core.options import require_at_least
from convscope.core.results import Figure
from convscope.core.softmax_regression import softmax_regression
from convscope.eval.best_layer import settings_of
from convscope.eval.classes import labelled, rank_of_truth
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
from convscope.eval.knn import vote_ranks

TASK = "few-shot"
PROTOCOL = "few-shot/1"
TEMPERATURE = 0.07  # of the k-NN vote


@dataclass(frozen=True, kw_only=True)
class FewShotConfig(EvalSettings):
    """Which labels are drawn and what learns from them."""

    shots: tuple[int, ...] = (1, 2, 5, 10)
    """Images a class; in one try, the larger draw holds the smaller."""
    tries: int = 10
    """Independent draws; the interval is Student's t over them."""
    classifier: Literal["nearest-centroid", "knn", "logreg"] = "nearest-centroid"
    """nearest-centroid: the class mean of unit vectors with the largest cosine. knn: the weighted vote. logreg: softmax
    regression on unit vectors, whose strength is --c (as in arXiv:2003.11539)."""
    k: int = 5
    """Neighbours of knn, at most all that were drawn."""
    c: float = 1.0
    """Inverse strength of logreg's L2 penalty, as in scikit-learn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 2, "tries")
        require_at_least(self, 1, "k")
        if not self.shots or min(self.shots) < 1:
            raise UserError(f"--shots must name numbers of at least 1, got {self.shots}")
        if not self.c > 0:
            raise UserError(f"--c must be above 0, got {self.c:g}")


@dataclass(frozen=True, kw_only=True)
class FewShotCommand(FrozenFeatures, FewShotConfig):
    """Accuracy on the test split with a few train images of each class."""

    def __post_init__(self) -> None:
        FrozenFeatures.__post_init__(self)
        FewShotConfig.__post_init__(self)


@dataclass(frozen=True)
class FewShot:
    """What came of all tries with one number of images a class."""

    accuracies: list[float]  # of each try
    hits: Tensor  # (N,) float64: share of the tries in which a test image was a hit


def run(config: FewShotCommand) -> None:
    """Load, evaluate, print a table and write the result."""
    backbone, train, test = open_both(config)
    require_two_splits(train, test)
    both = extract_both(backbone, train, test, config, config.device)
    found = {layer: few_shot(*parts, config) for layer, parts in both.items()}
    figures = {
        layer: {f"top1 n={shots}": mean_over(row.accuracies) for shots, row in rows.items()}
        for layer, rows in found.items()
    }
    result = frozen_result(
        backbone,
        train,
        test,
        config,
        task=TASK,
        protocol=f"{PROTOCOL} {config.classifier}",
        figures=figures_by_layer(figures),
        details={
            "layers": list(found),
            "settings": settings_of(config, FewShotConfig),
            "accuracies": {layer: {str(n): row.accuracies for n, row in rows.items()} for layer, rows in found.items()},
        },
        seed=config.seed,
        samples=figures_by_layer(
            {layer: {f"top1 n={n}": row.hits.numpy() for n, row in rows.items()} for layer, rows in found.items()}
        ),
    )
    rows = [[layer, *map(percent, row.values())] for layer, row in figures.items()]
    header = ["layer", *(f"{shots} a class" for shots in next(iter(found.values())))]
    print_table(f"{TASK} {config.model}, {config.classifier}, {config.tries} tries", header, rows)
    save_at(result, config.output, config.model)


def few_shot(train: Features, test: Features, config: FewShotConfig) -> dict[int, FewShot]:
    """Test accuracies by the number of images a class.

    Raises:
        UserError: labels are missing or do not fit, features that are not finite, a class with too few images.
    """
    part = labelled(train, test)
    shots = sorted(set(config.shots))
    counts = torch.bincount(part.train_y)
    if int(counts.min()) < shots[-1]:
        rare = int(counts.argmin())
        raise UserError(
            f"class {rare} of train has {int(counts[rare])} images, fewer than --shots {shots[-1]}; leave that out"
        )
    device = pick_device(config.device)
    test_x, test_y = F.normalize(part.test_x.float(), dim=1).to(device), part.test_y.to(device)
    hits = {n: torch.empty(config.tries, len(test_y), dtype=torch.bool) for n in shots}
    with progress("few-shot, tries", config.tries) as ticker:
        for number in range(config.tries):
            order = draw(part.train_y, shots[-1], config.seed * 100_003 + number)  # (C, largest n)
            for n in shots:
                chosen = order[:, :n].flatten()
                x = F.normalize(part.train_x[chosen].float(), dim=1).to(device)
                ranks = _ranks(x, part.train_y[chosen].to(device), test_x, test_y, part.classes, config)
                hits[n][number] = (ranks == 0).cpu()
            ticker.advance(1)
    return {n: FewShot(own.double().mean(1).tolist(), own.double().mean(0)) for n, own in hits.items()}


def draw(y: Tensor, largest: int, seed: int) -> Tensor:
    """Indices of `largest` images of each class, (C, largest); the first n columns are a draw of n.

    Args:
        y: classes 0 ... C-1, (N,), each at least `largest` times.
        largest: images a class.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    members = [torch.nonzero(y == label)[:, 0] for label in range(int(y.max()) + 1)]
    return torch.stack([own[torch.randperm(len(own), generator=generator)[:largest]] for own in members])


def mean_over(values: Sequence[float]) -> Figure:
    """The mean of independent tries with Student's 95 % interval, within 0 and 1."""
    count = len(values)
    mean = sum(values) / count
    error = math.sqrt(sum((one - mean) ** 2 for one in values) / (count - 1) / count)
    half = float(stats.t.ppf(0.975, count - 1)) * error
    return Figure(mean, max(mean - half, 0.0), min(mean + half, 1.0), count)


def _ranks(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, classes: int, config: FewShotConfig) -> Tensor:
    """Rank of the true class of every test image; all features are unit vectors."""
    if config.classifier == "knn":
        k = min(config.k, len(x))
        similarity, index = neighbours(x.cpu(), test_x.cpu(), k, device=x.device)
        return vote_ranks(similarity, y.cpu()[index], test_y.cpu(), classes, [k], TEMPERATURE)[k]
    if config.classifier == "logreg":
        return rank_of_truth(next(softmax_regression(x, y, classes, [config.c])).logits(test_x), test_y)
    sums = torch.zeros(classes, x.shape[1], device=x.device).index_add_(0, y, x)
    return rank_of_truth(test_x @ F.normalize(sums, dim=1).T, test_y)
