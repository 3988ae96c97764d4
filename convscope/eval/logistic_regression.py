"""Logistic regression on frozen features as DINOv2 does it (arXiv:2304.07193): C from a wide grid, exact optima."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from convscope.core.distributed import pick_device
from convscope.core.errors import UserError
from convscope.core.log import progress
from convscope.core.options import require_at_least
from convscope.core.softmax_regression import Solution, softmax_regression
from convscope.eval.best_layer import Probe, probe_layers, settings_of, show_layers
from convscope.eval.classes import accuracies, hits_of, labelled, rank_of_truth
from convscope.eval.common import EvalSettings, FrozenFeatures
from convscope.eval.features import Features

TASK = "logreg"
PROTOCOL = "dinov2-logreg/1"
HOLDOUT = 10  # one train image in ten chooses C


@dataclass(frozen=True, kw_only=True)
class LogRegConfig(EvalSettings):
    """How C is swept."""

    log10_c: tuple[float, float] = (-6.0, 5.0)
    """Ends of the grid of C, as powers of ten; C is the inverse strength of the L2 penalty, as in scikit-learn."""
    c_count: int = 45
    """Values of C, evenly spaced along the powers."""
    tol: float = 1e-8
    """Share of the objective below which a further gain is nothing: the optimum is met to about 1e-6 of it."""
    max_steps: int = 1000
    """Most L-BFGS steps for a value of C."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "c_count", "max_steps")
        if not -300 < self.log10_c[0] <= self.log10_c[1] < 300:
            raise UserError(f"--log10-c needs the smaller power first, got {self.log10_c[0]:g} {self.log10_c[1]:g}")
        if not 0 < self.tol < 1:
            raise UserError(f"--tol must be between 0 and 1, got {self.tol:g}")

    @property
    def strengths(self) -> list[float]:
        """The values of C, ascending."""
        powers = torch.linspace(*self.log10_c, self.c_count, dtype=torch.float64)
        return [10.0**power for power in powers.tolist()]


@dataclass(frozen=True, kw_only=True)
class LogRegCommand(FrozenFeatures, LogRegConfig):
    """Logistic regression on features as they are; a random tenth of train chooses C, and all of train fits again."""

    def __post_init__(self) -> None:
        FrozenFeatures.__post_init__(self)
        LogRegConfig.__post_init__(self)


def run(config: LogRegCommand) -> None:
    """Load, evaluate, print a table and write the result."""
    result = probe_layers(
        config,
        lambda train, test: logistic_regression(train, test, config),
        settings=config,
        task=TASK,
        protocol=PROTOCOL,
        details={"settings": settings_of(config, LogRegConfig)},
    )
    show_layers(
        result,
        config,
        ["C", "held-out top1"],
        lambda row: [f"{row['c']:.3g}{' (edge)' if row['c_at_edge'] else ''}", f"{row['holdout_top1']:.2%}"],
    )


def logistic_regression(train: Features, test: Features, config: LogRegConfig) -> Probe:
    """Choose C on a random tenth of `train`, fit all of `train` with it, and report on `test`.

    Raises:
        UserError: labels are missing or do not fit, features that are not finite, fewer than ten train images.
    """
    device = pick_device(config.device)
    part = labelled(train, test)
    x, y = part.train_x.to(device), part.train_y.to(device)
    near, hits = _sweep(x, y, config)
    best = max(range(len(hits)), key=lambda index: hits[index])  # the smallest C among equals
    strength = config.strengths[best]
    start = near if len(near.bias) == part.classes else None
    solution = next(
        softmax_regression(x, y, part.classes, [strength], tol=config.tol, max_steps=config.max_steps, start=start)
    )
    ranks = rank_of_truth(solution.logits(part.test_x.to(device)), part.test_y.to(device)).cpu()
    figures = accuracies(ranks, part.classes, config.seed)
    details = {
        "test": {name: dataclasses.asdict(figure) for name, figure in figures.items()},
        "holdout_top1": hits[best],
        "holdout_top1_by_c": hits,
        "c": strength,
        "c_at_edge": len(hits) > 1 and best in (0, len(hits) - 1),
        "loss": solution.loss,
        "converged": solution.converged,
        "dimensions": x.shape[1],
        "classes": part.classes,
    }
    return Probe(figures, hits[best], details, hits_of(ranks, part.classes))


def holdout_split(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to train on and to hold out: the first tenth of a random order, as in DINOv2's code.

    Raises:
        UserError: fewer than ten images.
    """
    if count < HOLDOUT:
        raise UserError(f"logreg holds out a tenth of the train images and needs {HOLDOUT} or more, got {count}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[count // HOLDOUT :], order[: count // HOLDOUT]


def _sweep(x: Tensor, y: Tensor, config: LogRegConfig) -> tuple[Solution, list[float]]:
    """The solution at the best C, and the held-out accuracy at every C."""
    fitted, held = (index.to(x.device) for index in holdout_split(len(x), config.seed))
    known, fitted_y = torch.unique(y[fitted], return_inverse=True)  # a class may be in the held-out part alone
    if len(known) < 2:
        raise UserError("all train images that are not held out are of one class; a classifier needs two")
    held_x, held_y = x[held], y[held]
    hits: list[float] = []
    best: Solution | None = None
    solutions = softmax_regression(
        x[fitted], fitted_y, len(known), config.strengths, tol=config.tol, max_steps=config.max_steps
    )
    with progress("logistic regression", config.c_count) as ticker:
        for solution in solutions:
            right = known[solution.logits(held_x).argmax(1)] == held_y
            hits.append(float(right.double().mean()))
            if best is None or hits[-1] > max(hits[:-1]):
                best = solution
            ticker.advance(1)
    assert best is not None  # there is at least one C
    return best, hits
