"""Filter statistics against the published notebook's way, on one thread; CPU seconds.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 python benchmarks/filters.py --arch resnet50

Both take turns, 7 rounds; medians, and the median over the rounds of their ratios. The notebook computes a layer's
figures from a full SVD of its centred (n, 9) filters, with the singular vectors, in the type they are stored in, and
the sparsity with a copy of the layer. `pooled` is one SVD of all filters, as for eigenfilters, against merged moments.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from scipy.stats import entropy

from convscope.analysis.conv_layers import conv_layers
from convscope.analysis.filter_drift import CoefficientCounts, basis_of, default_bins, peak_normalised
from convscope.analysis.filter_statistics import FilterMoments, sparsity, variance_entropy
from convscope.core.backbone import create_backbone


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    arch: str = "resnet50"
    rounds: int = 7
    streamed: int = 10_000_000


def main(settings: Settings) -> None:
    """Measure and print tables."""
    torch.set_num_threads(1)
    layers = [one.filters.numpy() for one in conv_layers(create_backbone(settings.arch, seed=0)) if one.size == "3x3"]
    print(f"{settings.arch}: {sum(map(len, layers)):,} 3x3 filters in {len(layers)} layers\n")
    print("| | notebook, s | here, s | ratio | largest difference |\n|---|---|---|---|---|")
    compare("each layer", lambda: [notebook(one) for one in layers], lambda: [here(one) for one in layers], settings)
    every = np.concatenate(layers)
    compare("pooled", lambda: [notebook_entropy(every)], lambda: [variance_entropy(every)], settings)
    print("\n| streamed float32 filters | M filters/s |\n|---|---|")
    throughput(settings)


def notebook(filters: np.ndarray) -> tuple[float, float]:
    """Variance entropy and sparsity of a layer."""
    used = np.ones_like(filters)
    used[np.abs(filters) < np.abs(filters).max() / 100] = 0
    return notebook_entropy(filters), float((used.sum(axis=1) == 0).sum() / len(filters))


def notebook_entropy(filters: np.ndarray) -> float:
    """Variance entropy by a full SVD."""
    _, singular, _ = np.linalg.svd(filters - filters.mean(axis=0), full_matrices=False)
    return float(entropy(singular**2 / (len(filters) - 1), base=10))


def here(filters: np.ndarray) -> tuple[float, float]:
    """The same figures."""
    return variance_entropy(filters), sparsity(filters)


def compare(name: str, one: Callable[[], list], other: Callable[[], list], settings: Settings) -> None:
    """Time both in turns and print a row."""
    seconds: list[tuple[float, float]] = []
    for _ in range(settings.rounds):
        times = []
        results = []
        for function in (one, other):
            start = time.process_time()
            results.append(function())
            times.append(time.process_time() - start)
        seconds.append((times[0], times[1]))
    first, second = (statistics.median(column) for column in zip(*seconds))
    ratio = statistics.median(a / b for a, b in seconds)
    difference = np.abs(np.array(results[0]) - np.array(results[1])).max()
    print(f"| {name} | {first:.3f} | {second:.3f} | {ratio:.1f} | {difference:.1e} |")


def throughput(settings: Settings) -> None:
    """Filters a second through the accumulators, fed in parts of a million."""
    part = np.random.default_rng(0).standard_normal((1_000_000, 9), dtype=np.float32)
    moments = FilterMoments(9)
    moments.update(peak_normalised(part))
    basis = basis_of(moments.eigenfilters())
    counts = CoefficientCounts(basis, default_bins(basis))
    for name, update in (("moments", moments.update), ("coefficients, 9 histograms and the density", counts.update)):
        rates = []
        for _ in range(settings.rounds):
            start = time.process_time()
            for _ in range(settings.streamed // len(part)):
                update(part)
            rates.append(settings.streamed / (time.process_time() - start) / 1e6)
        print(f"| {name} | {statistics.median(rates):.1f} |")


if __name__ == "__main__":
    main(tyro.cli(Settings))
