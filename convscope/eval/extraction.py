"""Filling a feature store: every sample once, over any number of processes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convscope.core import distributed
from convscope.core.backbone import Preprocessing
from convscope.core.data.shard_set import ShardSet
from convscope.core.data.stream import eval_batches
from convscope.core.data.transforms import eval_transform
from convscope.core.log import info, progress
from convscope.eval.feature_store import FeatureStore
from convscope.eval.row_writer import UnkeptError


@dataclass(frozen=True)
class Extraction:
    """What is computed of which images."""

    shards: ShardSet
    preprocessing: Preprocessing
    forward: Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]]  # uint8 (B, 3, H, W), layers -> (B, D) by layer
    source: str  # the network, in messages
    batch_size: int
    workers: int

    def widths(self, names: Sequence[str]) -> dict[str, int]:
        """D by layer, as one blank image shows it."""
        blank = torch.zeros(1, 3, *self.preprocessing.size, dtype=torch.uint8)
        return {name: rows.shape[1] for name, rows in self.forward(blank, names).items()}

    def batches(self, index: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
        """Batches of the samples at `index`."""
        whole = len(index) == len(self.shards)  # then shards that lie elsewhere are fetched ahead
        return eval_batches(
            self.shards,
            eval_transform(self.preprocessing),
            batch_size=self.batch_size,
            workers=self.workers,
            label=None,
            indices=None if whole else index,
        )


def share(index: NDArray[np.int64], batch_size: int, rank: int, world: int) -> NDArray[np.int64]:
    """The part of `index` that is process `rank`'s: every world-th batch, so that batches are those of one process."""
    starts = range(rank * batch_size, len(index), world * batch_size)
    return np.concatenate([index[:0], *(index[start : start + batch_size] for start in starts)])


def fill(kept: FeatureStore, files: Mapping[str, str], work: Extraction, about: Mapping[str, Any]) -> None:
    """Compute the layers in `files` (layer: name in the store) over all processes.

    What one process cannot do it raises at once: the launcher then ends the others.
    """
    main, names = distributed.is_main(), list(files.values())
    try:
        if main:
            kept.begin({files[name]: width for name, width in work.widths(list(files)).items()}, about)
        remaining = distributed.broadcast(kept.remaining(names) if main else np.empty(0, np.int64))
        if main and 0 < len(remaining) < kept.count:
            info(f"{kept.count - len(remaining)} of {kept.count} rows were computed before; going on")
        own = share(remaining, work.batch_size, distributed.rank(), distributed.world())
        keys = _compute(kept, files, work, own)
        gathered = {index: key for part in distributed.gather(keys) for index, key in part.items()}
        if main:
            kept.finish(names, _all_keys(work.shards, gathered))
    except UnkeptError:
        kept.discard(names)
        raise
    distributed.barrier()


def _compute(
    kept: FeatureStore, files: Mapping[str, str], work: Extraction, index: NDArray[np.int64]
) -> dict[int, str]:
    """Write the rows at `index`; keys of the samples by their index."""
    keys: dict[int, str] = {}
    if len(index) == 0:
        return keys
    ticking = progress(f"features of {work.shards.split}", len(index), distributed.is_main())
    with ticking as ticker, kept.writer(list(files.values())) as writer:
        for batch in work.batches(index):
            rows = {}
            for name, computed in work.forward(batch["image"], list(files)).items():
                with np.errstate(over="ignore"):
                    rows[files[name]] = computed.numpy().astype(kept.dtype)
                _refuse_infinite(computed, rows[files[name]], name, work.source, batch["key"])
            writer.write(batch["index"].numpy(), rows)
            keys |= zip(batch["index"].tolist(), batch["key"])
            ticker.advance(len(batch["key"]))
    return keys


def _refuse_infinite(computed: Tensor, rows: NDArray[Any], name: str, source: str, keys: Sequence[str]) -> None:
    bad = ~np.isfinite(rows).all(1)
    if not bad.any():
        return
    first = int(bad.argmax())
    if computed[first].isfinite().all():
        raise UnkeptError(
            f"layer {name} of {source} gives {float(computed[first].abs().max()):.3g} for sample {keys[first]}, more "
            "than fp16 holds (65504); use --store fp32"
        )
    raise UnkeptError(f"layer {name} of {source} gives NaN or infinity for sample {keys[first]}; is it trained well?")


def _all_keys(shards: ShardSet, known: Mapping[int, str]) -> list[str]:
    """The key of every sample; those that an earlier attempt computed are read again, without their images."""
    return [
        known[index] if index in known else str(shards.without_image(index)["__key__"]) for index in range(len(shards))
    ]
