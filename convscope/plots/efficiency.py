"""How far networks are from the latency that their arithmetic allows, and which layers keep them there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from convscope.plots.theme import GRID, INK, MARKERS, MUTED, Picture, colour, sheet, wrap

EFFICIENCIES = (1.0, 0.3, 0.1, 0.03, 0.01)  # lines of the plot without accuracies
COMPUTE: dict[str, Any] = {"facecolor": "#a9cfe6", "linewidth": 0}
MEMORY: dict[str, Any] = {"facecolor": "#f3d089", "edgecolor": "white", "hatch": "////", "linewidth": 0}


@dataclass(frozen=True)
class GapPoint:
    """A network's latencies in seconds."""

    label: str
    ideal: float
    measured: float
    accuracy: float | None = None  # per cent


@dataclass(frozen=True)
class WaterlinePanel:
    """A network's layers in the order in which they run; (L,) seconds each, 0 where there is nothing to do."""

    label: str
    compute: NDArray[np.float64]
    memory: NDArray[np.float64]
    measured: NDArray[np.float64]
    note: str  # what it comes to


def draw_gap(points: Sequence[GapPoint]) -> Picture:
    """Accuracy over ideal and measured latency; measured over ideal latency where accuracies are not known."""
    known = all(point.accuracy is not None for point in points)
    with sheet(7.0, 4.2 + 0.24 * len(points)) as figure:
        axis = figure.subplots()
        (_accuracies if known else _measured_over_ideal)(axis, points)
        axis.set_xscale("log")
        _plain_ticks(axis.xaxis, *axis.get_xlim())
        handles = [_handle(index, point) for index, point in enumerate(points)]
        if known:
            handles += [_mark("at peak arithmetic", "white"), _mark("measured", MUTED)]
        axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, -0.17), borderaxespad=0)
        return Picture(figure)


def _plain_ticks(axis: Any, low: float, high: float) -> None:
    """Numbers without exponents, as many as there is room for."""
    decades = np.log10(high / low)
    subs = (1, 1.5, 2, 3, 4, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2.5 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _handle(index: int, point: GapPoint) -> Line2D:
    marker = MARKERS[index % len(MARKERS)]
    share = f"{point.label}: {point.ideal / point.measured:.1%} of peak"
    return Line2D([], [], linestyle="", marker=marker, color=colour(index), markersize=7, label=share)


def _mark(label: str, face: str) -> Line2D:
    return Line2D(
        [], [], linestyle="", marker="o", markerfacecolor=face, markeredgecolor=MUTED, markersize=7, label=label
    )


def _accuracies(axis: Any, points: Sequence[GapPoint]) -> None:
    for index, point in enumerate(points):
        x, y = [point.ideal * 1e3, point.measured * 1e3], [point.accuracy, point.accuracy]
        axis.plot(x, y, color=colour(index), linewidth=1.4)
        for value, face in zip(x, ("white", colour(index))):
            marker = MARKERS[index % len(MARKERS)]
            axis.plot(value, y[0], marker, color=colour(index), markerfacecolor=face, markersize=8, zorder=3)
    axis.set_xlabel("latency of a batch (ms)")
    axis.set_ylabel("accuracy (%)")
    axis.margins(0.1, 0.12)


def _measured_over_ideal(axis: Any, points: Sequence[GapPoint]) -> None:
    x, y = (np.array(values) * 1e3 for values in zip(*((point.ideal, point.measured) for point in points)))
    left, right = x.min() / 2, x.max() * 2
    for efficiency in EFFICIENCIES:
        axis.plot(
            [left, right], [left / efficiency, right / efficiency], color=MUTED, linewidth=0.9, linestyle=(0, (2, 3))
        )
    for index, (one, other) in enumerate(zip(x, y)):
        axis.plot(one, other, MARKERS[index % len(MARKERS)], color=colour(index), markersize=8, zorder=3)
    axis.set_yscale("log")
    bottom, top = min(y.min() / 2, left), max(y.max() * 2, right)
    axis.set(xlim=(left, right), ylim=(bottom, top))
    for efficiency in EFFICIENCIES:  # named where the line leaves the plot
        end = min(right, top * efficiency)
        if end > left * 1.2:
            at_side = end == right
            axis.annotate(
                f"{efficiency:.0%}",
                (end, end / efficiency),
                (4, 0) if at_side else (0, 3),
                textcoords="offset points",
                ha="left" if at_side else "center",
                va="center" if at_side else "bottom",
                fontsize=8.5,
                color=MUTED,
                annotation_clip=False,
            )
    _plain_ticks(axis.yaxis, bottom, top)
    axis.set_xlabel("latency at peak arithmetic (ms)")
    axis.set_ylabel("measured latency (ms)")


def draw_waterline(panels: Sequence[WaterlinePanel]) -> Picture:
    """The least time that each layer's arithmetic and transfers need, filled to the larger, and what it took."""
    with sheet(7.4, 2.5 * len(panels) + 0.9, h_pad=0.08) as figure:
        axes = figure.subplots(len(panels), squeeze=False)[:, 0]
        for axis, panel in zip(axes, panels):
            _waterline(axis, panel)
        handles = [
            Patch(**COMPUTE, label="arithmetic bounds it: MACs / peak"),
            Patch(**MEMORY, label="memory bounds it: bytes / bandwidth"),
            Line2D([], [], color=INK, linewidth=1.3, label="waterline"),
            Line2D([], [], linestyle="", marker="o", markersize=3.5, color=colour(1), label="measured"),
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=2)
        return Picture(figure)


def _waterline(axis: Any, panel: WaterlinePanel) -> None:
    compute, memory, measured = (values * 1e6 for values in (panel.compute, panel.memory, panel.measured))
    least = np.maximum(compute, memory)
    edges = np.arange(len(least) + 1) - 0.5
    shown = np.concatenate([least[least > 0], measured[measured > 0]])
    floor = 10 ** np.floor(np.log10(np.percentile(shown, 1)))
    for bound, look in ((compute >= memory, COMPUTE), (compute < memory, MEMORY)):
        axis.bar(range(len(least)), np.where(bound, least, 0), width=1, **look)
    axis.stairs(least, edges, color=INK, linewidth=0.9 if len(least) > 60 else 1.3, baseline=None)
    axis.plot(range(len(measured)), measured, "o", color=colour(1), markersize=3.5, markeredgewidth=0)
    axis.set_yscale("log")
    axis.set(xlim=(edges[0], edges[-1]), ylim=(floor, shown.max() * 2), ylabel="time (µs)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(LogLocator(numticks=6))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="x", visible=False)
    axis.grid(axis="y", color=GRID)
    axis.set_title(wrap(panel.label, 80))
    axis.set_xlabel(panel.note, fontsize=9, color=MUTED)
