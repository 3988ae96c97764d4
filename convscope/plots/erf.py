"""Effective receptive fields side by side, on one logarithmic colour scale, with the curves of area."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import NDArray

from convscope.plots.theme import MUTED, Picture, colour, line, sheet, wrap

COLUMNS = 4
DECADES = 1e-4  # the colour scale's lower end, as a share of each map's maximum
MARKED = (0.2, 0.5, 0.99)


@dataclass(frozen=True)
class ErfPanel:
    """One model's map and curve."""

    label: str
    contributions: NDArray[np.float64]  # (H, W), non-negative
    curve: tuple[NDArray[np.float64], NDArray[np.float64]]  # share of the area, share of the contribution
    square: tuple[float, float, float] | None = None  # centre y, centre x, side in pixels; drawn over the map
    note: str = ""  # what the square holds, below the map


def draw_erf(panels: Sequence[ErfPanel]) -> Picture:
    """Heat maps, each divided by its maximum, above the share of contribution against the share of area."""
    columns = min(len(panels), COLUMNS)
    rows = -(-len(panels) // columns)
    with sheet(max(2.6 * columns + 0.9, 4.8), 3.25 * rows + 3.1, h_pad=0.09) as figure:
        grid = figure.add_gridspec(rows + 1, columns, height_ratios=[3.25] * rows + [2.6])
        axes = [figure.add_subplot(grid[divmod(index, columns)]) for index in range(len(panels))]
        for axis, panel in zip(axes, panels):
            image = _heat_map(axis, panel)
        bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=28, pad=0.015, panchor=(0.5, 0.5))
        bar.set_label("contribution / maximum", fontsize=9.5)
        bar.outline.set_visible(False)
        _curves(figure.add_subplot(grid[rows, :]), panels)
        return Picture(figure)


def _heat_map(axis: Any, panel: ErfPanel) -> Any:
    largest = panel.contributions.max()
    shown = np.clip(panel.contributions / (largest or 1.0), DECADES, 1.0)
    image = axis.imshow(shown, cmap="magma", norm=LogNorm(DECADES, 1.0), interpolation="nearest")
    axis.set_title(wrap(panel.label, 26), fontsize=9.5, loc="center")
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel(panel.note, fontsize=9, color=MUTED)
    for spine in axis.spines.values():
        spine.set_visible(False)
    if panel.square:
        y, x, side = panel.square
        corner = (x - side / 2, y - side / 2)
        axis.add_patch(Rectangle(corner, side, side, fill=False, edgecolor="white", linewidth=1.3))
        height, width = panel.contributions.shape
        axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    return image


def _curves(axis: Any, panels: Sequence[ErfPanel]) -> None:
    floor = 1.0
    for index, panel in enumerate(panels):
        area, share = (np.asarray(values) * 100 for values in panel.curve)
        floor = min(floor, float(area[area > 0].min(initial=1.0)))
        axis.plot(area, share, line(index), color=colour(index), label=panel.label)
    for threshold in MARKED:
        axis.axhline(threshold * 100, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
    axis.set_xscale("log")
    axis.set(xlim=(floor, 100), ylim=(0, 103), yticks=[0, 20, 50, 99])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("area of the centred square, share of the image")
    axis.set_ylabel("contribution inside")
    if len(panels) > 1:
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.22), ncols=1 if len(panels) < 4 else 2, borderaxespad=0)
