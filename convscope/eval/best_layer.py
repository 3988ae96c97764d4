"""One probe for each layer, of which the one that was best without the test set is reported."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from convscope.core.errors import UserError
from convscope.core.results import EvalResult, Figure
from convscope.eval.common import EvalSettings, FrozenFeatures, extract_both, frozen_result, open_both, same_samples
from convscope.eval.features import Features


@dataclass(frozen=True)
class Probe:
    """One layer's figures on the test set, and how the layer did on images that were held out of train."""

    figures: Mapping[str, Figure]
    holdout: float  # the larger the better
    details: Mapping[str, Any]


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
    if same_samples(train, test):
        raise UserError(f"{train.source}: splits {train.split} and {test.split} are the same shards")
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
    )


def settings_of(config: object, config_class: type) -> dict[str, Any]:
    """The settings that `config_class` declares, but for the device and the seed."""
    names = [field.name for field in dataclasses.fields(config_class) if field.name not in ("device", "seed")]
    return {name: getattr(config, name) for name in names}
