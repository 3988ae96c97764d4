"""Average precision against the curve drawn point by point."""

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_curve
from torch import Tensor

from convscope.core.errors import UserError
from convscope.eval.average_precision import average_precision, mean_average_precision, rank_images


def point_by_point(scores: Tensor, targets: Tensor) -> float:
    """Area under precision made monotone, one threshold after the other."""
    known = targets >= 0
    scores, positive = scores[known], targets[known] == 1
    curve = []  # recall, precision
    for threshold in sorted(set(scores.tolist()), reverse=True):
        chosen = scores >= threshold
        hits = int((chosen & positive).sum())
        curve.append((hits / int(positive.sum()), hits / int(chosen.sum())))
    area, before = 0.0, 0.0
    for i, (recall, _) in enumerate(curve):
        area += (recall - before) * max(precision for _, precision in curve[i:])
        before = recall
    return area


def example(seed: int, count: int = 40, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 12, (count, classes), generator=generator).float()  # with ties
    return scores, torch.randint(-1, 2, (count, classes), generator=generator).float()


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_area_under_the_monotone_curve(seed: int) -> None:
    scores, targets = example(seed)
    expected = [point_by_point(scores[:, c], targets[:, c]) for c in range(5)]
    assert average_precision(scores, targets).tolist() == pytest.approx(expected, rel=1e-12)


def test_against_the_curve_of_scikit_learn() -> None:
    scores, targets = example(7)
    for c, found in enumerate(average_precision(scores, targets).tolist()):
        known = targets[:, c] >= 0
        precision, recall, _ = precision_recall_curve(targets[known, c].numpy(), scores[known, c].numpy())
        envelope = np.maximum.accumulate(precision)  # recall falls along these arrays
        assert found == pytest.approx(float(-np.sum(np.diff(recall) * envelope[:-1])), rel=1e-12)


def test_by_hand() -> None:
    scores = torch.tensor([[4.0], [3.0], [2.0], [1.0]])
    # precision 0, 1/2, 1/3, 1/2 at recalls 0, 1/2, 1/2, 1: made monotone 1/2 throughout
    assert average_precision(scores, torch.tensor([[0.0], [1.0], [0.0], [1.0]])).item() == 0.5
    assert average_precision(scores, torch.tensor([[-1.0], [1.0], [0.0], [1.0]])).item() == pytest.approx(0.5 + 1 / 3)
    assert average_precision(scores, torch.tensor([[0.0], [0.0], [-1.0], [0.0]])).isnan().all()


def test_weights_are_repetitions() -> None:
    scores, targets = example(3)
    counts = torch.randint(0, 4, (40,), generator=torch.Generator().manual_seed(0))
    rows = torch.repeat_interleave(torch.arange(40), counts)
    weighted = rank_images(scores, targets).average_precision(counts.double())
    torch.testing.assert_close(weighted, average_precision(scores[rows], targets[rows]), rtol=1e-12, atol=0)


def test_mean_leaves_out_classes_that_nobody_has() -> None:
    scores, targets = example(5)
    targets[:, 2] = targets[:, 2].clamp_max(0)
    figure = mean_average_precision(scores, targets, seed=0)
    assert figure.value == pytest.approx(float(average_precision(scores, targets)[[0, 1, 3, 4]].mean()))
    assert figure.low is not None
    assert figure.high is not None
    assert figure.low < figure.value < figure.high
    with pytest.raises(UserError, match="no class is present"):
        mean_average_precision(scores, -torch.ones_like(targets), seed=0)
