"""Features of a frozen backbone: one pass for all layers, kept in a store that every evaluation reads."""

import hashlib
import inspect
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from convscope.core import distributed
from convscope.core.backbone import Backbone
from convscope.core.data.shard_set import ShardSet
from convscope.core.data.subset import read_labels
from convscope.core.data.transforms import Normalize
from convscope.core.distributed import pick_device
from convscope.core.errors import UserError
from convscope.core.memory import keep_freed_memory
from convscope.core.results import versions
from convscope.eval.extraction import Extraction, fill
from convscope.eval.feature_store import FeatureStore, Store

Pool = Literal["avg", "max", "gem", "cls"]
Precision = Literal["fp32", "bf16"]

POOLED = "pooled"  # the layer name of `Backbone.forward`
GEM_POWER = 3.0
CACHE_VERSION = 2  # of what is computed and how it is stored; a new one leaves old files unused


@dataclass(frozen=True)
class Features:
    """One layer's features of a data set, in the data set's order."""

    keys: list[str]
    x: Tensor  # (N, D) float32, or float16 with --store fp16, on the CPU; maps a file, so never write into it
    y: Tensor | None = None  # (N,) int64


def extract(
    backbone: Backbone,
    shards: ShardSet,
    *,
    layers: Sequence[str] = (POOLED,),
    pool: Pool = "avg",
    label: str | None = "cls",
    batch_size: int = 256,
    workers: int = 2,
    device: str = "auto",
    precision: Precision = "fp32",
    store: Store = "fp32",
    cache: Path | None = None,
) -> dict[str, Features]:
    """Features of every sample, by layer; the network runs once, and only for what the cache lacks.

    Rows go to disk as they are computed, so memory does not grow with the data, and a command that was stopped goes on
    where it was. In a process group each process computes its share of the batches, and all of them return the whole.

    Args:
        backbone: moved to `device`; its training flags are left as they were.
        shards: the data.
        layers: stage names, "last", "pooled" (what the network itself pools), or "all" (every stage and "pooled").
        pool: how a stage's map becomes a vector; "cls" takes the class token. Maps of transformers are those before
            the final norm.
        label: member or json field of the label; `None` leaves `y` out. It is not part of the cache.
        batch_size: images at a time; does not change the result.
        workers: processes that decode.
        device: "cuda", "cpu" or "auto".
        precision: of the network.
        store: of the numbers that are kept.
        cache: folder of the cache; `None` uses a temporary file that is gone when the features are.

    Raises:
        UserError: unknown layer, pooling that the network lacks, no such label, corrupt image, NaN features, full disk.
    """
    names = resolve_layers(backbone, layers, pool)
    target = pick_device(device)
    if target.type == "cpu":
        keep_freed_memory()
    y = None if label is None else torch.from_numpy(read_labels(shards, label))
    normalize = Normalize(backbone.preprocessing.mean, backbone.preprocessing.std).to(target)

    def forward(images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        return _forward(backbone, normalize(images.to(target)), names, pool, precision)

    work = Extraction(shards, backbone.preprocessing, forward, backbone.source, batch_size, workers)
    files = {name: name if name == POOLED else f"{name}-{pool}" for name in names}
    about = _about(backbone, shards, f"{precision} {target.type}", store)
    with _folder(cache, about) as folder:
        kept = FeatureStore(folder, len(shards), store)
        if distributed.broadcast(kept.missing(files.values())):
            backbone.to(target)
            with kept.lock() if distributed.is_main() else nullcontext(), _evaluating(backbone):
                missing = distributed.broadcast(kept.missing(files.values()))  # less, where another command was at it
                if missing:
                    fill(kept, {name: file for name, file in files.items() if file in missing}, work, about)
        keys = kept.read_keys()
        return {name: Features(keys, kept.read(file), y) for name, file in files.items()}


def resolve_layers(backbone: Backbone, layers: Sequence[str], pool: Pool = "avg") -> list[str]:
    """Names of the wanted layers in network order, each once, "pooled" after the stages.

    Raises:
        UserError: unknown layer, or `pool` is not possible for this network or these layers.
    """
    stages = [name for name in layers if name not in ("all", POOLED)]
    if not layers:
        raise UserError("name at least one layer, such as --layers pooled")
    if pool == "cls" and not _has_class_token(backbone):
        raise UserError(f"{backbone.arch} has no class token; use --pool avg, max or gem")
    indices = set(backbone.stage_indices(stages)) if "all" not in layers else set(range(len(backbone.stages)))
    if pool != "avg" and not indices:
        raise UserError(f"--pool {pool} does nothing for layer pooled, which the network pools; try --layers last")
    names = [backbone.stages[i].name for i in sorted(indices)]
    return [*names, POOLED] if {"all", POOLED} & set(layers) else names


def pool_map(feature_map: Tensor, pool: Pool) -> Tensor:
    """(B, C, H, W) -> (B, C) by average, maximum, or generalized mean (gem: power 3, as in arXiv:1711.02512)."""
    if pool == "max":
        return feature_map.amax((2, 3))
    if pool == "gem":
        return feature_map.clamp_min(1e-6).pow(GEM_POWER).mean((2, 3)).pow(1 / GEM_POWER)
    return feature_map.mean((2, 3))


def _has_class_token(backbone: Backbone) -> bool:
    parameters = inspect.signature(backbone.model.forward_intermediates).parameters
    return getattr(backbone.model, "cls_token", None) is not None and "return_prefix_tokens" in parameters


@torch.inference_mode()
def _forward(
    backbone: Backbone, images: Tensor, names: Sequence[str], pool: Pool, precision: Precision
) -> dict[str, Tensor]:
    """images (B, 3, H, W) -> (B, D) by layer, in one pass."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        if list(names) == [POOLED]:
            return {POOLED: backbone(images).float().cpu()}
        wanted = backbone.stage_indices([name for name in names if name != POOLED])
        # The last stage always, because some networks stop after the last one asked for.
        indices = sorted({*wanted, len(backbone.stages) - 1})
        options = {"return_prefix_tokens": True} if pool == "cls" else {}
        final, maps = backbone.model.forward_intermediates(images, indices=indices, **options)
        found = dict(zip(indices, maps))
        rows = {
            backbone.stages[i].name: found[i][1][:, 0].float() if pool == "cls" else pool_map(found[i].float(), pool)
            for i in wanted
        }
        if POOLED in names:
            rows[POOLED] = backbone.model.forward_head(final, pre_logits=True).float()
    return {name: value.cpu() for name, value in rows.items()}


@contextmanager
def _evaluating(backbone: Backbone) -> Iterator[None]:
    """Evaluation mode for a while, whatever mode each module is in."""
    training = [module for module in backbone.modules() if module.training]
    backbone.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _folder(cache: Path | None, about: Mapping[str, Any]) -> Iterator[Path]:
    """Where the features are kept: named by a hash of everything that they depend on, or for this command alone."""
    if cache is not None:
        yield cache / hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
        return
    folder = Path(
        distributed.broadcast(tempfile.mkdtemp(prefix="convscope-features-") if distributed.is_main() else "")
    )
    try:
        yield folder
        distributed.barrier()  # maps outlive the folder, but all have to have been made
    finally:
        if distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)


def _about(backbone: Backbone, shards: ShardSet, arithmetic: str, store: Store) -> dict[str, Any]:
    """Everything that features depend on but the layer and its pooling."""
    return {
        "version": CACHE_VERSION,
        "versions": versions(),
        "arch": backbone.arch,
        "weights": backbone.weights_hash(),
        "preprocessing": asdict(backbone.preprocessing),
        "data": {"fingerprint": shards.fingerprint, "split": shards.split, "count": len(shards)},
        "arithmetic": arithmetic,
        "store": store,
    }
