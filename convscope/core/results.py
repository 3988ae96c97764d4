"""Result files: every figure with its interval, and what it was measured on."""

import dataclasses
import math
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convscope import __version__
from convscope.core.config import to_dict
from convscope.core.errors import UserError
from convscope.core.files import read_json, write_json

BOOTSTRAP_RESAMPLES = 2000


@dataclass(frozen=True)
class Figure:
    """One measured number with its 95 % confidence interval, where the sample allows one."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None  # sample size behind the interval


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """What an evaluation or analysis reports; one JSON file in `results/`."""

    task: str  # "linear-probe", "knn", "fine-tune", "erf"
    protocol: str  # name and version, such as "holdout/1"
    model: Mapping[str, Any]  # source, arch, weights_hash, matched
    data: Mapping[str, Any]  # fingerprint, counts
    preprocessing: Mapping[str, Any]
    figures: Mapping[str, Figure]
    details: Mapping[str, Any] = field(default_factory=dict)  # chosen hyper-parameters, per-layer rows, settings
    seed: int = 0


def save_result(path: Path, result: EvalResult) -> None:
    """Write the result with versions and host, whole or not at all.

    Raises:
        UserError: a figure or its interval is NaN or infinite, or the file cannot be written.
    """
    bad = [name for name, figure in result.figures.items() if not _finite(figure)]
    if bad:
        raise UserError(f"{result.task}: {', '.join(bad)} is not a finite number; no result was written")
    write_json(path, {**to_dict(result), "versions": versions(), "host": host()})


def load_result(path: Path) -> EvalResult:
    """Read a result file.

    Raises:
        UserError: missing, malformed or not a result file.
    """
    values = read_json(path)
    try:
        names = [f.name for f in dataclasses.fields(EvalResult)]
        figures = {name: Figure(**figure) for name, figure in values["figures"].items()}
        return EvalResult(**{name: values[name] for name in names if name != "figures"}, figures=figures)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a convscope result file: {error!r}") from error


def bootstrap(
    values: NDArray[Any],
    statistic: Callable[[NDArray[Any]], float] | None = None,
    *,
    seed: int = 0,
    resamples: int = BOOTSTRAP_RESAMPLES,
) -> Figure:
    """Percentile bootstrap over the rows of `values` (N, ...); the mean by default.

    Args:
        values: one row per independent sample, such as 0/1 hits.
        statistic: maps resampled rows to a number.
        seed: of the resampling.
        resamples: number of bootstrap draws.
    """
    if len(values) == 0:
        raise UserError("an interval needs at least one sample")
    rng = np.random.default_rng(seed)
    count = len(values)
    measure = statistic or (lambda rows: float(np.mean(rows)))
    value = measure(values)
    if statistic is None and values.ndim == 1 and np.isin(values, (0, 1)).all():
        draws = rng.binomial(count, value, resamples) / count  # what resampling 0/1 hits amounts to, at once
    else:
        draws = np.array([measure(values[rng.integers(0, count, count)]) for _ in range(resamples)])
    low, high = np.percentile(draws, [2.5, 97.5])
    return Figure(value, float(low), float(high), count)


def _finite(figure: Figure) -> bool:
    return all(math.isfinite(value) for value in (figure.value, figure.low, figure.high) if value is not None)


def versions() -> dict[str, str]:
    """Versions of convscope, Python and the libraries that figures depend on."""
    found = {"convscope": __version__, "python": platform.python_version()}
    for name in ("torch", "torchvision", "timm", "numpy", "pillow", "scikit-learn", "faiss-cpu", "faiss-gpu-cu12"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def host() -> dict[str, Any]:
    """The machine in words: operating system, processor cores, devices."""
    import os

    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"system": platform.platform(), "cores": os.cpu_count(), "devices": devices}


def environment() -> dict[str, Any]:
    """What `environment.json` records: versions, host, git commit of the working directory, command line."""
    return {"versions": versions(), "host": host(), "git_commit": _git_commit(), "command": sys.argv}


def _git_commit() -> str | None:
    """None outside of a repository, and where git is not installed."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None
