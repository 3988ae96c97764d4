"""One probe for each layer; the one that was best without the test set is reported, beside a table of them all."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convscope.core.results import EvalResult, Figure, Samples
from convscope.eval.common import (
    EvalSettings,
    FrozenFeatures,
    extract_both,
    frozen_result,
    open_both,
    percent,
    print_table,
    require_two_splits,
    save_at,
)
from convscope.eval.features import Features


@dataclass(frozen=True)
class Probe:
    """One layer's figures on the test set, and how the layer did on images that were held out of train."""

    figures: Mapping[str, Figure]
    holdout: float  # the larger the better
    details: Mapping[str, Any]
    samples: Samples = dataclasses.field(default_factory=dict, compare=False, repr=False)  # of the figures


def probe_layers(
    config: FrozenFeatures,
    probe: Callable[[Features, Features], Probe],
    *,
    settings: EvalSettings,
    task: str,
    protocol: str,
    details: Mapping[str, Any],
) -> EvalResult:
    """Extract, probe every layer, and report the figures of the best one.

    Raises:
        UserError: what reading, extracting or probing refuses; train and test are the same shards.
    """
    backbone, train, test = open_both(config)
    require_two_splits(train, test)
    probes = {
        layer: probe(*both) for layer, both in extract_both(backbone, train, test, config, settings.device).items()
    }
    best = max(probes, key=lambda layer: probes[layer].holdout)
    return frozen_result(
        backbone,
        train,
        test,
        config,
        task=task,
        protocol=protocol,
        figures=probes[best].figures,
        details={"layer": best, "layers": {layer: one.details for layer, one in probes.items()}, **details},
        seed=settings.seed,
        samples=probes[best].samples,
    )


def show_layers(
    result: EvalResult, config: FrozenFeatures, names: Sequence[str], cells: Callable[[Mapping[str, Any]], list[str]]
) -> None:
    """Print a row for each layer, the best one marked, and write the result.

    Args:
        result: of `probe_layers`.
        config: where it goes.
        names: of the columns between a layer's width and its test figures.
        cells: those columns of a layer's details.
    """
    rows = [
        [
            f"{layer} *" if layer == result.details["layer"] else layer,
            str(row["dimensions"]),
            *cells(row),
            *(percent(Figure(**figure)) for figure in row["test"].values()),
        ]
        for layer, row in result.details["layers"].items()
    ]
    header = ["layer", "width", *names, *(f"test {name}" for name in result.figures)]
    print_table(f"{result.task} {config.model}", header, rows)
    save_at(result, config.output, config.model)


def settings_of(config: object, config_class: type) -> dict[str, Any]:
    """The settings that `config_class` declares, but for the seed and those that do not change the result."""
    apart = ("device", "processes", "seed")
    names = [field.name for field in dataclasses.fields(config_class) if field.name not in apart]
    return {name: getattr(config, name) for name in names}
