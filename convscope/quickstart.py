"""`convscope quickstart`: the whole suite once, small and offline, ending in a report.

Draws the embedded images, pretrains a small ResNet on them with SparK, and asks what it learned beside its untrained twin:
linear probe at every stage, k-NN, fine-tuning on a few labels, effective receptive field, reconstructions.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from convscope.analysis import erf_command
from convscope.core.backbone import Backbone
from convscope.core.data.shapes import cached
from convscope.core.data.shard_set import ShardSet, open_shards
from convscope.core.errors import UserError
from convscope.core.log import info
from convscope.core.models import load_backbone, save_backbone, untrained_twin
from convscope.core.results import EvalResult, Figure, save_result
from convscope.core.training.config import TrainConfig
from convscope.core.training.optimization import OptimizerConfig
from convscope.eval import fine_tune, knn, linear_probe
from convscope.plots.curves import draw_figures, draw_loss
from convscope.report.html import Image, Part, Section, Text, write_report
from convscope.report.sources import read_loss
from convscope.report.tables import Table, markdown
from convscope.ssl.objectives.spark import SparkConfig
from convscope.ssl.pretrain import SparkCommand, pretrain

CLASSES = 64  # shape x texture
BACKBONE = "resnet18"
BACKBONE_ARGS = ("channels=32,64,128,256", "output_stride=8")
NAMES = ("pretrained", "untrained")


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Data to report in minutes on two cores; run again, it continues where it stopped."""

    output_dir: Path = Path("quickstart")
    """Folder for the runs and report.html."""
    images: int = 16000
    """Unlabelled images to pretrain on."""
    test_images: int = 2000
    """Images to test on."""
    epochs: float = 6.0
    """Pretraining passes."""
    per_class: int = 10
    """Labelled images of each of the 64 classes to fine-tune on."""
    fine_tune_epochs: float = 30.0
    """Passes over those."""
    workers: int = 1
    """Data-loading processes."""
    seed: int = 0
    """Of everything."""


def run(config: QuickstartConfig) -> None:
    """Run every step, write the report, print the table."""
    started = time.perf_counter()
    data = cached(config.images, config.test_images)
    pretrain(_pretraining(config, data))
    spark = config.output_dir / "spark"
    models = {"pretrained": load_backbone(str(spark))}
    models["untrained"] = untrained_twin(models["pretrained"], config.seed)
    save_backbone(config.output_dir / "untrained.safetensors", models["untrained"])
    results = _evaluate(config, data, models)
    minutes = (time.perf_counter() - started) / 60
    table = _table(results)
    _report(config, results, table, minutes)
    print(markdown(table))
    print(f"\n{config.output_dir / 'report.html'} ({minutes:.1f} minutes)")


def _pretraining(config: QuickstartConfig, data: Path) -> SparkCommand:
    return SparkCommand(
        data=str(data),
        output_dir=config.output_dir / "spark",
        backbone=BACKBONE,
        backbone_args=BACKBONE_ARGS,
        objective=SparkConfig(size=64, mask_unit=8, decoder_width=256),
        optimization=OptimizerConfig(
            optimizer="adamw", lr=4e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05, weight_decay_end=None, warmup_epochs=0.5
        ),
        train=TrainConfig(
            epochs=config.epochs, batch_size=128, precision="bf16", workers=config.workers, seed=config.seed
        ),
    )
