"""How far filters lie apart: between models, along the depth and along the training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from convscope.plots.theme import COLOURS, INK, MUTED, Picture, colour, sheet, wrap

Array = NDArray[Any]
HATCHES = ("", "///", "...", "\\\\\\", "xxx")
WRITTEN = 10  # rows up to which every cell of the heat map has its number


@dataclass(frozen=True)
class DepthBars:
    """One model's drift in each tenth of its depth; NaN where it has no layer there."""

    label: str
    whole: Array  # (10,), from all of its filters
    first: Array  # (10,), from the same tenth of the first model


def draw_drift(
    labels: Sequence[str], matrix: Array, boxes: Mapping[str, Array], *, sort: bool = True, numbered: bool = True
) -> Picture:
    """Heat map of the drift of each pair above box plots of groups of pairs.

    Args:
        labels: names of the rows.
        matrix: symmetric (m, m); NaN where there is nothing to compare.
        boxes: drifts of a group of pairs, by the group's name.
        sort: the row that is nearest to all others comes first; else rows keep their order.
        numbered: columns have the rows' numbers; else their names, which have to be short.
    """
    order = np.argsort(np.nanmean(matrix, axis=0), kind="stable") if sort else np.arange(len(labels))
    shown = matrix[np.ix_(order, order)]
    side = max(0.48 * len(labels), 1.9)
    with sheet(side + 4.6, side + 0.42 * len(boxes) + 1.5, h_pad=0.08) as figure:
        top, bottom = figure.subplots(2, 1, height_ratios=[side, 0.42 * len(boxes) + 0.5])
        _heat_map(figure, top, [labels[i] for i in order], shown, numbered)
        names = list(boxes)
        _boxes(bottom, [boxes[name] for name in names])
        bottom.set_yticks(range(1, len(names) + 1), [wrap(name, 34) for name in names], color=INK, fontsize=9)
        bottom.invert_yaxis()
        bottom.set_xlim(left=0)
        bottom.grid(axis="y", visible=False)
        bottom.set_xlabel("drift D of pairs within a group (diamond: mean)")
        return Picture(figure)


def _boxes(axis: Any, groups: Sequence[Array]) -> None:
    mean = {"marker": "D", "markersize": 4, "markerfacecolor": "white", "markeredgecolor": INK}
    outliers = {"marker": ".", "markersize": 4, "markeredgecolor": MUTED}
    drawn = axis.boxplot(
        groups,
        orientation="horizontal",
        widths=0.55,
        patch_artist=True,
        showmeans=True,
        medianprops={"color": INK},
        meanprops=mean,
        flierprops=outliers,
    )
    for patch in drawn["boxes"]:
        patch.set(facecolor=COLOURS[5], edgecolor=MUTED)


def _heat_map(figure: Any, axis: Any, labels: Sequence[str], matrix: Array, numbered: bool) -> None:
    largest = float(np.nanmax(matrix, initial=0.0)) or 1.0
    image = axis.imshow(matrix, cmap="magma", vmin=0, vmax=largest)
    axis.set_facecolor("#d5dade")
    numbers = [str(i + 1) for i in range(len(labels))]
    names = [f"{wrap(each, 34)}  {number}" for number, each in zip(numbers, labels)] if numbered else labels
    axis.set_xticks(range(len(labels)), numbers if numbered else labels, fontsize=9)
    axis.set_yticks(range(len(labels)), names, color=INK, fontsize=9)
    axis.tick_params(length=0)
    axis.grid(visible=False)
    for spine in axis.spines.values():
        spine.set_visible(False)
    if len(labels) <= WRITTEN:
        for (y, x), value in np.ndenumerate(matrix):
            if not np.isnan(value):
                dark = value < 0.65 * largest
                axis.text(x, y, written(value), ha="center", va="center", fontsize=7.5, color="white" if dark else INK)
    bar = figure.colorbar(image, ax=axis, aspect=18, pad=0.02)
    bar.set_label("drift D, nats", fontsize=9.5)
    bar.outline.set_visible(False)


def written(value: float) -> str:
    """A drift in a narrow cell: two significant digits, and no more than three decimals."""
    return "0" if value < 0.0005 else f"{value:.3f}" if value < 0.1 else f"{value:.2g}"


def draw_depth(bars: Sequence[DepthBars]) -> Picture:
    """Drift in each tenth of the depth: from the model's own filters, and from the first model's."""
    several = len(bars) > 1
    with sheet(7.4, (4.6 if several else 2.7) + 0.2 * len(bars)) as figure:
        axes = figure.subplots(2 if several else 1, 1, sharex=True, squeeze=False)[:, 0]
        width = 0.84 / len(bars)
        tenths = np.arange(len(bars[0].whole))
        for index, one in enumerate(bars):
            at = tenths - 0.42 + width * (index + 0.5)
            look = {
                "color": colour(index),
                "edgecolor": "white",
                "linewidth": 0.5,
                "hatch": HATCHES[index % len(HATCHES)],
            }
            axes[0].bar(at, one.whole, width, label=one.label, **look)
            if several and index:
                axes[1].bar(at, one.first, width, **look)
        axes[0].set_ylabel("drift from all\nof its filters")
        if several:
            axes[1].set_ylabel("drift from the\nfirst model")
        axes[-1].set_xticks(tenths, [f"{tenth / 10:g}-{(tenth + 1) / 10:g}" for tenth in tenths])
        axes[-1].set_xlabel("depth of the layers among all convolutions")
        for axis in axes:
            axis.grid(axis="x", visible=False)
        if several:
            axes[1].legend(
                *axes[0].get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(0, -0.3), borderaxespad=0
            )
        return Picture(figure)


def draw_training(
    steps: Sequence[int], first: Array, before: Sequence[float], entropy: Sequence[float], sparsity: Sequence[float]
) -> Picture:
    """Drift from the first and from the previous checkpoint, and what becomes of entropy and sparsity."""
    with sheet(7.4, 4.6) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True)
        top.plot(steps, first, color=colour(0), marker="o", markersize=4.5, label="from the first")
        top.plot(steps[1:], before[1:], color=colour(1), marker="s", markersize=4.5, label="from the one before")
        top.set_ylabel("drift D, nats")
        top.set_ylim(bottom=0)
        bottom.plot(steps, entropy, color=colour(2), marker="^", markersize=4.5, label="variance entropy")
        bottom.plot(steps, sparsity, color=colour(3), marker="D", markersize=4.5, label="sparsity")
        bottom.set_ylabel("mean over layers")
        bottom.set_xlabel("training step")
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
        bottom.set_ylim(-0.03, None)
        for axis in (top, bottom):
            axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), borderaxespad=0)
        return Picture(figure)
