"""What the evaluations of frozen features share: their settings, their data, how they report."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from convscope.core.backbone import Backbone
from convscope.core.data.shard_set import ShardSet, open_shards
from convscope.core.distributed import is_main, pick_device, process_group
from convscope.core.errors import UserError
from convscope.core.files import cache_dir
from convscope.core.log import info
from convscope.core.models import LoadsModel, model_record
from convscope.core.options import AllowPartial, Arch, Device, ModelArguments, require_at_least
from convscope.core.results import EvalResult, Figure, Samples, save_result
from convscope.eval.feature_store import Store
from convscope.eval.features import Features, Pool, Precision, extract
from convscope.eval.layers import concatenate, wanted_layers
from convscope.eval.output import save_by_name
from convscope.eval.targets import Targets, read_targets

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FeatureSettings(LoadsModel):
    """Which features of which model."""

    model: tyro.conf.Positional[str]
    """Checkpoint, run directory, or timm:NAME (docs/design.md, Models)."""
    data: str
    """Folder of shards with labels, or builtin:shapes."""
    label: str = "cls"
    """Member or json field that holds the label."""
    layers: tuple[str, ...] = ("pooled",)
    """Stage names, last, pooled (the network's own pooling), or all; layer3+layer4 stands for both side by side."""
    pool: Pool = "avg"
    """How the map of a stage becomes a vector; cls is the class token of a transformer."""
    arch: Arch = None
    model_args: ModelArguments = ()
    allow_partial: AllowPartial = 1.0
    precision: Precision = "fp32"
    """Arithmetic of the backbone."""
    store: Store = "fp32"
    """How features are kept; fp16 takes half the disk (docs/design.md says what it changes)."""
    batch_size: int = 256
    """Images at a time; the result does not depend on it."""
    workers: int = 2
    """Processes that decode images."""
    cache: bool = True
    """Keep features in the cache folder ($CONVSCOPE_CACHE)."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "batch_size")
        require_at_least(self, 0, "workers")


@dataclass(frozen=True, kw_only=True)
class FrozenFeatures(FeatureSettings):
    """Which features of which model, of which data an evaluation takes, and where its result goes."""

    train_split: str = "train"
    test_split: str = "test"
    targets: Targets = "classes"
    """What the label is: a class; a list of classes, or of 1, 0, -1 (unknown) for each; a number or several."""
    output: Path | None = None
    """Result file; default RUN/results/TASK.json for a run, else results/ARCH-TASK.json, with a longer name where a
    result of another protocol, of other data or settings is there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_file_name(self.output)


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """How any evaluation of features runs."""

    device: Device = "auto"
    seed: int = 0
    """Of the intervals, and of whatever else is drawn."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "seed")


def require_labels(config: FrozenFeatures) -> None:
    """Raise a UserError where targets are numbers to predict."""
    if config.targets == "regression":
        raise UserError("--targets regression is for linear-probe alone; this evaluation needs labels")


def require_file_name(output: Path | None) -> None:
    """Raise a UserError where a result could not be written there, before anything is computed."""
    if output is None:
        return
    if output.suffix != ".json" or output.is_dir():
        raise UserError(f"--output {output}: name a file that ends in .json")
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--output {output}: {folder} is {'not writable' if folder.is_dir() else 'no folder'}")


def open_both(config: FrozenFeatures) -> tuple[Backbone, ShardSet, ShardSet]:
    """The model, the train split and the test split."""
    train, test = open_shards(config.data, config.train_split), open_shards(config.data, config.test_split)
    return config.load(), train, test


def same_samples(train: ShardSet, test: ShardSet) -> bool:
    """Whether both splits are the same shards."""
    return train.fingerprint == test.fingerprint


def require_two_splits(train: ShardSet, test: ShardSet) -> None:
    """Raise a UserError where both splits are the same shards."""
    if same_samples(train, test):
        raise UserError(f"{train.source}: splits {train.split} and {test.split} are the same shards")


def require_same_keys(train: Features, test: Features, skip_self: bool) -> None:
    """Raise a UserError where leaving oneself out would leave out another image."""
    if skip_self and train.keys != test.keys:
        raise UserError("--skip-self needs test images that are the train images, in the same order")


def features_of(
    backbone: Backbone, shards: ShardSet, config: FeatureSettings, device: str, label: str | None
) -> dict[str, Features]:
    """Features by layer as the settings say; in a process group each process computes a share of them."""
    wanted = wanted_layers(backbone, config.layers, config.pool)
    found = extract(
        backbone,
        shards,
        layers=sorted({name for parts in wanted.values() for name in parts}),
        pool=config.pool,
        label=label,
        batch_size=config.batch_size,
        workers=config.workers,
        device=device,
        precision=config.precision,
        store=config.store,
        cache=cache_dir() / "features" if config.cache else None,
    )
    return concatenate(found, wanted)


def extract_both(
    backbone: Backbone, train: ShardSet, test: ShardSet, config: FrozenFeatures, device: str
) -> dict[str, tuple[Features, Features]]:
    """Train and test features by layer, with targets of the kind that the settings name.

    Under torchrun each process computes a share of them; then all but the main one end, and the rest of the command is
    the main one's.
    """
    label = config.label if config.targets == "classes" else None
    with process_group(pick_device(device)):
        of_train = features_of(backbone, train, config, device, label)
        of_test = of_train if same_samples(train, test) else features_of(backbone, test, config, device, label)
        if not is_main():
            raise SystemExit(0)
    both = {name: (of_train[name], of_test[name]) for name in of_train}
    if config.targets == "classes":
        return both
    y = read_targets((train, test), config.label, config.targets)
    return {name: (replace(parts[0], y=y[0]), replace(parts[1], y=y[1])) for name, parts in both.items()}


def figures_by_layer(by_layer: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """All figures, or their samples, in one mapping; with several layers, each name starts with its layer."""
    return {
        name if len(by_layer) == 1 else f"{layer} {name}": figure
        for layer, figures in by_layer.items()
        for name, figure in figures.items()
    }


def frozen_result(
    backbone: Backbone,
    train: ShardSet,
    test: ShardSet,
    config: FrozenFeatures,
    *,
    task: str,
    protocol: str,
    figures: Mapping[str, Figure],
    details: Mapping[str, Any],
    seed: int,
    samples: Samples | None = None,
) -> EvalResult:
    """Figures and details with what they were measured on; `samples` are what figures are means of, in test order."""
    parts = {
        name: {"split": shards.split, "fingerprint": shards.fingerprint, "count": len(shards)}
        for name, shards in (("train", train), ("test", test))
    }
    return EvalResult(
        task=task,
        protocol=protocol,
        model=model_record(backbone),
        data={"source": train.source, **parts, "label": config.label, "targets": config.targets},
        preprocessing=asdict(backbone.preprocessing),
        figures=figures,
        details={"pool": config.pool, "precision": config.precision, "store": config.store, **details},
        seed=seed,
        samples=samples or {},
    )


def save_at(result: EvalResult, output: Path | None, model: str, stem: str | None = None) -> Path:
    """Write the result to `output`, or as `save_by_name` says where that is None, and name the file on the terminal."""
    if output is None:
        path = save_by_name(result, model, stem)
    else:
        save_result(path := output, result)
    info(f"{result.task}: wrote {path}")
    return path


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A small table on standard output."""
    table = Table(*header, box=SIMPLE, show_header=any(header))
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a file or a pipe has no edge to wrap at
    print(title)
    console.print(table)


def percent(figure: Figure | None) -> str:
    """A share as per cent with its interval."""
    if figure is None:
        return "-"
    if figure.low is None or figure.high is None:
        return f"{figure.value:.2%}"
    return f"{figure.value:.2%} [{figure.low:.2%}, {figure.high:.2%}]"


def shown(name: str, figure: Figure) -> str:
    """A figure as its name wants it: errors and R2 as they are, shares as per cent."""
    if name not in ("r2", "mse", "mae"):
        return percent(figure)
    return f"{figure.value:.4g} [{figure.low:.4g}, {figure.high:.4g}]"
