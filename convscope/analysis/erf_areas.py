"""How large the square is that holds a share of a contribution map.

As published (RepLKNet, Ding et al. 2022, section 4.3 and appendix) and corrected for two faults: the published box is
centred on pixel H // 2 rather than on the token's receptive field, and log10(A + 1) makes it depend on the gradient's
scale.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]  # float64
VARIANTS = ("official", "raw", "log")
LOG_RANGE = 1e3  # the corrected log compresses three decades below the largest contribution


@dataclass(frozen=True)
class Area:
    """The smallest centred square whose share of the total contribution exceeds a threshold."""

    side: float  # pixels
    share: float  # of the image's area, 0 to 1; the part of the square that lies on the image


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
    weights = compressed(contributions, variant)
    share = shares(np.bincount(ring.ravel(), weights.ravel()))
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


def compressed(contributions: Array, variant: str) -> Array:
    """Contributions as a variant weighs them: "raw", "log" or "official"; see `areas`."""
    largest = contributions.max()
    if variant == "raw" or largest == 0:
        return contributions
    scaled: Array = contributions * (LOG_RANGE / largest) if variant == "log" else contributions
    return np.asarray(np.log10(1 + scaled))


def shares(ring_sums: Array) -> Array:
    """Share of the total that lies within each ring; all zero where the total is."""
    total = ring_sums.sum()
    return np.cumsum(ring_sums) / total if total > 0 else np.zeros_like(ring_sums)
