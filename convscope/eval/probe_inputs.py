"""What the heads of an augmented linear probe see: vectors, or the positions of the last map, of one forward pass."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convscope.core.backbone import Backbone
from convscope.core.errors import UserError
from convscope.eval.features import POOLED, Pool, pool_map
from convscope.eval.layers import wanted_layers

BLOCKS = (1, 4)  # of DINOv2's inputs
PATCHES = "patches"


@dataclass(frozen=True)
class ProbeInputs:
    """Named inputs, each a concatenation of parts that one forward pass gives.

    A part is a layer's name, `cls-K` for the normed class token of the K-th last block, or `patches` for the mean of
    the last block's normed patch tokens.
    """

    inputs: Mapping[str, Sequence[str]]
    pool: Pool = "avg"

    @torch.no_grad()
    def __call__(self, backbone: Backbone, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W) -> for each input (B, D), float32."""
        names = sorted({part for parts in self.inputs.values() for part in parts})
        if any(name.startswith("cls-") for name in names):
            found = _block_vectors(backbone, images, names)
        else:
            found = _layer_vectors(backbone, images, names, self.pool)
        return [torch.cat([found[part] for part in parts], 1) for parts in self.inputs.values()]

    def widths(self, backbone: Backbone) -> list[int]:
        """Width of each input."""
        device = next(backbone.parameters()).device
        return [x.shape[1] for x in self(backbone, torch.zeros(1, 3, *backbone.preprocessing.size, device=device))]


@dataclass(frozen=True)
class PositionInputs:
    """The map of one stage as a sequence of positions; of a transformer, its patch tokens."""

    stage: str

    @torch.no_grad()
    def __call__(self, backbone: Backbone, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W) -> [(B, N, C)], float32."""
        return [backbone.feature_maps(images, [self.stage])[self.stage].flatten(2).transpose(1, 2).float()]


def block_inputs(backbone: Backbone) -> ProbeInputs:
    """DINOv2's inputs: class tokens of the last {1, 4} blocks, without and with the mean patch token of the last.

    For a network without class tokens the blocks are its stages, each averaged over positions, and the last one is what
    the network itself pools; as that is the mean over positions already, there is no input with another.
    """
    stages = [stage.name for stage in backbone.stages]
    inputs: dict[str, Sequence[str]] = {}
    for count in (min(count, len(stages)) for count in BLOCKS):
        if has_class_token(backbone):
            tokens = [f"cls-{back}" for back in range(count, 0, -1)]
            inputs[f"blocks={count} avgpool=no"] = tokens
            inputs[f"blocks={count} avgpool=yes"] = [*tokens, PATCHES]
        else:
            inputs[f"stages={count}"] = [*stages[len(stages) - count : -1], POOLED]
    return ProbeInputs(inputs)


def layer_inputs(backbone: Backbone, layers: Sequence[str], pool: Pool) -> ProbeInputs:
    """The named layers, or concatenations of them such as layer3+layer4, as features of them are extracted."""
    return ProbeInputs(wanted_layers(backbone, layers, pool), pool)


def position_inputs(backbone: Backbone, layers: Sequence[str]) -> PositionInputs:
    """Positions of the one named stage, or of the last.

    Raises:
        UserError: several layers, or one that is no stage.
    """
    if len(layers) > 1 or POOLED in layers or any("+" in name for name in layers):
        raise UserError("an attentive head looks at the positions of one stage: name one with --layers, such as last")
    index = backbone.stage_indices(list(layers) or ["last"])
    if len(index) != 1:
        raise UserError("an attentive head looks at the positions of one stage: name one with --layers, such as last")
    return PositionInputs(backbone.stages[index[0]].name)


def has_class_token(backbone: Backbone) -> bool:
    """Whether the network has class tokens and returns those of every block, normed."""
    parameters = inspect.signature(backbone.model.forward_intermediates).parameters
    return getattr(backbone.model, "cls_token", None) is not None and {"return_prefix_tokens", "norm"} <= set(
        parameters
    )


def _block_vectors(backbone: Backbone, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    back = [int(name.removeprefix("cls-")) for name in names if name != PATCHES]
    indices = [len(backbone.stages) - count for count in range(max(back), 0, -1)]
    blocks = backbone.model.forward_intermediates(
        images, indices=indices, norm=True, return_prefix_tokens=True, intermediates_only=True
    )  # of each (B, C, H, W) and (B, prefix, C), the class token first
    found = {f"cls-{len(indices) - i}": prefix[:, 0].float() for i, (_, prefix) in enumerate(blocks)}
    return found | {PATCHES: blocks[-1][0].float().mean((2, 3))}


def _layer_vectors(backbone: Backbone, images: Tensor, names: Sequence[str], pool: Pool) -> dict[str, Tensor]:
    if list(names) == [POOLED]:
        return {POOLED: backbone(images).float()}
    wanted = backbone.stage_indices([name for name in names if name != POOLED])
    indices = sorted({*wanted, len(backbone.stages) - 1})  # some networks stop after the last one asked for
    options = {"return_prefix_tokens": True} if pool == "cls" else {}
    final, maps = backbone.model.forward_intermediates(images, indices=indices, **options)
    found = dict(zip(indices, maps))
    vectors = {
        backbone.stages[i].name: found[i][1][:, 0].float() if pool == "cls" else pool_map(found[i].float(), pool)
        for i in wanted
    }
    if POOLED in names:
        vectors[POOLED] = backbone.model.forward_head(final, pre_logits=True).float()
    return vectors
