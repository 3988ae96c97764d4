"""torchvision's ViT, ConvNeXt and Swin in timm's names, and how torchvision prepares images for a published file.

Its ResNets, ResNeXts and DenseNets have timm's names already.
"""

import re
from functools import cache
from typing import Any

import torchvision

from convscope.core.backbone import Preprocessing
from convscope.core.weights_file import State

Rules = tuple[tuple[str, str], ...]

VIT: Rules = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"^heads\.head\.", "head."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
)
CONVNEXT: Rules = (
    (r"^features\.0\.", "stem."),
    (r"^classifier\.0\.", "head.norm."),
    (r"^classifier\.2\.", "head.fc."),
    (r"\.block\.0\.", ".conv_dw."),
    (r"\.block\.2\.", ".norm."),
    (r"\.block\.3\.", ".mlp.fc1."),
    (r"\.block\.5\.", ".mlp.fc2."),
    (r"\.layer_scale$", ".gamma"),
)
SWIN: Rules = (
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    (r"^head\.", "head.fc."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
)


def vit_names(state: State) -> State:
    """torchvision.models.vit_*."""
    return {_renamed(key, VIT): value for key, value in state.items()}


def convnext_names(state: State) -> State:
    """torchvision.models.convnext_*: odd features are stages, even ones what leads to the next."""
    named = {_renamed(_staged(key, "stages"), CONVNEXT): value for key, value in state.items()}
    return {key: value.flatten() if key.endswith(".gamma") else value for key, value in named.items()}


def swin_names(state: State) -> State:
    """torchvision.models.swin_*: the same order of stages; index tables follow from the architecture."""
    weights = {key: value for key, value in state.items() if not key.endswith("relative_position_index")}
    return {_renamed(_staged(key, "layers"), SWIN): value for key, value in weights.items()}


def published_preprocessing(file_name: str) -> Preprocessing | None:
    """What torchvision does to images for the weights that it publishes under this name."""
    if not re.search(r"-[0-9a-f]{8}\.pth$", file_name):
        return None
    transforms = _published().get(file_name)
    if transforms is None:
        return None
    crop, resize = transforms.crop_size[0], transforms.resize_size[0]
    return Preprocessing(
        size=(crop, crop),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=str(transforms.interpolation.value),
        crop_pct=crop / resize,
    )


def _renamed(key: str, rules: Rules) -> str:
    for pattern, name in rules:
        key = re.sub(pattern, name, key)
    return key


def _staged(key: str, stages: str) -> str:
    found = re.match(r"features\.(\d+)\.(.*)", key)
    if not found or found[1] == "0":
        return key
    stage, between = divmod(int(found[1]) - 1, 2)
    return f"{stages}.{stage + 1}.downsample.{found[2]}" if between else f"{stages}.{stage}.blocks.{found[2]}"


@cache
def _published() -> dict[str, Any]:
    models = torchvision.models
    weights = [entry for name in models.list_models(module=models) for entry in models.get_model_weights(name)]
    return {entry.url.rsplit("/", 1)[-1]: entry.transforms() for entry in weights}
