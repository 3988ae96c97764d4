"""What a submission consists of: command lines, read as the jobs will read them, and where their files belong."""

import hashlib
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convscope.core.config import read_yaml
from convscope.core.data.shard_set import open_shards
from convscope.core.errors import UserError
from convscope.core.training.config import TrainConfig
from convscope.slurm.settings import split

JOBS = Path("slurm-jobs")  # logs of commands that have no run directory, below the working directory
EVALUATIONS = ("linear-probe", "knn")  # what `then eval` runs


@dataclass(frozen=True)
class Point:
    """One command line, and its run directory or a folder of its own."""

    words: tuple[str, ...]
    home: Path
    is_run: bool
    config: Any

    @property
    def finished(self) -> bool:
        """Whether this is a run that has been trained to its end."""
        return self.is_run and (self.home / "backbone.safetensors").is_file()


def read_point(words: Sequence[str]) -> Point:
    """Parse a command line.

    Raises:
        UserError: what the command itself would refuse of its flags.
    """
    from convscope.cli import parse  # a mistake is told here, not by a job that has waited for its turn

    name, config = parse(words)
    if isinstance(getattr(config, "train", None), TrainConfig):
        return Point(tuple(words), Path(config.output_dir).absolute(), True, config)
    digest = hashlib.sha256("\0".join(words).encode()).hexdigest()[:8]
    return Point(tuple(words), (JOBS / f"{'-'.join(name)}-{digest}").absolute(), False, config)


def read_points(words: Sequence[str], sweep: Path | None) -> list[Point]:
    """The one point of a command line, or those of a sweep.

    Raises:
        UserError: a command line or the sweep's file is wrong, or two points share a directory.
    """
    if sweep is None:
        return [read_point(words)]
    points = [read_point(point) for point in sweep_points(words, sweep)]
    shared = [str(home) for home, count in Counter(point.home for point in points).items() if count > 1]
    if shared or not all(point.is_run for point in points):
        raise UserError(f"{sweep}: " + (f"two points are {shared[0]}" if shared else "only training runs are swept"))
    return points


def sweep_points(words: Sequence[str], file: Path) -> list[tuple[str, ...]]:
    """A command line for each point: a mapping of flags to lists is a grid, a list of mappings is taken as it is.

    Each point's run directory is a folder of `--output-dir`, named by its values.

    Raises:
        UserError: neither of both, or no --output-dir.
    """
    settings = read_yaml(file)
    if isinstance(settings, Mapping):
        points: list[dict[str, Any]] = [{}]
        for flag, values in settings.items():
            choices = values if isinstance(values, list) else [values]
            points = [{**point, str(flag): value} for point in points for value in choices]
    elif isinstance(settings, list) and all(isinstance(point, Mapping) for point in settings):
        points = [dict(point) for point in settings]
    else:
        raise UserError(f"{file}: a sweep is a mapping of flags to lists of values, or a list of such mappings")
    if not points or points == [{}]:
        raise UserError(f"{file} names no points")
    base = _value(words, "--output-dir")
    if base is None:
        raise UserError("a sweep needs --output-dir, the folder of its runs")
    found = []
    for point in points:
        name = "-".join(f"{flag.replace('_', '-')}={_shown(value)}" for flag, value in point.items()).replace("/", "_")
        flags = [word for flag, value in point.items() for word in _flag(flag, value)]
        found.append((*words, *flags, "--output-dir", str(Path(base) / name)))
    return found


def following(then: str, points: Sequence[Point]) -> list[tuple[tuple[str, ...], list[int]]]:
    """Command lines that run after success, each with the numbers of the points that it waits for.

    `eval`, with or without flags, is the linear probe and k-NN of every run, on `--data` or else on the run's own;
    anything else is one command line of convscope after all points.

    Raises:
        UserError: a command line is wrong, or the data that is to be evaluated is missing.
    """
    words = tuple(shlex.split(then.removeprefix("convscope ")))
    if words[:1] != ("eval",) or (len(words) > 1 and not words[1].startswith("-")):
        line, _ = split(words)
        if "--sweep" not in line:
            read_point(line)
        return [(words, list(range(len(points))))]
    found = []
    for i, point in enumerate(points):
        flags = words[1:] if _value(words, "--data") else (*words[1:], "--data", _own_data(point))
        for evaluation in EVALUATIONS:
            line = ["eval", evaluation, str(point.home), *flags]
            config = read_point(line).config
            if Path(config.data).is_dir():
                for part in (config.train_split, config.test_split):
                    open_shards(config.data, part)
            found.append((tuple(line), [i]))
    return found


def _own_data(point: Point) -> str:
    data = getattr(point.config, "data", ())
    sources = (data,) if isinstance(data, str) else tuple(data)
    if not point.is_run or len(sources) != 1:
        raise UserError("--slurm.then eval: say on which data, such as --slurm.then 'eval --data FOLDER'")
    return str(sources[0])


def _flag(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *(str(item) for item in (value if isinstance(value, list) else [value]))]


def _shown(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def _value(words: Sequence[str], flag: str) -> str | None:
    found = None
    for i, word in enumerate(words):
        if word == flag and i + 1 < len(words):
            found = words[i + 1]
        elif word.startswith(f"{flag}="):
            found = word.partition("=")[2]
    return found
