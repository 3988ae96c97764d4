"""`convscope eval info MODEL`: what a checkpoint was recognised as, before anything is measured on it."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import tyro

from convscope.core.backbone import Backbone
from convscope.core.config import parse_assignments
from convscope.core.models import load_backbone, model_record
from convscope.eval.common import print_table


@dataclass(frozen=True, kw_only=True)
class InfoCommand:
    """Load a model as every evaluation would and say what it is; nothing is computed."""

    model: tyro.conf.Positional[str]
    """Checkpoint, run directory, timm:NAME, open_clip:NAME/PRETRAINED, ... (docs/design.md, Models)."""
    arch: str | None = None
    """Architecture of weights that do not name their own."""
    model_args: tuple[str, ...] = ()
    """Its arguments, such as depths=2,2,6,2."""
    allow_partial: float = 1.0
    """Accepted share of the backbone's weights that a checkpoint provides."""
    json: bool = False
    """Print JSON instead of tables."""


def run(config: InfoCommand) -> None:
    """Load, describe and print."""
    arguments = parse_assignments(config.model_args)
    backbone = load_backbone(config.model, arch=config.arch, model_args=arguments, allow_partial=config.allow_partial)
    described = describe(backbone)
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
