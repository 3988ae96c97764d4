"""`convscope pretrain spark | rotation`."""

from dataclasses import dataclass, field
from typing import ClassVar

import tyro

from convscope.core.backbone import Backbone
from convscope.core.data.photometric import PhotometricConfig
from convscope.core.data.shard_set import ShardSet
from convscope.core.log import info
from convscope.core.training.config import Hook, TrainData
from convscope.core.training.objective import Objective
from convscope.core.training.optimization import OptimizerConfig
from convscope.ssl.objectives.rotation import Rotation, RotationConfig
from convscope.ssl.objectives.spark import Spark, SparkConfig
from convscope.ssl.pictures import ReconstructionPictures
from convscope.ssl.pretrain import PretrainCommand, preset, run
from convscope.ssl.sparse.rules import on_whole_maps

__all__ = ["RotationCommand", "SparkCommand", "preset", "run"]


@dataclass(frozen=True, kw_only=True)
class SparkCommand(PretrainCommand):
    """Masked modeling for convolutional networks (SparK, Tian et al. 2023)."""

    name: ClassVar[str] = "spark"

    picture_every: int | None = None
    """Steps between two reconstruction pictures; default: a twentieth of the run; 0: none."""
    objective: tyro.conf.OmitArgPrefixes[SparkConfig] = field(default_factory=SparkConfig)

    def objective_config(self) -> SparkConfig:
        """SparK's settings."""
        return self.objective

    def build(self, backbone: Backbone, shards: ShardSet) -> Spark:
        """Masked modeling on `backbone`, which is proved exact first."""
        return self.objective.build(backbone)

    def prepare(self, objective: Objective) -> None:
        """Name the layers that masked modeling never reaches, and those that it cannot make faster."""
        assert isinstance(objective, Spark)
        if slow := on_whole_maps(objective.backbone.model):
            kinds = ", ".join(f"{count} {kind}" for kind, count in slow.most_common())
            info(f"note: {kinds} of {objective.backbone.arch} are computed on whole maps: exact, but not faster")
        layers = sorted({name.removeprefix("model.").rpartition(".")[0] for name in objective.untrained})
        if layers:
            info(
                f"note: {', '.join(layers)} of {objective.backbone.arch} come after the last feature map and stay as "
                f"initialised; evaluate with --layers last"
            )

    def hooks(self, objective: Objective, data: TrainData) -> list[Hook]:
        """Reconstruction pictures."""
        if self.picture_every == 0:
            return []
        every = self.picture_every or max(self.train.total_steps(len(data)) // 20, 1)
        return [ReconstructionPictures(data, every)]


def rotation_optimization() -> OptimizerConfig:
    """SGD with a cosine to zero."""
    return OptimizerConfig(
        optimizer="sgd",
        lr=0.2,
        weight_decay=5e-4,
        weight_decay_end=None,
        clip=None,
        warmup_epochs=0.0,
        warmup_start=0.0,
        lr_end=0.0,
    )


@dataclass(frozen=True, kw_only=True)
class RotationCommand(PretrainCommand):
    """Rotation prediction (Gidaris et al. 2018); a step sees every image in its four rotations."""

    name: ClassVar[str] = "rotation"

    objective: tyro.conf.OmitArgPrefixes[RotationConfig] = field(default_factory=RotationConfig)
    optimization: tyro.conf.OmitArgPrefixes[OptimizerConfig] = field(default_factory=rotation_optimization)

    def objective_config(self) -> RotationConfig:
        """The settings of rotation prediction."""
        return self.objective

    def build(self, backbone: Backbone, shards: ShardSet) -> Rotation:
        """Rotation prediction with `backbone`."""
        return self.objective.build(backbone)

    def prepare(self, objective: Objective) -> None:
        """Say where the evaluation should look."""
        info("note: the last layer is the best at rotations, not at other tasks; evaluate with --layers all")

    def photometric(self) -> PhotometricConfig:
        """Changes of colour and sharpness."""
        return self.objective.photometric
