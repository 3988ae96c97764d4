"""Linear SVMs on frozen features, one a class: VISSL's VOC07 protocol and that of "CNN features off-the-shelf".

VISSL (Goyal et al. 2019, arXiv:1905.01235): unit features, squared hinge loss in the dual, positives weigh twice, C by
cross-validated average precision for each class. Off-the-shelf (Razavian et al. 2014, arXiv:1403.6382): features are
whitened between two normalisations.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convscope.core.errors import UserError
from convscope.core.log import progress
from convscope.core.options import require_at_least
from convscope.core.results import BOOTSTRAP_RESAMPLES, Figure, Samples
from convscope.eval.best_layer import Probe, probe_layers, settings_of, show_layers
from convscope.eval.classes import accuracies, hits_of, labelled, rank_of_truth, require_fit
from convscope.eval.common import EvalSettings, FrozenFeatures, require_labels
from convscope.eval.features import Features
from convscope.eval.svm_fit import FitSettings, fit_classes

TASK = "svm"
PROTOCOL = "linear-svm/1"
EPSILON = 1e-5  # added to a vector's length, as VISSL does
PRESETS: dict[str, dict[str, Any]] = {
    "vissl": {"costs": [0.01, 0.1, 1, 2, 5, 10, 15, 20, 50, 100, 1000], "folds": 3, "positive_weight": 2, "whiten": 0},
    "off-the-shelf": {"positive_weight": 1, "whiten": 500},
}


@dataclass(frozen=True, kw_only=True)
class SvmConfig(EvalSettings):
    """How the classifiers are trained; the defaults are VISSL's."""

    costs: tuple[float, ...] = (0.01, 0.1, 1, 2, 5, 10, 15, 20, 50, 100, 1000)
    """Values of C; each class takes the one with the best average precision in cross-validation."""
    folds: int = 3
    """Of the cross-validation."""
    positive_weight: float = 2.0
    """Weight of a class's own images; the others weigh 1."""
    max_iter: int = 2000
    """Most passes of the dual solver."""
    whiten: int = 0
    """Principal components that normalised features are whitened to and normalised again; 0 leaves them as they are."""

    processes: int | None = None
    """That fit classes; default: one a core, or none beside this one where there is little to fit. The result does not
    depend on it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 2, "folds")
        require_at_least(self, 1, "processes", "max_iter")
        require_at_least(self, 0, "whiten")
        if not self.costs or not min(self.costs) > 0:
            raise UserError(f"--costs must name numbers above 0, got {self.costs}")
        if not self.positive_weight > 0:
            raise UserError(f"--positive-weight must be above 0, got {self.positive_weight:g}")


@dataclass(frozen=True, kw_only=True)
class SvmCommand(FrozenFeatures, SvmConfig):
    """Linear SVMs on frozen features, one a class against the rest. --preset vissl or off-the-shelf."""

    def __post_init__(self) -> None:
        FrozenFeatures.__post_init__(self)
        SvmConfig.__post_init__(self)
        require_labels(self)


def preset(_: type, name: str, arguments: list[str]) -> Mapping[str, Any]:
    """Flags of a published protocol."""
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}; presets of svm: {', '.join(PRESETS)}")
    return PRESETS[name]


def run(config: SvmCommand) -> None:
    """Load, evaluate, print a table and write the result."""
    result = probe_layers(
        config,
        lambda train, test: svm(train, test, config),
        settings=config,
        task=TASK,
        protocol=PROTOCOL,
        details={"settings": settings_of(config, SvmConfig)},
    )
    show_layers(result, config, ["cross-validated mAP"], lambda row: [f"{row['cross_validated_map']:.2%}"])


def svm(train: Features, test: Features, config: SvmConfig) -> Probe:
    """Mean average precision over classes, and accuracy where every image has one class.

    Rows with the same key are views of one image, such as its crops: cross-validation keeps them together, and the
    scores of a test image are the mean over its views.

    Args:
        train: `y` has classes (N,), or presence (N, C): 1 present, 0 absent, -1 ignored in the test set. As in VISSL, a
            train image that is ignored counts as absent.
        test: the same for the images that figures are of.
        config: how to train.

    Raises:
        UserError: targets are missing or do not fit, features that are not finite, fewer images of a class than folds.
    """
    train_targets, test_targets, y = _targets(train, test)
    first, views = _views(test.keys)
    train_x, test_x = prepare(train.x, test.x, config.whiten)
    images, present = _views(train.keys)[1], train_targets == 1
    _require_folds(images, present, config.folds)
    settings = FitSettings(**{field.name: getattr(config, field.name) for field in dataclasses.fields(FitSettings)})
    fits = fit_classes(train_x, present.numpy(), images.numpy(), test_x, settings, config.processes)
    found = []
    with progress("SVM, classes", present.shape[1]) as ticker:
        for one in fits:
            found.append(one)
            ticker.advance(1)
    scores = torch.zeros(len(first), len(found), dtype=torch.float64)
    scores.index_add_(0, views, torch.from_numpy(np.stack([one.scores for one in found], 1)))
    scores /= torch.bincount(views)[:, None]
    figures = {"map": mean_average_precision(scores, test_targets[first], config.seed)}
    samples: Samples = {}
    if y is not None:
        ranks = rank_of_truth(scores, y[first])
        figures |= accuracies(ranks, len(found), config.seed)
        samples = hits_of(ranks, len(found))
    cross_validated = float(np.mean([one.average_precision for one in found]))
    details = {
        "test": {name: dataclasses.asdict(figure) for name, figure in figures.items()},
        "cross_validated_map": cross_validated,
        "costs": [one.cost for one in found],
        "ended_by_max_iter": sum(one.unfinished for one in found),
        "dimensions": train_x.shape[1],
        "classes": len(found),
    }
    return Probe(figures, cross_validated, details, samples)


def prepare(train_x: Tensor, test_x: Tensor, whiten: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Divide by length + 1e-5; with `whiten`, project on so many principal components of train, whiten, and repeat.

    Args:
        train_x: (N, D); statistics are of these alone.
        test_x: (Q, D).
        whiten: components to keep, at most as many as vary.
    """
    train_x, test_x = _normalise(train_x.double()), _normalise(test_x.double())
    if whiten:
        mean = train_x.mean(0)
        variances, axes = torch.linalg.eigh((train_x - mean).T @ (train_x - mean) / len(train_x))
        varying = int((variances > 1e-10 * variances.max()).sum())
        kept = min(whiten, varying)
        if not kept:
            raise UserError("all train features are equal; there is nothing to whiten")
        project = axes[:, -kept:] / variances[-kept:].sqrt()
        train_x, test_x = _normalise((train_x - mean) @ project), _normalise((test_x - mean) @ project)
    return train_x.numpy(), test_x.numpy()


def mean_average_precision(scores: Tensor, targets: Tensor, seed: int) -> Figure:
    """Mean over classes of the average precision, with an interval over images.

    Args:
        scores: (N, C).
        targets: 1 present, 0 absent, -1 ignored, (N, C); a class that no image has is left out of the mean.
        seed: of the bootstrap; a class that a resample lacks is left out of that resample's mean.
    """
    rng = np.random.default_rng(seed)
    count = len(scores)
    draws = [np.bincount(rng.integers(0, count, count), minlength=count) for _ in range(BOOTSTRAP_RESAMPLES)]
    once = np.ones(count)
    total, values = np.zeros((len(draws), 2)), []
    for number in range(scores.shape[1]):
        kept = torch.nonzero(targets[:, number] >= 0)[:, 0]
        order = kept[torch.argsort(scores[kept, number], descending=True, stable=True)].numpy()
        truth = targets[order, number].numpy() == 1
        if not truth.any():
            continue
        values.append(average_precision(truth, once[order]))
        for row, draw in enumerate(draws):
            if draw[order][truth].any():
                total[row] += average_precision(truth, draw[order]), 1
    low, high = np.percentile(total[:, 0] / np.maximum(total[:, 1], 1), [2.5, 97.5])
    return Figure(float(np.mean(values)), float(low), float(high), count)


def average_precision(truth: NDArray[np.bool_], weights: NDArray[Any]) -> float:
    """Area under the precision-recall curve made monotone, over all points, as PASCAL VOC 2010 defines it.

    Args:
        truth: (N,), best score first, at least one true with a weight.
        weights: how often each image counts, (N,).
    """
    hits = weights * truth
    precision = np.cumsum(hits) / np.maximum(np.cumsum(weights), 1)
    return float((np.maximum.accumulate(precision[::-1])[::-1] * hits).sum() / hits.sum())


def _targets(train: Features, test: Features) -> tuple[Tensor, Tensor, Tensor | None]:
    """Presence (N, C) in train and test, and the test classes (N,) where images have one each."""
    if train.y is None or test.y is None or train.y.ndim == 1:
        part = labelled(train, test)
        of_train = torch.nn.functional.one_hot(part.train_y, part.classes)
        return of_train, torch.nn.functional.one_hot(part.test_y, part.classes), part.test_y
    require_fit(train, test)
    if train.y.shape[1:] != test.y.shape[1:]:
        raise UserError(f"train targets {tuple(train.y.shape)} and test targets {tuple(test.y.shape)} do not fit")
    for one, y in ((train, train.y), (test, test.y)):
        if not bool(torch.isin(y, y.new_tensor([-1, 0, 1])).all()):
            raise UserError("targets of several labels must be 1 (present), 0 (absent) or -1 (ignored)")
        if len(absent := torch.nonzero((y == 1).sum(0) == 0)):
            raise UserError(f"class {int(absent[0])} is in no {'train' if one is train else 'test'} image")
    return train.y, test.y, None


def _require_folds(images: Tensor, present: Tensor, folds: int) -> None:
    """Raise a UserError where a class has fewer images than folds, or all others together have."""
    for number in range(present.shape[1]):
        fewest = min(len(torch.unique(images[present[:, number] == side])) for side in (True, False))
        if fewest < folds:
            raise UserError(
                f"class {number} has {fewest} images on one side, fewer than the {folds} folds; pass smaller --folds"
            )


def _views(keys: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The first row of every image, and the image of every row."""
    images: dict[str, int] = {}
    first = [row for row, key in enumerate(keys) if key not in images and images.setdefault(key, len(images)) >= 0]
    return torch.tensor(first), torch.tensor([images[key] for key in keys])


def _normalise(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / (length + EPSILON)
