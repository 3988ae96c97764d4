"""Effective receptive fields side by side, on one logarithmic colour scale, with curves of area and distance."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from convscope.plots.theme import MUTED, Picture, sheet, stroke, wrap

Array = NDArray[np.float64]
COLUMNS = 4
DECADES = 1e-4  # the colour scale's lower end, as a share of each map's maximum
LOWEST = 1e-6  # of the profile over the distance
MARKED = (0.2, 0.5, 0.99)
FITTED = 2  # lines up to which the fitted Gaussians are drawn too
ZOOMED = 0.1  # a square smaller than this share of the image's side is shown enlarged as well


@dataclass(frozen=True)
class ErfPanel:
    """One map with its curves."""

    title: str
    contributions: Array  # (H, W), non-negative
    curves: Mapping[str, tuple[Array, Array]]  # "raw", "log": share of the area, share of the contribution
    radial: Array  # (D,), mean contribution at a distance of 0, 1, ... pixels; 0 where nothing lies
    gaussian: float | None = None  # fitted sigma in pixels, of the profile over the distance
    square: tuple[float, float, float] | None = None  # centre y, centre x, side in pixels; drawn over the map
    note: str = ""  # below the map


def draw_erf(rows: Sequence[Sequence[ErfPanel | None]], lines: Mapping[str, ErfPanel], of: str = "") -> Picture:
    """Heat maps, each divided by its maximum, above share of contribution over area (raw, log) and over distance.

    Args:
        rows: of maps, None for an empty place; a single row is broken where it is long.
        lines: the panels whose curves are drawn, by the name in the legend.
        of: what the curves are of, where that is not all of the maps.
    """
    if len(rows) == 1:
        rows = [rows[0][start : start + COLUMNS] for start in range(0, len(rows[0]), COLUMNS)]
    columns = max(map(len, rows))
    width = max(2.6 * columns + 0.9, 9.2)
    legend = len(lines) > 1
    with sheet(width, 3.2 * len(rows) + 3.0 + 0.24 * len(lines) * legend, h_pad=0.07, w_pad=0.07) as figure:
        halves: Any = figure.subfigures(2, 1, height_ratios=[3.2 * len(rows), 3.0 + 0.24 * len(lines) * legend])
        top, bottom = halves
        alone = columns == 1  # in the middle third, so that the colour bar stands beside it
        grid = top.add_gridspec(len(rows), 3 if alone else columns)
        axes, image = [], None
        for y, row in enumerate(rows):
            for x, panel in enumerate(row):
                if panel is None:
                    continue
                axes.append(top.add_subplot(grid[y, 1 if alone else x]))
                image = _heat_map(axes[-1], panel)
        bar = top.colorbar(image, ax=axes, shrink=0.8, aspect=26 * len(rows), pad=0.015, panchor=(0.5, 0.5))
        bar.set_label("contribution / maximum", fontsize=9.5)
        bar.outline.set_visible(False)
        _lines(bottom, lines, of)
        return Picture(figure)


def draw_sides(steps: Sequence[int], sides: Mapping[str, Sequence[float | None]], ylabel: str) -> Picture:
    """A side over the training steps, a line for each threshold; gaps where the threshold was never met."""
    with sheet(6.4, 3.6) as figure:
        axis = figure.subplots()
        order = np.argsort(steps)
        for index, (name, values) in enumerate(sides.items()):
            drawn = np.array([np.nan if value is None else value for value in values])[order]
            axis.plot(np.array(steps)[order], drawn, label=name, **stroke(index))
        axis.set(xlabel="training step", ylabel=ylabel)
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, title="share held")
        return Picture(figure)


def _heat_map(axis: Any, panel: ErfPanel) -> Any:
    shown = np.clip(panel.contributions / (panel.contributions.max() or 1.0), DECADES, 1.0)
    style = {"cmap": "magma", "norm": LogNorm(DECADES, 1.0), "interpolation": "nearest"}
    image = axis.imshow(shown, **style)
    axis.set_title(wrap(panel.title, 26), fontsize=9.5, loc="center")
    axis.set_xlabel(panel.note, fontsize=8.5, color=MUTED)
    _bare(axis)
    if panel.square is None:
        return image
    y, x, side = panel.square
    height, width = shown.shape
    axis.add_patch(_frame(y, x, side))
    axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    if side < ZOOMED * min(height, width):
        inset = axis.inset_axes((0.62, 0.62, 0.36, 0.36))
        inset.imshow(shown, **style)
        inset.add_patch(_frame(y, x, side))
        reach = max(1.5 * side, 6.0)
        inset.set(xlim=(x - reach, x + reach), ylim=(y + reach, y - reach))
        _bare(inset)
        for spine in inset.spines.values():
            spine.set(visible=True, edgecolor="white", linewidth=0.8)
        axis.indicate_inset_zoom(inset, edgecolor="white", linewidth=0.6)
    return image


def _bare(axis: Any) -> None:
    axis.set(xticks=[], yticks=[])
    axis.grid(visible=False)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _frame(y: float, x: float, side: float) -> Rectangle:
    outline = [withStroke(linewidth=2.6, foreground="black")]  # bright maps need an edge too
    corner = (x - side / 2, y - side / 2)
    return Rectangle(corner, side, side, fill=False, edgecolor="white", linewidth=1.2, path_effects=outline)


def _lines(figure: Any, lines: Mapping[str, ErfPanel], of: str) -> None:
    raw, log, radial = figure.subplots(1, 3)
    for axis, variant, title in ((raw, "raw", "Contribution"), (log, "log", "Its logarithm (3 decades)")):
        _shares(axis, [panel.curves[variant] for panel in lines.values()])
        axis.set_title(title, fontsize=9.5)
    raw.set_ylabel("share inside the square")
    for index, (panel, profile) in enumerate(zip(lines.values(), map(_profile, lines.values()))):
        if np.isnan(profile).all():  # no pixel contributes
            continue
        style = stroke(index, len(profile))
        radial.plot(np.arange(len(profile)), profile, **style)
        if panel.gaussian and len(lines) <= FITTED:
            radial.plot(*_gaussian(panel.gaussian, profile), color=style["color"], linewidth=5, alpha=0.25)
    radial.set(yscale="log", ylim=(LOWEST, 1.6), xlim=(0, None), xlabel="distance from the centre, pixels")
    if len(lines) <= FITTED:
        radial.set_xlabel("distance from the centre, pixels\n(broad band: fitted Gaussian)")
    radial.set_title("Mean contribution / maximum", fontsize=9.5)
    if len(lines) > 1:
        handles, names = raw.get_lines()[: len(lines)], [f"{name}{of and f', {of}'}" for name in lines]
        columns = 1 if max(map(len, names)) > 48 or len(names) < 3 else 2
        figure.legend(handles, names, loc="outside lower left", ncols=columns)


def _shares(axis: Any, curves: Sequence[tuple[Array, Array]]) -> None:
    floor = 1.0
    for index, curve in enumerate(curves):
        area, share = (np.asarray(values) * 100 for values in curve)
        floor = min(floor, float(area[area > 0].min(initial=1.0)))
        axis.plot(area, share, **stroke(index, len(area)))
    for threshold in MARKED:
        axis.axhline(threshold * 100, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
    axis.set_xscale("log")
    axis.set(xlim=(floor, 100), ylim=(0, 103), yticks=[0, 20, 50, 99])
    percent = FuncFormatter(lambda value, _: f"{value:g} %")
    axis.xaxis.set_major_formatter(percent)
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(percent)
    axis.tick_params(axis="x", labelsize=8.5)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("area of the square / image")


def _profile(panel: ErfPanel) -> Array:
    """The profile over its maximum; what is below the axis is left out."""
    shown = np.asarray(panel.radial / (panel.radial.max() or 1.0))
    return np.where(shown > LOWEST, shown, np.nan)


def _gaussian(sigma: float, profile: Array) -> Iterator[Array]:
    """Distances and heights of a Gaussian whose sum over the plane is the profile's."""
    distance = np.arange(len(profile), dtype=np.float64)
    rings = np.maximum(2 * np.pi * distance, 1.0)
    height = float(np.nansum(profile * rings)) / (2 * np.pi * sigma**2)
    values = height * np.exp(-(distance**2) / (2 * sigma**2))
    yield distance[values > LOWEST]
    yield values[values > LOWEST]
