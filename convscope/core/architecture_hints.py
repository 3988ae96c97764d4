"""What a checkpoint says about its architecture, so that nobody has to.

A guess is never the last word: the weights have to fill the network that it names, all of them.
"""

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import timm
from torch import nn

from convscope.core.weights_file import State, WeightsFile
from convscope.core.weights_match import OPEN_CLIP, Match

SETTINGS = ("args", "hyper_parameters", "config", "cfg", "hparams")  # where training code keeps its settings
NAMES = ("arch", "architecture", "model", "backbone", "encoder", "model_name", "backbone_name", "name")
MOCO_SMALL = {"width": 384, "heads": 12}  # MoCo v3's ViT-S has 12 heads, everybody else's 6: the authors' vits.py


@dataclass(frozen=True, kw_only=True)
class Hint:
    """An architecture and who named it."""

    architecture: str
    said_by: str
    model_args: Mapping[str, Any] = field(default_factory=dict)


def published_name(file_name: str) -> str | None:
    """timm's name, with its tag, of weights that are published under this file name, where there is just one."""
    return _published().get(file_name)


def stated_architecture(file: WeightsFile) -> Hint | None:
    """The architecture by the file's published name, its own settings, or solo-learn's args.json beside it."""
    if published := published_name(file.path.name):
        return Hint(architecture=published, said_by="its file name")
    places = {"": file.said, **{name: _plain(file.said.get(name)) for name in SETTINGS}}
    beside = file.path.with_name("args.json")
    if beside.is_file():
        with suppress(OSError, ValueError):
            places["args.json"] = _plain(json.loads(beside.read_text()))
    for place, settings in places.items():
        for name in NAMES:
            if architecture := _timm_name(settings.get(name), settings):
                where = f"its {place} {name}" if place else f"its {name}"
                return _for_small_images(Hint(architecture=architecture, said_by=where), settings)
    return None


def implied_args(match: Match, network: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments under which the architecture is the one that these weights were trained with.

    Shapes alone do not always tell: an image size (positions would be resampled), the norm after the pooling of
    fine-tuned MAE, the heads of MoCo v3's ViT-S.
    """
    implied: dict[str, Any] = {}
    if "fc_norm.weight" in match.left_over and "norm.weight" in match.missing and hasattr(network, "fc_norm"):
        implied["global_pool"] = "avg"
    if match.layout.name == "MoCo v3" and getattr(network, "embed_dim", 0) == MOCO_SMALL["width"]:
        implied["num_heads"] = MOCO_SMALL["heads"]
    if size := _image_size(match.selected, network):
        implied["img_size"] = size
    return {key: value for key, value in implied.items() if key not in given}


@cache
def _published() -> dict[str, str]:
    names: dict[str, list[str]] = {}
    for name in timm.list_pretrained():
        config = timm.get_pretrained_cfg(name)
        if config is not None and config.url:
            names.setdefault(config.url.rsplit("/", 1)[-1], []).append(name)
    return {file: known[0] for file, known in names.items() if len(known) == 1}


def _plain(settings: Any) -> Mapping[str, Any]:
    return settings if isinstance(settings, Mapping) else getattr(settings, "__dict__", {})


def _timm_name(value: Any, settings: Mapping[str, Any]) -> str | None:
    """timm's name for what training code calls an architecture."""
    if isinstance(value, Mapping):
        value = value.get("name")
    if not isinstance(value, str):
        return None
    if timm.is_model(value.split(".")[0]):
        return value
    patch = settings.get("patch_size", 16)
    if found := re.fullmatch(r"(?:mae_)?vit_(\w+?)_patch(\d+)(?:_dec\w+)?", value):  # MAE
        value, patch = f"vit_{found[1]}", found[2]
    name = f"{value.replace('deit_', 'vit_')}_patch{patch}_224"  # DINO, MoCo v3
    return name if re.fullmatch(r"(deit|vit)_\w+", value) and timm.is_model(name) else None


def _for_small_images(hint: Hint, settings: Mapping[str, Any]) -> Hint:
    """solo-learn replaces the stem of ResNets on CIFAR by a 3x3 convolution with a padding of 2."""
    data = settings.get("data", settings)
    small = str(_plain(data).get("dataset", "")).startswith("cifar")
    name = f"{hint.architecture}_cifar"
    if not ("method" in settings and small and timm.is_model(name)):
        return hint
    return Hint(architecture=name, said_by=hint.said_by, model_args={"stem_padding": 2})


def _image_size(selected: State, network: nn.Module) -> int | None:
    """Side in pixels of the square images whose positions the file holds, where it is not the network's."""
    embedding = getattr(network, "patch_embed", None)
    grid, patch = getattr(embedding, "grid_size", None), getattr(embedding, "patch_size", None)
    named = {OPEN_CLIP.get(key, key): value for key, value in selected.items()}
    positions, patches = named.get("pos_embed"), named.get("patch_embed.proj.weight")
    if grid is None or positions is None or patches is None or positions.ndim not in (2, 3):
        return None
    if tuple(patches.shape[2:]) != patch:
        return None
    tokens = positions.shape[-2]
    sides = [math.isqrt(tokens - extra) for extra in (0, 1, 2) if math.isqrt(tokens - extra) ** 2 == tokens - extra]
    if not sides or (sides[0], sides[0]) == tuple(grid):
        return None
    return sides[0] * patches.shape[-1]
