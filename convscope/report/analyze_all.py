"""`convscope analyze all`: every analysis that applies to the models, and one page of what they show."""

import csv
import dataclasses
import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import tyro

from convscope.analysis.common import load_models
from convscope.core.backbone import Backbone
from convscope.core.errors import UserError
from convscope.core.files import read_bytes
from convscope.core.log import info
from convscope.core.options import Arch, Device
from convscope.core.results import EvalResult
from convscope.report.analyses import ANALYSES, Analysis
from convscope.report.html import Image, Links, Part, Section, Text, write_report
from convscope.report.runs import measured_how
from convscope.report.sources import read_run
from convscope.report.tables import Cell, Table

MOST_ROWS = 40  # of a table in the page; all are in the files
MOST_COLUMNS = 14
DONE = "done"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllCommand:
    """Every analysis that applies, on images of its own or yours, and one report.html."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """One or more MODELs."""
    data: str = "builtin:shapes"
    """Folder of shards, or builtin:shapes."""
    split: str = "test"
    """Split to draw images from."""
    only: tuple[str, ...] = ()
    """Analyses to run, such as erf filters; all by default."""
    untrained: bool = False
    """Measure each model's randomly initialised twin too."""
    seed: int = 0
    """Of images, intervals and untrained twins."""
    arch: Arch = None
    allow_partial: float = 1.0
    """Accepted share of a backbone's weights that a checkpoint provides."""
    device: Device = "auto"
    output_dir: Path = Path("analysis")
    """Where report.html and a folder for each analysis go."""

    def __post_init__(self) -> None:
        if not self.models:
            raise UserError("analyze all: name at least one MODEL")
        if unknown := [name for name in self.only if name not in ANALYSES]:
            raise UserError(f"analyze all: no analysis {', '.join(unknown)}; there are {', '.join(ANALYSES)}")


@dataclasses.dataclass
class Outcome:
    """What became of one analysis."""

    folders: dict[Path, str] = dataclasses.field(default_factory=dict)  # with results; the model if it is alone
    said: dict[str, str] = dataclasses.field(default_factory=dict)  # by model: DONE, or why not


def run(config: AllCommand) -> None:
    """Run the analyses one after the other, write report.html and say what was skipped.

    Raises:
        UserError: no model can be loaded, or no analysis gave anything.
    """
    backbones, unloaded = _loaded(config)
    outcomes: dict[str, Outcome] = {}
    for name in config.only or ANALYSES:
        info(f"analyze {name}")
        outcomes[name] = analyze(name, ANALYSES[name], backbones, config)
        outcomes[name].said |= unloaded
        for model, said in outcomes[name].said.items():
            if said != DONE:
                info(f"analyze {name}: {model}: {said}")
    if not any(outcome.folders for outcome in outcomes.values()):
        raise UserError("analyze all: no analysis could be run; the lines above say why")
    page = config.output_dir / "report.html"
    sections = [_overview(config, outcomes)]
    for name, outcome in outcomes.items():
        for folder, model in outcome.folders.items():
            sections.append(_section(ANALYSES[name], folder, model, config.output_dir))
    write_report(page, f"Analysis of {', '.join(config.models)}", sections)
    print(page)


def analyze(name: str, analysis: Analysis, backbones: Mapping[str, Backbone], config: AllCommand) -> Outcome:
    """Run one analysis on all models that it applies to; where that fails, on each of them alone."""
    outcome = Outcome()
    fitting: dict[str, Backbone] = {}
    for model, backbone in backbones.items():
        reason = analysis.applies(backbone)
        if reason is None:
            fitting[model] = backbone
        else:
            outcome.said[model] = f"skipped: {reason}"
    if not fitting:
        return outcome
    folder = config.output_dir / name
    error = _attempt(analysis, fitting, config, folder)
    if error is None or len(fitting) == 1:
        outcome.said |= dict.fromkeys(fitting, error or DONE)
        outcome.folders |= {folder: ""} if error is None else {}
        return outcome
    info(f"analyze {name}: not side by side ({error}); one model at a time")
    for model, backbone in fitting.items():
        own = config.output_dir / f"{name}-{re.sub(r'[^A-Za-z0-9.-]+', '_', model).strip('_')}"
        error = _attempt(analysis, {model: backbone}, config, own)
        outcome.said[model] = error or DONE
        outcome.folders |= {own: model} if error is None else {}
    return outcome


def _attempt(analysis: Analysis, backbones: Mapping[str, Backbone], config: AllCommand, folder: Path) -> str | None:
    """What went wrong, in one line."""
    try:
        module = importlib.import_module(analysis.module)
        command = getattr(module, analysis.config)
        known = {field.name for field in dataclasses.fields(command)}
        shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in known}
        own = {**analysis.settings, **analysis.settings_for(list(backbones.values()))}
        module.run(command(**{**shared, **own, "models": tuple(backbones), "output_dir": folder}))
    except UserError as error:
        return f"skipped: {error}"
    except Exception as error:  # one analysis must not cost the others
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def _loaded(config: AllCommand) -> tuple[dict[str, Backbone], dict[str, str]]:
    """Models that load, and why the others do not."""
    found: dict[str, Backbone] = {}
    errors: dict[str, str] = {}
    for source in dict.fromkeys(config.models):
        try:
            found |= load_models([source], arch=config.arch, allow_partial=config.allow_partial)
        except UserError as error:
            errors[source] = f"skipped: {error}"
    if not found:
        raise UserError("; ".join(reason.removeprefix("skipped: ") for reason in errors.values()))
    return found, errors


def _overview(config: AllCommand, outcomes: Mapping[str, Outcome]) -> Section:
    models = list(dict.fromkeys(config.models))
    rows: list[list[Cell]] = [
        [name, *(outcome.said.get(model, "-") for model in models)] for name, outcome in outcomes.items()
    ]
    parts: list[Part] = [Table(["analysis", *models], rows, "What was run on which model, and why not")]
    lines = (f"{name}, {model}: {said}" for name, each in outcomes.items() for model, said in each.said.items())
    parts += [Text(line, warning=True) for line in lines if ": failed: " in line]
    return Section("Overview", parts)


def _section(analysis: Analysis, folder: Path, model: str, root: Path) -> Section:
    """What one analysis shows, in words, pictures and figures, and where its numbers are."""
    files = read_run(folder)
    parts: list[Part] = [Text(analysis.meaning)]
    for picture in files.pictures:
        caption = analysis.caption(picture.stem)
        parts.append(Image(read_bytes(picture), caption, f"{picture.stem}: {caption}"))
    for path, result in files.results.items():
        parts += _figures(result)
        parts.append(measured_how(path, result))
    parts += _small_tables(folder)
    links = {file.name: file.relative_to(root).as_posix() for file in _data_files(folder)}
    parts.append(Links("Arrays, tables and pictures", links))
    title = f"{analysis.title}: {model}" if model else analysis.title
    return Section(title, parts)


def _figures(result: EvalResult) -> Iterator[Part]:
    rows: Sequence[Sequence[Cell]] = [[name, figure, figure.n] for name, figure in result.figures.items()]
    if rows:
        left = len(rows) - MOST_ROWS
        caption = f"{result.task}: figures with their 95 % intervals" + (
            f"; {left} more in the files" if left > 0 else ""
        )
        yield Table(["figure", "value", "samples"], rows[:MOST_ROWS], caption)


def _small_tables(folder: Path) -> Iterator[Table]:
    """The .csv files that fit into a page."""
    for path in sorted(folder.glob("*.csv")):
        header, *rows = csv.reader(read_bytes(path).decode().splitlines())
        if 0 < len(rows) <= MOST_ROWS and len(header) <= MOST_COLUMNS:
            yield Table(header, [[_cell(text) for text in row] for row in rows], path.name)


def _cell(text: str) -> Cell:
    try:
        return float(text) if text else None
    except ValueError:
        return text


def _data_files(folder: Path) -> list[Path]:
    kinds = [".csv", ".npz", ".json", ".svg", ".png"]
    found = [path for path in folder.iterdir() if path.suffix in kinds]
    return sorted(found, key=lambda path: (kinds.index(path.suffix), path.name))
