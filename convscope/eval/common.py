"""What the evaluations of frozen features share: their settings, their data, how they report."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from convscope.core.backbone import Backbone
from convscope.core.config import parse_assignments
from convscope.core.data.shard_set import ShardSet, open_shards
from convscope.core.distributed import is_main, pick_device, process_group
from convscope.core.errors import UserError
from convscope.core.files import cache_dir
from convscope.core.log import info
from convscope.core.models import load_backbone, model_record
from convscope.core.results import EvalResult, Figure, Samples, bootstrap, save_result
from convscope.eval.feature_store import Store
from convscope.eval.features import Features, Pool, Precision, extract
from convscope.eval.layers import concatenate, wanted_layers
from convscope.eval.output import save_by_name
from convscope.eval.targets import Targets, read_targets

CHUNK = 65_536  # rows checked at a time
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FrozenFeatures:
    """Which features of which model on which data."""

    model: tyro.conf.Positional[str]
    """Checkpoint, run directory, or timm:NAME (docs/design.md, Models)."""
    data: str
    """Folder of shards with labels, or builtin:shapes."""
    train_split: str = "train"
    test_split: str = "test"
    label: str = "cls"
    """Member or json field that holds the label."""
    targets: Targets = "classes"
    """What the label is: a class; a list of classes, or of 1, 0, -1 (unknown) for each; a number or several."""
    layers: tuple[str, ...] = ("pooled",)
    """Stage names, last, pooled (the network's own pooling), or all; layer3+layer4 stands for both side by side."""
    pool: Pool = "avg"
    """How the map of a stage becomes a vector; cls is the class token of a transformer."""
    arch: str | None = None
    """Architecture of weights that do not name their own."""
    model_args: tuple[str, ...] = ()
    """Its arguments, such as depths=2,2,6,2."""
    allow_partial: float = 1.0
    """Accepted share of the backbone's weights that a checkpoint provides."""
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
    output: Path | None = None
    """Result file; default RUN/results/TASK.json for a run, else results/ARCH-TASK.json, with a longer name where a
    result of another protocol, of other data or settings is there."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "batch_size")
        require_at_least(self, 0, "workers")


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """How any evaluation of features runs."""

    device: str = "auto"
    """cuda, cpu, or auto."""
    seed: int = 0
    """Of the intervals, and of whatever else is drawn."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "seed")


@dataclass(frozen=True)
class Labelled:
    """Train and test features of one layer with labels 0 ... C-1; class i is the i-th label of the train part."""

    train_x: Tensor  # (N, D)
    train_y: Tensor  # (N,)
    test_x: Tensor
    test_y: Tensor
    classes: int


def require_at_least(config: object, least: int, *names: str) -> None:
    """Raise a UserError where one of the named settings is below `least`."""
    for name in names:
        if (value := getattr(config, name)) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


def require_fit(train: Features, test: Features) -> None:
    """Raise a UserError where features have no labels, are none, differ in width, or are NaN or infinite."""
    if train.y is None or test.y is None:
        raise UserError("these features have no labels; name the field that holds them with --label")
    if len(train.x) == 0 or len(test.x) == 0 or train.x.shape[1] != test.x.shape[1]:
        raise UserError(f"train features {tuple(train.x.shape)} and test features {tuple(test.x.shape)} do not fit")
    for name, part in (("train", train), ("test", test)):
        for start in range(0, len(part.x), CHUNK):
            bad = ~part.x[start : start + CHUNK].isfinite().all(1)
            if bad.any():
                key = part.keys[start + int(bad.int().argmax())]
                raise UserError(f"the {name} features of {key} hold NaN or infinity; is the model trained well?")


def labelled(train: Features, test: Features) -> Labelled:
    """Check that both parts fit one another and number their classes.

    Raises:
        UserError: no or negative labels, a single class, test labels that the train part lacks; NaN features.
    """
    require_fit(train, test)
    assert train.y is not None
    assert test.y is not None
    if train.y.ndim != 1 or test.y.ndim != 1:
        raise UserError("this evaluation takes one class an image; leave --targets out")
    if int(train.y.min()) < 0:
        raise UserError(f"label {int(train.y.min())} is negative; labels count from 0")
    known, train_y = torch.unique(train.y, return_inverse=True)
    if len(known) < 2:
        raise UserError(f"every train label is {int(known[0])}; an evaluation needs at least two classes")
    if absent := sorted(set(test.y.tolist()) - set(known.tolist())):
        raise UserError(
            f"{len(absent)} test labels, such as {absent[0]}, are not among the {len(known)} train classes; "
            "are these two splits of one data set?"
        )
    return Labelled(train.x, train_y, test.x, torch.searchsorted(known, test.y), len(known))


def rank_of_truth(scores: Tensor, y: Tensor) -> Tensor:
    """How many classes precede the true one (N,); equal scores count by class number, NaN before anything.

    Args:
        scores: (N, C).
        y: true classes (N,).
    """
    true = scores.gather(1, y[:, None])
    later = torch.arange(scores.shape[1], device=scores.device) >= y[:, None]
    behind = (scores < true) | ((scores == true) & later)  # the true class too
    return (~behind).sum(1)


def hits_of(rank: Tensor, classes: int) -> Samples:
    """Whether the truth comes first, and among the first five where there are more than five classes, (N,) each."""
    ends = {"top1": 1, "top5": 5} if classes > 5 else {"top1": 1}
    return {name: (rank < end).cpu().numpy() for name, end in ends.items()}


def accuracies(rank: Tensor, classes: int, seed: int) -> dict[str, Figure]:
    """Top-1, and top-5 where there are more than five classes, with intervals over the test images."""
    return {name: bootstrap(hits, seed=seed) for name, hits in hits_of(rank, classes).items()}


def open_both(config: FrozenFeatures) -> tuple[Backbone, ShardSet, ShardSet]:
    """The model, the train split and the test split."""
    train, test = open_shards(config.data, config.train_split), open_shards(config.data, config.test_split)
    backbone = load_backbone(
        config.model,
        arch=config.arch,
        model_args=parse_assignments(config.model_args),
        allow_partial=config.allow_partial,
    )
    return backbone, train, test


def same_samples(train: ShardSet, test: ShardSet) -> bool:
    """Whether both splits are the same shards."""
    return train.fingerprint == test.fingerprint


def require_same_keys(train: Features, test: Features, skip_self: bool) -> None:
    """Raise a UserError where leaving oneself out would leave out another image."""
    if skip_self and train.keys != test.keys:
        raise UserError("--skip-self needs test images that are the train images, in the same order")


def extract_both(
    backbone: Backbone, train: ShardSet, test: ShardSet, config: FrozenFeatures, device: str
) -> dict[str, tuple[Features, Features]]:
    """Train and test features by layer, with targets of the kind that the settings name.

    Under torchrun each process computes a share of them; then all but the main one end, and the rest of the command is
    the main one's.
    """
    wanted = wanted_layers(backbone, config.layers, config.pool)

    def features(shards: ShardSet) -> dict[str, Features]:
        found = extract(
            backbone,
            shards,
            layers=sorted({name for parts in wanted.values() for name in parts}),
            pool=config.pool,
            label=config.label if config.targets == "classes" else None,
            batch_size=config.batch_size,
            workers=config.workers,
            device=device,
            precision=config.precision,
            store=config.store,
            cache=cache_dir() / "features" if config.cache else None,
        )
        return concatenate(found, wanted)

    with process_group(pick_device(device)):
        of_train = features(train)
        of_test = of_train if same_samples(train, test) else features(test)
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
