"""Linear probes that train on augmented images: the protocols of DINOv2, MAE and lightly, and attentive heads."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from convscope.core import distributed
from convscope.core.backbone import Backbone
from convscope.core.checkpoint import RunDirectory
from convscope.core.config import to_dict
from convscope.core.data.shard_set import ShardSet
from convscope.core.data.subset import read_labels
from convscope.core.data.transforms import Normalize, crop_flip
from convscope.core.errors import UserError
from convscope.core.options import require_at_least
from convscope.core.results import EvalResult, Figure, save_result
from convscope.core.training.config import RESUMABLE, Hook, TrainConfig, TrainData
from convscope.core.training.loop import train
from convscope.core.training.optimization import OptimizerConfig, count_parameters
from convscope.eval.classes import hits_of, known_classes
from convscope.eval.common import (
    EvalSettings,
    FrozenFeatures,
    frozen_result,
    open_both,
    percent,
    print_table,
    require_two_splits,
)
from convscope.eval.features import POOLED
from convscope.eval.probe_inputs import PositionInputs, block_inputs, layer_inputs, position_inputs
from convscope.eval.probe_objective import AttentiveHead, FrozenProbe, Initial, LinearHeads
from convscope.eval.probe_score import EpochAccuracy, best_head_figures, each_accuracy, rank_test_images

TASK = "linear-probe"
Protocol = Literal["holdout", "cached", "dinov2", "mae", "lightly"]

DINOV2_LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)


@dataclass(frozen=True)
class Recipe:
    """How a protocol trains its heads."""

    lrs: tuple[float, ...]  # for 256 images
    batch_size: int
    optimizer: Literal["sgd", "lars", "adamw"]
    initial: Initial
    epochs: int | None = 90  # None: a number of steps
    warmup_epochs: float = 0.0
    normed: bool = False
    interpolation: str = "bicubic"
    zero_after_end: bool = True  # the cosine would reach 0 at the step after the last, not at the last


RECIPES = {
    "dinov2": Recipe(DINOV2_LRS, 1024, "sgd", "normal", epochs=None),
    "mae": Recipe((0.1,), 16384, "lars", "truncated", warmup_epochs=10.0, normed=True),
    "lightly": Recipe((0.1,), 256, "sgd", "uniform", interpolation="bilinear", zero_after_end=False),
}
ATTENTIVE_LRS = (2.5e-4,)
ATTENTIVE_BATCH_SIZE = 1024
ATTENTIVE_WEIGHT_DECAY = 0.05


@dataclass(frozen=True, kw_only=True)
class AugmentedProbeConfig(FrozenFeatures, EvalSettings):
    """The protocol, and what those that train on augmented images need."""

    layers: tuple[str, ...] = ()
    """As for other evaluations; default: pooled, but its own inputs with dinov2, and last with an attentive head."""
    protocol: Protocol = "holdout"
    """holdout, cached: on features; dinov2, mae, lightly: as published, on augmented images (docs/design.md)."""
    head: Literal["linear", "attentive"] = "linear"
    """attentive: learned queries attend to the positions of the last stage; with dinov2, mae or lightly."""
    queries: int = 4
    """Learned queries of an attentive head."""
    output_dir: Path | None = None
    """Run directory of dinov2, mae and lightly; the same command continues a run that is there."""
    # these three as LinearProbeConfig describes them
    lrs: tuple[float, ...] | None = None
    epochs: int | None = None
    sgd_batch_size: int | None = None
    iterations: int = 12_500
    """Steps of dinov2."""
    accumulate: int = 1
    """Forward and backward rounds per step of dinov2, mae and lightly."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints; default: an epoch, at least 50 and at most 2000 steps."""
    decoding: Literal["fast", "exact"] = "fast"
    """fast: training crops straight from JPEG bytes. exact: torchvision's, from whole images."""

    def __post_init__(self) -> None:
        FrozenFeatures.__post_init__(self)
        EvalSettings.__post_init__(self)
        require_at_least(self, 1, "queries", "iterations", "accumulate", "log_every")
        if not self.is_augmented:
            if self.head == "attentive":
                raise UserError("--head attentive needs --protocol dinov2, mae or lightly, which train on images")
            if not self.layers:
                object.__setattr__(self, "layers", (POOLED,))
            return
        if self.output_dir is None:
            raise UserError(f"--protocol {self.protocol} trains on images and needs --output-dir, its run directory")
        if self.targets != "classes":
            raise UserError(
                f"--protocol {self.protocol} is for classes; --targets {self.targets} needs holdout or cached"
            )
        if self.recipe.optimizer != "sgd" and len(self.recipe.lrs) > 1:
            kind = "--head attentive" if self.head == "attentive" else f"--protocol {self.protocol}"
            raise UserError(f"{kind} trains one head: give one of --lrs, not {len(self.recipe.lrs)}")

    @property
    def is_augmented(self) -> bool:
        """Whether heads are trained on augmented images."""
        return self.protocol in RECIPES

    @property
    def recipe(self) -> Recipe:
        """The protocol's, with what the flags change."""
        recipe = RECIPES[self.protocol]
        if self.head == "attentive":
            recipe = replace(recipe, lrs=ATTENTIVE_LRS, optimizer="adamw", batch_size=ATTENTIVE_BATCH_SIZE)
        epochs = recipe.epochs if recipe.epochs is None else self.epochs or recipe.epochs
        size = self.sgd_batch_size or recipe.batch_size
        return replace(recipe, lrs=self.lrs or recipe.lrs, batch_size=size, epochs=epochs)

    def training(self, images: int) -> TrainConfig:
        """The loop's settings for a train split of so many images."""
        recipe = self.recipe
        steps = self.iterations
        if recipe.epochs is not None:
            steps = max(1, -(-recipe.epochs * images // recipe.batch_size))
        return TrainConfig(
            steps=steps + recipe.zero_after_end,  # a last step with learning rate 0, which changes nothing
            batch_size=recipe.batch_size,
            accumulate=self.accumulate,
            precision=self.precision,
            device=self.device,
            workers=self.workers,
            seed=self.seed,
            log_every=self.log_every,
            checkpoint_every=self.checkpoint_every,
            decoding=self.decoding,
        )

    def optimization(self) -> OptimizerConfig:
        """The optimizer's settings; its rate is that of the fastest head."""
        recipe = self.recipe
        return OptimizerConfig(
            optimizer=recipe.optimizer,
            nesterov=False,
            lr=max(recipe.lrs),
            momentum=0.9,
            betas=(0.9, 0.999),
            weight_decay=ATTENTIVE_WEIGHT_DECAY if self.head == "attentive" else 0.0,
            weight_decay_end=None,
            clip=None,
            warmup_epochs=recipe.warmup_epochs,
            warmup_start=0.0,
            lr_end=0.0,
        )


def augmented_probe(config: AugmentedProbeConfig) -> EvalResult | None:
    """Train the heads, print the figures and write results/linear-probe-PROTOCOL.json in the run directory.

    The result is None on all processes but the main one.

    Raises:
        UserError: what loading, reading or training refuses; train and test are the same shards.
    """
    assert config.output_dir is not None
    with distributed.process_group(distributed.pick_device(config.device)):
        backbone, shards, test = open_both(config)
        require_two_splits(shards, test)
        known = known_classes(*(read_labels(part, config.label) for part in (shards, test)))
        objective = build_probe(backbone, known, config)
        main = distributed.is_main()
        data = _train_data(config, backbone, shards)
        with RunDirectory(config.output_dir, main=main, takes_over="CONVSCOPE_JOB" in os.environ) as run_dir:
            run_dir.claim(config, RESUMABLE | {"batch_size", "output", "cache"})
            objective.to(distributed.pick_device(config.device))
            hooks = _hooks(config, objective, test, len(shards))
            trained = train(objective, data, config.training(len(shards)), config.optimization(), run_dir, hooks)
            assert isinstance(trained, FrozenProbe)
            ranks = rank_test_images(trained, test, config.label, config.batch_size, config.workers)
            if not main:
                return None
            result = _result(config, trained, shards, test, ranks, run_dir)
            save_result(config.output or config.output_dir / "results" / f"{TASK}-{_name(config)}.json", result)
    _print(result, config)
    return result


def build_probe(backbone: Backbone, known: torch.Tensor, config: AugmentedProbeConfig) -> FrozenProbe:
    """Heads with their initial weights, drawn from the seed, on the frozen backbone.

    Args:
        backbone: frozen here.
        known: class labels (C,), ascending.
        config: protocol, head, layers, learning rates.
    """
    recipe, classes = config.recipe, len(known)
    torch.manual_seed(config.seed)
    rates = torch.tensor(recipe.lrs) / max(recipe.lrs)
    heads: LinearHeads | AttentiveHead
    if config.head == "attentive":
        positions = position_inputs(backbone, config.layers)
        width = backbone.stages[backbone.stage_indices([positions.stage])[0]].channels
        heads = AttentiveHead(width, classes, config.queries)
        return FrozenProbe(backbone, positions, heads, known, rates)
    if config.protocol == "dinov2" and not config.layers:
        inputs = block_inputs(backbone)
    else:
        inputs = layer_inputs(backbone, config.layers or (POOLED,), config.pool)
    widths = inputs.widths(backbone.eval())
    heads = LinearHeads(widths, classes, len(rates), recipe.initial, recipe.normed)
    return FrozenProbe(backbone, inputs, heads, known, rates.repeat(len(widths)))


def _train_data(config: AugmentedProbeConfig, backbone: Backbone, shards: ShardSet) -> TrainData:
    preprocessing = backbone.preprocessing
    transform = crop_flip(preprocessing.size, scale=(0.08, 1.0), interpolation=config.recipe.interpolation)
    normalize = Normalize(preprocessing.mean, preprocessing.std)
    return TrainData(shards=shards, transform=transform, normalize=normalize, label=config.label)


def _hooks(config: AugmentedProbeConfig, objective: FrozenProbe, test: ShardSet, images: int) -> list[Hook]:
    """lightly looks at the test images after every epoch; linear heads can do so on features."""
    if config.protocol != "lightly" or isinstance(objective.inputs, PositionInputs):
        return []
    steps_per_epoch = images / config.recipe.batch_size
    return [EpochAccuracy(objective, test, config.label, config.batch_size, config.workers, steps_per_epoch)]


def _result(
    config: AugmentedProbeConfig,
    trained: FrozenProbe,
    shards: ShardSet,
    test: ShardSet,
    ranks: torch.Tensor,
    run: RunDirectory,
) -> EvalResult:
    recipe, inputs = config.recipe, trained.inputs
    names = [inputs.stage] if isinstance(inputs, PositionInputs) else list(inputs.inputs)
    labels = [{"input": name, "lr": lr} for name in names for lr in recipe.lrs]
    heads = [{**row, "top1": top1} for row, top1 in zip(labels, each_accuracy(ranks))]
    figures, choice = best_head_figures(ranks, len(trained.known), config.seed)
    details: dict[str, Any] = {**labels[choice.best], **choice.details, "heads": heads, "settings": to_dict(config)}
    if config.protocol == "lightly" and (epochs := EpochAccuracy.read(run)):
        figures["top1_best_epoch"] = Figure(max(epochs.values()))
        details["top1_by_step"] = epochs
        details["top1_best_epoch"] = "the maximum over epochs and heads on the reported images"
    details |= {"head": config.head, "parameters": count_parameters(trained)}
    return frozen_result(
        trained.backbone,
        shards,
        test,
        config,
        task=TASK,
        protocol=f"{_name(config)}/1",
        figures=figures,
        details=details,
        seed=config.seed,
        samples=hits_of(ranks[:, choice.best], len(trained.known)),
    )


def _name(config: AugmentedProbeConfig) -> str:
    return f"{config.protocol}-attentive" if config.head == "attentive" else config.protocol


def _print(result: EvalResult, config: AugmentedProbeConfig) -> None:
    best: dict[str, Mapping[str, Any]] = {}
    for head in result.details["heads"]:
        if head["input"] not in best or head["top1"] > best[head["input"]]["top1"]:
            best[head["input"]] = head
    rows = [[name, f"{head['lr']:g}", f"{head['top1']:.2%}"] for name, head in best.items()]
    print_table(f"{result.task} {result.protocol} {config.model}", ["input", "lr of its best head", "test top1"], rows)
    print_table("", ["figure", "value"], [[name, percent(figure)] for name, figure in result.figures.items()])
