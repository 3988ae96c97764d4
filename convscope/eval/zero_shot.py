"""Zero-shot classification: the nearest class name, in words, of every image (Radford et al. 2021, sec. 3.1)."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from convscope.core.data.shard_set import ShardSet, open_shards
from convscope.core.data.subset import read_labels
from convscope.core.distributed import pick_device
from convscope.core.errors import UserError
from convscope.core.memory import keep_freed_memory
from convscope.core.options import require_at_least
from convscope.core.pairs.embed import embed_classes, embed_images
from convscope.core.pairs.pair import load_pair
from convscope.core.pairs.prompts import template_list, text_lines
from convscope.core.results import EvalResult
from convscope.eval.classes import accuracies, hits_of, rank_of_truth
from convscope.eval.common import EvalSettings, percent, print_table, require_file_name, save_at

TASK = "zero-shot"
PROTOCOL = "zero-shot/1"


@dataclass(frozen=True, kw_only=True)
class ZeroShotCommand(EvalSettings):
    """Zero-shot accuracy of an image-text model: an image is of the class whose name is nearest."""

    model: tyro.conf.Positional[str]
    """Run of pretrain clip, open_clip:NAME/PRETRAINED, or open_clip:FOLDER."""
    data: str
    """Folder of shards with labels, or builtin:shapes."""
    split: str = "test"
    label: str = "cls"
    """Member or json field that holds the label."""
    classes: str | None = None
    """File with the name of a class a line, in the labels' order, or imagenet (open_clip's names); default: those
    beside the shards."""
    templates: str = "imagenet"
    """File with a sentence a line and {} for the name; imagenet (CLIP's 80, from open_clip) or simple."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of both towers."""
    batch_size: int = 256
    """Images at a time."""
    workers: int = 2
    """Processes that decode images."""
    output: Path | None = None
    """Result file; default RUN/results/zero-shot.json for a run, else results/ARCH-zero-shot.json."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "batch_size")
        require_at_least(self, 0, "workers")
        require_file_name(self.output)


def run(config: ZeroShotCommand) -> None:
    """Load, classify, print a table and write the result."""
    result = zero_shot(config)
    rows = [[name, percent(figure)] for name, figure in result.figures.items()]
    print_table(f"{TASK} {config.model}", ["figure", "value"], rows)
    save_at(result, config.output, config.model)


def zero_shot(config: ZeroShotCommand) -> EvalResult:
    """Accuracy over every image of the split.

    Raises:
        UserError: what loading or reading refuses; class names or templates that do not fit.
    """
    shards = open_shards(config.data, config.split)
    labels = torch.from_numpy(read_labels(shards, config.label))
    names, templates = class_names(config.classes, shards), template_list(config.templates)
    if int(labels.min()) < 0 or int(labels.max()) >= len(names):
        raise UserError(
            f"labels go from {int(labels.min())} to {int(labels.max())}, but {len(names)} classes have names"
        )
    pair, record = load_pair(config.model)
    device, bf16 = pick_device(config.device), config.precision == "bf16"
    if device.type == "cpu":
        keep_freed_memory()
    pair.to(device)
    classes = embed_classes(pair, names, templates, bf16=bf16)
    images = embed_images(pair, shards, batch_size=config.batch_size, workers=config.workers, bf16=bf16)
    ranks = rank_of_truth(images @ classes.T, labels)
    return EvalResult(
        task=TASK,
        protocol=PROTOCOL,
        model=record,
        data={
            "source": shards.source,
            "test": {"split": shards.split, "fingerprint": shards.fingerprint, "count": len(shards)},
            "label": config.label,
        },
        preprocessing=asdict(pair.preprocessing),
        figures=accuracies(ranks, len(names), config.seed),
        samples=hits_of(ranks, len(names)),
        details={"classes": names, "templates": templates, "precision": config.precision},
        seed=config.seed,
    )


def class_names(source: str | None, shards: ShardSet) -> list[str]:
    """Names in the order of the labels.

    Raises:
        UserError: the shards name none and no file was given, or the file holds none.
    """
    if source == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES

        return list(IMAGENET_CLASSNAMES)
    if source is not None:
        return text_lines(source)
    if not shards.classes:
        raise UserError(f"{shards.source} names no classes; give a file with --classes, a name a line")
    return shards.classes
