"""Features without labels: figures by stage, spectra, similarity of layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from convscope.plots.theme import INK, MARKERS, MUTED, Picture, colour, line, sheet, wrap

PANELS = {
    "rankme": ("RankMe", "uncentred"),
    "effective_rank": ("Effective rank", "centred"),
    "uniformity": ("Uniformity", "lower: more even"),
    "alignment": ("Alignment", "lower: crops more alike"),
}
MOST_NAMES = 40  # of layers on an axis; beyond, every model's name alone


@dataclass(frozen=True)
class StageCurves:
    """One model's figures by layer, and the spectrum of its last one."""

    label: str
    layers: list[str]
    values: Mapping[str, list[float | None]]  # of PANELS, one for each layer
    eigenvalues: NDArray[np.float64]  # descending
    law: tuple[float, tuple[int, int], float] | None  # alpha, the ranks it was fitted on, R2 of the fit


def draw_stages(models: Sequence[StageCurves]) -> Picture:
    """A panel for each figure over the layers, and the eigenvalues of the last layer's covariance."""
    shown = [name for name in PANELS if any(value is not None for one in models for value in one.values[name])]
    with sheet(7.4, 6.9 + 0.22 * len(models), h_pad=0.09, w_pad=0.07) as figure:
        grid = figure.add_gridspec(3, 2, height_ratios=[1, 1, 1.15])
        for index, name in enumerate(shown):
            _panel(figure.add_subplot(grid[divmod(index, 2)]), models, name)
        axis = figure.add_subplot(grid[2, :])
        _spectra(axis, models)
        return Picture(figure)


def _panel(axis: Any, models: Sequence[StageCurves], name: str) -> None:
    title, sense = PANELS[name]
    for index, one in enumerate(models):
        values = [np.nan if value is None else value for value in one.values[name]]
        axis.plot(
            range(len(values)),
            values,
            line(index),
            color=colour(index),
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
        )
    longest = max(models, key=lambda one: len(one.layers))
    if all(one.layers == longest.layers for one in models) and len(longest.layers) <= 8:
        names = [wrap(layer.replace(".", ". "), 9) for layer in longest.layers]
        axis.set_xticks(range(len(names)), names, rotation=35 if max(map(len, names)) > 6 else 0, fontsize=8.5)
    else:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("layer")
    axis.set_title(title)
    axis.set_ylabel(sense, fontsize=8.5, color=MUTED)


def _spectra(axis: Any, models: Sequence[StageCurves]) -> None:
    for index, one in enumerate(models):
        positive = one.eigenvalues[one.eigenvalues > one.eigenvalues.max() * 1e-12]
        share = positive / positive.sum()
        ranks = np.arange(1, len(share) + 1)
        label = one.label
        if one.law:
            alpha, (first, last), r2 = one.law
            label += f": alpha {alpha:.2f} at ranks {first}-{last}, R2 {r2:.3f}"
            fitted = np.arange(first, last + 1)
            level = np.exp(np.log(share[first - 1 : last]).mean() + alpha * np.log(fitted).mean())
            axis.plot(fitted, level * fitted**-alpha, color=INK, linewidth=3.2, alpha=0.25, solid_capstyle="butt")
        axis.plot(ranks, share, line(index), color=colour(index), label=label)
    axis.set(xscale="log", yscale="log", xlabel="rank of the eigenvalue", ylabel="share of the variance")
    axis.set_title("Covariance of the pooled features")
    axis.legend(loc="upper left", bbox_to_anchor=(0, -0.28), borderaxespad=0)


def draw_cka(cka: NDArray[np.float64], layers: Sequence[tuple[str, str]]) -> Picture:
    """Heat map of the similarity between layers; lines part the models.

    Args:
        cka: (L, L), 0 to 1; NaN is left white.
        layers: model and layer of each row.
    """
    side = min(max(0.3 * len(layers) + 2.4, 4.4), 12.0)
    models = list(dict.fromkeys(model for model, _ in layers))
    edges = np.cumsum([0, *(sum(owner == model for owner, _ in layers) for model in models)])
    with sheet(side + 0.9, side) as figure:
        axis = figure.subplots()
        image = axis.imshow(cka, vmin=0, vmax=1, cmap="cividis", interpolation="nearest")
        axis.grid(visible=False)
        names = [layer for _, layer in layers]
        if len(layers) <= MOST_NAMES:
            axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8.5)
            axis.set_yticks(range(len(names)), names, fontsize=8.5)
        else:
            axis.set(xticks=[], yticks=[])
        for edge in edges[1:-1]:
            axis.axhline(edge - 0.5, color="white", linewidth=2)
            axis.axvline(edge - 0.5, color="white", linewidth=2)
        if len(models) > 1:
            top = axis.secondary_xaxis("top")
            centres = (edges[:-1] + edges[1:] - 1) / 2
            top.set_xticks(
                centres, [wrap(model, max(6, int(5 * (b - a)))) for model, a, b in zip(models, edges, edges[1:])]
            )
            top.tick_params(length=0, labelsize=8.5)
            top.spines["top"].set_visible(False)
        for spine in axis.spines.values():
            spine.set_visible(False)
        if len(layers) <= 14:
            _write_numbers(axis, cka)
        bar = figure.colorbar(image, ax=axis, shrink=0.8, aspect=28, pad=0.02)
        bar.set_label("linear CKA (unbiased)", fontsize=9.5)
        bar.outline.set_visible(False)
        return Picture(figure)


def _write_numbers(axis: Any, cka: NDArray[np.float64]) -> None:
    for (row, column), value in np.ndenumerate(cka):
        if np.isfinite(value):
            ink = "white" if value < 0.55 else INK
            axis.text(column, row, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=7, color=ink)
