"""Histograms."""

from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from convscope.plots.theme import Picture, colour, sheet

MOST_BARS = 40  # of named bars; names below would overlap


def draw_histogram(values: Sequence[float], *, xlabel: str, log: bool = False, bins: int = 40) -> Picture:
    """How often values occur; whole numbers of a narrow range get a bar each.

    With `log` the axis is logarithmic where values span a factor of ten or more.
    """
    data = np.asarray(values, dtype=float)
    low, high = float(data.min()), float(data.max())
    edges: list[float] | int = bins
    whole = bool((data == data.round()).all())
    log = log and 0 < 10 * low <= high
    if log:
        edges = np.geomspace(low, high, bins + 1).tolist()
    elif whole and high - low < bins:
        edges = np.arange(low - 0.5, high + 1.5).tolist()
    with sheet(4.6, 2.6) as figure:
        axis = figure.subplots()
        axis.hist(data, bins=edges, color=colour(0))
        if log:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        elif whole:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel(xlabel)
        axis.set_ylabel("samples")
        return Picture(figure)


def draw_counts(counts: Sequence[tuple[str, int]], *, xlabel: str) -> Picture:
    """Counts of named things in the given order; names are left out where there are too many."""
    with sheet(max(4.6, min(len(counts), MOST_BARS) * 0.22), 2.6) as figure:
        axis = figure.subplots()
        axis.bar(range(len(counts)), [count for _, count in counts], width=0.9, color=colour(0))
        axis.grid(axis="x", visible=False)
        if len(counts) <= MOST_BARS:
            axis.set_xticks(range(len(counts)), [name for name, _ in counts], rotation=90 if len(counts) > 8 else 0)
        axis.set_xlabel(xlabel)
        axis.set_ylabel("samples")
        return Picture(figure)
