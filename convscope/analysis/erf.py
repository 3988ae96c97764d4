"""Effective receptive field: which pixels the central token of a feature map depends on.

Contribution maps follow RepLKNet (Ding et al. 2022, section 4.3 and appendix); areas are those of `erf_areas`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convscope.analysis.erf_areas import VARIANTS, Area, areas, compressed, rings, shares
from convscope.analysis.erf_shape import GaussianFit, Point, centroid, fit_gaussian, radial_profile, sigma
from convscope.analysis.receptive_field import ReceptiveField, beyond, receptive_field, refused
from convscope.analysis.token_grid import TokenGrid, token_grid
from convscope.core.backbone import Backbone, eval_mode
from convscope.core.errors import UserError
from convscope.core.gradients import at_least_two
from convscope.core.results import Figure, bootstrap

Array = NDArray[Any]  # float64
Precision = Literal["fp32", "bf16"]
CURVES = ("raw", "log")  # variants whose share is given over the area
MIN_IMAGES = 5  # fewer give no interval
NOTHING = 1e-6  # share of the largest contribution below which rounding may have made it


@dataclass(frozen=True, kw_only=True)
class ErfConfig:
    """How the effective receptive field is measured."""

    stages: tuple[str, ...] = ("last",)
    """Layers whose central token is scored, in one pass; all: every one that timm reports."""
    centre: Literal["token", "centroid"] = "token"
    """Middle of the squares: the token's receptive field, or the contributions' centre of mass to the nearest half
    pixel (keeps the maps of all images in memory)."""
    thresholds: tuple[float, ...] = (0.2, 0.3, 0.5, 0.99)
    """Shares of the total contribution that the reported squares hold."""
    precision: Precision = "fp32"
    """bf16: autocast; how much that changes the map of the first images is measured and reported."""
    seed: int = 0
    """Of the bootstrap; the command draws images and untrained twins by it too."""

    def __post_init__(self) -> None:
        if not self.thresholds or not all(0 < t < 1 for t in self.thresholds):
            raise UserError(f"erf: thresholds must lie between 0 and 1, got {self.thresholds}")
        if not self.stages:
            raise UserError("erf: name at least one stage, or all")


@dataclass(frozen=True)
class ErfResult:
    """What the central token of one stage depends on."""

    contributions: Array  # (H, W), the mean over images of the non-negative input gradient, summed over channels
    images: int
    token: tuple[int, int]
    token_centre: Point  # pixel of the token's receptive field centre
    centroid: Point | None  # pixel of the map's centre of mass; None where the map is zero
    centre: Point  # pixel that squares, radii and sigma are about: one of the two
    sigma: Point | None  # pixels: standard deviation of the map about `centre`
    fit: GaussianFit | None
    field: ReceptiveField  # what the kernels' sizes allow
    areas: Mapping[str, tuple[Area | None, ...]]  # variant -> one per threshold; None where it is never exceeded
    intervals: tuple[Figure | None, ...]  # raw area with its interval over images, one per threshold
    curves: Mapping[str, tuple[Array, Array]]  # of CURVES: share of the image's area, share of the contribution
    radial: Array  # mean contribution at a rounded distance of 0, 1, 2, ... pixels from `centre`
    bf16_change: float | None  # sum |map - fp32 map| / sum of the fp32 map, over the first images


def erf(backbone: Backbone, images: Iterable[Tensor], config: ErfConfig) -> dict[str, ErfResult]:
    """Measure the effective receptive fields of stages' central tokens, in one pass over the images.

    Args:
        backbone: put in eval mode for the measurement, then restored.
        images: batches (B, 3, H, W), normalised, all of one height and width, on the backbone's device.
        config: stages, thresholds, seed.

    Returns:
        Results by stage, in network order.

    Raises:
        UserError: no images, images of several sizes, an unknown stage, or gradients that are not finite.
    """
    found: dict[str, _Stage] = {}
    shape: torch.Size | None = None
    with eval_mode(backbone):
        for batch in images:
            if shape is None:
                shape = batch.shape[2:]
                found = _stages(backbone, batch, config)
            if batch.shape[2:] != shape:
                raise UserError(
                    f"erf: images of {tuple(batch.shape[2:])} and {tuple(shape)} pixels; give them one size"
                )
            for name, maps in contribution_maps(backbone, batch, config.stages, config.precision).items():
                found[name].add(maps)
    if not found:
        raise UserError("erf: no images")
    return {name: stage.result(config, backbone.source) for name, stage in found.items()}


def contribution_maps(
    backbone: Backbone, images: Tensor, stages: Sequence[str] = ("last",), precision: Precision = "fp32"
) -> dict[str, Array]:
    """Non-negative input gradients of the central token's score, summed over channels.

    The score is the sum over channels of relu(map[:, :, H // 2, W // 2]). The backbone should be in eval mode, so
    that images of a batch do not touch one another. Weights receive no gradient.

    Args:
        backbone: the network.
        images: (B, 3, H, W), normalised.
        stages: their names, "last", or "all".
        precision: of the forward pass.

    Returns:
        (B, H, W) float64 by stage, in network order.
    """
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            seen = at_least_two(images)
            maps = backbone.feature_maps(seen, stages)  # (B, C, h, w) each
        share = len(images) / len(seen)
        scores = [each[:, :, each.shape[2] // 2, each.shape[3] // 2].relu().sum() * share for each in maps.values()]
        found: dict[str, Array] = {}
        for index, (name, score) in enumerate(zip(maps, scores)):
            (gradient,) = torch.autograd.grad(score, images, retain_graph=index + 1 < len(scores))
            found[name] = gradient.relu().double().sum(dim=1).cpu().numpy()
    return found


class _Stage:
    """One stage's sums over images."""

    def __init__(self, grid: TokenGrid, field: ReceptiveField, shape: torch.Size, centre: str) -> None:
        self.token, self.middle = grid.central_token, grid.centre(grid.central_token)
        self.field = field
        self.total = np.zeros(tuple(shape))
        self.ring = rings((shape[0], shape[1]), self.middle)[1] if centre == "token" else None
        self.profiles: list[Array] = []  # sums over the rings, an image each
        self.maps: list[Array] = []  # where rings are not known before the last image
        self.bf16_change: float | None = None

    def add(self, maps: Array) -> None:
        self.total += maps.sum(axis=0)
        if self.ring is None:
            self.maps += list(maps.astype(np.float32))
        else:
            self.profiles += [_by_ring(self.ring, one) for one in maps]

    def result(self, config: ErfConfig, source: str) -> ErfResult:
        if not np.isfinite(self.total).all():
            raise UserError(f"erf: the input gradient of {source} is not finite; its weights may have diverged")
        mean = self.total / max(len(self.profiles), len(self.maps))
        mass = centroid(mean)
        centre, ring, profiles = self.middle, self.ring, self.profiles
        if ring is None:
            centre = self.middle if mass is None else (round(2 * mass[0]) / 2, round(2 * mass[1]) / 2)
            ring = rings((mean.shape[0], mean.shape[1]), centre)[1]
            profiles = [_by_ring(ring, one) for one in self.maps]
        per_image, cells = np.stack(profiles), np.bincount(ring.ravel())
        covered = np.cumsum(cells) / mean.size
        return ErfResult(
            contributions=mean,
            images=len(profiles),
            token=self.token,
            token_centre=self.middle,
            centroid=mass,
            centre=centre,
            sigma=sigma(mean, centre),
            fit=fit_gaussian(mean),
            field=_checked(self.field, mean, self.middle),
            areas={v: tuple(areas(mean, centre, v, config.thresholds)) for v in VARIANTS},
            intervals=tuple(_interval(per_image, cells, t, config.seed) for t in config.thresholds),
            curves={v: (covered, shares(_by_ring(ring, compressed(mean, v)))) for v in CURVES},
            radial=radial_profile(mean, centre),
            bf16_change=self.bf16_change,
        )


def _stages(backbone: Backbone, batch: Tensor, config: ErfConfig) -> dict[str, _Stage]:
    """What is known of each stage before the first image is measured."""
    image = batch[:1].detach().requires_grad_()
    with torch.enable_grad():
        fields = {
            name: receptive_field(feature_map, image)
            for name, feature_map in backbone.feature_maps(image, config.stages).items()
        }
    found = {
        name: _Stage(token_grid(backbone, batch[:1], name), field, batch.shape[2:], config.centre)
        for name, field in fields.items()
    }
    if config.precision == "bf16":
        exact = contribution_maps(backbone, batch, config.stages)
        for name, maps in contribution_maps(backbone, batch, config.stages, "bf16").items():
            whole = exact[name].sum(axis=0)
            moved = np.abs(maps.sum(axis=0) - whole).sum()
            found[name].bf16_change = float(moved / whole.sum()) if whole.sum() > 0 else None
    return found


def _checked(field: ReceptiveField, contributions: Array, centre: Point) -> ReceptiveField:
    """The field, unless the map shows that it is not all that the token sees."""
    seen = contributions > NOTHING * contributions.max()
    if not seen.any():
        return field
    rows, columns = (np.flatnonzero(seen.any(axis=axis)) for axis in (1, 0))
    ends = (int(rows[0]), int(rows[-1])), (int(columns[0]), int(columns[-1]))
    return refused(field) if beyond(field, *ends, centre) else field


def _by_ring(ring: NDArray[np.int64], one: Array) -> Array:
    return np.bincount(ring.ravel(), one.ravel())


def _interval(profiles: Array, cells: NDArray[np.int64], threshold: float, seed: int) -> Figure | None:
    """Raw area at a threshold, with a bootstrap over images where there are enough of them."""
    alive = profiles[profiles.sum(axis=1) > 0]  # images without any gradient add nothing to the mean map
    if len(alive) == 0:
        return None
    covered = np.cumsum(cells) / cells.sum()

    def area(rows: Array) -> float:
        return float(covered[(shares(rows.sum(axis=0)) > threshold).argmax()])

    return bootstrap(alive, area, seed=seed) if len(alive) >= MIN_IMAGES else Figure(area(alive), n=len(alive))
