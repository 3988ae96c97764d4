"""Features with one class an image: whether two parts fit, and how often the true class comes first."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convscope.core.errors import UserError
from convscope.core.results import Figure, Samples, bootstrap
from convscope.eval.features import Features

CHUNK = 65_536  # rows checked at a time


@dataclass(frozen=True)
class Labelled:
    """Train and test features of one layer with labels 0 ... C-1; class i is the i-th label of the train part."""

    train_x: Tensor  # (N, D)
    train_y: Tensor  # (N,)
    test_x: Tensor
    test_y: Tensor
    classes: int


def require_fit(train: Features, test: Features) -> None:
    """Raise a UserError where features have no labels, are none, differ in width, or are NaN or infinite."""
    if train.y is None or test.y is None:
        raise UserError("these features have no labels; name the field that holds them with --label")
    if len(train.x) == 0 or len(test.x) == 0 or train.x.shape[1] != test.x.shape[1]:
        raise UserError(f"train features {tuple(train.x.shape)} and test features {tuple(test.x.shape)} do not fit")
    for name, part in (("train", train), ("test", test)):
        for start in range(0, len(part.x), CHUNK):
            bad = ~part.x[start : start + CHUNK].isfinite().all(1)
            if bad.any():
                key = part.keys[start + int(bad.int().argmax())]
                raise UserError(f"the {name} features of {key} hold NaN or infinity; is the model trained well?")


def labelled(train: Features, test: Features) -> Labelled:
    """Check that both parts fit one another and number their classes.

    Raises:
        UserError: no or negative labels, a single class, test labels that the train part lacks; NaN features.
    """
    require_fit(train, test)
    assert train.y is not None
    assert test.y is not None
    if train.y.ndim != 1 or test.y.ndim != 1:
        raise UserError("this evaluation takes one class an image; leave --targets out")
    known = known_classes(train.y.numpy(), test.y.numpy())
    train_y, test_y = (torch.searchsorted(known, y) for y in (train.y, test.y))
    return Labelled(train.x, train_y, test.x, test_y, len(known))


def known_classes(train_y: NDArray[np.int64], test_y: NDArray[np.int64]) -> Tensor:
    """The labels of train (C,), ascending, once it is sure that test has no others.

    Raises:
        UserError: negative labels, a single class, test labels that train lacks.
    """
    known = np.unique(train_y)
    if known[0] < 0:
        raise UserError(f"label {known[0]} is negative; labels count from 0")
    if len(known) < 2:
        raise UserError(f"every train label is {known[0]}; an evaluation needs at least two classes")
    if len(absent := np.setdiff1d(test_y, known)):
        raise UserError(
            f"{len(absent)} test labels, such as {absent[0]}, are not among the {len(known)} train classes; "
            "are these two splits of one data set?"
        )
    return torch.from_numpy(known)


def rank_of_truth(scores: Tensor, y: Tensor) -> Tensor:
    """How many classes precede the true one (N,); equal scores count by class number, NaN before anything.

    Args:
        scores: (N, C).
        y: true classes (N,).
    """
    true = scores.gather(1, y[:, None])
    later = torch.arange(scores.shape[1], device=scores.device) >= y[:, None]
    behind = (scores < true) | ((scores == true) & later)  # the true class too
    return (~behind).sum(1)


def hits_of(rank: Tensor, classes: int) -> Samples:
    """Whether the truth comes first, and among the first five where there are more than five classes, (N,) each."""
    ends = {"top1": 1, "top5": 5} if classes > 5 else {"top1": 1}
    return {name: (rank < end).cpu().numpy() for name, end in ends.items()}


def accuracies(rank: Tensor, classes: int, seed: int) -> dict[str, Figure]:
    """Top-1, and top-5 where there are more than five classes, with intervals over the test images."""
    return {name: bootstrap(hits, seed=seed) for name, hits in hits_of(rank, classes).items()}
