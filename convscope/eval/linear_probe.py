"""`convscope eval linear-probe`: a linear classifier on a frozen backbone, by one of several protocols.

Protocols holdout and cached work on features that are extracted once; dinov2, mae and lightly train on augmented images
(`augmented_probe`).
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from convscope.core.backbone import Backbone
from convscope.core.data.shard_set import ShardSet
from convscope.core.errors import UserError
from convscope.core.results import EvalResult, Figure, Samples
from convscope.eval.augmented_probe import TASK, AugmentedProbeConfig, augmented_probe
from convscope.eval.common import (
    FrozenFeatures,
    extract_both,
    frozen_result,
    open_both,
    print_table,
    require_two_splits,
    save_at,
    shown,
)
from convscope.eval.features import Features
from convscope.eval.linear_heads import LinearProbeConfig, Score, holdout_split
from convscope.eval.linear_problem import PROBLEMS, Problem
from convscope.eval.targets import Targets

DIVERGED = "every head of the linear probe diverged; pass smaller --lrs"


@dataclass(frozen=True, kw_only=True)
class LinearProbeCommand(AugmentedProbeConfig, LinearProbeConfig):
    """Linear classifiers on a frozen backbone; unless a protocol says otherwise, held-out train images choose."""

    def __post_init__(self) -> None:
        FrozenFeatures.__post_init__(self)
        LinearProbeConfig.__post_init__(self)
        AugmentedProbeConfig.__post_init__(self)


@dataclass(frozen=True)
class LinearProbe:
    """One layer's probe: test figures, and how the head was chosen."""

    figures: Mapping[str, Figure]
    holdout: Score | None  # of the chosen head; None where there was nothing to choose
    details: Mapping[str, Any]
    samples: Samples = dataclasses.field(compare=False, repr=False)  # of the figures


def run(config: LinearProbeCommand) -> None:
    """Load, evaluate, print a table and write the result."""
    if config.is_augmented:
        augmented_probe(config)
        return
    backbone, train, test = open_both(config)
    result = evaluate(backbone, train, test, config)
    rows = [_row(layer, row, layer == result.details["layer"]) for layer, row in result.details["layers"].items()]
    first = next(iter(result.details["layers"].values()))
    header = ["layer", "width", *_settings(first), f"held-out {first['measure']}"]
    print_table(f"{TASK} {config.model}", [*header, *(f"test {name}" for name in result.figures)], rows)
    stem = TASK if config.protocol == "holdout" else f"{TASK}-{config.protocol}"
    save_at(result, config.output, config.model, stem)


def evaluate(backbone: Backbone, train: ShardSet, test: ShardSet, config: LinearProbeCommand) -> EvalResult:
    """Probe every layer; the figures are those of the layer that was best on the held-out train images.

    Raises:
        UserError: what reading, extracting or probing refuses; train and test are the same shards.
    """
    require_two_splits(train, test)
    both = extract_both(backbone, train, test, config, config.device)
    if config.protocol == "cached":
        probes = {layer: cached_probe(*parts, config, config.targets, len(both) > 1) for layer, parts in both.items()}
    else:
        probes = {layer: linear_probe(*parts, config, config.targets) for layer, parts in both.items()}
    best = max(probes, key=lambda layer: probes[layer].holdout or (-math.inf, -math.inf))
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(LinearProbeConfig)}
    details = {
        "layer": best,
        "layers": {layer: probe.details for layer, probe in probes.items()},
        "standardised": "by mean and standard deviation of each dimension over the images trained on",
        "settings": {name: value for name, value in settings.items() if name not in ("device", "seed")},
    }
    return frozen_result(
        backbone,
        train,
        test,
        config,
        task=TASK,
        protocol=f"{config.protocol}/1",
        figures=probes[best].figures,
        details=details,
        seed=config.seed,
        samples=probes[best].samples,
    )


def linear_probe(
    train: Features, test: Features, config: LinearProbeConfig, targets: Targets = "classes"
) -> LinearProbe:
    """Train the grid on nine tenths of `train`, choose on the tenth, report on `test` with that one head.

    Raises:
        UserError: targets are missing or do not fit, too few train images, every head diverged.
    """
    problem = PROBLEMS[targets](train, test, config)
    fitted, held = (index.to(problem.device) for index in holdout_split(problem.strata, config.seed))
    heads = problem.fit(fitted, problem.settings)
    scores = problem.score(heads, held)
    best = _best(scores)
    chosen = problem.fit(None, problem.settings[best : best + 1]) if config.refit else heads.only(best)
    predicted = problem.predict(chosen)
    figures = problem.figures(predicted)
    held_out = {f"holdout_{problem.measure}": scores[best][0], "holdout_count": len(held)}
    details = {**_details(problem, best, figures), **held_out, **problem.details(predicted)}
    return LinearProbe(figures, scores[best], details, problem.samples(predicted))


def cached_probe(
    train: Features, test: Features, config: LinearProbeConfig, targets: Targets = "classes", choose: bool = False
) -> LinearProbe:
    """Train every setting on all of `train` and report each on `test`.

    The figures are those of one setting: the only one, or the one that `linear_probe` would choose on a held-out tenth.

    Args:
        train: features.
        test: features.
        config: how heads are trained.
        targets: what they predict.
        choose: hold out a tenth for a single setting too, to compare it with other layers.

    Raises:
        UserError: as `linear_probe`.
    """
    problem = PROBLEMS[targets](train, test, config)
    heads = problem.fit(None, problem.settings)
    best, score, held_out = 0, None, {}
    if choose or len(problem.settings) > 1:
        fitted, held = (index.to(problem.device) for index in holdout_split(problem.strata, config.seed))
        scores = problem.score(problem.fit(fitted, problem.settings), held)
        best = _best(scores)
        score = scores[best]
        held_out = {f"holdout_{problem.measure}": score[0], "holdout_count": len(held)}
    shares = problem.test_shares(heads)
    if shares[best] is None:
        raise UserError(DIVERGED)
    every = [
        {**_without_edges(problem.describe(setting)), problem.measure: share}
        for setting, share in zip(problem.settings, shares)
    ]
    predicted = problem.predict(heads.only(best))
    figures = problem.figures(predicted)
    details = {**_details(problem, best, figures), **held_out, "every_setting": every, **problem.details(predicted)}
    return LinearProbe(figures, score, details, problem.samples(predicted))


def _best(scores: list[Score]) -> int:
    best = max(range(len(scores)), key=lambda index: scores[index])
    if not math.isfinite(scores[best][1]):
        raise UserError(DIVERGED)
    return best


def _details(problem: Problem, best: int, figures: Mapping[str, Figure]) -> dict[str, Any]:
    return {
        "measure": problem.measure,
        "test": {name: dataclasses.asdict(figure) for name, figure in figures.items()},
        **problem.describe(problem.settings[best]),
        "dimensions": problem.x.shape[1],
        "classes": problem.outputs,
    }


def _without_edges(described: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in described.items() if not name.endswith("_at_edge")}


def _settings(row: Mapping[str, Any]) -> dict[str, str]:
    """Names of the settings and, as the table shows them, their values."""
    return {
        name.removesuffix("_at_edge"): f"{row[name.removesuffix('_at_edge')]:g}{' (edge)' if row[name] else ''}"
        for name in row
        if name.endswith("_at_edge")
    }


def _row(layer: str, row: Mapping[str, Any], best: bool) -> list[str]:
    held_out = row.get(f"holdout_{row['measure']}")
    return [
        f"{layer} *" if best else layer,
        str(row["dimensions"]),
        *_settings(row).values(),
        "-" if held_out is None else f"{held_out:.4g}" if row["measure"] == "r2" else f"{held_out:.2%}",
        *(shown(name, Figure(**figure)) for name, figure in row["test"].items()),
    ]
