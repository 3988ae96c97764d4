"""Layers side by side: `layer3+layer4` is one layer as wide as both."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from convscope.core.backbone import Backbone
from convscope.core.errors import UserError
from convscope.eval.features import Features, Pool, resolve_layers


def wanted_layers(backbone: Backbone, layers: Sequence[str], pool: Pool) -> dict[str, list[str]]:
    """Every wanted layer with the single layers that it consists of: those alone first, in network order.

    Raises:
        UserError: unknown layer, a layer twice in one concatenation, or a pooling that is not possible.
    """
    single = [name for name in layers if "+" not in name]
    wanted = {name: [name] for name in (resolve_layers(backbone, single, pool) if single or not layers else [])}
    for name in layers:
        if "+" in name:
            parts = [found for part in name.split("+") for found in resolve_layers(backbone, [part])]
            if len(set(parts)) < len(parts) or "all" in name.split("+"):
                raise UserError(f"--layers {name} names a layer twice; give different ones, such as layer3+layer4")
            wanted["+".join(parts)] = parts
    return wanted


def concatenate(features: Mapping[str, Features], wanted: Mapping[str, Sequence[str]]) -> dict[str, Features]:
    """Features of every wanted layer from those of single ones."""
    return {
        name: features[parts[0]]
        if len(parts) == 1
        else replace(features[parts[0]], x=torch.cat([features[part].x for part in parts], 1))
        for name, parts in wanted.items()
    }
