"""The classifiers of `eval svm`, one a class, in processes of their own: without torch, which these need not load."""

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedGroupKFold, cross_val_score
from sklearn.svm import LinearSVC
from sklearn.utils.parallel import Parallel, delayed

SMALL = 10_000_000  # numbers that all fits together read; fewer are fitted sooner than processes start


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How each class is fitted."""

    costs: Sequence[float]
    folds: int
    positive_weight: float
    max_iter: int
    seed: int


@dataclass(frozen=True)
class Classifier:
    """What came of one class."""

    cost: float
    average_precision: float  # in cross-validation
    scores: NDArray[np.float64]  # of the test images
    unfinished: int  # fits that max_iter ended


def fit_classes(
    x: NDArray[np.float64],
    present: NDArray[np.bool_],
    images: NDArray[np.int64],
    test_x: NDArray[np.float64],
    settings: FitSettings,
    processes: int | None = None,
) -> Iterator[Classifier]:
    """One classifier a class, in the classes' order; the same for any number of processes.

    Processes and not threads: liblinear draws its order from one generator, which threads would share.

    Args:
        x: features to train on (N, D).
        present: which rows are of each class (N, C).
        images: which image each row is a view of (N,); cross-validation keeps views together.
        test_x: features to score (Q, D).
        settings: of the fits.
        processes: how many; None takes one a core, and this one alone where there is little to do.
    """
    classes = present.shape[1]
    if processes is None:
        fits = classes * len(settings.costs) * settings.folds
        processes = 1 if x.size * fits < SMALL else _cores()
    parallel = Parallel(n_jobs=min(processes, classes), return_as="generator")
    found: Iterator[Classifier] = parallel(
        delayed(fit_class)(x, present[:, number], images, test_x, settings) for number in range(classes)
    )
    return found


def fit_class(
    x: NDArray[np.float64],
    present: NDArray[np.bool_],
    images: NDArray[np.int64],
    test_x: NDArray[np.float64],
    settings: FitSettings,
) -> Classifier:
    """Choose C by cross-validated average precision, the smallest among equals, and fit all rows with it."""
    truth = np.where(present, 1, -1)
    folds: Any = settings.folds
    if int(images.max()) + 1 < len(images):
        folds = StratifiedGroupKFold(settings.folds)
    models = [
        LinearSVC(
            C=cost,
            class_weight={1: settings.positive_weight, -1: 1},
            dual=True,
            max_iter=settings.max_iter,
            random_state=settings.seed,
        )
        for cost in settings.costs
    ]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", ConvergenceWarning)
        precisions = [
            cross_val_score(model, x, truth, cv=folds, groups=images, scoring="average_precision").mean()
            for model in models
        ]
        best = int(np.argmax(precisions))
        scores = models[best].fit(x, truth).decision_function(test_x)
    unfinished = sum(issubclass(one.category, ConvergenceWarning) for one in said)
    return Classifier(settings.costs[best], float(precisions[best]), scores, unfinished)


def _cores() -> int:
    """That this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
