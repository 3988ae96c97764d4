"""Effective receptive field: which pixels the central token of a feature map depends on.

Contribution maps follow RepLKNet (Ding et al. 2022, section 4.3 and appendix); areas are given as published and
corrected for two faults: the published box is centred on pixel H // 2 rather than on the token's receptive field,
and log10(A + 1) makes it depend on the gradient's scale.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convscope.analysis.token_grid import token_grid
from convscope.core.backbone import Backbone, eval_mode
from convscope.core.errors import UserError
from convscope.core.results import Figure, bootstrap

Array = NDArray[Any]  # float64
VARIANTS = ("official", "raw", "log")
LOG_RANGE = 1e3  # the corrected log compresses three decades below the largest contribution
MIN_IMAGES = 5  # fewer give no interval


@dataclass(frozen=True, kw_only=True)
class ErfConfig:
    """How the effective receptive field is measured."""

    stage: str = "last"
    """Layer whose central token is scored."""
    thresholds: tuple[float, ...] = (0.2, 0.3, 0.5, 0.99)
    """Shares of the total contribution that the reported squares hold."""
    seed: int = 0
    """Of the bootstrap; the command draws images and untrained twins by it too."""

    def __post_init__(self) -> None:
        if not self.thresholds or not all(0 < t < 1 for t in self.thresholds):
            raise UserError(f"erf: thresholds must lie between 0 and 1, got {self.thresholds}")


@dataclass(frozen=True)
class Area:
    """The smallest centred square whose share of the total contribution exceeds a threshold."""

    side: float  # pixels
    share: float  # of the image's area, 0 to 1; the part of the square that lies on the image


@dataclass(frozen=True)
class ErfResult:
    """What one backbone's central token depends on."""

    contributions: Array  # (H, W), the mean over images of the non-negative input gradient, summed over channels
    images: int
    token: tuple[int, int]
    centre: tuple[float, float]  # pixel (y, x) of the token's receptive field centre
    centroid: tuple[float, float] | None  # pixel (y, x) of the map's centre of mass; None where the map is zero
    sigma: tuple[float, float] | None  # pixels (y, x): standard deviation of the map about `centre`
    areas: Mapping[str, tuple[Area | None, ...]]  # variant -> one per threshold; None where it is never exceeded
    intervals: tuple[Figure | None, ...]  # raw area with its interval over images, one per threshold
    curve: tuple[Array, Array]  # share of the image's area, share of the raw contribution
    radial: Array  # mean contribution at a rounded distance of 0, 1, 2, ... pixels from `centre`


def erf(backbone: Backbone, images: Iterable[Tensor], config: ErfConfig) -> ErfResult:
    """Measure the effective receptive field of a stage's central token.

    Args:
        backbone: put in eval mode for the measurement, then restored.
        images: batches (B, 3, H, W), normalised, all of one height and width, on the backbone's device.
        config: stage, thresholds, seed.

    Raises:
        UserError: no images, images of several sizes, an unknown stage, or gradients that are not finite.
    """
    total: Array | None = None
    profiles: list[Array] = []
    with eval_mode(backbone):
        for batch in images:
            if total is None:
                grid = token_grid(backbone, batch[:1], config.stage)
                centre = grid.centre(grid.central_token)
                radii, ring = rings((batch.shape[2], batch.shape[3]), centre)
                total = np.zeros(ring.shape)
            if batch.shape[2:] != total.shape:
                raise UserError(f"erf: images of {tuple(batch.shape[2:])} and {total.shape} pixels; give them one size")
            maps = contribution_maps(backbone, batch, config.stage)
            total += maps.sum(axis=0)
            profiles += [np.bincount(ring.ravel(), one.ravel(), len(radii)) for one in maps]
    if total is None:
        raise UserError("erf: no images")
    if not np.isfinite(total).all():
        raise UserError(f"erf: the input gradient of {backbone.source} is not finite; its weights may have diverged")
    mean = total / len(profiles)
    per_image, cells = np.stack(profiles), np.bincount(ring.ravel())
    return ErfResult(
        contributions=mean,
        images=len(profiles),
        token=grid.central_token,
        centre=centre,
        centroid=_centroid(mean),
        sigma=_sigma(mean, centre),
        areas={v: tuple(areas(mean, centre, v, config.thresholds)) for v in VARIANTS},
        intervals=tuple(_interval(per_image, cells, t, config.seed) for t in config.thresholds),
        curve=(np.cumsum(cells) / mean.size, _shares(per_image.sum(axis=0))),
        radial=radial_profile(mean, centre),
    )


def contribution_maps(backbone: Backbone, images: Tensor, stage: str = "last") -> Array:
    """Non-negative input gradients of the central token's score, summed over channels.

    The score is the sum over channels of relu(map[:, :, H // 2, W // 2]). The backbone should be in eval mode, so
    that images of a batch do not touch one another.

    Args:
        backbone: its parameters receive no gradient.
        images: (B, 3, H, W), normalised.
        stage: a stage's name, or "last".

    Returns:
        (B, H, W) float64.
    """
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        (feature_map,) = backbone.feature_maps(images, [stage]).values()  # (B, C, h, w)
        score = feature_map[:, :, feature_map.shape[2] // 2, feature_map.shape[3] // 2].relu().sum()
        (gradient,) = torch.autograd.grad(score, images)
    maps: Array = gradient.relu().double().sum(dim=1).cpu().numpy()
    return maps


def areas(
    contributions: Array, centre: tuple[float, float], variant: str, thresholds: Sequence[float]
) -> Iterator[Area | None]:
    """Yield the smallest square for each threshold, `None` where no square exceeds it.

    Args:
        contributions: (H, W), non-negative.
        centre: pixel (y, x) to centre on; "official" ignores it and takes (H // 2, W // 2).
        variant: "official": log10(A + 1), odd sides from 3 that fit the image, area (side/H)(side/W), as published;
            "raw": A itself; "log": log10(1 + 1000 A / max A), which does not depend on A's scale.
        thresholds: shares, 0 to 1.
    """
    height, width = contributions.shape
    official = variant == "official"
    if official:
        centre = (height // 2, width // 2)
    radii, ring = rings((height, width), centre)
    weights = _weights(contributions, variant)
    share = _shares(np.bincount(ring.ravel(), weights.ravel()))
    covered = np.cumsum(np.bincount(ring.ravel()))
    for threshold in thresholds:
        met = share > threshold
        if official:
            met &= (radii >= 1) & (radii < height // 2)
        if not met.any():
            yield None
            continue
        first = int(met.argmax())
        side = float(2 * radii[first] + 1)
        yield Area(side, (side**2 if official else int(covered[first])) / (height * width))


def rings(shape: tuple[int, int], centre: tuple[float, float]) -> tuple[Array, NDArray[np.int64]]:
    """Sort pixels into square rings about a centre.

    Returns:
        The rings' radii (R,) in pixels, ascending, and each pixel's ring (H, W). Rings up to one of radius r make
        a square with a side of 2 r + 1 pixels.
    """
    rows = np.abs(np.arange(shape[0]) - centre[0])[:, None]
    columns = np.abs(np.arange(shape[1]) - centre[1])[None, :]
    radii, ring = np.unique(np.maximum(rows, columns).round(6), return_inverse=True)
    return radii, ring.reshape(shape)


def radial_profile(contributions: Array, centre: tuple[float, float]) -> Array:
    """Mean contribution at each rounded Euclidean distance from `centre`; 0 where no pixel lies. (D,)"""
    rows = np.arange(contributions.shape[0])[:, None] - centre[0]
    columns = np.arange(contributions.shape[1])[None, :] - centre[1]
    distance = np.hypot(rows, columns).round().astype(np.int64).ravel()
    return np.bincount(distance, contributions.ravel()) / np.maximum(np.bincount(distance), 1)


def _weights(contributions: Array, variant: str) -> Array:
    largest = contributions.max()
    if variant == "raw" or largest == 0:
        return contributions
    scaled: Array = contributions * (LOG_RANGE / largest) if variant == "log" else contributions
    return np.asarray(np.log10(1 + scaled))


def _shares(ring_sums: Array) -> Array:
    """Share of the total that lies within each ring; all zero where the total is."""
    total = ring_sums.sum()
    return np.cumsum(ring_sums) / total if total > 0 else np.zeros_like(ring_sums)


def _interval(profiles: Array, cells: NDArray[np.int64], threshold: float, seed: int) -> Figure | None:
    """Raw area at a threshold, with a bootstrap over images where there are enough of them."""
    alive = profiles[profiles.sum(axis=1) > 0]  # images without any gradient add nothing to the mean map
    if len(alive) == 0:
        return None
    covered = np.cumsum(cells) / cells.sum()

    def area(rows: Array) -> float:
        return float(covered[(_shares(rows.sum(axis=0)) > threshold).argmax()])

    return bootstrap(alive, area, seed=seed) if len(alive) >= MIN_IMAGES else Figure(area(alive), n=len(alive))


def _centroid(contributions: Array) -> tuple[float, float] | None:
    total = contributions.sum()
    if total == 0:
        return None
    rows, columns = np.arange(contributions.shape[0]), np.arange(contributions.shape[1])
    return float(contributions.sum(axis=1) @ rows / total), float(contributions.sum(axis=0) @ columns / total)


def _sigma(contributions: Array, centre: tuple[float, float]) -> tuple[float, float] | None:
    total = contributions.sum()
    if total == 0:
        return None
    rows, columns = np.arange(contributions.shape[0]) - centre[0], np.arange(contributions.shape[1]) - centre[1]
    along_y = contributions.sum(axis=1) @ rows**2 / total
    return float(np.sqrt(along_y)), float(np.sqrt(contributions.sum(axis=0) @ columns**2 / total))
