"""A weights file and a recipe in, a filled backbone out, or one line that says why not."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from convscope.core.architecture_hints import implied_args
from convscope.core.backbone import Backbone, Origin, Preprocessing, create_backbone
from convscope.core.errors import UserError
from convscope.core.log import info
from convscope.core.torchvision_names import published_preprocessing
from convscope.core.weights_file import State, WeightsFile, first_names
from convscope.core.weights_match import Match, match_weights

OPEN_CLIP_CONFIG = "open_clip_config.json"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to build the network that a file's weights belong to."""

    architecture: str
    model_args: dict[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None  # where absent: the layout's, or timm's for the architecture
    size: tuple[int, int] | None = None  # of the images that it was trained on
    said_by: str = ""  # what named the architecture


def load_weights(
    file: WeightsFile, recipe: Recipe, given: Mapping[str, Any], *, source: str, allow_partial: float = 1.0
) -> Backbone:
    """Build the recipe's network, with `given` arguments above its own, and fill it with the file's weights.

    Raises:
        UserError: weights that do not fit the architecture, or that are not finite.
    """
    backbone, match, implied = fit(file.state, recipe.architecture, {**recipe.model_args, **given})
    _require_fit(match, backbone.arch, file.path, recipe, allow_partial)
    _require_padding(match, backbone, file.path)
    backbone.model.load_state_dict(match.weights, strict=False)
    backbone.source, backbone.matched, backbone.absent = source, match.share, tuple(match.absent)
    backbone.classifier = match.classifier
    backbone.preprocessing, prepared_by = _preprocessing(backbone, match, file.path, recipe, "img_size" in given)
    backbone.origin = Origin(
        layout=match.layout.name,
        container=file.container,
        said_by=recipe.said_by,
        dropped=(*parts(match.dropped), *file.copies),
        resampled=tuple(match.resampled),
        preprocessing=prepared_by,
    )
    _tell(backbone, match, file.path, implied)
    return backbone


def fit(state: State, architecture: str, arguments: Mapping[str, Any]) -> tuple[Backbone, Match, dict[str, Any]]:
    """The network, how far the tensors fill it, and the arguments that they imply beyond the given ones."""
    backbone = create_backbone(architecture, arguments, seed=0)
    match = match_weights(state, backbone.model)
    if implied := implied_args(match, backbone.model, arguments):
        backbone = create_backbone(architecture, {**arguments, **implied}, seed=0)
        match = match_weights(state, backbone.model)
    return backbone, match, implied


def parts(keys: Sequence[str]) -> list[str]:
    """The modules that keys belong to, each once: the first word, or two below a word that holds whole networks."""
    holders = ("teacher", "student", "visual", "base_encoder", "encoder_q", "model", "head")
    found = []
    for key in keys:
        words = key.removesuffix(".weight").removesuffix(".bias").split(".")
        words = words[-1:] if words[-1] == "mask_token" else words  # which lies inside the backbone
        found.append(".".join(words[: 2 if words[0] in holders else 1]))
    return list(dict.fromkeys(found))


def open_clip_preprocessing(config: Mapping[str, Any], size: tuple[int, int] = (224, 224)) -> Preprocessing:
    """What open_clip's `preprocess_cfg` says, for images of `size` unless it has its own."""
    own = config.get("size", size)
    height, width = (own, own) if isinstance(own, int) else own
    clip = Preprocessing(size=(int(height), int(width)), crop_pct=1.0)
    return replace(
        clip,
        mean=tuple(config.get("mean", clip.mean)),
        std=tuple(config.get("std", clip.std)),
        interpolation=config.get("interpolation", "bicubic"),
        crop_mode="squash" if config.get("resize_mode") == "squash" else "center",
    )


def _require_fit(match: Match, arch: str, path: Path, recipe: Recipe, allow_partial: float) -> None:
    accepted = match.complete or (allow_partial < 1 and match.share >= allow_partial)
    if not accepted:
        by = f" ({recipe.said_by})" if recipe.said_by else ""
        raise UserError(
            f"{path} does not fit {arch}{by}: {match.percent} of the backbone's weights matched; "
            f"{match.problems()}. {_advice(match)}"
        )
    if broken := [key for key, value in match.weights.items() if not torch.isfinite(value).all()]:
        raise UserError(f"{path}: {len(broken)} weights hold NaN or infinity, the first is {broken[0]}")


def _require_padding(match: Match, backbone: Backbone, path: Path) -> None:
    """A backbone beside a classifier may be solo-learn's, and shapes do not tell how its small stem pads."""
    small_stem = match.layout.name == "solo-learn" and hasattr(backbone.model, "stem_padding")
    if small_stem and "stem_padding" not in backbone.model_args:
        raise UserError(
            f"{path} does not say how its 3x3 stem pads: pass --model-args stem_padding=2 for solo-learn's networks "
            "(its args.json beside the file says so), or stem_padding=1"
        )


def _advice(match: Match) -> str:
    stem = match.selected.get("conv1.weight")
    if stem is not None and stem.shape[-1] == 3 and any(name.startswith("conv1.weight") for name in match.misshapen):
        return "Its stem is that of small images: pass --arch resnet18_cifar or resnet50_cifar"
    return "Pass the --arch that it was trained with, or --allow-partial"


def _preprocessing(
    backbone: Backbone, match: Match, path: Path, recipe: Recipe, other_size: bool
) -> tuple[Preprocessing, str]:
    """How images are prepared for these weights, and who says so."""
    if recipe.preprocessing:
        own_size = backbone.preprocessing.size if other_size else recipe.preprocessing.size
        return replace(recipe.preprocessing, size=own_size), "the file's own"
    base = replace(backbone.preprocessing, size=recipe.size or backbone.preprocessing.size)
    if "." in backbone.arch:
        return base, f"timm's for {backbone.arch}"
    if published := published_preprocessing(path.name):
        return replace(published, size=backbone.preprocessing.size), "torchvision's for this file"
    layout = match.layout
    config = path.with_name(OPEN_CLIP_CONFIG)
    if layout.name.startswith("open_clip") and config.is_file():
        try:
            return open_clip_preprocessing(json.loads(config.read_text())["preprocess_cfg"], base.size), config.name
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{config} has no preprocess_cfg that open_clip would understand: {error!r}") from error
    own = None if "siglip" in backbone.arch else layout.preprocessing  # SigLIP has means of its own, timm's
    if own:
        prepared = replace(
            base,
            mean=own.mean,
            std=own.std,
            interpolation=own.interpolation or base.interpolation,
            crop_pct=own.crop_pct or base.crop_pct,
        )
        return prepared, f"that of {layout.name}"
    if recipe.said_by.startswith("convscope"):
        return base, "the run's"
    return base, f"timm's for {backbone.arch}, assumed: the file does not say"


def _tell(backbone: Backbone, match: Match, path: Path, implied: Mapping[str, Any]) -> None:
    origin, notes = backbone.origin, []
    if origin.said_by and not origin.said_by.startswith("convscope"):
        notes.append(f"its architecture is {backbone.arch} by {origin.said_by}")
    if implied:
        notes.append("it was trained with " + ", ".join(f"{key}={value}" for key, value in implied.items()))
    if match.absent:
        notes.append(f"it has no {', '.join(match.absent)} (pretrained without a classifier); initial values are used")
    if match.resampled:
        notes.append(f"{first_names(match.resampled)} resampled to {backbone.model_args.get('img_size', 'its')} pixels")
    if match.layout.name == "open_clip" and "quickgelu" not in backbone.arch and hasattr(backbone.model, "blocks"):
        notes.append("GELU is used; OpenAI's and other weights of QuickGELU need the _quickgelu_ architecture")
    if origin.preprocessing.endswith("does not say"):
        used = backbone.preprocessing
        mean = "/".join(f"{value:.3f}" for value in used.mean)
        notes.append(
            f"it does not say how images are prepared; timm's way for {backbone.arch} is used (mean {mean}, "
            f"crop_pct {used.crop_pct}; name another with --arch {backbone.arch}.TAG)"
        )
    for note in notes:
        info(f"note: {path}: {note}")
    if not match.complete:
        info(f"warning: {path} gave {match.percent} of the backbone's weights: {match.problems()}")
