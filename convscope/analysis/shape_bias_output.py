"""Files and tables of cue conflicts."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convscope.analysis.common import aligned, write_result
from convscope.analysis.shape_bias import Consistency, Row, category_order
from convscope.core.results import EvalResult, Figure
from convscope.plots.shape_bias import CueSeries, draw_consistency, draw_cue_bias


@dataclasses.dataclass(frozen=True)
class CueReport:
    """Everything that was measured."""

    rows: Mapping[str, Row]
    categories: Sequence[str]
    what: str  # "shape bias", or "cue preference"
    consistency: Consistency | None = None

    @property
    def chance(self) -> float:
        """Coverage of a guess."""
        return 2 / len(self.categories)


def figures(report: CueReport) -> dict[str, Figure]:
    """Bias, coverage and accuracies of every row; a bias that means nothing is left out."""
    found: dict[str, Figure] = {}
    for label, row in report.rows.items():
        cues, prefix = row.cues, f"{label}: " if len(report.rows) > 1 else ""
        named = {
            report.what: cues.bias,
            "coverage": cues.coverage,
            "shape accuracy": cues.shape,
            "texture accuracy": cues.texture,
        }
        found |= {f"{prefix}{name}": figure for name, figure in named.items() if figure is not None}
    return found


def details(report: CueReport) -> dict[str, Any]:
    """What stands behind the figures; null where there is no number, with the reason."""
    name = report.what.replace(" ", "_")
    rows = {}
    for label, row in report.rows.items():
        cues = row.cues
        by_category = dict(zip(report.categories, (_number(value) for value in cues.by_category)))
        reason = {f"no_{name}": cues.reason} if cues.bias is None else {}
        rows[label] = {
            "kind": row.kind,
            name: None if cues.bias is None else cues.bias.value,
            **reason,
            "stimuli": cues.stimuli,
            "by_category": by_category,
            **row.details,
        }
    found: dict[str, Any] = {"chance_coverage": report.chance, "rows": rows}
    if report.consistency is not None:
        found["error_consistency"] = {
            "labels": list(report.rows),
            "kappa": [[_number(value) for value in line] for line in report.consistency.kappa],
            "stimuli": report.consistency.stimuli.tolist(),
        }
    return found


def table(report: CueReport) -> str:
    """One line an observer, as aligned text."""
    people = [index for index, row in enumerate(report.rows.values()) if row.kind == "human"]
    kappa = people and report.consistency is not None
    header = ("", "head", report.what, "coverage", "shape", "texture")
    lines: list[tuple[str, ...]] = [(*header, "kappa with people") if kappa else header]
    for index, (label, row) in enumerate(report.rows.items()):
        cues = row.cues
        shares = [_interval(figure) for figure in (cues.coverage, cues.shape, cues.texture)]
        bias = "- (coverage at chance)" if cues.bias is None else _interval(cues.bias, 4)
        alike = [_kappa_with(report.consistency, index, people)] if kappa and report.consistency else []
        lines.append((label, str(row.details.get("head", row.kind)), bias, *shares, *alike))
    return "\n".join(aligned(lines))


def write(folder: Path, task: str, result: EvalResult, report: CueReport) -> list[str]:
    """Write TASK.json, .npz, .csv and the plots; the names of the files."""
    order = category_order(report.rows, len(report.categories))
    series = [
        CueSeries(
            label,
            row.kind == "human",
            row.kind == "untrained",
            None if row.cues.bias is None else row.cues.bias.value,
            row.cues.by_category,
            row.cues.shape.value,
            row.cues.texture.value,
        )
        for label, row in report.rows.items()
    ]
    pictures = {task: draw_cue_bias(series, report.categories, order, report.chance)}
    if report.consistency is not None:
        pictures[f"{task}-consistency"] = draw_consistency(list(report.rows), report.consistency.kappa)
    header = ("observer", "kind", "category", "texture_fraction", "low", "high", "coverage", "shape", "texture")
    tables = {task: (header, _rows(report))}
    return write_result(folder, task, result, arrays=_arrays(report), tables=tables, pictures=pictures)


def _arrays(report: CueReport) -> dict[str, Any]:
    arrays: dict[str, Any] = {
        "labels": np.array(list(report.rows)),
        "categories": np.array(report.categories),
        "by_category": np.stack([row.cues.by_category for row in report.rows.values()]),
    }
    for index, row in enumerate(report.rows.values()):
        if row.answers is not None:
            arrays[f"stimuli_{index}"] = np.array(row.answers.keys)
            arrays[f"shape_{index}"], arrays[f"texture_{index}"] = row.answers.shape, row.answers.texture
            arrays[f"decisions_{index}"] = row.answers.decisions
        if row.scores is not None:
            arrays[f"scores_{index}"] = row.scores
    if report.consistency is not None:
        arrays |= {"kappa": report.consistency.kappa, "kappa_stimuli": report.consistency.stimuli}
    return arrays


def _rows(report: CueReport) -> Iterator[list[Any]]:
    """What the plots show: a row for each observer and category, and one for all of them."""
    for label, row in report.rows.items():
        cues, bias = row.cues, row.cues.bias
        whole: list[Any] = ["", "", ""]
        if bias is not None and bias.low is not None and bias.high is not None:
            whole = [1 - bias.value, 1 - bias.high, 1 - bias.low]
        yield [label, row.kind, "all", *whole, cues.coverage.value, cues.shape.value, cues.texture.value]
        for name, value in zip(report.categories, cues.by_category):
            known = bias is not None and math.isfinite(value)
            yield [label, row.kind, name, 1 - value if known else "", *[""] * 5]


def _kappa_with(consistency: Consistency, index: int, people: Sequence[int]) -> str:
    """The mean error consistency of one observer with people, itself left out."""
    values = [consistency.kappa[index, person] for person in people if person != index]
    known = [value for value in values if math.isfinite(value)]
    return f"{np.mean(known):.3f}" if known else "-"


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _interval(figure: Figure, digits: int = 3) -> str:
    if figure.low is None or figure.high is None:
        return f"{figure.value:.{digits}f}"
    return f"{figure.value:.{digits}f} [{figure.low:.3f}, {figure.high:.3f}]"
