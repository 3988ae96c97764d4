"""What `analyze filters` writes: figures, tables, arrays and pictures."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convscope.analysis.common import aligned
from convscope.analysis.conv_layers import Layers
from convscope.analysis.filter_drift import layer_drift
from convscope.analysis.filter_statistics import DEGENERATE, MEANINGS, Eigenfilters, Kind, is_random
from convscope.analysis.filters import Comparison, FiltersConfig, LayerStatistics, pooled_moments
from convscope.core.results import EvalResult, Figure, bootstrap

Array = NDArray[Any]
MARGINS = (0.0, 0.01, 0.02, 0.05, 0.1)  # of the sweep over what counts as random
MIN_LAYERS = 5  # fewer give no interval


@dataclasses.dataclass(frozen=True)
class FiltersReport:
    """All that was measured."""

    config: FiltersConfig
    size: str  # of the kernels that the summary and plots are of
    networks: Mapping[str, Layers]
    statistics: Mapping[str, list[LayerStatistics]]
    comparisons: Mapping[str, Comparison]  # by size, the main one first
    trajectory: bool

    @property
    def main(self) -> Comparison:
        """The comparison at the main size."""
        return self.comparisons[self.size]

    @property
    def labels(self) -> list[str]:
        """Models that have filters of the main size."""
        return list(self.main.distributions)

    def layers(self, label: str) -> list[LayerStatistics]:
        """A model's layers of the main size."""
        return [layer for layer in self.statistics[label] if layer.size == self.size]

    def entropy(self, layer: LayerStatistics) -> float:
        """The entropy that a layer is judged by."""
        return layer.entropy_normalised if self.config.normalise else layer.entropy

    def eigenfilters(self, label: str) -> Eigenfilters:
        """Of a model's normalised filters of the main size."""
        pooled = pooled_moments(self.statistics[label], self.size)
        assert pooled is not None
        return pooled.eigenfilters()

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Models whose drift is given with an interval: all pairs, or along the training."""
        if not self.trajectory:
            return list(itertools.combinations(self.labels, 2))
        along = [(self.labels[0], label) for label in self.labels[1:]]
        return list(dict.fromkeys([*along, *itertools.pairwise(self.labels)]))

    @cached_property
    def drifts(self) -> dict[tuple[str, str], tuple[Figure, Figure]]:
        """Drift of each of `pairs`, by filters and with all layers counting alike."""
        found = {}
        for first, second in self.pairs:
            one, other = (self.main.distributions[label] for label in (first, second))
            plain, balanced = (
                layer_drift(
                    one.counts,
                    other.counts,
                    self.main.bins,
                    self.main.basis.explained,
                    balanced=balanced,
                    paired=one.layers == other.layers,
                    seed=self.config.seed,
                )
                for balanced in (False, True)
            )
            found[first, second] = (plain, balanced)
        return found

    def steps(self) -> list[int]:
        """The training steps in the labels, else the positions in the order given."""
        found = [int(match.group(1)) for label in self.labels if (match := re.search(r"step-(\d+)", label))]
        return found if len(found) == len(self.labels) else list(range(len(self.labels)))


def figures(report: FiltersReport) -> dict[str, Figure]:
    """Means over a model's layers of the main size, and drifts, with intervals over layers."""
    found: dict[str, Figure] = {}
    seed = report.config.seed
    for label in report.labels:
        layers = report.layers(label)
        values = {
            "variance entropy": [report.entropy(layer) for layer in layers],
            "sparsity": [layer.sparsity for layer in layers],
            "orthogonality": [layer.orthogonality for layer in layers if layer.orthogonality is not None],
            "degenerate layers": [float(layer.kind in DEGENERATE) for layer in layers],
        }
        for name, each in values.items():
            if each:
                figure = bootstrap(np.array(each), seed=seed)
                full = figure if len(each) >= MIN_LAYERS else Figure(figure.value, n=len(each))
                found[name if len(report.statistics) == 1 else f"{label}: {name}"] = full
    for (first, second), (plain, balanced) in report.drifts.items():
        found[f"drift: {first} | {second}"] = plain
        found[f"layer-balanced drift: {first} | {second}"] = balanced
    return found


def details(report: FiltersReport) -> dict[str, Any]:
    """Settings, every layer, and what is degenerate."""
    return {
        "settings": {name: getattr(report.config, name) for name in FiltersConfig.__dataclass_fields__},
        "size": report.size,
        "bases": {
            size: {"hash": one.basis.hash, "bins": dataclasses.asdict(one.bins)}
            for size, one in report.comparisons.items()
        },
        "drifts": {
            size: {"models": list(one.distributions), "drift": one.drifts().tolist()}
            for size, one in report.comparisons.items()
        },
        "pairs": [list(pair) for pair in report.pairs],
        "models": {label: _model(report, label) for label in report.statistics},
    }


def _model(report: FiltersReport, label: str) -> dict[str, Any]:
    layers = report.statistics[label]
    network = report.networks[label]
    judged = [layer for layer in layers if layer.kind in DEGENERATE]
    return {
        "depth_from": network.depth_from,
        "unreached": list(network.unreached),
        "folded": list(network.folded),
        "degenerate": [{"layer": layer.name, "kind": layer.kind, "meaning": MEANINGS[layer.kind]} for layer in judged],
        "random layers by margin": {str(margin): _random(report, label, margin) for margin in MARGINS},
        "layers": [dict(zip(layer_header(report), row[1:])) for row in layer_rows(report, label)],
    }


def _random(report: FiltersReport, label: str, margin: float) -> int:
    """Layers of any size that are random at this margin; those that are degenerate in another way are not counted."""
    judged = [layer for layer in report.statistics[label] if layer.kind in ("sound", "random")]
    return sum(bool(is_random(report.entropy(one), one.filters, one.dimension, margin)) for one in judged)


def layer_header(report: FiltersReport) -> list[str]:
    """Names of what `layer_rows` gives, after the model's label."""
    sweep = [f"sparsity_{ratio:g}" for ratio in report.config.sparse_ratios]
    names = ["layer", "size", "depth", "depth_norm", "filters", "out_channels", "groups"]
    return [*names, "entropy", "entropy_normalised", "threshold", "sparsity", *sweep, "orthogonality", "verdict"]


def layer_rows(report: FiltersReport, label: str) -> Iterator[list[Any]]:
    """A row for each of a model's layers, of any size."""
    for one in report.statistics[label]:
        place = [label, one.name, one.size, one.depth, one.depth_norm, one.filters, one.out_channels, one.groups]
        entropies = [one.entropy, one.entropy_normalised, one.threshold]
        yield [*place, *entropies, one.sparsity, *one.sparsities, one.orthogonality, one.kind]


def summary(result: EvalResult) -> str:
    """Means, what is degenerate and what that means, and drifts, as aligned text."""
    models = result.details["models"]
    size = result.details["size"]
    lines: list[tuple[str, ...]] = [
        ("model", "layers", "filters", "entropy", "sparsity", "orthogonality", "degenerate")
    ]
    for label, model in models.items():
        layers = [layer for layer in model["layers"] if layer["size"] == size]
        prefix = "" if len(models) == 1 else f"{label}: "
        cells = [
            _cell(result.figures.get(f"{prefix}{name}")) for name in ("variance entropy", "sparsity", "orthogonality")
        ]
        bad = sum(layer["verdict"] in DEGENERATE for layer in layers)
        filters = sum(layer["filters"] for layer in layers)
        lines.append((label, str(len(layers)), f"{filters:,}", *cells, f"{bad} of {len(layers)}"))
    text = [f"{size} filters, means over layers:", *aligned(lines)]
    for label, model in models.items():
        by_kind: dict[Kind, list[str]] = {}
        for row in model["degenerate"]:
            by_kind.setdefault(row["kind"], []).append(row["layer"])
        for kind, names in by_kind.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            text.append(f"{label}: {kind}: {shown}: {MEANINGS[kind]}")
    if result.details["pairs"]:
        lines = [("drift between", "and", "by filters", "by layers")]
        for first, second in result.details["pairs"]:
            drifts = [result.figures[f"{name}: {first} | {second}"] for name in ("drift", "layer-balanced drift")]
            lines.append((first, second, *map(_cell, drifts)))
        text += ["", *aligned(lines), f"in the basis {result.details['bases'][size]['hash']} (filters.npz)"]
    return "\n".join(text)


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    interval = "" if figure.low is None else f" [{figure.low:.3f}, {figure.high:.3f}]"
    return f"{figure.value:.3f}{interval}"
