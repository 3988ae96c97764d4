"""A network as an affine function of an image: rows, a column, and the share of its biases."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from convscope.plots.theme import MARKERS, MUTED, Picture, colour, line, sheet, wrap

INCHES = 1.6  # of one picture
DECADES = 1e-3  # lower end of a column's colours, as a share of its maximum
BRIGHT = 99.5  # percentile of the absolute values that is drawn at full strength


@dataclass(frozen=True)
class LinearPanel:
    """One image with what was found at it."""

    label: str  # of the model
    image: NDArray[np.uint8]  # (H, W, 3)
    rows: NDArray[Any]  # (K, 3, H, W)
    outputs: NDArray[Any]  # (K,) index of each feature
    values: NDArray[Any]  # (K,)
    pixels: NDArray[Any]  # (K,) the part of the value that pixels add
    column: NDArray[Any]  # (h, w), non-negative


@dataclass(frozen=True)
class BiasCurve:
    """Share of the biases by layer."""

    label: str
    layers: list[str]
    shares: NDArray[Any]  # (images, layers)


def draw_linear(panels: Sequence[LinearPanel]) -> Picture:
    """A line for each image: itself, the row of J of each feature as a signed picture, a column's length."""
    columns = max(len(panel.rows) for panel in panels) + 2
    with sheet(INCHES * columns + 0.4, (INCHES + 0.52) * len(panels) + 0.3, h_pad=0.05, w_pad=0.03) as figure:
        axes = figure.subplots(len(panels), columns, squeeze=False)
        for line_, panel in zip(axes, panels):
            for axis in line_:
                axis.set(xticks=[], yticks=[])
                axis.grid(visible=False)
                for spine in axis.spines.values():
                    spine.set_visible(False)
            line_[0].imshow(panel.image)
            line_[0].set_xlabel(wrap(panel.label, 20), fontsize=8, color=MUTED)
            for axis, row, output, value, pixels in zip(
                line_[1:], panel.rows, panel.outputs, panel.values, panel.pixels
            ):
                _signed(axis, row.sum(0))
                axis.set_xlabel(f"feature {output}: {value:.2g}\npixels {pixels:.2g}", fontsize=8, color=MUTED)
            largest = panel.column.max() or 1.0
            shown = np.clip(panel.column / largest, DECADES, 1)
            line_[-1].imshow(shown, cmap="magma", norm=LogNorm(DECADES, 1), interpolation="nearest")
            line_[-1].set_xlabel("answer to the central\nsquare, log scale", fontsize=8, color=MUTED)
        axes[0, 0].set_title("image", loc="center", fontsize=10)
        axes[0, 1].set_title("rows of J: + red, - blue", loc="left", fontsize=10)
        axes[0, -1].set_title("columns of J", loc="center", fontsize=10)
        return Picture(figure)


def _signed(axis: Any, values: NDArray[Any]) -> None:
    strength = float(np.percentile(np.abs(values), BRIGHT)) or 1.0
    axis.imshow(values, cmap="RdBu_r", vmin=-strength, vmax=strength, interpolation="nearest")


def draw_bias(curves: Sequence[BiasCurve]) -> Picture:
    """Mean share over the images by layer, with the range of the images."""
    with sheet(5.6, 3.1 + 0.2 * len(curves)) as figure:
        axis = figure.subplots()
        for index, one in enumerate(curves):
            x = np.arange(len(one.layers))
            axis.plot(
                x,
                100 * one.shares.mean(0),
                line(index),
                color=colour(index),
                marker=MARKERS[index % len(MARKERS)],
                markersize=5,
                label=one.label,
            )
            axis.fill_between(
                x, 100 * one.shares.min(0), 100 * one.shares.max(0), color=colour(index), alpha=0.15, linewidth=0
            )
        first = curves[0].layers
        if all(one.layers == first for one in curves) and len(first) <= 12:
            axis.set_xticks(range(len(first)), first, rotation=30 if max(map(len, first)) > 6 else 0)
        else:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.set_xlabel("layer")
        axis.set_ylim(0, 100)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axis.set_ylabel("share of the biases")
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.24), borderaxespad=0)
        return Picture(figure)
