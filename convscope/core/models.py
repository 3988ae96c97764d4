"""What model is this? One grammar for every source of weights.

runs/spark-r50             a convscope run, or a file in it
timm:resnet50              timm's pretrained weights
timm:resnet50@random       a seeded random initialisation; @random=3 for seed 3
weights.pth + arch         weights on disk, in any layout that checkpoint_layouts.py knows
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from convscope.core.backbone import Backbone, ModelArgs, Preprocessing, create_backbone
from convscope.core.checkpoint import latest_checkpoint
from convscope.core.checkpoint_layouts import State, match_weights, read_tensors
from convscope.core.config import from_dict, load_yaml, parse_assignments, to_dict
from convscope.core.errors import UserError
from convscope.core.files import write_bytes
from convscope.core.log import info

EXPORT = "backbone.safetensors"
NOT_SUPPORTED = ("open_clip", "hf-hub")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to build the network that a file's weights belong to."""

    architecture: str
    model_args: dict[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None  # where absent, timm's for the architecture, at `size` if that is given
    size: tuple[int, int] | None = None


def load_backbone(
    source: str, *, arch: str | None = None, model_args: ModelArgs | None = None, allow_partial: float = 1.0
) -> Backbone:
    """Load the backbone that `source` names (see the module's grammar).

    Args:
        source: a run directory, a weights file, or `timm:NAME[@random[=SEED]]`.
        arch: timm architecture, for files that do not say theirs.
        model_args: further arguments of the architecture; they override those that a file states.
        allow_partial: smallest accepted share of the backbone's weights; below 1, weights that are left over are
            accepted too. The share found is in `Backbone.matched`.

    Raises:
        UserError: no such source, an unreadable or unsafe file, or weights that do not fit the architecture.
    """
    if not 0 < allow_partial <= 1:
        raise UserError(f"--allow-partial is a share above 0 and at most 1, got {allow_partial}")
    scheme, separator, name = source.partition(":")
    if separator and scheme == "timm":
        return _from_timm(name, arch, model_args)
    if separator and scheme in NOT_SUPPORTED:
        raise UserError(f"{source}: {scheme}: models are not supported yet; use timm:NAME, a run or a weights file")
    path = Path(source)
    if not path.exists():
        raise UserError(f"no model {source}: it is neither a run, nor a weights file, nor timm:NAME")
    file = _newest(path) if path.is_dir() else path
    state, metadata = read_tensors(file)
    recipe = _stated_recipe(file, metadata)
    if recipe is None and arch is None:
        raise UserError(f"{file} does not say its architecture; pass --arch")
    if recipe is not None and arch not in (None, recipe.architecture):
        raise UserError(f"{file} holds a {recipe.architecture}, not a {arch}")
    recipe = recipe or Recipe(architecture=str(arch))
    backbone = create_backbone(recipe.architecture, {**recipe.model_args, **(model_args or {})}, seed=0)
    backbone.source = source
    if recipe.preprocessing:
        backbone.preprocessing = recipe.preprocessing
    elif recipe.size:
        backbone.preprocessing = replace(backbone.preprocessing, size=recipe.size)
    _fill(backbone, state, file, allow_partial)
    return backbone


def save_backbone(path: Path, backbone: Backbone) -> None:
    """Write the weights under timm's keys, with architecture, model_args and preprocessing as metadata.

    The file loads with `load_backbone(path)`, and in timm alone with
    `timm.create_model(architecture, num_classes=0, checkpoint_path=path, **model_args)`.

    Raises:
        UserError: the file cannot be written.
    """
    recipe = {
        "architecture": backbone.arch,
        "model_args": backbone.model_args,
        "preprocessing": backbone.preprocessing,
    }
    metadata = {key: json.dumps(value) for key, value in to_dict(recipe).items()}
    # Clones, because safetensors refuses tensors that share memory.
    weights = {key: value.detach().cpu().contiguous().clone() for key, value in backbone.model.state_dict().items()}
    write_bytes(path, save(weights, {"format": "pt", **metadata}))  # safetensors' own files only their owner may read


def model_record(backbone: Backbone) -> dict[str, Any]:
    """What a result file says about its model."""
    return {
        "source": backbone.source,
        "arch": backbone.arch,
        "model_args": to_dict(backbone.model_args),
        "weights_hash": backbone.weights_hash(),
        "matched": backbone.matched,
        "absent": list(backbone.absent),
    }


def untrained_twin(backbone: Backbone, seed: int = 0) -> Backbone:
    """The same architecture and preprocessing with a random initialisation: the floor for any comparison."""
    twin = create_backbone(backbone.arch, backbone.model_args, seed=seed)
    twin.preprocessing = backbone.preprocessing
    return twin


def _from_timm(name: str, arch: str | None, model_args: ModelArgs | None) -> Backbone:
    name, at, suffix = name.partition("@")
    if arch not in (None, name):
        raise UserError(f"timm:{name} names its architecture; leave --arch {arch} out")
    if not at:
        return create_backbone(name, model_args, pretrained=True)
    word, _, seed = suffix.partition("=")
    if word != "random" or not (seed or "0").isdecimal():
        raise UserError(f"timm:{name}@{suffix}: only @random or @random=SEED may follow the name")
    return create_backbone(name, model_args, seed=int(seed or 0))


def _newest(run: Path) -> Path:
    exported = run / EXPORT
    newest = exported if exported.is_file() else latest_checkpoint(run)
    if newest is None:
        raise UserError(f"{run} is no finished or running convscope run: it has no {EXPORT} and no checkpoints/latest")
    return newest


def _stated_recipe(file: Path, metadata: Mapping[str, str]) -> Recipe | None:
    """The recipe in a file's metadata, or, for a checkpoint of a pretraining run, in the run's config.yaml."""
    if "architecture" in metadata:
        names = [name for name in ("architecture", "model_args", "preprocessing") if name in metadata]
        try:
            values = {name: json.loads(metadata[name]) for name in names}
        except ValueError as error:
            raise UserError(f"{file}: its metadata is not valid JSON: {error}") from error
        if not isinstance(values.get("model_args", {}), dict):
            raise UserError(f"{file}: model_args in its metadata is no mapping")
        return from_dict(Recipe, values, f"metadata of {file}")
    config = file.parent.parent / "config.yaml"
    if file.parent.name != "checkpoints" or not config.is_file():
        return None
    settings = load_yaml(config)
    if not isinstance(settings.get("backbone"), str):
        return None
    arguments = parse_assignments(settings.get("backbone_args") or ())
    if drop_path := settings.get("drop_path"):
        arguments["drop_path_rate"] = drop_path
    size = (settings.get("objective") or {}).get("size")
    if isinstance(size, int):
        size = [size, size]
    return Recipe(architecture=settings["backbone"], model_args=arguments, size=tuple(size) if size else None)


def _fill(backbone: Backbone, state: State, file: Path, allow_partial: float) -> None:
    match = match_weights(state, backbone.model)
    accepted = match.complete or (allow_partial < 1 and match.share >= allow_partial)
    if not accepted:
        raise UserError(
            f"{file} does not fit {backbone.arch}: {match.share:.1%} of the backbone's weights matched; "
            f"{match.problems()}. Pass the --arch that it was trained with, or --allow-partial"
        )
    if broken := [key for key, value in match.weights.items() if not torch.isfinite(value).all()]:
        raise UserError(f"{file}: {len(broken)} weights hold NaN or infinity, the first is {broken[0]}")
    backbone.model.load_state_dict(match.weights, strict=False)
    backbone.matched, backbone.absent = match.share, tuple(match.absent)
    if match.absent:
        info(
            f"note: {file} has no {', '.join(match.absent)} (pretrained without a classifier); initial values are used"
        )
    if not match.complete:
        info(f"warning: {file} gave {match.share:.1%} of the backbone's weights: {match.problems()}")
