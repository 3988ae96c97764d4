"""`convscope report`: runs and results side by side, as one HTML file and as Markdown, CSV or LaTeX."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from convscope.core.errors import UserError
from convscope.core.files import write_bytes
from convscope.core.log import info
from convscope.core.results import EvalResult, load_samples
from convscope.plots.curves import draw_loss
from convscope.report.compare import (
    Row,
    cautions,
    comparison,
    differences,
    flatten,
    model_name,
    paired,
    paired_table,
)
from convscope.report.html import Image, KeyValues, Part, Section, Text, write_report
from convscope.report.sources import RunFiles, expand, read_run
from convscope.report.tables import Table
from convscope.report.texts import FORMATS, Tasks

SUFFIXES = {".html": "html", ".htm": "html", ".md": "markdown", ".csv": "csv", ".tex": "latex"}


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """Compare runs: results with their intervals, paired differences, loss curves, pictures."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, folders of runs (a sweep), results folders or result files."""
    output: tuple[Path, ...] = (Path("report.html"),)
    """Files to write: .html is the page; .md, .csv and .tex have the tables."""
    title: str = "Comparison of runs"
    """Heading of the page."""
    format: Literal["markdown", "csv", "latex"] = "markdown"
    """How the tables are printed; csv has one line a figure, latex needs the package booktabs."""

    def __post_init__(self) -> None:
        if unknown := [path for path in self.output if path.suffix not in SUFFIXES]:
            raise UserError(f"--output {unknown[0]}: a report is written to .html, .md, .csv or .tex")


def run(config: ReportCommand) -> None:
    """Write the files and print the tables.

    Raises:
        UserError: nothing given, or a file that is missing or malformed.
    """
    if not config.runs:
        raise UserError("report: give at least one run directory, folder of runs, results folder or result file")
    runs = [read_run(path) for path in expand(config.runs)]
    tasks = by_task(runs)
    for path in config.output:
        kind = SUFFIXES[path.suffix]
        if kind == "html":
            write_report(path, config.title, [_overview(runs, tasks), *map(_run_section, runs)])
        else:
            write_bytes(path, FORMATS[kind](tasks).encode())
    print(FORMATS[config.format](tasks), end="")
    for line in notes(tasks):
        info(f"note: {line}")
    info(f"report: {', '.join(map(str, config.output))}")


def by_task(runs: Sequence[RunFiles]) -> Tasks:
    """Every result of every run, grouped by task; a run with several of one task is named with the file's name."""
    tasks: dict[str, list[Row]] = {}
    for each in runs:
        of_task = [result.task for result in each.results.values()]
        for path, result in each.results.items():
            name = each.label if of_task.count(result.task) == 1 else f"{each.label} ({path.stem})"
            tasks.setdefault(result.task, []).append(Row(name, result, load_samples(path, result)))
    return tasks


def notes(tasks: Tasks) -> list[str]:
    """What has to be known before figures are compared."""
    return [line for rows in tasks.values() for line in (*differences(rows), *cautions(rows))]


def _overview(runs: Sequence[RunFiles], tasks: Tasks) -> Section:
    parts: list[Part] = [Text(line, warning=True) for line in notes(tasks)]
    for rows in tasks.values():
        parts += [comparison(rows), *(paired_table(found) for found in [paired(rows)] if found)]
    curves = {each.label: each.loss for each in runs if each.loss is not None}
    if len(curves) > 1:
        parts.append(Image(draw_loss(curves).render("svg"), "Pretraining loss.", f"Loss curves of {', '.join(curves)}"))
    if not parts:
        parts.append(Text("None of these runs holds results yet."))
    return Section("Results", parts)


def _run_section(each: RunFiles) -> Section:
    parts: list[Part] = []
    if each.loss is not None:
        steps, losses = each.loss
        caption = f"Loss over {steps[-1]} steps; last value {losses[-1]:.4g}."
        parts.append(Image(draw_loss({each.label: each.loss}).render("svg"), caption, f"Loss curve of {each.label}"))
    for path, result in each.results.items():
        rows = [[name, figure, figure.n] for name, figure in result.figures.items()]
        parts.append(Table(["figure", "value", "samples"], rows, f"{result.task} of {model_name(result)}"))
        mine = [picture for picture in each.pictures if picture.stem.startswith(path.stem)]
        parts += [_picture(picture) for picture in mine]
        parts.append(measured_how(path, result))
    shown = {p for path in each.results for p in each.pictures if p.stem.startswith(path.stem)}
    parts += [_picture(picture) for picture in each.pictures if picture not in shown]
    for summary, nested in (("Settings of the run", each.config), ("Environment", each.environment)):
        if nested:
            parts.append(KeyValues(flatten(nested), summary))
    return Section(each.label, parts)


def measured_how(path: Path, result: EvalResult) -> KeyValues:
    """Protocol, model, data and preprocessing of a result file, folded away."""
    values = {"protocol": result.protocol, "seed": result.seed}
    for name in ("model", "data", "preprocessing"):
        values |= flatten(getattr(result, name), f"{name}.")
    return KeyValues(values, f"How {path.name} was measured")


def _picture(path: Path) -> Image:
    try:
        return Image(path.read_bytes(), path.name, f"Plot {path.stem}")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
