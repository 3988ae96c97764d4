"""What model is this? One grammar for every source of weights.

runs/spark-r50                 a convscope run, or a file in it
timm:resnet50                  timm's pretrained weights
timm:resnet50@random           a seeded random initialisation; @random=3 for seed 3
weights.pth [+ arch]           weights on disk, in any layout that checkpoint_layouts.py knows
open_clip:ViT-B-32/laion2b...  the image tower of an open_clip model; open_clip:FOLDER in open_clip's format
hf-hub:ORG/NAME                timm's models on the Hugging Face hub; local-dir:FOLDER for one on disk
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save

from convscope.core.architecture_hints import published_name, stated_architecture
from convscope.core.backbone import Backbone, ModelArgs, Preprocessing, create_backbone, preprocessing_from
from convscope.core.backbone_loading import Recipe, load_weights
from convscope.core.checkpoint import latest_checkpoint
from convscope.core.config import from_dict, load_yaml, parse_assignments, to_dict
from convscope.core.errors import UserError
from convscope.core.files import read_json, write_bytes
from convscope.core.weights_file import WeightsFile, read_weights

EXPORT = "backbone.safetensors"
HUBS = ("hf-hub", "local-dir")
FORMS = "a run, a weights file, timm:NAME, open_clip:NAME/PRETRAINED, hf-hub:ORG/NAME or local-dir:FOLDER"


def load_backbone(
    source: str, *, arch: str | None = None, model_args: ModelArgs | None = None, allow_partial: float = 1.0
) -> Backbone:
    """Load the backbone that `source` names (see the module's grammar).

    Args:
        source: a run directory, a weights file, or a name with a scheme.
        arch: timm architecture, for files that do not say theirs.
        model_args: further arguments of the architecture; they override those that a file states.
        allow_partial: smallest accepted share of the backbone's weights; below 1, weights that are left over are
            accepted too. The share found is in `Backbone.matched`.

    Raises:
        UserError: no such source, an unreadable or unsafe file, or weights that do not fit the architecture.
    """
    if not 0 < allow_partial <= 1:
        raise UserError(f"--allow-partial is a share above 0 and at most 1, got {allow_partial}")
    scheme, _, name = source.partition(":")
    if scheme in ("timm", "open_clip", *HUBS):
        if arch is not None and arch != name.partition("@")[0]:
            raise UserError(f"{source} names its architecture; leave --arch {arch} out")
        if scheme == "timm":
            return _from_timm(name, model_args)
        if scheme == "open_clip":
            from convscope.core.pairs.open_clip_tower import load_tower

            return load_tower(name, model_args)
        return _from_hub(source, model_args or {}, allow_partial)
    path = Path(source)
    if not path.exists():
        raise UserError(f"no model {source}: it is none of {FORMS}")
    file = read_weights(_newest(path) if path.is_dir() else path)
    recipe = _recipe(file, arch)
    return load_weights(file, recipe, model_args or {}, source=source, allow_partial=allow_partial)


class LoadsModel:
    """Commands that load one model; each declares these settings where its --help shows them."""

    model: str
    arch: str | None
    model_args: tuple[str, ...]
    allow_partial: float

    def load(self) -> Backbone:
        """The model.

        Raises:
            UserError: it cannot be loaded.
        """
        arguments = parse_assignments(self.model_args)
        return load_backbone(self.model, arch=self.arch, model_args=arguments, allow_partial=self.allow_partial)


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
        "layout": backbone.origin.layout,
        "dropped": list(backbone.origin.dropped),
        "preprocessing_from": backbone.origin.preprocessing,
    }


def untrained_twin(backbone: Backbone, seed: int = 0) -> Backbone:
    """The same architecture and preprocessing with a random initialisation: the floor for any comparison."""
    twin = create_backbone(backbone.arch, backbone.model_args, seed=seed)
    twin.preprocessing = backbone.preprocessing
    return twin


def _from_timm(name: str, model_args: ModelArgs | None) -> Backbone:
    name, at, suffix = name.partition("@")
    if not at:
        return create_backbone(name, model_args, pretrained=True)
    word, _, seed = suffix.partition("=")
    if word != "random" or not (seed or "0").isdecimal():
        raise UserError(f"timm:{name}@{suffix}: only @random or @random=SEED may follow the name")
    return create_backbone(name, model_args, seed=int(seed or 0))


def _from_hub(source: str, given: ModelArgs, allow_partial: float) -> Backbone:
    """A model in the format of timm's hub: config.json with architecture and preprocessing, and weights."""
    from timm.models import _hub

    scheme, _, name = source.partition(":")
    try:
        if scheme == "local-dir":
            config, architecture, arguments = _hub.load_model_config_from_path(name)
            state = _hub.load_state_dict_from_path(name)
        else:
            config, architecture, arguments = _hub.load_model_config_from_hf(name)
            state = _hub.load_state_dict_from_hf(name)
    except Exception as error:  # of the network, the hub, the file or its content
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"cannot load {source} as a timm model: {reason}") from error
    recipe = Recipe(
        architecture=architecture,
        model_args={key: value for key, value in arguments.items() if key != "num_classes"},
        preprocessing=preprocessing_from(
            timm.data.resolve_data_config({}, pretrained_cfg=config), {**arguments, **given}
        ),
    )
    return load_weights(
        WeightsFile(path=Path(name), state=state), recipe, given, source=source, allow_partial=allow_partial
    )


def _newest(run: Path) -> Path:
    exported = run / EXPORT
    newest = exported if exported.is_file() else latest_checkpoint(run)
    if newest is None:
        raise UserError(
            f"{run} is no finished or running convscope run: it has no {EXPORT} and no checkpoints/latest; "
            "a folder in the format of open_clip or of timm's hub is open_clip:FOLDER or local-dir:FOLDER"
        )
    return newest


def _recipe(file: WeightsFile, arch: str | None) -> Recipe:
    """What the file itself says, else `arch`, else what its name or its settings hint at."""
    stated = _stated_recipe(file)
    if stated is not None:
        if arch not in (None, stated.architecture):
            raise UserError(f"{file.path} holds a {stated.architecture}, not a {arch}")
        return stated
    size = file.said.get("input_size")  # SparK's
    sides = (size, size) if isinstance(size, int) else None
    if arch is not None:
        published = published_name(file.path.name) or ""
        return Recipe(architecture=published if published.partition(".")[0] == arch else arch, size=sides)
    hint = stated_architecture(file)
    if hint is None:
        raise UserError(f"{file.path} does not say its architecture; pass --arch")
    return Recipe(architecture=hint.architecture, model_args=dict(hint.model_args), size=sides, said_by=hint.said_by)


def _stated_recipe(file: WeightsFile) -> Recipe | None:
    """The recipe in a file's metadata, or, for a checkpoint of a pretraining run, in the run's config.yaml."""
    if "architecture" in file.metadata:
        return _recipe_in_metadata(file.path, file.metadata)
    if "image_text" in file.metadata:  # both towers of pretrain clip: core/pairs/model.py
        image = json.loads(file.metadata["image_text"])["image"]
        return from_dict(Recipe, image, f"metadata of {file.path}")
    config = file.path.parent.parent / "config.yaml"
    if file.path.parent.name != "checkpoints" or not config.is_file():
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
    return Recipe(
        architecture=settings["backbone"],
        model_args=arguments,
        preprocessing=_preprocessing_of_run(config.with_name("environment.json")),
        size=tuple(size) if size else None,
        said_by="convscope's config.yaml",
    )


def _preprocessing_of_run(file: Path) -> Preprocessing | None:
    """What the run's images went through, which is not its architecture's where it started from other weights."""
    stated = read_json(file).get("preprocessing") if file.is_file() else None
    return None if stated is None else from_dict(Preprocessing, stated, str(file))


def _recipe_in_metadata(path: Path, metadata: Mapping[str, str]) -> Recipe:
    names = [name for name in ("architecture", "model_args", "preprocessing") if name in metadata]
    try:
        values = {name: json.loads(metadata[name]) for name in names}
    except ValueError as error:
        raise UserError(f"{path}: its metadata is not valid JSON: {error}") from error
    if not isinstance(values.get("model_args", {}), dict):
        raise UserError(f"{path}: model_args in its metadata is no mapping")
    return from_dict(Recipe, values, f"metadata of {path}")
