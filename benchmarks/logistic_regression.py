"""A sweep over C: `eval logreg`'s solver beside a loop over scikit-learn's lbfgs, at the same held-out accuracy.

    python benchmarks/logistic_regression.py                                        # 10 000 x 384, 50 classes
    python benchmarks/logistic_regression.py --count 50000 --width 768 --classes 100

Both fit the 45 values of C of DINOv2's protocol on nine tenths of synthetic features (non-negative, correlated, with
a falling spectrum, not normalised) and choose C on the last tenth. scikit-learn has the features in float64, at most
1000 iterations and a tolerance of 1e-12, as the protocol says. It may be given a part of the grid (--theirs 9 fits
every fifth value); its time is then scaled to the whole grid, and the accuracies compared are those of the values that
both have. Seconds are those of the processor, which a busy machine does not stretch, and those of the clock.
"""

import json
import time
import warnings
from dataclasses import dataclass

import torch
import tyro
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from convscope.core.softmax_regression import softmax_regression
from convscope.eval.logistic_regression import LogRegConfig, holdout_split


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    count: int = 10_000
    width: int = 384
    classes: int = 50
    distance: float = 0.2
    """Of the classes, in standard deviations of a class along each axis; smaller is harder."""
    theirs: int = 45
    """Values of C that scikit-learn fits."""
    tol: float = 1e-8
    threads: int = 2


def features(settings: Settings) -> tuple[Tensor, Tensor]:
    """(N, D) float32 and classes (N,)."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, settings.width + 1) ** -0.5
    axes = torch.linalg.qr(torch.randn(settings.width, settings.width, generator=generator))[0]
    y = torch.randint(0, settings.classes, (settings.count,), generator=generator)
    centres = settings.distance * torch.randn(settings.classes, settings.width, generator=generator)
    noise = torch.randn(settings.count, settings.width, generator=generator)
    return torch.relu(2 * ((centres[y] + noise) * scale) @ axes + 0.3), y


def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    x, y = features(settings)
    fitted, held = holdout_split(len(x), 0)
    config = LogRegConfig(tol=settings.tol)
    strengths = config.strengths
    began, ours, losses, gradients = _now(), [], [], 0
    for solution in softmax_regression(x[fitted], y[fitted], settings.classes, strengths, tol=config.tol):
        ours.append(float((solution.logits(x[held]).argmax(1) == y[held]).double().mean()))
        losses.append(solution.loss)
        gradients += solution.evaluations
    ours_s, ours_clock = (now - then for now, then in zip(_now(), began))
    print(
        json.dumps(
            {"ours_s": round(ours_s, 1), "clock_s": round(ours_clock, 1), "gradients": gradients, "best": max(ours)}
        ),
        flush=True,
    )
    step = max(1, (len(strengths) - 1) // max(1, settings.theirs - 1))
    began, theirs, iterations, excess = _now(), {}, 0, []
    wide = x.double().numpy()
    for place in range(0, len(strengths), step):
        model = LogisticRegression(C=strengths[place], max_iter=1000, tol=1e-12)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(wide[fitted], y[fitted].numpy())
        theirs[place] = float(model.score(wide[held], y[held].numpy()))
        iterations += int(model.n_iter_[0])
        weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
        cross = torch.nn.functional.cross_entropy(x[fitted].double() @ weight.T + bias, y[fitted])
        loss = float(cross + weight.square().sum() / (2 * strengths[place] * len(fitted)))
        excess.append(losses[place] - loss)
        print(f"C={strengths[place]:.2e} ours {ours[place]:.4f} theirs {theirs[place]:.4f}", flush=True)
    scale = len(strengths) / len(theirs)
    theirs_s, theirs_clock = (scale * (now - then) for now, then in zip(_now(), began))
    print(
        json.dumps(
            {
                "theirs_s": round(theirs_s, 1),
                "clock_s": round(theirs_clock, 1),
                "fitted": len(theirs),
                "iterations": iterations,
                "times_faster": round(theirs_s / ours_s, 1),
                "times_faster_by_the_clock": round(theirs_clock / ours_clock, 1),
                "best_of_shared": [max(ours[place] for place in theirs), max(theirs.values())],
                "largest_excess_of_our_loss": max(excess),
            }
        )
    )


def _now() -> tuple[float, float]:
    """Seconds of the processor and of the clock."""
    return time.process_time(), time.perf_counter()


if __name__ == "__main__":
    main(tyro.cli(Settings))
