"""The shape of a contribution map: centroid, spread, the Gaussian nearest to it, the profile over the distance."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import curve_fit

Array = NDArray[Any]  # float64
Point = tuple[float, float]  # (y, x), pixels
LEAST_POINTS = 4  # a Gaussian along an axis has three parameters


@dataclass(frozen=True)
class GaussianFit:
    """The least-squares Gaussian of the map's sums along each axis."""

    centre: Point
    sigma: Point
    explained: float  # share of the variance of both sums that it explains; 1 where the map is a Gaussian


def centroid(contributions: Array) -> Point | None:
    """The centre of mass, pixel (y, x), of a non-negative map (H, W); None where the map is zero."""
    total = contributions.sum()
    if total == 0:
        return None
    rows, columns = np.arange(contributions.shape[0]), np.arange(contributions.shape[1])
    return float(contributions.sum(axis=1) @ rows / total), float(contributions.sum(axis=0) @ columns / total)


def sigma(contributions: Array, centre: Point) -> Point | None:
    """Standard deviation (y, x) in pixels about `centre`; None where the map is zero."""
    total = contributions.sum()
    if total == 0:
        return None
    rows, columns = np.arange(contributions.shape[0]) - centre[0], np.arange(contributions.shape[1]) - centre[1]
    along_y = contributions.sum(axis=1) @ rows**2 / total
    return float(np.sqrt(along_y)), float(np.sqrt(contributions.sum(axis=0) @ columns**2 / total))


def fit_gaussian(contributions: Array) -> GaussianFit | None:
    """Fit a exp(-(z - m)^2 / (2 s^2)) to the sums of rows and of columns; None where that does not converge.

    A Gaussian's sums are Gaussians of the same sigma, and sums are smooth where strides leave a grid in the map. The
    standard deviation weighs the tails; the fit weighs the middle.
    """
    middle = centroid(contributions)
    spread = None if middle is None else sigma(contributions, middle)
    if middle is None or spread is None or min(contributions.shape) < LEAST_POINTS:
        return None
    found, left, whole = [], 0.0, 0.0
    for axis in (0, 1):
        sums = contributions.sum(axis=1 - axis)
        sums = sums / sums.max()
        pixels = np.arange(len(sums), dtype=np.float64)
        try:
            start = (1.0, middle[axis], max(spread[axis], 0.5))
            (height, mean, width), _ = curve_fit(_gaussian, pixels, sums, p0=start, maxfev=2000)
        except RuntimeError:
            return None
        left += float(np.square(sums - _gaussian(pixels, height, mean, width)).sum())
        whole += float(np.square(sums - sums.mean()).sum())
        found.append((float(mean), abs(float(width))))
    if whole == 0:
        return None
    return GaussianFit((found[0][0], found[1][0]), (found[0][1], found[1][1]), 1 - left / whole)


def radial_profile(contributions: Array, centre: tuple[float, float]) -> Array:
    """Mean contribution at each rounded Euclidean distance from `centre`; 0 where no pixel lies. (D,)"""
    rows = np.arange(contributions.shape[0])[:, None] - centre[0]
    columns = np.arange(contributions.shape[1])[None, :] - centre[1]
    distance = np.hypot(rows, columns).round().astype(np.int64).ravel()
    return np.bincount(distance, contributions.ravel()) / np.maximum(np.bincount(distance), 1)


def _gaussian(z: Array, height: float, mean: float, width: float) -> Array:
    return np.asarray(height * np.exp(-((z - mean) ** 2) / (2 * width**2)))
