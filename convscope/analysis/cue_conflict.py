"""What decisions on cue-conflict stimuli say: shape bias (arXiv:1811.12231) and error consistency (arXiv:2006.16736).

A stimulus has the shape of one category and the texture of another. Pure functions of decisions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convscope.core.errors import UserError
from convscope.core.results import BOOTSTRAP_RESAMPLES, Figure

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class CueNames:
    """What a stimulus's name says."""

    key: str  # cat3-elephant2: the same in folders and in tables of responses
    shape: str
    texture: str


@dataclass(frozen=True)
class CueConflict:
    """What one observer made of the stimuli whose cues disagree."""

    shape: Figure  # share of decisions for the shape's category
    texture: Figure
    coverage: Figure  # their sum
    bias: Figure | None  # shape / (shape + texture); None where coverage is at chance
    by_category: NDArray[np.float64]  # (C,) the same ratio over stimuli with that shape; NaN where there is no decision
    stimuli: int
    reason: str = ""  # why there is no bias


def parse_name(path: str, categories: Sequence[str]) -> CueNames:
    """Read `cat/cat3-elephant2.png`, or `0001_cue_dnn_0_cat_00_cat3-elephant2.png`.

    The texture is what follows the last `_` and precedes the first `.`, after its last `-`, without digits. The shape
    is the folder where that is a category, else the text before the first digit.

    Raises:
        UserError: either is no category.
    """
    folder, _, file = path.rpartition("/")
    key = file.rpartition("_")[2].partition(".")[0]
    first = next((place for place, letter in enumerate(key) if letter.isdigit()), len(key))
    folder = folder.rpartition("/")[2]
    shape = folder if folder in categories else key[:first]
    texture = "".join(letter for letter in key.rpartition("-")[2] if not letter.isdigit())
    for cue, name in (("shape", shape), ("texture", texture)):
        if name not in categories:
            raise UserError(
                f"stimulus {path}: its {cue} {name!r} is none of {', '.join(categories)}; "
                "stimuli are named like cat/cat3-elephant2.png"
            )
    return CueNames(key, shape, texture)


def cue_conflict(
    decisions: Numbers, shape: Numbers, texture: Numbers, categories: int, *, seed: int = 0, all_stimuli: bool = False
) -> CueConflict:
    """Shape bias over the stimuli whose cues disagree, with intervals from resampling stimuli.

    Args:
        decisions: (N,) numbers of categories, -1 without a decision.
        shape: (N,) category of each stimulus's shape.
        texture: (N,) and of its texture.
        categories: their number C.
        seed: of the resampling.
        all_stimuli: shares are of all stimuli, those whose cues agree too, as in model-vs-human.

    Raises:
        UserError: no stimulus has cues that disagree.
    """
    conflict = shape != texture
    if not conflict.any():
        raise UserError("in no stimulus do shape and texture disagree; there is nothing to decide between")
    for_shape, for_texture = conflict & (decisions == shape), conflict & (decisions == texture)
    counted = np.ones_like(conflict) if all_stimuli else conflict
    rows = np.stack([for_shape, for_texture, counted], 1)[counted].astype(np.int64)
    by_category = np.full(categories, np.nan)
    for number in range(categories):
        own = shape == number
        if hits := int((for_shape | for_texture)[own].sum()):
            by_category[number] = for_shape[own].sum() / hits
    return summary(rows, by_category, 2 / categories, seed=seed)


def summary(rows: Numbers, by_category: NDArray[np.float64], chance: float, *, seed: int = 0) -> CueConflict:
    """Shares and bias of stimuli that may have been shown several times.

    Args:
        rows: (N, 3): of each stimulus, how often the decision was its shape, its texture, and how often it was shown.
        by_category: the bias by category (C,).
        chance: coverage of a guess.
        seed: of the resampling.
    """
    total, drawn = rows.sum(0), resampled(rows, seed)
    figures = [
        ratio_figure(total @ np.array(part), total[2], drawn @ np.array(part), drawn[:, 2], len(rows))
        for part in ((1, 0, 0), (0, 1, 0), (1, 1, 0))
    ]
    shape, texture, coverage = figures
    low = coverage.value if coverage.low is None else coverage.low
    hits = total[0] + total[1]
    if low <= chance:
        reason = f"coverage {coverage.value:.1%} (from {low:.1%}) is not above chance, {chance:.1%}"
        return CueConflict(shape, texture, coverage, None, by_category, len(rows), reason)
    bias = ratio_figure(total[0], hits, drawn[:, 0], drawn[:, 0] + drawn[:, 1], int(hits))
    return CueConflict(shape, texture, coverage, bias, by_category, len(rows))


def resampled(rows: Numbers, seed: int, resamples: int = BOOTSTRAP_RESAMPLES) -> NDArray[np.float64]:
    """Column sums (R, K) of rows (N, K) drawn with replacement, N at a time."""
    different, times = np.unique(rows, axis=0, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(rows), times / len(rows), resamples)
    return np.asarray(draws @ different, dtype=np.float64)


def ratio_figure(
    part: float, whole: float, parts: NDArray[np.float64], wholes: NDArray[np.float64], count: int
) -> Figure:
    """A ratio of sums with its percentile interval; resamples without anything to divide by are left out."""
    ratios = parts[wholes > 0] / wholes[wholes > 0]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Figure(float(part / whole), float(low), float(high), count)


def error_consistency(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Cohen's kappa of two observers' being right (arXiv:2006.16736, eq. 3), 1 where they always agree.

    Args:
        a: whether the one was right, for each stimulus that both saw (N,).
        b: whether the other was.

    Returns:
        kappa, NaN for no stimulus in common.
    """
    if len(a) == 0:
        return math.nan
    observed = float((a == b).mean())
    if observed == 1:
        return 1.0
    p, q = float(a.mean()), float(b.mean())
    expected = p * q + (1 - p) * (1 - q)
    return (observed - expected) / (1 - expected)
