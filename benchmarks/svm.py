"""How much sooner the classes of `eval svm` are fitted by several processes than by one.

    python benchmarks/svm.py

Synthetic features of one length, as a network's pooled ones; one process and several take turns.
"""

import statistics
import time
from dataclasses import dataclass

import numpy as np
import tyro

from convscope.eval.svm_fit import FitSettings, fit_classes


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    count: int = 5_000
    width: int = 512
    classes: int = 20
    costs: tuple[float, ...] = (0.01, 0.1, 1)
    processes: int = 2
    rounds: int = 7


def main(settings: Settings) -> None:
    """A line for each round, and the median of both and of their ratio."""
    generator = np.random.default_rng(0)
    y = generator.integers(settings.classes, size=settings.count)
    centres = generator.normal(size=(settings.classes, settings.width))
    x = np.maximum(0.7 * centres[y] + generator.normal(size=(settings.count, settings.width)), 0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    present = y[:, None] == np.arange(settings.classes)
    fit = FitSettings(costs=settings.costs, folds=3, positive_weight=2, max_iter=2000, seed=0)
    seconds: dict[int, list[float]] = {1: [], settings.processes: []}
    for _ in range(settings.rounds):
        for processes, values in seconds.items():
            began = time.perf_counter()
            list(fit_classes(x, present, np.arange(len(x)), x[:1000], fit, processes))
            values.append(time.perf_counter() - began)
        print({processes: round(values[-1], 2) for processes, values in seconds.items()}, flush=True)
    one, several = seconds.values()
    ratio = statistics.median(a / b for a, b in zip(one, several))
    print(f"{statistics.median(one):.2f} s by one, {statistics.median(several):.2f} s by several, ratio {ratio:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Settings))
