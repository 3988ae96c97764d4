"""`convscope report`: runs and results side by side, as one HTML file and as Markdown or CSV."""

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from convscope.core.errors import UserError
from convscope.core.log import info
from convscope.plots.curves import draw_loss
from convscope.report.compare import Row, comparison, differences, flatten, model_name
from convscope.report.html import Image, KeyValues, Part, Section, Text, write_report
from convscope.report.sources import RunFiles, expand, read_run
from convscope.report.tables import Table, markdown


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """Compare runs: results with their intervals, loss curves, pictures."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, folders of runs (a sweep), results folders or result files."""
    output: Path = Path("report.html")
    """The HTML file to write."""
    title: str = "Comparison of runs"
    """Heading of the page."""
    csv: bool = False
    """Print CSV (one line a figure) rather than Markdown."""


def run(config: ReportCommand) -> None:
    """Write the page and print the tables.

    Raises:
        UserError: nothing given, or a file that is missing or malformed.
    """
    if not config.runs:
        raise UserError("report: give at least one run directory, folder of runs, results folder or result file")
    runs = [read_run(path) for path in expand(config.runs)]
    tasks = by_task(runs)
    notes = [line for rows in tasks.values() for line in differences(rows)]
    write_report(config.output, config.title, [_overview(runs, tasks, notes), *map(_run_section, runs)])
    if config.csv:
        _print_csv(tasks)
    else:
        for task, rows in tasks.items():
            print(f"\n{task}\n\n{markdown(comparison(rows))}")
    for line in notes:
        info(f"note: {line}")
    info(f"report: {config.output}")


def by_task(runs: Sequence[RunFiles]) -> dict[str, list[Row]]:
    """Every result of every run, grouped by task."""
    tasks: dict[str, list[Row]] = {}
    for each in runs:
        for result in each.results.values():
            tasks.setdefault(result.task, []).append(Row(each.label, result))
    return tasks


def _overview(runs: Sequence[RunFiles], tasks: dict[str, list[Row]], notes: Sequence[str]) -> Section:
    parts: list[Part] = [Text(line, warning=True) for line in notes]
    parts += [comparison(rows) for rows in tasks.values()]
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
        values = {"protocol": result.protocol, "seed": result.seed}
        for name in ("model", "data", "preprocessing"):
            values |= flatten(getattr(result, name), f"{name}.")
        parts.append(KeyValues(values, f"How {path.name} was measured"))
    shown = {p for path in each.results for p in each.pictures if p.stem.startswith(path.stem)}
    parts += [_picture(picture) for picture in each.pictures if picture not in shown]
    for summary, nested in (("Settings of the run", each.config), ("Environment", each.environment)):
        if nested:
            parts.append(KeyValues(flatten(nested), summary))
    return Section(each.label, parts)


def _picture(path: Path) -> Image:
    try:
        return Image(path.read_bytes(), path.name, f"Plot {path.stem}")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _print_csv(tasks: dict[str, list[Row]]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["task", "run", "model", "figure", "value", "low", "high", "n"])
    for task, rows in tasks.items():
        for row in rows:
            for name, figure in row.result.figures.items():
                values = (figure.value, figure.low, figure.high, figure.n)
                writer.writerow([task, row.run, model_name(row.result), name, *values])
