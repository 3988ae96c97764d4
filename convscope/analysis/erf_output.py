"""What `analyze erf` prints, draws and writes."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from convscope.analysis.common import Table, aligned, short_labels, steps
from convscope.analysis.erf import CURVES, ErfResult
from convscope.analysis.erf_areas import VARIANTS, Area
from convscope.analysis.receptive_field import ReceptiveField
from convscope.core.results import EvalResult, Figure
from convscope.plots.erf import ErfPanel, draw_erf, draw_sides
from convscope.plots.theme import Picture

SHOWN = 0.5  # threshold of the square drawn on the heat maps
Measured = Mapping[str, Mapping[str, ErfResult]]  # model -> stage -> what was found


def figures(measured: Measured, headline: str, thresholds: Sequence[float]) -> dict[str, Figure]:
    """The headline variant's areas; thresholds that are never met are left out."""
    found: dict[str, Figure] = {}
    for label, stage, one in _each(measured):
        for index, threshold in enumerate(thresholds):
            area, figure = one.areas[headline][index], one.intervals[index]
            if headline != "raw":
                figure = None if area is None else Figure(area.share, n=one.images)
            if figure is not None:
                found[_name(label, stage, threshold, measured)] = figure
    return found


def details(measured: Measured) -> dict[str, Any]:
    """By model and stage, all but the arrays."""
    return {label: {stage: _details(one) for stage, one in by_stage.items()} for label, by_stage in measured.items()}


def area_table(result: EvalResult) -> str:
    """Areas at every threshold in every variant as aligned text: per cent of the image and the square's side."""
    models: Mapping[str, Mapping[str, Any]] = result.details["models"]
    lines: list[tuple[str, ...]] = [("model", "stage", "t", *VARIANTS)]
    told: list[str] = []
    for label, by_stage in models.items():
        for stage, one in by_stage.items():
            for index, threshold in enumerate(result.details["thresholds"]):
                cells = [_cell(one["areas"][variant][index]) for variant in VARIANTS]
                figure = result.figures.get(_name(label, stage, threshold, models))
                if figure and figure.low is not None and figure.high is not None:
                    cells[1] += f" [{figure.low:.2%}, {figure.high:.2%}]"
                head = (label, stage) if index == 0 else ("", "")
                lines.append((*head, f"{100 * threshold:g}%", *cells))
            told.append(f"{label}, {stage}: {_spread(one)}")
    what = "Area of the smallest square that holds a share t of the contribution:"
    return "\n".join([what, *aligned(lines), *told])


def arrays(measured: Measured) -> dict[str, Any]:
    """For the i-th pair of `labels` and `stages`: contributions_i (H, W), area_i, raw_i, log_i, radial_i."""
    pairs = list(_each(measured))
    found: dict[str, Any] = {
        "labels": np.array([label for label, _, _ in pairs]),
        "stages": np.array([stage for _, stage, _ in pairs]),
    }
    for index, (_, _, one) in enumerate(pairs):
        found[f"contributions_{index}"] = one.contributions.astype(np.float32)
        found[f"area_{index}"] = one.curves["raw"][0]
        found |= {f"{variant}_{index}": one.curves[variant][1] for variant in CURVES}
        found[f"radial_{index}"] = one.radial
    return found


def tables(measured: Measured, thresholds: Sequence[float]) -> dict[str, Table]:
    """erf.csv has the areas, erf-spread.csv the Gaussians beside theory, erf-curves.csv what is drawn as lines."""
    curves = ["model", "stage", "curve", "x", "y"]
    spreads = ["sigma_y", "sigma_x", "fit_sigma_y", "fit_sigma_x", "explained", "reach_y", "reach_x"]
    theory = ["least_sigma_y", "most_sigma_y", "least_sigma_x", "most_sigma_x", "no_theory_because"]
    return {
        "erf": (
            ["model", "stage", "variant", "threshold", "side", "share", "low", "high"],
            _area_rows(measured, thresholds),
        ),
        "erf-spread": (["model", "stage", *spreads, *theory], _spread_rows(measured)),
        "erf-curves": (curves, _curve_rows(measured)),
    }


def pictures(measured: Measured, headline: str, thresholds: Sequence[float]) -> dict[str, Picture]:
    """The maps with their curves, and the sides over the steps where the models are checkpoints of one run."""
    labels = list(measured)
    names = short_labels(labels)
    many = max(len(by_stage) for by_stage in measured.values()) > 1
    panels = [
        [
            _panel(
                stage if many and len(labels) == 1 else f"{name}\n{stage}" if many else name, one, headline, thresholds
            )
            for stage, one in by_stage.items()
        ]
        for name, by_stage in zip(names, measured.values())
    ]
    rows: list[list[ErfPanel | None]] = [[*panels[0]]]
    lines, of = {panel.title: panel for panel in panels[0]}, ""
    if len(labels) > 1:
        depth = max(map(len, panels))  # stages are rows, models are columns
        rows = [[column[y] if y < len(column) else None for column in panels] for y in range(depth)]
        lines, of = {name: column[-1] for name, column in zip(names, panels)}, "last stage" if many else ""
    found = {"erf": draw_erf(rows, lines, of)}
    moments = steps(labels)
    if moments is not None:
        last = [list(by_stage.values())[-1] for by_stage in measured.values()]
        sides = {
            f"{threshold:.0%}": [area.side if area else None for area in (one.areas[headline][index] for one in last)]
            for index, threshold in enumerate(thresholds)
        }
        found["erf-steps"] = draw_sides(moments, sides, "side of the square, pixels")
    return found


def _each(measured: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, Any]]:
    for label, by_stage in measured.items():
        for stage, one in by_stage.items():
            yield label, stage, one


def _name(label: str, stage: str, threshold: float, models: Mapping[str, Mapping[str, Any]]) -> str:
    many = len(models[label]) > 1
    return ": ".join(
        [*([label] if len(models) > 1 else []), *([stage] if many else []), f"area at {100 * threshold:g}%"]
    )


def _cell(area: Mapping[str, float] | None) -> str:
    return "never met" if area is None else f"{area['share']:.2%} ({area['side']:g} px)"


def _spread(one: Mapping[str, Any]) -> str:
    """Measured spread beside what the kernels' sizes allow, in words."""
    if one["sigma"] is None:
        return "no pixel contributes"
    text = f"standard deviation {_pair(one['sigma'])} px"
    if fit := one["fit"]:
        text += f", fitted Gaussian {_pair(fit['sigma'])} px ({fit['explained']:.0%} explained)"
    field = one["field"]
    if field["y"] is None:
        return f"{text}; no theoretical field: {field['reason']}"
    reach = _pair([field[axis]["reach"] for axis in "yx"])
    least, most = (_pair([field[axis]["sigma"][end] for axis in "yx"]) for end in (0, 1))
    bounds = f"{least} px" if least == most else f"{least} to {most} px, by path"
    return f"{text}; kernels reach {reach} px, uniform ones would give {bounds}"


def _pair(values: Sequence[float]) -> str:
    y, x = (f"{value:.3g}" for value in values)
    return y if y == x else f"{y} x {x}"


def _details(one: ErfResult) -> dict[str, Any]:
    return {
        "images": one.images,
        "token": one.token,
        "token_centre": one.token_centre,
        "centroid": one.centroid,
        "centre": one.centre,
        "sigma": one.sigma,
        "fit": one.fit and dataclasses.asdict(one.fit),
        "field": dataclasses.asdict(one.field),
        "bf16_change": one.bf16_change,
        "areas": {name: [area and dataclasses.asdict(area) for area in row] for name, row in one.areas.items()},
    }


def _area_rows(measured: Measured, thresholds: Sequence[float]) -> Iterator[list[Any]]:
    for label, stage, one in _each(measured):
        for variant in VARIANTS:
            for index, threshold in enumerate(thresholds):
                area = one.areas[variant][index]
                interval = one.intervals[index] if variant == "raw" else None
                ends = (interval.low, interval.high) if interval else (None, None)
                size = (area.side, area.share) if area else (None, None)
                yield [label, stage, variant, threshold, *size, *ends]


def _spread_rows(measured: Measured) -> Iterator[list[Any]]:
    for label, stage, one in _each(measured):
        fit = (*one.fit.sigma, one.fit.explained) if one.fit else (None, None, None)
        yield [label, stage, *(one.sigma or (None, None)), *fit, *_theory(one.field)]


def _theory(field: ReceptiveField) -> list[Any]:
    if field.y is None or field.x is None:
        return [None] * 6 + [field.reason]
    return [field.y.reach, field.x.reach, *field.y.sigma, *field.x.sigma, None]


def _curve_rows(measured: Measured) -> Iterator[list[Any]]:
    for label, stage, one in _each(measured):
        for variant in CURVES:
            for x, y in zip(*one.curves[variant]):
                yield [label, stage, f"{variant} share over area", x, y]
        for distance, value in enumerate(one.radial):
            yield [label, stage, "mean contribution over distance", distance, value]


def _panel(title: str, one: ErfResult, headline: str, thresholds: Sequence[float]) -> ErfPanel:
    nearest = int(np.argmin([abs(t - SHOWN) for t in thresholds]))
    area: Area | None = one.areas[headline][nearest]
    height, width = one.contributions.shape
    centre = (height // 2, width // 2) if headline == "official" else one.centre
    notes = []
    if area is not None:
        notes.append(f"square: {thresholds[nearest]:.0%} of the total, side {area.side:g} px")
    if one.field.y is not None and one.field.x is not None:
        notes.append(f"kernels reach {_pair((one.field.y.reach, one.field.x.reach))} px")
    return ErfPanel(
        title,
        one.contributions,
        one.curves,
        one.radial,
        None if one.fit is None else float(np.mean(one.fit.sigma)),
        None if area is None else (*centre, area.side),
        "\n".join(notes),
    )
