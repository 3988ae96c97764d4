"""`convscope eval info MODEL`: what a checkpoint was recognised as, before anything is measured on it."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import tyro

from convscope.core.backbone import Backbone
from convscope.core.models import LoadsModel, model_record
from convscope.core.options import AllowPartial, Arch, ModelArguments
from convscope.eval.common import print_table


@dataclass(frozen=True, kw_only=True)
class InfoCommand(LoadsModel):
    """Load a model as every evaluation would and say what it is; nothing is computed."""

    model: tyro.conf.Positional[str]
    """Checkpoint, run directory, timm:NAME, open_clip:NAME/PRETRAINED, ... (docs/design.md, Models)."""
    arch: Arch = None
    model_args: ModelArguments = ()
    allow_partial: AllowPartial = 1.0
    json: bool = False
    """Print JSON instead of tables."""


def run(config: InfoCommand) -> None:
    """Load, describe and print."""
    described = describe(config.load())
    if config.json:
        print(json.dumps(described, indent=2))
        return
    stages, preprocessing = described.pop("stages"), described.pop("preprocessing")
    print_table("model", ("", ""), [(key.replace("_", " "), _words(value)) for key, value in described.items()])
    print_table("preprocessing", ("", ""), [(key.replace("_", " "), _words(v)) for key, v in preprocessing.items()])
    header = ("stage", "channels", "stride")
    print_table(
        "stages", header, [tuple(str(stage[name]) for name in ("name", "channels", "stride")) for stage in stages]
    )


def describe(backbone: Backbone) -> dict[str, Any]:
    """Everything that is known of a backbone and of how it was recognised, as plain values."""
    origin = backbone.origin
    record = model_record(backbone)
    hashed = record.pop("weights_hash")
    preprocessing_from = record.pop("preprocessing_from")
    return {
        **record,
        "architecture_named_by": origin.said_by,
        "container": origin.container,
        "resampled": list(origin.resampled),
        "parameters": sum(parameter.numel() for parameter in backbone.model.parameters()),
        "features": backbone.num_features,
        "weights_hash": hashed,
        "preprocessing": {**_plain(asdict(backbone.preprocessing)), "from": preprocessing_from},
        "stages": [asdict(stage) for stage in backbone.stages],
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_words(inner)}" for key, inner in value.items()) or "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_words, value)) or "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and value > 9999 else str(value) or "-"
