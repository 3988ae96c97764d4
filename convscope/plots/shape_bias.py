"""Decisions on cue conflicts: texture or shape by category, their spread, coverage; and who errs alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from convscope.plots.theme import GRID, INK, MARKERS, MUTED, Picture, colour, line, sheet, wrap

SHAPE_FILL, TEXTURE_FILL, NEITHER_FILL = "#3d4f5f", "#a8b6c1", "#eef1f3"  # dark, middle and light in grey too
MOST_NUMBERS = 14  # observers up to which kappa is written into its cell
LABEL = 26  # letters in a line of an observer's name


@dataclass(frozen=True)
class CueSeries:
    """One observer or model."""

    label: str
    human: bool
    untrained: bool
    bias: float | None  # towards shape; None where it means nothing
    by_category: NDArray[np.float64]  # (C,), NaN without decisions
    shape: float  # shares of all decisions
    texture: float


def draw_cue_bias(
    series: Sequence[CueSeries], categories: Sequence[str], order: Sequence[int], chance: float
) -> Picture:
    """Fraction of texture decisions by category, its spread over categories, and the shares behind it.

    Args:
        series: observers.
        categories: names.
        order: the categories' numbers from the bottom row to the top one.
        chance: coverage of a guess.
    """
    below = sum(0.14 + 0.19 * (wrap(one.label, LABEL).count("\n") + 1) for one in series) + 0.75
    above = 0.29 * len(order) + 1.1
    with sheet(8.6, above + below, h_pad=0.09, w_pad=0.06) as figure:
        grid = figure.add_gridspec(2, 2, height_ratios=[above, below], width_ratios=[1, 1])
        _by_category(figure.add_subplot(grid[0, :]), series, categories, order)
        left = figure.add_subplot(grid[1, 0])
        _spread(left, series)
        _shares(figure.add_subplot(grid[1, 1], sharey=left), series, chance)
        return Picture(figure)


def draw_consistency(labels: Sequence[str], kappa: NDArray[np.float64]) -> Picture:
    """Error consistency of every two observers, by their numbers; the diagonal, which is 1, says nothing."""
    count = len(labels)
    side = max(0.52 * count, 1.6)
    shown = np.where(np.eye(count, dtype=bool), np.nan, kappa)
    with sheet(side + 3.4, side + 0.9) as figure:
        axis = figure.subplots()
        largest = max(0.5, float(np.nanmax(shown, initial=0.0)))
        image = axis.imshow(shown, cmap="Blues", vmin=0, vmax=largest)
        for i, j in np.ndindex(count, count):
            if count <= MOST_NUMBERS and np.isfinite(shown[i, j]):
                dark = shown[i, j] > 0.55 * largest
                text = f"{shown[i, j]:.2f}".replace("-0.", "-.").removeprefix("0")
                axis.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if dark else INK)
        numbers = [str(number) for number in range(1, count + 1)]
        axis.set_xticks(range(count), numbers)
        axis.set_yticks(range(count), [f"{wrap(label, LABEL)}  {number}" for label, number in zip(labels, numbers)])
        axis.tick_params(length=0)
        axis.grid(visible=False)
        for spine in axis.spines.values():
            spine.set_visible(False)
        bar = figure.colorbar(image, ax=axis, shrink=0.8, aspect=22)
        bar.set_label("error consistency (kappa)", fontsize=9.5)
        bar.outline.set_visible(False)
        return Picture(figure)


def _styles(series: Sequence[CueSeries]) -> list[dict[str, Any]]:
    """People alike, everybody else by a colour and a marker; untrained models are hollow."""
    styles: list[dict[str, Any]] = []
    others = 0
    for one in series:
        if one.human:
            styles.append({"color": INK, "marker": "o", "markerfacecolor": INK, "linestyle": "-"})
            continue
        own = colour(others)
        marker = MARKERS[(1 + others) % len(MARKERS)]
        face = "white" if one.untrained else own
        styles.append({"color": own, "marker": marker, "markerfacecolor": face, "linestyle": line(others)})
        others += 1
    return styles


def _by_category(axis: Any, series: Sequence[CueSeries], categories: Sequence[str], order: Sequence[int]) -> None:
    rows = np.arange(len(order))
    for one, style in zip(series, _styles(series)):
        if one.bias is None:
            continue
        points = {name: value for name, value in style.items() if name != "linestyle"}
        points |= {"markersize": 5.0 if one.human else 6.5, "clip_on": False}
        axis.plot(1 - one.by_category[list(order)], rows, **{**points, "linestyle": ""}, zorder=3)
        width = 1.0 if one.human else 1.6
        axis.axvline(1 - one.bias, color=style["color"], linestyle=style["linestyle"], linewidth=width, zorder=2)
        axis.plot([1 - one.bias], [-0.6], zorder=4, **points)  # at the line's foot, for those who print in grey
    axis.set(xlim=(0, 1), ylim=(-0.6, len(order) - 0.4))
    axis.set_yticks(rows, [categories[number] for number in order])
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", visible=False)
    axis.set_xlabel("fraction of texture decisions (lines: over all categories)")
    axis.xaxis.set_major_formatter(FuncFormatter(_short))
    top = axis.secondary_xaxis("top", functions=(_reversed, _reversed))
    top.set_xlabel("fraction of shape decisions")
    top.xaxis.set_major_formatter(FuncFormatter(_short))


def _spread(axis: Any, series: Sequence[CueSeries]) -> None:
    """Boxes over categories, and each observer's marker at its value over all of them."""
    for row, (one, style) in enumerate(zip(series, _styles(series))):
        edge = axis.get_yaxis_transform()  # x as a share of the axis, y in data units
        points = {name: value for name, value in style.items() if name != "linestyle"}
        axis.plot([-0.035], [row], transform=edge, clip_on=False, markersize=6.5, **points)
        if one.bias is None:
            axis.text(0.5, row, "coverage at chance", ha="center", va="center", color=MUTED, fontsize=9)
            continue
        values = 1 - one.by_category[np.isfinite(one.by_category)]
        axis.boxplot(
            values,
            positions=[row],
            orientation="horizontal",
            widths=0.55,
            whis=(0, 100),
            manage_ticks=False,
            boxprops={"color": style["color"], "linewidth": 1.3},
            whiskerprops={"color": style["color"], "linewidth": 1.1},
            capprops={"color": style["color"], "linewidth": 1.1},
            medianprops={"color": style["color"], "linewidth": 1.3},
        )
        axis.plot([1 - one.bias], [row], markersize=6.5, zorder=3, clip_on=False, **points)
    axis.set(xlim=(0, 1), ylim=(len(series) - 0.4, -0.6))
    axis.set_yticks(range(len(series)), [wrap(one.label, LABEL) for one in series])
    axis.tick_params(axis="y", length=0, pad=19, labelcolor=INK)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("fraction of texture decisions,\nspread over categories")
    axis.xaxis.set_major_formatter(FuncFormatter(_short))


def _shares(axis: Any, series: Sequence[CueSeries], chance: float) -> None:
    rows = np.arange(len(series))
    shape, texture = np.array([one.shape for one in series]), np.array([one.texture for one in series])
    neither = 1 - shape - texture
    for left, width, fill, label in (
        (np.zeros_like(shape), shape, SHAPE_FILL, "shape"),
        (shape, texture, TEXTURE_FILL, "texture"),
        (shape + texture, neither, NEITHER_FILL, "neither"),
    ):
        axis.barh(rows, width, 0.55, left=left, color=fill, label=label, edgecolor="white", linewidth=0.6)
    axis.axvline(chance, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axis.text(chance, -0.62, " chance", va="bottom", ha="left", color=MUTED, fontsize=9)
    axis.set(xlim=(0, 1))
    axis.tick_params(axis="y", labelleft=False, length=0)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("share of decisions")
    axis.xaxis.set_major_formatter(FuncFormatter(_short))
    axis.legend(loc="upper left", bbox_to_anchor=(0, -0.02), ncols=3, borderaxespad=3.2, edgecolor=GRID)


def _reversed(value: Any) -> Any:
    return 1 - value


def _short(value: float, _: int) -> str:
    return f"{value:.1f}".replace("0.", ".") if 0 < value < 0.999 else f"{value:.0f}"
