"""`convscope quickstart`: the whole suite once, small and offline, ending in a report.

Draws the embedded images, pretrains a small ResNet on them with SparK, and asks what it learned beside its untrained
twin: linear probe at every stage, k-NN, fine-tuning on a few labels, effective receptive field, reconstructions.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from convscope.analysis import erf_command
from convscope.core.backbone import Backbone
from convscope.core.data.shapes import cached
from convscope.core.data.shard_set import ShardSet, open_shards
from convscope.core.errors import UserError
from convscope.core.files import read_bytes
from convscope.core.models import load_backbone, save_backbone, untrained_twin
from convscope.core.results import EvalResult, Figure, save_result
from convscope.core.training.config import TrainConfig
from convscope.core.training.optimization import OptimizerConfig
from convscope.eval import fine_tune, knn, linear_probe
from convscope.plots.curves import draw_figures, draw_loss
from convscope.report.html import Image, Section, Text, write_report
from convscope.report.sources import read_loss
from convscope.report.tables import Table, markdown
from convscope.ssl.commands import SparkCommand
from convscope.ssl.objectives.spark import SparkConfig
from convscope.ssl.pretrain import pretrain

LABELS = {"shape x texture": "cls", "shape": "shape", "texture": "texture"}  # the first is the primary one
CLASSES = {"cls": 64, "shape": 8, "texture": 8}
NAMES = ("pretrained", "untrained")
Results = dict[str, dict[str, EvalResult]]  # task and label -> model -> result


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Data to report in minutes on two cores; run again, it continues where it stopped."""

    output_dir: Path = Path("quickstart")
    """Folder for the runs and report.html."""
    backbone: str = "resnet18"
    """What is pretrained."""
    backbone_args: tuple[str, ...] = ("layers=1,1,1,1", "channels=32,64,128,256", "output_stride=8")
    """Its arguments."""
    images: int = 8000
    """Unlabelled images to pretrain on."""
    test_images: int = 2000
    """Images to test on."""
    epochs: float = 6.0
    """Pretraining passes."""
    probe_steps: int = 300
    """SGD steps of each linear probe."""
    per_class: int = 25
    """Labelled images of each of the 64 classes to fine-tune on."""
    fine_tune_epochs: float = 20.0
    """Passes over those."""
    erf_images: int = 50
    """Images behind the receptive fields."""
    workers: int = 1
    """Data-loading processes."""
    seed: int = 0
    """Of everything."""


def run(config: QuickstartConfig) -> None:
    """Run every step, write the report, print the table."""
    started = time.perf_counter()
    data = str(cached(config.images, config.test_images))
    spark = config.output_dir / "spark"
    pretrain(pretraining(config, data))
    models = {"pretrained": load_backbone(str(spark))}
    models["untrained"] = untrained_twin(models["pretrained"], config.seed)
    save_backbone(config.output_dir / "untrained.safetensors", models["untrained"])
    train, test = open_shards(data, "train"), open_shards(data, "test")
    results = frozen(config, models, train, test)
    results["fine-tune"] = {name: tuned(config, data, name) for name in NAMES}
    erf = erf_command.ErfCommand(
        models=(), size=64, n_images=config.erf_images, output_dir=config.output_dir / "results", seed=config.seed
    )
    areas = erf_command.evaluate(models, test, erf)
    minutes = (time.perf_counter() - started) / 60
    table = comparison(results)
    report(config, results, table, areas, minutes)
    print(markdown(table))
    print(f"\n{verdict(results)}\n{config.output_dir / 'report.html'} ({minutes:.1f} minutes)")


def pretraining(config: QuickstartConfig, data: str) -> SparkCommand:
    """The recipe; benchmarks/quickstart.md tells how it was found."""
    return SparkCommand(
        data=(data,),
        output_dir=config.output_dir / "spark",
        backbone=config.backbone,
        backbone_args=config.backbone_args,
        objective=SparkConfig(size=64, mask_unit=16, decoder="light", decoder_width=256),
        optimization=OptimizerConfig(
            optimizer="adamw",
            lr=8e-3,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.05,
            weight_decay_end=None,
            warmup_epochs=0.5,
        ),
        train=TrainConfig(
            epochs=config.epochs, batch_size=128, precision="bf16", workers=config.workers, seed=config.seed
        ),
    )


def frozen(config: QuickstartConfig, models: Mapping[str, Backbone], train: ShardSet, test: ShardSet) -> Results:
    """Linear probe of every stage and k-NN, for the primary label and its two factors."""
    results: Results = {}
    for label in LABELS.values():
        for name, backbone in models.items():
            folder = config.output_dir / "results"
            probe = linear_probe.LinearProbeCommand(
                model=name,
                data=train.source,
                label=label,
                layers=("all",),
                lrs=(0.1, 0.3, 1.0, 3.0, 10.0),
                weight_decays=(1e-4,),
                epochs=1,
                min_steps=config.probe_steps,
                seed=config.seed,
            )
            vote = knn.KnnCommand(model=name, data=train.source, label=label, layers=("last",), seed=config.seed)
            for task, found in (
                ("linear-probe", linear_probe.evaluate(backbone, train, test, probe)),
                ("knn", knn.evaluate(backbone, train, test, vote)),
            ):
                save_result(folder / f"{task}-{label}-{name}.json", found)
                results.setdefault(f"{task} {label}", {})[name] = found
    return results


def tuned(config: QuickstartConfig, data: str, name: str) -> EvalResult:
    """Fine-tune one of the two on a few labels, with the same settings."""
    source = config.output_dir / ("spark" if name == "pretrained" else "untrained.safetensors")
    result = fine_tune.fine_tune(
        fine_tune.FineTuneCommand(
            model=str(source),
            data=data,
            output_dir=config.output_dir / f"fine-tune-{name}",
            per_class=config.per_class,
            crop_scale=(0.6, 1.0),
            optimization=replace(fine_tune.default_optimization(), lr=12e-3, warmup_epochs=2.0),
            train=TrainConfig(
                epochs=config.fine_tune_epochs,
                batch_size=32,
                precision="bf16",
                workers=config.workers,
                seed=config.seed,
            ),
        )
    )
    if result is None:
        raise UserError("quickstart runs in one process; start it without torchrun")
    return result


def comparison(results: Results) -> Table:
    """Every figure of both models, in per cent."""
    rows: list[list[str | Figure | None]] = []
    for task in ("fine-tune", "linear-probe", "knn"):
        for title, label in LABELS.items():
            found = results.get(task if task == "fine-tune" and label == "cls" else f"{task} {label}")
            if found:
                chance = f"{100 / CLASSES[label]:.1f}"
                rows.append([task, title, *(_percent(found[name].figures["top1"]) for name in NAMES), chance])
    caption = "Test accuracy in per cent with its 95 % interval over the test images."
    return Table(["evaluation", "label", *NAMES, "chance"], rows, caption)


def verdict(results: Results) -> str:
    """Whether the intervals of the few-label fine-tune overlap, in a sentence."""
    ours, twin = (results["fine-tune"][name].figures["top1"] for name in NAMES)
    if ours.low is not None and twin.high is not None and ours.low > twin.high:
        return (
            "Fine-tuned on a few labels, the pretrained network beats its untrained twin; the intervals do not overlap."
        )
    return "Fine-tuned on a few labels, the pretrained network does not clearly beat its untrained twin."


def report(config: QuickstartConfig, results: Results, table: Table, areas: EvalResult, minutes: float) -> None:
    """Write report.html."""
    pictures = sorted((config.output_dir / "spark" / "pictures").glob("*.png"))
    loss = read_loss(config.output_dir / "spark" / "metrics.jsonl")
    sections = [Section("What was learned", [Text(verdict(results)), table])]
    for title, label in LABELS.items():
        by_stage, stages = {}, list(results[f"linear-probe {label}"]["pretrained"].details["layers"])
        for name in NAMES:
            layers = results[f"linear-probe {label}"][name].details["layers"]
            by_stage[name] = [Figure(**layers[stage]["test"]["top1"]) for stage in stages]
        drawn = draw_figures(stages, by_stage, ylabel="test accuracy", chance=1 / CLASSES[label])
        caption = f"Linear probe of every stage, label {title}"
        sections.append(Section(caption, [Image(drawn.render(), caption, f"{caption}: accuracy with intervals")]))
    if loss is not None:
        curve = draw_loss({"SparK": loss})
        sections.append(Section("Pretraining", [Image(curve.render(), "Loss on masked patches", "loss against step")]))
    if pictures:
        caption = "Training images, what the network saw, and what it painted"
        sections.append(Section("Reconstructions", [Image(read_bytes(pictures[-1]), caption, caption)]))
    heat = read_bytes(config.output_dir / "results" / "erf.png")
    caption = "Where the last stage's central position looks: the square holds half of the contribution"
    rows: list[list[str | Figure]] = [[name, figure] for name, figure in areas.figures.items()]
    sections.append(
        Section(
            "Effective receptive field", [Image(heat, caption, caption), Table(["share of the image", "area"], rows)]
        )
    )
    lead = (
        f"SparK on {config.images} procedural images, {config.epochs:g} passes, {config.backbone} "
        f"({', '.join(config.backbone_args)}), beside the same network untrained; {minutes:.1f} minutes."
    )
    write_report(config.output_dir / "report.html", "convscope quickstart", sections, lead=lead)


def _percent(figure: Figure) -> Figure:
    low, high = (None if bound is None else 100 * bound for bound in (figure.low, figure.high))
    return Figure(100 * figure.value, low, high, figure.n)
