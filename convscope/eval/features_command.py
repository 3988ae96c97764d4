"""`convscope eval features`: a frozen backbone's features as plain arrays, for use elsewhere."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convscope.core.data.shard_set import ShardSet, open_shards
from convscope.core.data.subset import read_labels
from convscope.core.distributed import is_main, pick_device, process_group
from convscope.core.errors import UserError
from convscope.core.files import atomic_write, write_bytes, write_json
from convscope.core.log import info
from convscope.core.models import model_record
from convscope.core.options import Device
from convscope.core.results import versions
from convscope.eval.common import FeatureSettings, features_of
from convscope.eval.features import Features


@dataclass(frozen=True, kw_only=True)
class FeaturesCommand(FeatureSettings):
    """Write OUTPUT/SPLIT/LAYER.npy (N, D), keys.json and, where there are labels, labels.npy (N,)."""

    output: Path
    """Folder for the arrays."""
    splits: tuple[str, ...] = ("train", "test")
    """Which to extract."""
    device: Device = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.splits:
            raise UserError("name at least one split, such as --splits train")


def run(config: FeaturesCommand) -> None:
    """Extract every split and write its arrays; under torchrun each process computes a share.

    Raises:
        UserError: what loading, reading or extracting refuses.
    """
    parts = [open_shards(config.data, split) for split in config.splits]
    backbone = config.load()
    about = {"model": model_record(backbone), "preprocessing": asdict(backbone.preprocessing), "versions": versions()}
    with process_group(pick_device(config.device)):
        for shards in parts:
            found = features_of(backbone, shards, config, config.device, None)
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
