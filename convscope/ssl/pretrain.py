"""`convscope pretrain OBJECTIVE`: a backbone, shards and an objective in, a run directory out."""

import fnmatch
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import torch
import tyro
import yaml

from convscope.core import distributed
from convscope.core.backbone import Backbone, create_backbone
from convscope.core.checkpoint import RunDirectory
from convscope.core.config import parse_assignments
from convscope.core.data.shard_set import ShardSet, open_shards
from convscope.core.data.stream import Transform
from convscope.core.data.transforms import Normalize
from convscope.core.errors import UserError
from convscope.core.files import write_json
from convscope.core.log import info
from convscope.core.models import save_backbone
from convscope.core.results import environment
from convscope.core.tracking import TrackerName
from convscope.core.training.config import RESUMABLE, Hook, TrainConfig, TrainData
from convscope.core.training.hooks import TrackingHook
from convscope.core.training.loop import train
from convscope.core.training.objective import Objective
from convscope.core.training.optimization import OptimizerConfig
from convscope.ssl.objectives.spark import SparkConfig
from convscope.ssl.pictures import ReconstructionPictures


class ObjectiveConfig(Protocol):
    """What an objective's settings can do."""

    def build(self, backbone: Backbone) -> Objective:
        """The objective around a backbone."""

    def transform(self, backbone: Backbone) -> Transform:
        """Augmentation of a training image."""

    def crop_size(self, backbone: Backbone) -> tuple[int, int]:
        """Side of a training image in pixels."""


@dataclass(frozen=True, kw_only=True)
class PretrainCommand:
    """What every pretraining run is told, whatever its objective."""

    data: tuple[str, ...]
    """Folder of shards (see `convscope shards build`), brace pattern of tars, URLs or pipe: commands, builtin:shapes;
    several are mixed."""
    data_weights: tuple[float, ...] = ()
    """Weight of each source of the mixture; without, every sample comes once an epoch."""
    output_dir: Path
    """Run directory; the same command continues a run that is there."""
    backbone: str = "resnet50"
    """Any timm architecture that the objective accepts."""
    backbone_args: tuple[str, ...] = ()
    """Arguments for timm.create_model, such as depths=2,2,6,2."""
    split: str = "train"
    """Which split of the data to train on."""
    drop_path: float = 0.0
    """Stochastic depth rate."""
    picture_every: int | None = None
    """Steps between two reconstruction pictures; default: a twentieth of the run; 0: none."""
    track: tuple[TrackerName, ...] = ()
    """Also log to tensorboard, wandb."""
    optimization: tyro.conf.OmitArgPrefixes[OptimizerConfig] = field(default_factory=OptimizerConfig)
    train: tyro.conf.OmitArgPrefixes[TrainConfig]

    def objective_config(self) -> ObjectiveConfig:
        """The objective's own settings."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class SparkCommand(PretrainCommand):
    """Masked modeling for convolutional networks (SparK, Tian et al. 2023)."""

    objective: tyro.conf.OmitArgPrefixes[SparkConfig] = field(default_factory=SparkConfig)

    def objective_config(self) -> SparkConfig:
        """SparK's settings."""
        return self.objective


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
        arguments = parse_assignments(config.backbone_args) | (
            {"drop_path_rate": config.drop_path} if config.drop_path else {}
        )
        backbone = create_backbone(config.backbone, arguments, seed=config.train.seed)
        backbone.preprocessing = replace(backbone.preprocessing, size=objective_config.crop_size(backbone))
        torch.manual_seed(config.train.seed)  # the objective's own weights
        objective = objective_config.build(backbone)
        normalize = Normalize(backbone.preprocessing.mean, backbone.preprocessing.std)
        data = TrainData(
            shards=shards,
            transform=objective_config.transform(backbone),
            normalize=normalize,
            weights=config.data_weights or None,
        )
        with RunDirectory(config.output_dir, main=main) as run_dir:
            run_dir.claim(config, RESUMABLE)
            if main:
                write_json(config.output_dir / "environment.json", environment())
                _warn_untrained(objective)
            hooks = _hooks(config, data) if main else []
            trained = train(objective, data, config.train, config.optimization, run_dir, hooks)
            if main:
                save_backbone(config.output_dir / "backbone.safetensors", trained.backbone)


def _hooks(config: PretrainCommand, data: TrainData) -> list[Hook]:
    hooks: list[Hook] = []
    if config.picture_every != 0:
        every = config.picture_every or max(config.train.total_steps(len(data)) // 20, 1)
        hooks.append(ReconstructionPictures(data, every))
    if config.track:
        hooks.append(TrackingHook(config.track, config))
    return hooks


def _warn_untrained(objective: Objective) -> None:
    names: list[str] = getattr(objective, "untrained", [])
    layers = sorted({name.removeprefix("model.").rpartition(".")[0] for name in names})
    if layers:
        info(
            f"note: {', '.join(layers)} of {objective.backbone.arch} come after the last feature map and stay as "
            f"initialised; evaluate with --layers last"
        )


@cache
def presets() -> dict[str, Any]:
    """Published recipes, as data."""
    text = resources.files("convscope.ssl").joinpath("presets.yaml").read_text()
    return dict(yaml.safe_load(text))


def preset(name: str, arguments: list[str]) -> Mapping[str, Any]:
    """Flags of a named recipe; some depend on the backbone that the arguments name.

    Raises:
        UserError: no such recipe, or none for this backbone.
    """
    if name not in presets():
        raise UserError(f"no preset {name!r}; presets: {', '.join(presets())}")
    recipe = presets()[name]
    flags = dict(recipe["flags"])
    backbone = flags.get("backbone", PretrainCommand.backbone)
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
