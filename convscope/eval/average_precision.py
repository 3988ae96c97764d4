"""Average precision of several labels an image."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from convscope.core.errors import UserError
from convscope.core.results import BOOTSTRAP_RESAMPLES, Figure, bootstrap

WORK = 10**9  # scores that an interval may go through; many images and classes are resampled less often
FEWEST_RESAMPLES = 200


@dataclass(frozen=True)
class Ranking:
    """Images by falling score, class by class."""

    order: Tensor  # (N, C) int64: images
    positive: Tensor  # (N, C) float64: 1 where the class is present
    known: Tensor  # (N, C) float64: 0 where that is unknown
    ends: Tensor  # (N, C) bool: the last one of those with this score, for equal scores are one threshold

    def average_precision(self, weights: Tensor | None = None) -> Tensor:
        """(C,), where image i counts `weights[i]` times (N,); NaN without a positive."""
        known = self.known if weights is None else self.known * weights[self.order]
        hits = known * self.positive
        found, seen = hits.cumsum(0), known.cumsum(0)
        precision = torch.where(self.ends, found / seen.clamp_min(1), 0.0)
        envelope = precision.flip(0).cummax(0).values.flip(0)
        return (hits * envelope).sum(0) / found[-1]


def rank_images(scores: Tensor, targets: Tensor) -> Ranking:
    """Rank for `average_precision`.

    Args:
        scores: (N, C).
        targets: (N, C), 1 present, 0 absent, -1 ignored.
    """
    ranked, order = torch.sort(scores, dim=0, descending=True, stable=True)
    sorted_targets = targets.gather(0, order)
    ends = torch.ones_like(order, dtype=torch.bool)
    ends[:-1] = ranked[:-1] != ranked[1:]
    return Ranking(order, (sorted_targets == 1).double(), (sorted_targets >= 0).double(), ends)


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """All-point average precision (C,): the area under the precision-recall curve, precision made monotone (VOC 2010).

    Args:
        scores: (N, C); those of equal score are one point of the curve.
        targets: (N, C), 1 present, 0 absent, -1 ignored. A class without a positive gives NaN.
    """
    return rank_images(scores, targets).average_precision()


def mean_average_precision(scores: Tensor, targets: Tensor, *, seed: int) -> Figure:
    """Mean over the classes that have a positive, with an interval over the images.

    Raises:
        UserError: no class has one.
    """
    if not (targets == 1).any():
        raise UserError("no class is present in any test image; average precision means nothing")
    ranking = rank_images(scores, targets)

    def statistic(images: np.ndarray) -> float:
        counts = torch.from_numpy(np.bincount(images, minlength=len(scores))).double()
        return float(ranking.average_precision(counts).nanmean())

    resamples = min(BOOTSTRAP_RESAMPLES, max(FEWEST_RESAMPLES, WORK // scores.numel()))
    return bootstrap(np.arange(len(scores)), statistic, seed=seed, resamples=resamples)
