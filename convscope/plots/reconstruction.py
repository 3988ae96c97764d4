"""Masked image modelling, seen: the original, what the network saw, what it filled in."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from convscope.plots.theme import Picture, sheet

TITLES = ("original", "masked", "reconstruction")
INCHES = 1.55  # of one image


def draw_reconstruction(
    original: NDArray[Any], masked: NDArray[Any], reconstruction: NDArray[Any], *, titles: tuple[str, ...] = TITLES
) -> Picture:
    """Grid of images, three to a sample, two samples to a row where there are four or more.

    Args:
        original: (N, H, W, 3), uint8 or float from 0 to 1 (beyond is clipped).
        masked: like `original`.
        reconstruction: like `original`.
        titles: headings of the three columns.
    """
    blocks = 2 if len(original) >= 4 else 1
    rows = -(-len(original) // blocks)
    widths = ([1.0] * 3 + [0.12]) * (blocks - 1) + [1.0] * 3  # a narrow gap between two blocks
    height = INCHES * rows * original.shape[1] / original.shape[2] + 0.3
    with sheet(INCHES * sum(widths), height, w_pad=0.02, h_pad=0.02, wspace=0, hspace=0) as figure:
        axes = figure.subplots(rows, len(widths), squeeze=False, gridspec_kw={"width_ratios": widths})
        for axis in axes.ravel():
            axis.set_axis_off()
        for index, triple in enumerate(zip(original, masked, reconstruction)):
            row, block = divmod(index, blocks)
            for column, (image, title) in enumerate(zip(triple, titles)):
                axis = axes[row, 4 * block + column]
                axis.imshow(_displayable(image), interpolation="nearest")
                if row == 0:
                    axis.set_title(title, fontsize=10, loc="center", pad=5)
        return Picture(figure)


def _displayable(image: NDArray[Any]) -> NDArray[Any]:
    return image if image.dtype == np.uint8 else np.clip(np.nan_to_num(image), 0.0, 1.0)
