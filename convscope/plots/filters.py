"""Convolution filters: figures of each layer over its depth, and eigenfilters."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from convscope.plots.theme import INK, MARKERS, MUTED, Picture, colour, line, sheet, wrap

Array = NDArray[Any]
SIGNED_SIDE = 5  # kernels up to this side have room for a sign in every cell
MANY = 200  # layers from which medians and bands take the place of points
BANDED = 6  # models up to which bands can be told apart
BANDS = 20  # parts of the depth
UNIT_WEIGHTS = 9  # up to so many weights a filter, the colours span -1 to 1


@dataclass(frozen=True)
class LayerSeries:
    """One model's layers of one kernel size."""

    label: str
    depth: Array  # (layers,), 0 to 1
    entropy: Array  # (layers,), base 10
    threshold: Array  # (layers,), of random filters; NaN where unknown
    sparsity: Array  # (layers,), 0 to 1
    orthogonality: Array  # (layers,); NaN where undefined
    degenerate: Array  # (layers,), bool


@dataclass(frozen=True)
class EigenfilterRow:
    """One model's first principal components."""

    label: str
    filters: Array  # (components, h, w)
    explained: Array  # (components,), shares of the variance


def draw_layers(series: Sequence[LayerSeries], size: str) -> Picture:
    """Variance entropy with random filters', sparsity and orthogonality over depth; rings mark degenerate layers.

    Of very many layers, as of a database, medians and bands are drawn.
    """
    with sheet(7.4, 6.9 + 0.2 * len(series), h_pad=0.06) as figure:
        axes = figure.subplots(3, 1, sharex=True)
        for index, one in enumerate(series):
            for axis, values in zip(axes, (one.entropy, one.sparsity, one.orthogonality)):
                _series(axis, index, one, values, band=len(series) <= BANDED)
            depth, (threshold,) = _banded(one.depth, one.threshold, [50])
            if len(one.depth) < MANY:
                order = np.argsort(one.depth, kind="stable")
                depth, threshold = one.depth[order], one.threshold[order]
            axes[0].plot(depth, threshold, color=INK, linewidth=1.0, linestyle=(0, (1, 1.6)))
        height, width = (int(side) for side in size.split("x"))
        axes[0].set_ylabel("variance entropy")
        axes[0].set_ylim(-0.03, 1.06 * math.log10(height * width))
        axes[1].set_ylabel("sparsity")
        axes[1].set_ylim(-0.03, 1.03)
        axes[2].set_ylabel("orthogonality")
        axes[2].set_xlabel(f"depth of the layer among all convolutions ({size} filters)")
        axes[2].set_xlim(-0.03, 1.03)
        figure.align_ylabels(axes)
        axes[2].legend(handles=_layer_legend(series), loc="upper left", bbox_to_anchor=(0, -0.28), borderaxespad=0)
        return Picture(figure)


def _banded(depth: Array, values: Array, percentiles: Sequence[float]) -> tuple[Array, Array]:
    """Middles of the parts of the depth that have layers (b,), and percentiles of their values (p, b)."""
    place = (depth * BANDS).astype(int).clip(max=BANDS - 1)
    parts = [(i, values[(place == i) & ~np.isnan(values)]) for i in range(BANDS)]
    found = [(i, np.percentile(part, percentiles)) for i, part in parts if len(part)]
    if not found:
        return np.empty(0), np.empty((len(percentiles), 0))
    return np.array([(i + 0.5) / BANDS for i, _ in found]), np.stack([each for _, each in found], axis=1)


def _series(axis: Any, index: int, one: LayerSeries, values: Array, *, band: bool) -> None:
    order = np.argsort(one.depth, kind="stable")
    marker, shade = MARKERS[index % len(MARKERS)], colour(index)
    if len(order) >= MANY:
        middles, (low, median, high) = _banded(one.depth, values, [5, 50, 95])
        axis.plot(middles, median, line(index), color=shade, marker=marker, markersize=4.5, linewidth=1.2)
        if band:
            axis.fill_between(middles, low, high, color=shade, alpha=0.18, linewidth=0)
        return
    axis.plot(one.depth[order], values[order], line(index), color=shade, marker=marker, markersize=4.5, linewidth=1.2)
    bad = one.degenerate.astype(bool)
    ring = {"marker": "o", "s": 85, "facecolors": "none", "edgecolors": INK, "linewidths": 1.0, "zorder": 4}
    axis.scatter(one.depth[bad], values[bad], **ring)


def _layer_legend(series: Sequence[LayerSeries]) -> list[Line2D]:
    handles = [
        Line2D(
            [],
            [],
            color=colour(i),
            linestyle=line(i),
            marker=MARKERS[i % len(MARKERS)],
            markersize=4.5,
            label=one.label,
        )
        for i, one in enumerate(series)
    ]
    threshold = Line2D([], [], color=INK, linewidth=1.0, linestyle=(0, (1, 1.6)), label="as many random filters")
    ring: dict[str, Any] = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "linestyle": "none"}
    handles.append(threshold)
    if any(len(one.depth) < MANY for one in series):
        handles.append(Line2D([], [], label="degenerate layer", markeredgecolor=INK, **ring))
    if any(len(one.depth) >= MANY for one in series):
        band: dict[str, Any] = {"linewidth": 8, "color": MUTED, "alpha": 0.3}
        handles.append(Line2D([], [], label="median and 5 to 95 % of the layers, by twentieths of the depth", **band))
    return handles


def draw_eigenfilters(rows: Sequence[EigenfilterRow]) -> Picture:
    """A row of components for each model, their share of the variance beneath; a bar in a cell: a negative weight."""
    columns = max(len(row.filters) for row in rows)
    limit = 1.0
    if rows[0].filters[0].size > UNIT_WEIGHTS:
        limit = float(max(np.abs(row.filters).max() for row in rows)) or 1.0
    with sheet(max(0.86 * columns + 2.6, 4.8), 1.22 * len(rows) + 0.35) as figure:
        axes = figure.subplots(len(rows), columns, squeeze=False)
        for index, row in enumerate(rows):
            for component, axis in enumerate(axes[index]):
                if component >= len(row.filters):
                    axis.set_visible(False)
                    continue
                image = _kernel(axis, row.filters[component], limit)
                axis.set_xlabel(f"{row.explained[component]:.3f}", fontsize=9, labelpad=2)
                if index == 0:
                    axis.set_title(f"$v_{{{component}}}$", loc="center", fontsize=10)
            name = wrap(row.label, 20)
            axes[index][0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8, fontsize=9, color=INK)
        bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 2.4 / (1.22 * len(rows))), aspect=18, pad=0.015)
        bar.set_label("weight", fontsize=9.5)
        bar.outline.set_visible(False)
        return Picture(figure)


def _kernel(axis: Any, kernel: Array, limit: float) -> Any:
    image = axis.imshow(kernel, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.grid(visible=False)
    for spine in axis.spines.values():
        spine.set_visible(True)
        spine.set_color(MUTED)
        spine.set_linewidth(0.6)
    if max(kernel.shape) <= SIGNED_SIDE:
        for y, x in zip(*np.nonzero(kernel < -0.1 * limit)):
            dark = kernel[y, x] < -0.6 * limit
            axis.plot([x - 0.16, x + 0.16], [y, y], color="white" if dark else INK, linewidth=1.1)
    return image
