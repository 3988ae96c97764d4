"""Ridge regression on features, and how good predicted numbers are."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convscope.core.errors import UserError
from convscope.core.results import Figure, bootstrap
from convscope.eval.linear_heads import CHUNK, Heads, standardisation


def fit_ridge(x: Tensor, y: Tensor, penalties: Sequence[float]) -> Heads:
    """For each penalty the minimum of mean |y - zW - b|^2 + penalty |W|^2 over standardised features z, in closed form.

    One eigendecomposition of the covariance, in float64, serves all penalties.

    Args:
        x: features (N, D).
        y: targets (N, T).
        penalties: G of them, above 0.
    """
    mean, scale = standardisation(x)
    centre = y.double().mean(0)
    covariance = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    product = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
    for rows, truth in zip(torch.split(x, CHUNK), torch.split(y, CHUNK)):
        z = (rows.double() - mean) / scale
        covariance += z.T @ z / len(x)
        product += z.T @ (truth.double() - centre) / len(x)
    values, vectors = torch.linalg.eigh(covariance)
    turned = vectors.T @ product  # (D, T)
    weights = [vectors @ (turned / (values.clamp_min(0) + penalty)[:, None]) for penalty in penalties]
    bias = centre[:, None].expand(-1, len(penalties))
    return Heads(torch.stack(weights, -1).to(x.dtype), bias.to(x.dtype).clone(), mean, scale)


def regression_figures(predicted: Tensor, truth: Tensor, *, seed: int) -> dict[str, Figure]:
    """R2, mean squared and mean absolute error, each the mean over targets, with intervals over the images.

    Args:
        predicted: (N, T).
        truth: (N, T).
        seed: of the intervals.

    Raises:
        UserError: a target is the same for all images, so that R2 means nothing.
    """
    if (constant := (truth == truth[0]).all(0)).any():
        raise UserError(f"target {int(constant.nonzero()[0])} is the same in every test image; R2 means nothing")
    pairs = np.stack([predicted.double().numpy(), truth.double().numpy()], 1)  # (N, 2, T)
    errors = pairs[:, 0] - pairs[:, 1]
    return {
        "r2": bootstrap(pairs, _r2, seed=seed),
        "mse": bootstrap((errors**2).mean(1), seed=seed),
        "mae": bootstrap(np.abs(errors).mean(1), seed=seed),
    }


def _r2(pairs: NDArray[Any]) -> float:
    predicted, truth = pairs[:, 0], pairs[:, 1]
    spread = ((truth - truth.mean(0)) ** 2).sum(0)
    unexplained = ((predicted - truth) ** 2).sum(0)
    varies = spread > 0  # a resample of few images may be of one value; it then explains nothing
    return float(np.where(varies, 1 - unexplained / np.where(varies, spread, 1), 0).mean())
