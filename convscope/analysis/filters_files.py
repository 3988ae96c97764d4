"""The files of `analyze filters`: filters.json, .npz and .csv, and a .csv and pictures for each view of the filters."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convscope.analysis.common import write_result
from convscope.analysis.filter_drift import basis_arrays
from convscope.analysis.filter_statistics import DEGENERATE
from convscope.analysis.filters_output import FiltersReport, layer_header, layer_rows
from convscope.core.results import EvalResult
from convscope.plots.filter_coefficients import DensityPanel, RidgeRow, draw_densities, draw_ridges
from convscope.plots.filter_drift import DepthBars, draw_depth, draw_drift, draw_training
from convscope.plots.filters import EigenfilterRow, LayerSeries, draw_eigenfilters, draw_layers
from convscope.plots.theme import Picture

SHOWN = 9  # components in the pictures


def write(folder: Path, result: EvalResult, report: FiltersReport) -> None:
    """Write everything, the result last."""
    rows = (row for label in report.statistics for row in layer_rows(report, label))
    components = [f"w{i}" for i in range(report.main.basis.dimension)]
    drifts = ["first", "second", "drift", "low", "high", "balanced", "balanced_low", "balanced_high"]
    write_result(
        folder,
        "filters",
        result,
        arrays=_arrays(report),
        tables={
            "filters": (["model", *layer_header(report)], rows),
            "filters-eigenfilters": (["model", "component", "explained", *components], _component_rows(report)),
            "filters-drift": (drifts, _drift_rows(report)),
            "filters-depth": (["model", "depth", "from_whole", "from_first_model"], _depth_rows(report)),
        },
        pictures={f"filters-{name}": picture for name, picture in _pictures(report)},
    )


def _arrays(report: FiltersReport) -> dict[str, Any]:
    """Bases and bins by kernel size; distributions of the main size by the model's position in `labels`."""
    arrays: dict[str, Any] = basis_arrays({size: one.basis for size, one in report.comparisons.items()})
    arrays["labels"] = np.array(report.labels)
    for size, one in report.comparisons.items():
        arrays[f"bins_{size}"] = np.array([one.bins.low, one.bins.high, one.bins.count])
        arrays[f"drift_{size}"], arrays[f"balanced_drift_{size}"] = one.drifts(), one.drifts(balanced=True)
    for index, label in enumerate(report.labels):
        own = report.main.distributions[label]
        found = report.eigenfilters(label)
        arrays[f"components_{index}"], arrays[f"explained_{index}"] = found.components, found.explained
        arrays[f"layers_{index}"], arrays[f"counts_{index}"] = np.array(own.layers), own.counts.astype(np.uint32)
        arrays[f"density_{index}"] = own.total.density.astype(np.uint32)
        arrays[f"depth_drift_{index}"] = report.main.depth_drifts(label)
    return arrays


def _component_rows(report: FiltersReport) -> Iterator[list[Any]]:
    for label in report.labels:
        found = report.eigenfilters(label)
        for component, (explained, weights) in enumerate(zip(found.explained, found.components[:SHOWN])):
            yield [label, component, explained, *weights]


def _drift_rows(report: FiltersReport) -> Iterator[list[Any]]:
    for pair, (plain, balanced) in report.drifts.items():
        yield [*pair, plain.value, plain.low, plain.high, balanced.value, balanced.low, balanced.high]


def _depth_rows(report: FiltersReport) -> Iterator[list[Any]]:
    for label in report.labels:
        whole, other = report.main.from_whole(label), report.main.from_other(label, report.labels[0])
        for tenth, values in enumerate(zip(whole, other)):
            yield [label, (tenth + 1) / len(whole), *(None if np.isnan(value) else value for value in values)]


def _pictures(report: FiltersReport) -> Iterator[tuple[str, Picture]]:
    main, labels = report.main, report.labels
    size = tuple(int(side) for side in report.size.split("x"))
    yield "layers", draw_layers([_series(report, label) for label in labels], report.size)
    rows = []
    for label in labels:
        found = report.eigenfilters(label)
        rows.append(EigenfilterRow(label, found.components[:SHOWN].reshape(-1, *size), found.explained[:SHOWN]))
    yield "eigenfilters", draw_eigenfilters(rows)
    span = (main.bins.low, main.bins.high)
    yield "coefficients", draw_ridges(_ridges(report), span, ordered=len(labels) == 1 or report.trajectory)
    panels = [DensityPanel(label, main.distributions[label].total.density) for label in labels]
    yield "density", draw_densities(panels, span)
    yield from _drift_pictures(report)
    if report.trajectory and len(labels) > 1:
        between = main.drifts()
        before = [0.0, *(float(between[i, i + 1]) for i in range(len(labels) - 1))]
        entropies = [float(np.mean([report.entropy(layer) for layer in report.layers(label)])) for label in labels]
        sparsities = [float(np.mean([layer.sparsity for layer in report.layers(label)])) for label in labels]
        yield "training", draw_training(report.steps(), between[0], before, entropies, sparsities)


def _drift_pictures(report: FiltersReport) -> Iterator[tuple[str, Picture]]:
    """None where there is one model whose layers lie in one tenth of its depth."""
    main, labels = report.main, report.labels
    depths = {label: main.depth_drifts(label) for label in labels}
    boxes = {f"depths of {label}": _pairs_of(matrix) for label, matrix in depths.items()}
    if len(labels) > 1:
        between = main.drifts()
        boxes = {"between models": _pairs_of(between), **boxes}
        yield "drift", draw_drift(labels, between, boxes, sort=not report.trajectory)
    elif len(_pairs_of(depths[labels[0]])):
        tenths = [f"{tenth / 10:g}-{(tenth + 1) / 10:g}" for tenth in range(10)]
        yield "drift", draw_drift(tenths, depths[labels[0]], boxes, sort=False, numbered=False)
    else:
        return
    bars = [DepthBars(label, main.from_whole(label), main.from_other(label, labels[0])) for label in labels]
    yield "depth", draw_depth(bars)


def _series(report: FiltersReport, label: str) -> LayerSeries:
    layers = report.layers(label)
    return LayerSeries(
        label=label,
        depth=np.array([layer.depth_norm for layer in layers]),
        entropy=np.array([report.entropy(layer) for layer in layers]),
        threshold=np.array([np.nan if layer.threshold is None else layer.threshold for layer in layers]),
        sparsity=np.array([layer.sparsity for layer in layers]),
        orthogonality=np.array([np.nan if layer.orthogonality is None else layer.orthogonality for layer in layers]),
        degenerate=np.array([layer.kind in DEGENERATE for layer in layers]),
    )


def _ridges(report: FiltersReport) -> list[RidgeRow]:
    """A row for each model, or for each tenth of the depth of a single one."""
    if len(report.labels) > 1:
        found = {label: report.main.distributions[label].total.fine for label in report.labels}
    else:
        tenths = report.main.distributions[report.labels[0]].deciles()
        found = {f"depth {i / 10:g}-{(i + 1) / 10:g}": each for i, each in enumerate(tenths) if each is not None}
    return [RidgeRow(label, counts[:SHOWN]) for label, counts in found.items()]


def _pairs_of(matrix: Any) -> Any:
    values = matrix[np.triu_indices(len(matrix), 1)]
    return values[~np.isnan(values)]
