"""Loss over training, and figures with their intervals for several groups."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from convscope.core.results import Figure as Measured
from convscope.plots.theme import MARKERS, MUTED, Picture, colour, line, sheet

SMOOTHING_WINDOW = 0.02  # share of the curve's points that one smoothed point averages
MANY = 60  # points; a curve with fewer is drawn as it is


def draw_loss(
    curves: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], *, xlabel: str = "step", ylabel: str = "loss"
) -> Picture:
    """Loss against step for each run: faint as logged, strong as a running mean; gaps where it is not finite."""
    with sheet(5.6, 3.1) as figure:
        axis = figure.subplots()
        for index, (label, (steps, values)) in enumerate(curves.items()):
            steps, values = np.asarray(steps), np.asarray(values, dtype=float)
            long = len(values) >= MANY
            if long:
                axis.plot(steps, values, color=colour(index), alpha=0.25, linewidth=0.9)
            drawn = _running_mean(values) if long else values
            axis.plot(
                steps,
                drawn,
                line(index),
                color=colour(index),
                label=label,
                marker="o" if len(values) == 1 else None,
            )
        axis.set_xlabel(xlabel)
        axis.set_ylabel(ylabel)
        axis.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axis.xaxis.set_major_formatter(FuncFormatter(_thousands))
        if len(curves) > 1:
            axis.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=1 if len(curves) < 4 else 2, borderaxespad=0)
        return Picture(figure)


def draw_figures(
    groups: Sequence[str],
    series: Mapping[str, Sequence[Measured | None]],
    *,
    ylabel: str = "accuracy",
    percent: bool = True,
    chance: float | None = None,
) -> Picture:
    """Figures with their 95 % intervals, one position a group (a stage, say) and one colour a series.

    Args:
        groups: names along the horizontal axis.
        series: name -> one figure a group; `None` leaves a gap.
        ylabel: what the figures are.
        percent: figures are shares from 0 to 1, shown in per cent.
        chance: level of guessing, drawn as a dashed line.
    """
    scale = 100.0 if percent else 1.0
    with sheet(max(4.6, 1.1 * len(groups) + 2.2), 3.5) as figure:
        axis = figure.subplots()
        for index, (label, figures) in enumerate(series.items()):
            offset = (index - (len(series) - 1) / 2) * min(0.14, 0.6 / len(series))
            _errors(axis, index, label, offset, figures, scale)
        if chance is not None:
            axis.axhline(chance * scale, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            right = axis.get_yaxis_transform()  # x as a share of the axis, y in data units
            axis.text(1, chance * scale, "chance ", transform=right, ha="right", va="bottom", color=MUTED, fontsize=9)
        axis.set(xticks=range(len(groups)), xticklabels=groups, xlim=(-0.5, len(groups) - 0.5))
        axis.grid(axis="x", visible=False)
        axis.set_ylabel(ylabel)
        if percent:
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        if len(series) > 1:
            axis.legend(loc="upper left", bbox_to_anchor=(0, -0.14), ncols=min(len(series), 2), borderaxespad=0)
        return Picture(figure)


def _errors(axis: Any, index: int, label: str, offset: float, figures: Sequence[Measured | None], scale: float) -> None:
    known = [(place, one) for place, one in enumerate(figures) if one is not None]
    values = np.array([one.value for _, one in known])
    low = np.array([one.value if one.low is None else one.low for _, one in known])
    high = np.array([one.value if one.high is None else one.high for _, one in known])
    axis.errorbar(
        [place + offset for place, _ in known],
        values * scale,
        yerr=[np.maximum(values - low, 0) * scale, np.maximum(high - values, 0) * scale],
        fmt=MARKERS[index % len(MARKERS)],
        color=colour(index),
        markersize=6.5,
        elinewidth=1.6,
        capsize=3.5,
        label=label,
    )


def _running_mean(values: NDArray[Any]) -> NDArray[Any]:
    """Centred mean over finite neighbours, with a shorter window at both ends; NaN where there are none."""
    half = max(int(len(values) * SMOOTHING_WINDOW / 2), 2)
    finite = np.isfinite(values)
    sums, counts = (np.concatenate([[0], np.cumsum(v)]) for v in (np.where(finite, values, 0), finite))
    first = np.maximum(np.arange(len(values)) - half, 0)
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    count = counts[last] - counts[first]
    return np.where(count > 0, (sums[last] - sums[first]) / np.maximum(count, 1), np.nan)


def _thousands(value: float, _: int) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"
