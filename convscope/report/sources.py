"""Finding what a run directory, a results folder or a result file holds."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convscope.core.config import load_yaml
from convscope.core.errors import UserError
from convscope.core.files import read_json
from convscope.core.log import info
from convscope.core.results import EvalResult, load_result

Curve = tuple[NDArray[np.int64], NDArray[np.float64]]


@dataclass(frozen=True)
class RunFiles:
    """One argument of the report command, read."""

    label: str
    results: Mapping[Path, EvalResult]
    pictures: tuple[Path, ...]
    loss: Curve | None  # steps, losses
    config: Mapping[str, Any]
    environment: Mapping[str, Any]


def expand(paths: Sequence[Path]) -> list[Path]:
    """A folder of runs, such as a sweep's, as the runs in it; what was submitted and holds nothing yet is left out.

    Raises:
        UserError: nothing is left.
    """
    found: list[Path] = []
    for path in paths:
        inside = [child for child in sorted(path.glob("*/")) if _holds_something(child)]
        if path.is_dir() and not _holds_something(path):
            if inside:
                found += inside
                continue
            if path.name == "slurm" or (path / "slurm").is_dir():  # logs; a point of a sweep that waits for its turn
                info(f"note: {path} holds no results yet")
                continue
        found.append(path)
    if not found:
        raise UserError(f"report: nothing to report in {', '.join(map(str, paths))} yet")
    return list(dict.fromkeys(found))


def _holds_something(path: Path) -> bool:
    return bool(_result_files(path)) or _loss(path) is not None


def _results_folder(path: Path) -> Path:
    return path / "results" if (path / "results").is_dir() else path


def _result_files(path: Path) -> list[Path]:
    ours = {path / "environment.json", path / "image_text.json"}
    found = sorted(_results_folder(path).glob("*.json"), key=lambda file: file.stem)  # knn before knn-birds
    return [file for file in found if file not in ours]


def _loss(path: Path) -> Curve | None:
    metrics = path / "metrics.jsonl"
    return read_loss(metrics) if metrics.is_file() else None


def read_run(path: Path) -> RunFiles:
    """Read a run directory, a folder of results or one result file.

    Raises:
        UserError: missing, empty of results and metrics, or a file in it is malformed.
    """
    if path.is_file():
        pictures = tuple(p for p in _pictures(path.parent) if p.stem == path.stem)
        return RunFiles(str(path), {path: load_result(path)}, pictures, None, {}, {})
    if not path.is_dir():
        raise UserError(f"report: {path} does not exist; give run directories, results folders or result files")
    folder = _results_folder(path)
    results = {file: load_result(file) for file in _result_files(path)}
    loss = _loss(path)
    if not results and loss is None:
        raise UserError(f"report: {path} holds neither results (*.json, results/*.json) nor metrics.jsonl")
    config, environment = path / "config.yaml", path / "environment.json"
    return RunFiles(
        str(path),
        results,
        (*_pictures(folder), *_pictures(path / "pictures")[-1:]),  # of the pictures drawn while training, the newest
        loss,
        load_yaml(config) if config.is_file() else {},
        _mapping(environment) if environment.is_file() else {},
    )


def read_loss(path: Path) -> Curve | None:
    """Steps and losses of a metrics.jsonl, in order of steps; `None` where it holds no losses.

    A step that was run again after a restart counts once, as it was last run. A last line that was cut short by a
    crash is left out.

    Raises:
        UserError: any other line is not a JSON object with a step and a loss, named by its number.
    """
    try:
        lines = path.read_text().splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    losses: dict[int, float] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            if not isinstance(values, dict):
                raise TypeError
            if "loss" in values:
                losses[int(values["step"])] = math.nan if values["loss"] is None else float(values["loss"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise UserError(f"{path}, line {number}: not a JSON object with a step and a loss") from error
    steps = sorted(losses)
    return (np.array(steps), np.array([losses[step] for step in steps])) if steps else None


def _pictures(folder: Path) -> tuple[Path, ...]:
    """PNG files, and SVG files that have no PNG of the same name."""
    found = sorted(folder.glob("*.png"))
    named = {p.stem for p in found}
    return tuple(sorted([*found, *(p for p in folder.glob("*.svg") if p.stem not in named)]))


def _mapping(path: Path) -> Mapping[str, Any]:
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object")
    return values
