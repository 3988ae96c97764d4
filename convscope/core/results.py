"""Result files: every figure with its interval, and what it was measured on."""

import dataclasses
import math
import platform
import subprocess
import sys
import zipfile
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
from convscope.core.files import atomic_write, read_json, write_json

# By figure, what it is the mean of: (N,) in the order of the test data, NaN where a sample was not asked.
Samples = Mapping[str, NDArray[Any]]

BOOTSTRAP_RESAMPLES = 2000
FEW = 16  # different values, for which resampling amounts to drawing how often each comes
FINGERPRINT = "fingerprint"  # of the test data, beside the samples in their file


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
    samples: Samples = field(default_factory=dict, compare=False, repr=False)  # kept beside the JSON, as .npz


def save_result(path: Path, result: EvalResult) -> None:
    """Write the result with versions and host, whole or not at all; its samples go into an .npz of the same name.

    Raises:
        UserError: a figure or its interval is NaN or infinite, or the file cannot be written.
    """
    bad = [name for name, figure in result.figures.items() if not _finite(figure)]
    if bad:
        raise UserError(f"{result.task}: {', '.join(bad)} is not a finite number; no result was written")
    if result.samples:
        arrays: dict[str, Any] = {FINGERPRINT: np.array(fingerprint_of(result)), **result.samples}
        with atomic_write(path.with_suffix(".npz")) as file:
            np.savez_compressed(file, **arrays)
    values = to_dict(dataclasses.replace(result, samples={}))
    del values["samples"]
    write_json(path, {**values, "versions": versions(), "host": host()})


def load_result(path: Path) -> EvalResult:
    """Read a result file, without its samples.

    Raises:
        UserError: missing, malformed or not a result file.
    """
    values = read_json(path)
    try:
        names = [f.name for f in dataclasses.fields(EvalResult) if f.name not in ("figures", "samples")]
        figures = {name: Figure(**figure) for name, figure in values["figures"].items()}
        return EvalResult(**{name: values[name] for name in names}, figures=figures)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a convscope result file: {error!r}") from error


def load_samples(path: Path, result: EvalResult) -> Samples:
    """The samples beside a result file, by figure; empty where there are none that belong to it."""
    file = path.with_suffix(".npz")
    try:
        with np.load(file) as stored:
            if str(stored.get(FINGERPRINT)) != fingerprint_of(result):
                return {}
            found = {name: stored[name] for name in result.figures if name in stored}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}
    return {name: each for name, each in found.items() if _close(each, result.figures[name])}


def _close(values: NDArray[Any], figure: Figure) -> bool:
    return math.isclose(float(np.nanmean(values)), figure.value, rel_tol=1e-5, abs_tol=1e-9)


def fingerprint_of(result: EvalResult) -> str:
    """Of the test data; samples of two results are of the same images, in the same order, where it is equal."""
    test = result.data.get("test")
    return str(test.get("fingerprint", "")) if isinstance(test, Mapping) else ""


def paired_difference(
    a: NDArray[Any], b: NDArray[Any], seed: int = 0, *, resamples: int = BOOTSTRAP_RESAMPLES
) -> Figure:
    """Mean of a - b with its percentile bootstrap interval over samples, which both have in common.

    Drawing samples keeps what the two made of each together. An interval that excludes 0 speaks of a difference at the
    5 % level; intervals of the two that overlap do not speak against it.

    Args:
        a: values (N,), such as 0/1 hits; where either is NaN the sample is left out.
        b: the other's, of the same samples in the same order.
        seed: of the resampling.
        resamples: number of bootstrap draws.

    Raises:
        UserError: other lengths, or no sample in common.
    """
    if a.shape != b.shape or a.ndim != 1:
        raise UserError(f"paired samples have to be the same, got {a.shape} and {b.shape}")
    difference = a.astype(np.float64) - b.astype(np.float64)
    return bootstrap(difference[~np.isnan(difference)], seed=seed, resamples=resamples)


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
    plain = statistic is None and values.ndim == 1
    different, times = np.unique(values if plain else np.empty(0), return_counts=True)
    if plain and np.isin(different, (0, 1)).all():
        draws = rng.binomial(count, value, resamples) / count  # what resampling 0/1 hits amounts to, at once
    elif plain and len(different) <= FEW:
        draws = rng.multinomial(count, times / count, resamples) @ different / count
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
