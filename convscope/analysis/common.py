"""What analyses of one or several models share."""

import csv
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from torch import Tensor

from convscope.core.backbone import Backbone
from convscope.core.data.shard_set import ShardSet
from convscope.core.data.stream import eval_batches
from convscope.core.data.transforms import Normalize, eval_transform
from convscope.core.errors import UserError
from convscope.core.files import atomic_write, write_bytes
from convscope.core.log import Ticker
from convscope.core.models import load_backbone, untrained_twin
from convscope.core.results import EvalResult, save_result
from convscope.plots.theme import Picture

CHECKPOINT = re.compile(r"(.*?)/?(?:checkpoints/)?step-(\d+)\.pt")
Table = tuple[Sequence[str], Iterable[Sequence[Any]]]  # header, rows


class LoadsModels:
    """Commands that load models; each declares these settings where its --help shows them."""

    models: tuple[str, ...]
    untrained: bool
    seed: int
    arch: str | None
    allow_partial: float

    def load(self, sources: Sequence[str] | None = None) -> dict[str, Backbone]:
        """The models, or those of `sources` in their place, and their untrained twins if wanted, by label.

        Raises:
            UserError: no model, or one that cannot be loaded.
        """
        return load_models(
            self.models if sources is None else sources,
            arch=self.arch,
            allow_partial=self.allow_partial,
            untrained_seed=self.seed if self.untrained else None,
        )


@dataclass(frozen=True, kw_only=True)
class ImageSettings(LoadsModels):
    """Which models, and which images they are shown."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """One or more MODELs."""
    data: str = "builtin:shapes"
    """Folder of shards, or builtin:shapes."""
    split: str = "test"
    """Split to draw images from."""
    size: int | None = None
    """Height and width of the images in pixels; each model's own by default."""


def load_models(
    sources: Sequence[str],
    *,
    arch: str | None = None,
    allow_partial: float = 1.0,
    untrained_seed: int | None = None,
) -> dict[str, Backbone]:
    """Load each MODEL once, by its label.

    Args:
        sources: what the user named.
        arch: architecture of weights that do not name their own.
        allow_partial: accepted share of a backbone's weights that a checkpoint provides.
        untrained_seed: also give each model's randomly initialised twin, of this seed, as "MODEL (untrained)".

    Raises:
        UserError: no model, or one that cannot be loaded.
    """
    if not sources:
        raise UserError("name at least one MODEL")
    found: dict[str, Backbone] = {}
    for source in dict.fromkeys(sources):
        found[source] = load_backbone(source, arch=arch, allow_partial=allow_partial)
        if untrained_seed is not None:
            found[f"{source} (untrained)"] = untrained_twin(found[source], seed=untrained_seed)
    return found


def one_or_all(values: Mapping[str, dict[str, Any]], **shared: Any) -> dict[str, Any]:
    """The one value where all models have the same, else every model's under its label, beside what they share."""
    distinct = list(values.values())
    return distinct[0] if all(value == distinct[0] for value in distinct) else {**shared, "models": dict(values)}


def model_records(records: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The models in a result, from the record of each by its label."""
    return one_or_all(records, source=", ".join(records))


def data_record(shards: ShardSet, **measured: int) -> dict[str, Any]:
    """The images in a result: where they are from, and numbers such as how many were taken."""
    return {"source": shards.source, "split": shards.split, "fingerprint": shards.fingerprint, **measured}


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines of text with columns below each other."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table, whole or not at all; None is an empty cell."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(header)
    table.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def spread(size: int, count: int, seed: int) -> list[int]:
    """Indices of up to `count` samples, one drawn from each of `count` equal stretches of the data set.

    The first samples of an ordered data set are all of one class, and a fixed step can be too.

    Raises:
        UserError: there are no samples.
    """
    if size == 0:
        raise UserError("the data set is empty")
    edges = np.linspace(0, size, min(count, size) + 1).astype(int)
    rng = np.random.default_rng(seed)
    return [int(rng.integers(first, last)) for first, last in itertools.pairwise(edges)]


def normalized_batches(
    backbone: Backbone, shards: ShardSet, indices: Sequence[int], batch_size: int, ticker: Ticker
) -> Iterator[Tensor]:
    """The images at `indices` as the backbone expects them, in batches (B, 3, H, W) on its device."""
    device = next(backbone.parameters()).device
    normalize = Normalize(backbone.preprocessing.mean, backbone.preprocessing.std).to(device)
    transform = eval_transform(backbone.preprocessing)
    for batch in eval_batches(shards, transform, batch_size=batch_size, label=None, indices=np.asarray(indices)):
        yield normalize(batch["image"].to(device))
        ticker.advance(len(batch["image"]))


def steps(labels: Sequence[str]) -> list[int] | None:
    """Training steps of labels that are all checkpoints of one run (RUN/checkpoints/step-00000100.pt), else None."""
    found = [CHECKPOINT.fullmatch(label) for label in labels]
    if len(labels) < 2 or not all(found) or len({match[1] for match in found if match}) > 1:
        return None
    numbers = [int(match[2]) for match in found if match]
    return numbers if len(set(numbers)) == len(numbers) else None


def short_labels(labels: Sequence[str]) -> list[str]:
    """Labels for plots: steps of one run by their number, else without the folders that all paths share."""
    found = steps(labels)
    if found is not None:
        return [f"step {number:,}".replace(",", " ") for number in found]
    if len(labels) > 1 and all("/" in label and ":" not in label for label in labels):
        shared = os.path.commonpath([os.path.dirname(label) for label in labels])
        return [os.path.relpath(label, shared) if shared else label for label in labels]
    return list(labels)


def write_result(
    folder: Path,
    name: str,
    result: EvalResult,
    *,
    arrays: Mapping[str, Any],
    tables: Mapping[str, Table],
    pictures: Mapping[str, Picture],
) -> list[str]:
    """Write an analysis: arrays as NAME.npz, each table as .csv, each picture as .png and .svg, NAME.json last.

    Args:
        folder: where to.
        name: the analysis, such as "erf".
        result: its result.
        arrays: by name.
        tables: header and rows, by file name without suffix.
        pictures: by file name without suffix.

    Returns:
        The names of the files.
    """
    with atomic_write(folder / f"{name}.npz") as file:
        np.savez_compressed(file, **arrays)
    for stem, (header, rows) in tables.items():
        write_csv(folder / f"{stem}.csv", header, rows)
    for stem, picture in pictures.items():
        picture.save(folder / f"{stem}.png", folder / f"{stem}.svg")
    save_result(folder / f"{name}.json", result)
    drawn = [f"{stem}{suffix}" for stem in pictures for suffix in (".png", ".svg")]
    return [f"{name}.json", f"{name}.npz", *(f"{stem}.csv" for stem in tables), *drawn]
