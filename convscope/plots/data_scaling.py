"""Accuracy over the number of labelled images, with the fitted line."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import FuncFormatter, NullLocator

from convscope.core.results import Figure as Measured
from convscope.plots.theme import MARKERS, Picture, colour, sheet


@dataclass(frozen=True)
class Curve:
    """One layer's figures by number of images, and the line intercept + slope log10(n)."""

    figures: Mapping[int, Measured]
    intercept: float
    slope: float


def draw_data_scaling(curves: Mapping[str, Curve], *, ylabel: str = "top-1 accuracy") -> Picture:
    """A curve for each label: figures with their intervals, the line dashed, images on a logarithmic axis."""
    with sheet(5.6, 3.5) as figure:
        axis = figure.subplots()
        axis.set_xscale("log")
        for index, (label, curve) in enumerate(curves.items()):
            sizes = np.array(list(curve.figures), dtype=float)
            values = np.array([one.value for one in curve.figures.values()])
            low = np.array([one.value if one.low is None else one.low for one in curve.figures.values()])
            high = np.array([one.value if one.high is None else one.high for one in curve.figures.values()])
            axis.errorbar(
                sizes,
                100 * values,
                yerr=[100 * np.maximum(values - low, 0), 100 * np.maximum(high - values, 0)],
                fmt=MARKERS[index % len(MARKERS)],
                color=colour(index),
                markersize=6,
                capsize=3,
                label=f"{label}: {100 * curve.slope:+.1f} points a decade",
            )
            line = curve.intercept + curve.slope * np.log10(sizes)
            axis.plot(sizes, 100 * line, color=colour(index), linewidth=1.2, linestyle=(0, (4, 3)))
        ticks = sorted({size for curve in curves.values() for size in curve.figures})
        axis.set_xticks(ticks, [f"{tick / 1000:g}k" if tick >= 10_000 else str(tick) for tick in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set(xlabel="train images", ylabel=ylabel)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=1, borderaxespad=0)
        return Picture(figure)
