"""`convscope eval features`: a frozen backbone's features as plain arrays, for use elsewhere."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray

from convscope.core.config import parse_assignments
from convscope.core.data.shard_set import ShardSet, open_shards
from convscope.core.data.subset import read_labels
from convscope.core.distributed import is_main, pick_device, process_group
from convscope.core.errors import UserError
from convscope.core.files import atomic_write, cache_dir, write_bytes, write_json
from convscope.core.log import info
from convscope.core.models import load_backbone, model_record
from convscope.core.results import versions
from convscope.eval.common import require_at_least
from convscope.eval.feature_store import Store
from convscope.eval.features import Features, Pool, Precision, extract


@dataclass(frozen=True, kw_only=True)
class FeaturesCommand:
    """Write OUTPUT/SPLIT/LAYER.npy (N, D), keys.json and, where there are labels, labels.npy (N,)."""

    model: tyro.conf.Positional[str]
    """Checkpoint, run directory, or timm:NAME (docs/design.md, Models)."""
    data: str
    """Folder of shards, or builtin:shapes."""
    output: Path
    """Folder for the arrays."""
    splits: tuple[str, ...] = ("train", "test")
    """Which to extract."""
    label: str = "cls"
    """Member or json field that holds the label."""
    layers: tuple[str, ...] = ("pooled",)
    """Stage names, last, pooled (the network's own pooling), or all."""
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
    """Type of the arrays."""
    batch_size: int = 256
    """Images at a time."""
    workers: int = 2
    """Processes that decode images."""
    device: str = "auto"
    """cuda, cpu, or auto."""
    cache: bool = True
    """Use the features that evaluations left in the cache folder, and leave these there."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "batch_size")
        require_at_least(self, 0, "workers")
        if not self.splits:
            raise UserError("name at least one split, such as --splits train")


def run(config: FeaturesCommand) -> None:
    """Extract every split and write its arrays; under torchrun each process computes a share.

    Raises:
        UserError: what loading, reading or extracting refuses.
    """
    parts = [open_shards(config.data, split) for split in config.splits]
    arguments = parse_assignments(config.model_args)
    backbone = load_backbone(config.model, arch=config.arch, model_args=arguments, allow_partial=config.allow_partial)
    about = {"model": model_record(backbone), "preprocessing": asdict(backbone.preprocessing), "versions": versions()}
    with process_group(pick_device(config.device)):
        for shards in parts:
            found = extract(
                backbone,
                shards,
                layers=config.layers,
                pool=config.pool,
                label=None,
                batch_size=config.batch_size,
                workers=config.workers,
                device=config.device,
                precision=config.precision,
                store=config.store,
                cache=cache_dir() / "features" if config.cache else None,
            )
            if is_main():
                _write(config.output / shards.split, found, _labels(shards, config.label))
    if is_main():
        chosen = {"layers": config.layers, "pool": config.pool, "precision": config.precision, "store": config.store}
        data = {shards.split: {"fingerprint": shards.fingerprint, "count": len(shards)} for shards in parts}
        write_json(config.output / "about.json", {**about, **chosen, "data": {"source": config.data, **data}})


def _labels(shards: ShardSet, field: str) -> NDArray[np.int64] | None:
    try:
        return read_labels(shards, field)
    except UserError as error:
        info(f"note: no labels are written: {error}")
        return None


def _write(folder: Path, found: Mapping[str, Features], labels: NDArray[np.int64] | None) -> None:
    for layer, features in found.items():
        _save(folder / f"{layer}.npy", features.x.numpy())
        info(f"features: wrote {folder / layer}.npy {tuple(features.x.shape)}")
    write_bytes(folder / "keys.json", json.dumps(next(iter(found.values())).keys).encode())
    if labels is not None:
        _save(folder / "labels.npy", labels)


def _save(path: Path, array: NDArray[Any]) -> None:
    with atomic_write(path) as file:
        np.save(file, array)
