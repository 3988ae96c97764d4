"""What `analyze representation` prints and writes."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from convscope.analysis.common import aligned, write_result
from convscope.analysis.representation import PowerLaw
from convscope.core.results import EvalResult, Figure
from convscope.plots.representation import StageCurves, draw_cka, draw_stages

POOLED = "pooled"  # what the network hands its classifier
METRICS = ("rankme", "effective_rank", "nesum", "alpha", "uniformity", "alignment", "lidar", "spread", "unused")
MEANINGS = {
    "rankme": "RankMe (uncentred)",
    "effective_rank": "effective rank (centred)",
    "nesum": "NESum",
    "alpha": "alpha-ReQ",
    "uniformity": "uniformity",
    "alignment": "alignment of two views",
    "lidar": "LiDAR",
    "spread": "standard deviation by dimension x sqrt(D), mean",
    "unused": "share of dimensions with less than a hundredth of it",
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """What was measured of one layer."""

    figures: Mapping[str, Figure]  # of METRICS; those that cannot be measured are left out
    eigenvalues: Tensor  # (min(N, D),) of the covariance, descending
    law: PowerLaw | None
    verdict: tuple[str, str]
    deviations: Tensor  # (D,) standard deviation of each dimension over the images, as the network gives it

    @property
    def width(self) -> int:
        """Number of dimensions."""
        return len(self.deviations)


def table(result: EvalResult) -> str:
    """Aligned text: a row for each layer."""
    head = (
        "model",
        "layer",
        "width",
        "RankMe",
        "eff. rank",
        "NESum",
        "alpha (ranks, R2)",
        "uniformity",
        "alignment",
        "LiDAR",
    )
    lines = [head]
    previous = ""
    for row in result.details["layers"]:
        law = row["power_law"]
        alpha = f"{law['alpha']:.2f} ({law['window'][0]}-{law['window'][1]}, {law['r2']:.3f})" if law else "-"
        cells = [_cell(row["figures"].get(name)) for name in ("rankme", "effective_rank", "nesum")]
        cells += [alpha, *(_cell(row["figures"].get(name)) for name in ("uniformity", "alignment", "lidar"))]
        lines.append((row["model"] if row["model"] != previous else "", row["layer"], str(row["width"]), *cells))
        previous = row["model"]
    ends = {row["model"]: row for row in result.details["layers"]}  # the last layer of each
    verdicts = [f"{model}: {row['verdict']}: {row['because']}" for model, row in ends.items()]
    return "\n".join([*aligned(lines), *verdicts])


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def figures(layers: Mapping[tuple[str, str], Layer], *, many: bool) -> dict[str, Figure]:
    """Of the network's own pooled features; those of the stages are among the details."""
    return {
        f"{label}: {MEANINGS[name]}" if many else MEANINGS[name]: figure
        for (label, layer), one in layers.items()
        if layer == POOLED
        for name, figure in one.figures.items()
    }


def details(key: tuple[str, str], layer: Layer) -> dict[str, Any]:
    """A layer's row in the result file."""
    return {
        "model": key[0],
        "layer": key[1],
        "width": layer.width,
        "figures": {name: figure.value for name, figure in layer.figures.items()},
        "power_law": dataclasses.asdict(layer.law) if layer.law else None,
        "verdict": layer.verdict[0],
        "because": layer.verdict[1],
    }


def write(
    folder: Path,
    result: EvalResult,
    layers: Mapping[tuple[str, str], Layer],
    cka: Tensor,
    biased: list[list[float]],
) -> None:
    """Write representation.json, .npz, .csv, -cka.csv and the plots."""
    models = np.array([label for label, _ in layers])
    names = np.array([name for _, name in layers])
    arrays: dict[str, Any] = {"models": models, "layers": names, "cka": cka.numpy(), "cka_biased": np.array(biased)}
    arrays |= {f"eigenvalues_{index}": layer.eigenvalues.numpy() for index, layer in enumerate(layers.values())}
    arrays |= {f"std_{index}": layer.deviations.numpy() for index, layer in enumerate(layers.values())}
    rows = []
    for (label, name), layer in layers.items():
        for metric, figure in layer.figures.items():
            rows.append((label, name, layer.width, metric, figure.value, figure.low, figure.high, figure.n))
    header = ("model", "layer", "width", "metric", "value", "low", "high", "images")
    cka_rows = [
        (*first, *second, float(cka[i, j])) for i, first in enumerate(layers) for j, second in enumerate(layers)
    ]
    cka_header = ("model", "layer", "other model", "other layer", "unbiased linear CKA")
    write_result(
        folder,
        "representation",
        result,
        arrays=arrays,
        tables={"representation": (header, rows), "representation-cka": (cka_header, cka_rows)},
        pictures={
            "representation": draw_stages(_curves(layers)),
            "representation-cka": draw_cka(cka.numpy(), list(layers)),
        },
    )


def _curves(layers: Mapping[tuple[str, str], Layer]) -> list[StageCurves]:
    found = []
    for label in dict.fromkeys(label for label, _ in layers):
        mine = {name: layer for (owner, name), layer in layers.items() if owner == label}
        values = {
            metric: [layer.figures[metric].value if metric in layer.figures else None for layer in mine.values()]
            for metric in ("rankme", "effective_rank", "uniformity", "alignment")
        }
        last = mine[POOLED]
        law = None if last.law is None else (last.law.alpha, last.law.window, last.law.r2)
        found.append(StageCurves(label, list(mine), values, last.eigenvalues.numpy(), law))
    return found
