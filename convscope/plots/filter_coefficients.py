"""Distributions of filters' coefficients: ridges by component, and the joint density of the first two."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from convscope.plots.theme import GRID, INK, MUTED, Picture, colour, sheet, wrap

Array = NDArray[Any]
COLUMNS = 4
OVERLAP = 1.55  # height of a ridge, in rows
DECADES = 1e-4  # the colour scale's lower end, as a share of each panel's maximum
FEW = 200_000  # filters, below which a panel's cells are four times as wide


@dataclass(frozen=True)
class RidgeRow:
    """One group's histograms."""

    label: str
    counts: Array  # (components, bins)


@dataclass(frozen=True)
class DensityPanel:
    """One model's joint histogram of its first two coefficients."""

    label: str
    counts: Array  # (cells of the first, cells of the second)


def draw_ridges(rows: Sequence[RidgeRow], span: tuple[float, float], *, ordered: bool = False) -> Picture:
    """Kernel density estimates, a row for each group and a column for each component, each divided by its maximum.

    Args:
        rows: groups, from top to bottom.
        span: first and last edge of the histograms, the same for all.
        ordered: shade the groups from dark to light, as they have an order.
    """
    components = rows[0].counts.shape[0]
    dark_to_light = colormaps["cividis"](np.linspace(0.05, 0.9, len(rows)))
    with sheet(1.0 * components + 2.4, 0.46 * len(rows) + 1.3) as figure:
        axis = figure.subplots()
        for component in range(components):
            axis.axvline(component + 0.5, color=GRID, linewidth=0.8, zorder=0)
            for index, row in enumerate(rows):
                shade = dark_to_light[index] if ordered else colour(index)
                density = smoothed(row.counts[component])
                x = component + 0.03 + 0.94 * (np.arange(len(density)) + 0.5) / len(density)
                height = OVERLAP * density / (density.max() or 1.0)
                order = 2 + index  # lower rows in front
                axis.fill_between(x, -index, height - index, color=shade, alpha=0.72, linewidth=0, zorder=order)
                axis.plot(x, height - index, color="white", linewidth=0.8, zorder=order)
        axis.grid(visible=False)
        axis.set(xlim=(0, components), ylim=(-len(rows) + 0.85, OVERLAP + 0.15))
        axis.set_xticks(np.arange(components) + 0.5, [f"$c_{{{component}}}$" for component in range(components)])
        axis.set_yticks(-np.arange(len(rows)), [wrap(row.label, 26) for row in rows], color=INK)
        axis.tick_params(length=0)
        axis.spines["left"].set_visible(False)
        axis.set_xlabel(f"coefficient, each from {span[0]:.2g} to {span[1]:.2g} about the line at the middle")
        return Picture(figure)


def smoothed(counts: Array) -> Array:
    """Gaussian kernel density estimate of binned values, with Silverman's bandwidth; in counts a bin."""
    total = counts.sum()
    places = np.arange(len(counts))
    mean = (counts @ places) / max(total, 1)
    deviation = np.sqrt(counts @ (places - mean) ** 2 / max(total, 1))
    bandwidth = 1.06 * deviation * max(total, 1) ** -0.2
    return np.asarray(gaussian_filter1d(counts.astype(float), max(bandwidth, 0.5), mode="constant"))


def draw_densities(panels: Sequence[DensityPanel], span: tuple[float, float]) -> Picture:
    """Logarithmic density of the first two coefficients, each panel divided by its maximum."""
    columns = min(len(panels), COLUMNS)
    rows = -(-len(panels) // columns)
    with sheet(max(2.6 * columns + 1.0, 4.4), 3.05 * rows + 0.4, h_pad=0.1) as figure:
        axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for axis, panel in zip(axes.flat, panels):
            counts = panel.counts
            if counts.sum() < FEW:
                counts = counts.reshape(len(counts) // 4, 4, -1, 4).sum(axis=(1, 3))
            share = np.clip(counts.T / max(counts.max(), 1), DECADES, 1.0)
            image = axis.imshow(
                share,
                cmap="magma",
                norm=LogNorm(DECADES, 1.0),
                origin="lower",
                extent=(*span, *span),
                interpolation="nearest",
            )
            axis.grid(visible=False)
            axis.set_title(wrap(panel.label, 26), fontsize=9.5, loc="center")
            axis.set_xlabel("$c_0$")
        for axis in axes[:, 0]:
            axis.set_ylabel("$c_1$")
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 2.4 / (2.4 * rows)), aspect=24, pad=0.015)
        bar.set_label("filters / maximum", fontsize=9.5, color=MUTED)
        bar.outline.set_visible(False)
        return Picture(figure)
