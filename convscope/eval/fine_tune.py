"""Fine-tuning: the whole network trained on all labels or a few, from a checkpoint or from scratch."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
import yaml
from numpy.typing import NDArray
from torch import Tensor

from convscope.core import distributed
from convscope.core.backbone import Backbone
from convscope.core.checkpoint import RunDirectory
from convscope.core.config import parse_assignments, to_dict
from convscope.core.data.shard_set import ShardSet, open_shards
from convscope.core.data.stream import eval_batches
from convscope.core.data.subset import per_class_subset, read_labels
from convscope.core.data.transforms import Normalize, crop_flip, eval_transform
from convscope.core.errors import UserError
from convscope.core.models import load_backbone, model_record, save_backbone, untrained_twin
from convscope.core.options import ModelArguments, require_at_least
from convscope.core.results import EvalResult, Figure, bootstrap, save_result
from convscope.core.training.config import RESUMABLE, TrainConfig, TrainData
from convscope.core.training.loop import train
from convscope.core.training.objective import Objective
from convscope.core.training.optimization import OptimizerConfig
from convscope.eval.classes import known_classes
from convscope.eval.classification import Classification, ClassificationConfig
from convscope.eval.common import require_two_splits

PROTOCOL = "fine-tune/1"


def default_optimization() -> OptimizerConfig:
    """AdamW with a short warm-up and a cosine to zero."""
    return OptimizerConfig(
        optimizer="adamw",
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.05,
        weight_decay_end=None,
        clip=1.0,
        warmup_epochs=5.0,
        warmup_start=0.0,
        lr_end=0.0,
    )


@dataclass(frozen=True, kw_only=True)
class FineTuneCommand:
    """Train the whole network with labels and report test accuracy once, after the last step."""

    model: tyro.conf.Positional[str]
    """Checkpoint, run directory, or timm:NAME (docs/design.md, Models)."""
    data: str
    """Folder of shards with labels, or builtin:shapes."""
    output_dir: Path
    """Run directory; the same command continues a run that is there."""
    arch: str | None = None
    """Architecture of a bare weights file."""
    model_args: ModelArguments = ()
    allow_partial: float = 1.0
    """Share of the backbone's weights that the checkpoint must provide."""
    from_scratch: bool = False
    """Start from random weights of the same architecture instead: the untrained twin."""
    train_split: str = "train"
    test_split: str = "test"
    label: str = "cls"
    """Member or json field that holds the label."""
    per_class: int | None = None
    """Train on this many labelled images of each class; default: all."""
    size: int | None = None
    """Side of the images in pixels; default: as the checkpoint was trained."""
    crop_scale: tuple[float, float] = (0.35, 1.0)
    """Range of the random crop's area."""
    flip: bool = True
    """Mirror images at random."""
    crop_pct: float | None = None
    """Share of the resized test image that its centre crop takes; default: as the checkpoint says."""
    drop_path: float | None = None
    """Stochastic depth rate; default: as the checkpoint was trained."""
    classification: tyro.conf.OmitArgPrefixes[ClassificationConfig] = field(default_factory=ClassificationConfig)
    optimization: tyro.conf.OmitArgPrefixes[OptimizerConfig] = field(default_factory=default_optimization)
    train: tyro.conf.OmitArgPrefixes[TrainConfig]

    def __post_init__(self) -> None:
        require_at_least(self, 1, "size")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            low, high = self.crop_scale
            raise UserError(f"--crop-scale needs two shares between 0 and 1, the smaller first, got {low:g} {high:g}")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise UserError(f"--crop-pct must be above 0 and at most 1, got {self.crop_pct:g}")
        if self.drop_path is not None and not 0 <= self.drop_path < 1:
            raise UserError(f"--drop-path must be at least 0 and below 1, got {self.drop_path:g}")


@cache
def presets() -> dict[str, dict[str, Any]]:
    """Published recipes by name, as data."""
    return dict(yaml.safe_load(resources.files("convscope.eval").joinpath("fine_tune_presets.yaml").read_text()))


def preset(command: type[FineTuneCommand], name: str, arguments: list[str]) -> Mapping[str, Any]:
    """Flags of a named recipe.

    Raises:
        UserError: no such recipe.
    """
    if name not in presets():
        raise UserError(f"no preset {name!r}; presets of fine-tune: {', '.join(presets())}")
    return presets()[name]


def run(config: FineTuneCommand) -> None:
    """Fine-tune, print the accuracy and write results/fine-tune.json in the run directory."""
    result = fine_tune(config)
    if result is not None:
        top1 = result.figures["top1"]
        print(f"top-1 {100 * top1.value:.2f} % [{100 * (top1.low or 0):.2f}, {100 * (top1.high or 0):.2f}]")


def fine_tune(config: FineTuneCommand) -> EvalResult | None:
    """Run the whole protocol; the result is None on all processes but the main one.

    Raises:
        UserError: what loading, reading or training refuses; train and test are the same shards.
    """
    device = distributed.pick_device(config.train.device)
    with distributed.process_group(device):
        backbone = _start(config)
        record = model_record(backbone)  # before training changes the weights
        shards = open_shards(config.data, config.train_split)
        test = open_shards(config.data, config.test_split)
        require_two_splits(shards, test)
        labels = read_labels(shards, config.label)
        known_classes(labels, read_labels(test, config.label))
        indices = None if config.per_class is None else per_class_subset(labels, config.per_class, config.train.seed)
        torch.manual_seed(config.train.seed)
        objective = Classification(backbone, int(labels.max()) + 1, config.classification)
        main = distributed.is_main()
        with RunDirectory(config.output_dir, main=main, takes_over="CONVSCOPE_JOB" in os.environ) as run_dir:
            run_dir.claim(config, RESUMABLE)
            data = _train_data(config, backbone, shards, indices)
            trained = train(objective, data, config.train, config.optimization, run_dir)
            if not main:
                return None
            result = _test(config, trained, test, record, data)
            save_result(config.output_dir / "results" / "fine-tune.json", result)
            save_backbone(config.output_dir / "backbone.safetensors", trained.backbone)
    return result


def _start(config: FineTuneCommand) -> Backbone:
    arguments = parse_assignments(config.model_args)
    if config.drop_path is not None:
        arguments["drop_path_rate"] = config.drop_path
    backbone = load_backbone(config.model, arch=config.arch, model_args=arguments, allow_partial=config.allow_partial)
    if config.from_scratch:
        backbone = untrained_twin(backbone, config.train.seed)
    if config.size is not None:
        backbone = backbone.at_size(config.size)
    if config.crop_pct is not None:
        backbone.preprocessing = replace(backbone.preprocessing, crop_pct=config.crop_pct)
    return backbone


def _train_data(
    config: FineTuneCommand, backbone: Backbone, shards: ShardSet, indices: NDArray[np.int64] | None
) -> TrainData:
    preprocessing = backbone.preprocessing
    transform = crop_flip(
        preprocessing.size,
        scale=config.crop_scale,
        interpolation=preprocessing.interpolation,
        flip=config.flip,
        after=config.classification.augmentation(preprocessing),
    )
    normalize = Normalize(preprocessing.mean, preprocessing.std)
    return TrainData(shards=shards, transform=transform, normalize=normalize, label=config.label, indices=indices)


def _test(
    config: FineTuneCommand, trained: Objective, test: ShardSet, record: dict[str, Any], data: TrainData
) -> EvalResult:
    assert isinstance(trained, Classification)
    hits = predict(trained, test, data.normalize, config.label, workers=config.train.workers)
    samples = {"top1": hits[:, 0].astype(bool)}
    if trained.head.out_features > 5:
        samples["top5"] = hits[:, 1].astype(bool)
    figures = {name: bootstrap(each, seed=config.train.seed) for name, each in samples.items()}
    figures["train_images"] = Figure(float(len(data)))
    return EvalResult(
        task="fine-tune",
        protocol=PROTOCOL,
        model={**record, "from_scratch": config.from_scratch},
        data={
            "source": config.data,
            "train": {"split": config.train_split, "fingerprint": data.shards.fingerprint, "count": len(data)},
            "test": {"split": config.test_split, "fingerprint": test.fingerprint, "count": len(test)},
            "label": config.label,
        },
        preprocessing=asdict(trained.backbone.preprocessing),
        figures=figures,
        details={"settings": to_dict(config)},
        seed=config.train.seed,
        samples=samples,
    )


@torch.inference_mode()
def predict(
    objective: Classification, shards: ShardSet, normalize: Normalize, label: str, *, workers: int = 0
) -> NDArray[np.float64]:
    """Whether the true class is the first, and among the first five: (N, 2) of 0 and 1."""
    device = next(objective.parameters()).device
    was_training = objective.training
    objective.eval()
    transform = eval_transform(objective.backbone.preprocessing)
    hits: list[Tensor] = []
    classes = objective.head.out_features
    for batch in eval_batches(shards, transform, batch_size=256, workers=workers, label=label):
        if int(batch["label"].max()) >= classes:
            raise UserError(
                f"split {shards.split} has label {int(batch['label'].max())}; training had {classes} classes"
            )
        logits = objective.logits(normalize(batch["image"].to(device)))
        ranked = logits.topk(min(5, classes), dim=1).indices.cpu() == batch["label"][:, None]
        hits.append(torch.stack([ranked[:, 0], ranked.any(1)], dim=1))
    objective.train(was_training)
    return torch.cat(hits).double().numpy()
