"""`convscope pretrain OBJECTIVE`: a backbone, shards and an objective in, a run directory out."""

import fnmatch
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
import tyro
import yaml

from convscope.core import distributed
from convscope.core.backbone import Backbone, create_backbone
from convscope.core.checkpoint import RunDirectory
from convscope.core.config import format_assignments, parse_assignments, to_dict
from convscope.core.data.photometric import PhotometricConfig
from convscope.core.data.shard_set import ShardSet, open_shards
from convscope.core.data.stream import Fields, Transform
from convscope.core.data.transforms import Normalize
from convscope.core.errors import UserError
from convscope.core.files import write_json
from convscope.core.models import load_backbone, save_backbone
from convscope.core.results import environment
from convscope.core.tracking import TrackerName
from convscope.core.training.config import RESUMABLE, Hook, TrainConfig, TrainData
from convscope.core.training.hooks import TrackingHook
from convscope.core.training.loop import train
from convscope.core.training.objective import Objective
from convscope.core.training.optimization import OptimizerConfig

DEFAULT_BACKBONE = "resnet50"


class ObjectiveConfig(Protocol):
    """What the settings of every objective can do."""

    def transform(self, backbone: Backbone) -> Transform:
        """Augmentation of a training image."""

    def crop_size(self, backbone: Backbone) -> tuple[int, int]:
        """Side of a training image in pixels."""


@dataclass(frozen=True, kw_only=True)
class PretrainCommand:
    """What every pretraining run is told, whatever its objective."""

    name: ClassVar[str]  # of the objective, as in presets.yaml

    data: tuple[str, ...]
    """Folder of shards (see `convscope shards build`), brace pattern of tars, URLs or pipe: commands, builtin:shapes;
    several are mixed."""
    data_weights: tuple[float, ...] = ()
    """Weight of each source of the mixture; without, every sample comes once an epoch."""
    output_dir: Path
    """Run directory; the same command continues a run that is there."""
    backbone: str | None = None
    """Any timm architecture that the objective accepts; default: that of --init, else resnet50."""
    backbone_args: tuple[str, ...] = ()
    """Arguments for timm.create_model, such as depths=2,2,6,2."""
    init: str | None = None
    """Weights to start from: any MODEL of eval (with --backbone where a file does not name its architecture)."""
    split: str = "train"
    """Which split of the data to train on."""
    drop_path: float = 0.0
    """Stochastic depth rate."""
    track: tuple[TrackerName, ...] = ()
    """Also log to tensorboard, wandb."""
    optimization: tyro.conf.OmitArgPrefixes[OptimizerConfig] = field(default_factory=OptimizerConfig)
    train: tyro.conf.OmitArgPrefixes[TrainConfig]

    def objective_config(self) -> ObjectiveConfig:
        """The objective's own settings."""
        raise NotImplementedError

    def build(self, backbone: Backbone, shards: ShardSet) -> Objective:
        """The objective around `backbone`; called with the same draws on every process."""
        raise NotImplementedError

    def photometric(self) -> PhotometricConfig | None:
        """Changes of colour and sharpness."""
        return None

    def fields(self, objective: Objective, shards: ShardSet) -> Fields | None:
        """What the objective reads of a sample beside its image."""
        return None

    def prepare(self, objective: Objective) -> None:
        """Called on the main process once the run directory is this run's own."""

    def hooks(self, objective: Objective, data: TrainData) -> list[Hook]:
        """What looks on, on the main process."""
        return []

    def export(self, trained: Objective) -> None:
        """Write what the run was for; called on the main process at its end."""
        save_backbone(self.output_dir / "backbone.safetensors", trained.backbone)


def run(config: PretrainCommand) -> None:
    """Pretrain, or continue, and export the encoder."""
    pretrain(config)
    if os.environ.get("RANK", "0") == "0":
        print(config.output_dir)


def pretrain(config: PretrainCommand) -> None:
    """Run `config` to the end of its budget and export the trained encoder.

    Raises:
        UserError: see `core.training.loop.train`; also a directory that holds or is used by another run.
    """
    device = distributed.pick_device(config.train.device)
    with distributed.process_group(device):
        main = distributed.is_main()
        objective_config = config.objective_config()
        shards = ShardSet.joined([open_shards(source, config.split) for source in config.data])
        backbone, config = _start(config)
        torch.manual_seed(config.train.seed)  # the objective's own weights
        objective = config.build(backbone, shards)
        data = TrainData(
            shards=shards,
            transform=objective_config.transform(backbone),
            normalize=Normalize(backbone.preprocessing.mean, backbone.preprocessing.std),
            weights=config.data_weights or None,
            fields=config.fields(objective, shards),
            photometric=config.photometric(),
        )
        with RunDirectory(config.output_dir, main=main, takes_over="CONVSCOPE_JOB" in os.environ) as run_dir:
            run_dir.claim(config, RESUMABLE)
            if main:
                prepared = {"preprocessing": to_dict(backbone.preprocessing)}  # of --init, not in config.yaml
                write_json(config.output_dir / "environment.json", environment() | prepared)
                config.prepare(objective)
            hooks = config.hooks(objective, data) if main else []
            if main and config.track:
                hooks.append(TrackingHook(config.track, config))
            trained = train(objective, data, config.train, config.optimization, run_dir, hooks)
            if main:
                config.export(trained)


def _start(config: PretrainCommand) -> tuple[Backbone, PretrainCommand]:
    """The backbone to train at the size of its images, and the settings with its architecture written out."""
    arguments = parse_assignments(config.backbone_args)
    if config.drop_path:
        arguments["drop_path_rate"] = config.drop_path
    if config.init is None:
        backbone = create_backbone(config.backbone or DEFAULT_BACKBONE, arguments, seed=config.train.seed)
    else:
        backbone = load_backbone(config.init, arch=config.backbone, model_args=arguments)
    backbone = _at_size(backbone, config.objective_config().crop_size(backbone), config)
    if config.init is None and backbone.model_args == arguments:
        return backbone, replace(config, backbone=backbone.arch)
    stated = {key: value for key, value in backbone.model_args.items() if key != "drop_path_rate"}
    return backbone, replace(config, backbone=backbone.arch, backbone_args=format_assignments(stated))


def _at_size(backbone: Backbone, size: tuple[int, int], config: PretrainCommand) -> Backbone:
    """The backbone for images of `size`; where positions are fixed it is rebuilt, and its arguments state the size.

    Raises:
        UserError: a size that the network, or its weights, cannot be brought to.
    """
    refused = _refusal(backbone, size)
    if refused is not None:
        try:
            rebuilt = create_backbone(backbone.arch, {**backbone.model_args, "img_size": size}, seed=config.train.seed)
        except UserError:
            raise refused from None
        if config.init is not None:
            try:
                rebuilt.model.load_state_dict(backbone.at_size(size[0]).model.state_dict())
            except RuntimeError as error:
                raise UserError(f"{refused}; nor can the weights of {config.init} be brought to them") from error
            rebuilt.preprocessing, rebuilt.source = backbone.preprocessing, backbone.source
        backbone = rebuilt
        if (refused := _refusal(backbone, size)) is not None:
            raise refused
    backbone.preprocessing = replace(backbone.preprocessing, size=size)
    return backbone


def _refusal(backbone: Backbone, size: tuple[int, int]) -> UserError | None:
    """Why the network does not take images of `size`, if it does not."""
    training = backbone.training
    try:
        with torch.no_grad():
            backbone.eval()(torch.zeros(1, 3, *size))
    except (AssertionError, RuntimeError, ValueError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        return UserError(f"{backbone.arch} does not take images of {size[0]} x {size[1]} px: {said}")
    finally:
        backbone.train(training)
    return None


@cache
def presets() -> dict[str, dict[str, Any]]:
    """Published recipes by objective and name, as data."""
    text = resources.files("convscope.ssl").joinpath("presets.yaml").read_text()
    return dict(yaml.safe_load(text))


def preset(command: type[PretrainCommand], name: str, arguments: list[str]) -> Mapping[str, Any]:
    """Flags of a named recipe; some depend on the backbone that the arguments name.

    Raises:
        UserError: no such recipe, or none for this backbone.
    """
    known = presets()[command.name]
    if name not in known:
        raise UserError(f"no preset {name!r}; presets of {command.name}: {', '.join(known)}")
    recipe = known[name]
    flags = dict(recipe["flags"])
    backbone = flags.get("backbone", DEFAULT_BACKBONE)
    for i, argument in enumerate(arguments):
        if argument.startswith("--backbone="):
            backbone = argument.partition("=")[2]
        elif argument == "--backbone" and i + 1 < len(arguments):
            backbone = arguments[i + 1]
    for pattern, values in recipe.get("by_backbone", {}).items():
        if fnmatch.fnmatch(backbone, pattern):
            return {**flags, **values}
    if "by_backbone" in recipe:
        raise UserError(f"preset {name} is published for {', '.join(recipe['by_backbone'])}, not for {backbone}")
    return flags
