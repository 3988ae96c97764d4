"""Features of a frozen backbone: one pass for all layers, kept in a cache."""

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from convscope.core.backbone import Backbone
from convscope.core.data.shard_set import ShardSet
from convscope.core.data.stream import eval_batches
from convscope.core.data.subset import read_labels
from convscope.core.data.transforms import Normalize, eval_transform
from convscope.core.distributed import pick_device
from convscope.core.errors import UserError
from convscope.core.files import write_bytes
from convscope.core.log import info, progress
from convscope.core.memory import keep_freed_memory
from convscope.core.results import versions

Pool = Literal["avg", "max", "gem", "cls"]
Precision = Literal["fp32", "bf16"]

POOLED = "pooled"  # the layer name of `Backbone.forward`
GEM_POWER = 3.0
CACHE_VERSION = 1  # of what is computed; a new one leaves old files unused


@dataclass(frozen=True)
class Features:
    """One layer's features of a data set, in the data set's order."""

    keys: list[str]
    x: Tensor  # (N, D) float32, on the CPU
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
    cache: Path | None = None,
) -> dict[str, Features]:
    """Features of every sample, by layer; the network runs once, and only for layers that the cache lacks.

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
        precision: of the network; features are float32 in any case.
        cache: folder of the cache; `None` keeps nothing.

    Raises:
        UserError: unknown layer, pooling that the network lacks, no such label, corrupt image, NaN features.
    """
    names = resolve_layers(backbone, layers, pool)
    target = pick_device(device)
    if target.type == "cpu":
        keep_freed_memory()
    y = None if label is None else torch.from_numpy(read_labels(shards, label))
    files = _cache_files(cache, backbone, shards, names, pool, f"{precision} {target.type}") if cache else {}
    found = {name: stored for name, file in files.items() if (stored := _read(file, len(shards))) is not None}
    if missing := [name for name in names if name not in found]:
        keys, computed = _compute(backbone.to(target), shards, missing, pool, precision, batch_size, workers)
        for name, x in computed.items():
            found[name] = Features(keys, x)
            if name in files:
                _write(files[name], found[name])
    return {name: Features(found[name].keys, found[name].x, y) for name in names}


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


def _compute(
    backbone: Backbone,
    shards: ShardSet,
    names: Sequence[str],
    pool: Pool,
    precision: Precision,
    batch_size: int,
    workers: int,
) -> tuple[list[str], dict[str, Tensor]]:
    """Keys and, by layer, (N, D)."""
    device = next(backbone.parameters()).device
    preprocessing = backbone.preprocessing
    normalize = Normalize(preprocessing.mean, preprocessing.std).to(device)
    batches = eval_batches(shards, eval_transform(preprocessing), batch_size=batch_size, workers=workers, label=None)
    training = [module for module in backbone.modules() if module.training]
    keys: list[str] = []
    x: dict[str, Tensor] = {}
    backbone.eval()
    try:
        with progress(f"features of {shards.split}", len(shards)) as ticker:
            for batch in batches:
                images = normalize(batch["image"].to(device))
                for name, rows in _forward(backbone, images, names, pool, precision).items():
                    if not rows.isfinite().all():
                        raise UserError(f"layer {name} of {backbone.source} gives NaN or infinity; is it trained well?")
                    if name not in x:
                        x[name] = torch.empty(len(shards), rows.shape[1])
                    x[name][len(keys) : len(keys) + len(rows)] = rows
                keys += batch["key"]
                ticker.advance(len(images))
    finally:
        for module in training:
            module.training = True
    return keys, x


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


def _cache_files(
    cache: Path, backbone: Backbone, shards: ShardSet, names: Sequence[str], pool: Pool, arithmetic: str
) -> dict[str, Path]:
    """Where each layer's features are kept: named by a hash of everything that they depend on."""
    shared = {
        "version": CACHE_VERSION,
        "versions": versions(),
        "weights": backbone.weights_hash(),
        "preprocessing": asdict(backbone.preprocessing),
        "data": [shards.fingerprint, shards.split],
        "arithmetic": arithmetic,
    }
    files = {}
    for name in names:
        described = json.dumps({**shared, "layer": name, "pool": name != POOLED and pool}, sort_keys=True)
        files[name] = cache / f"{hashlib.sha256(described.encode()).hexdigest()[:32]}.safetensors"
    return files


def _write(file: Path, features: Features) -> None:
    keys = torch.frombuffer(bytearray(json.dumps(features.keys).encode()), dtype=torch.uint8)
    write_bytes(file, save({"x": features.x, "keys": keys}))


def _read(file: Path, count: int) -> Features | None:
    """Cached features, or `None` where there are none, or none that are whole."""
    if not file.is_file():
        return None
    try:
        stored: Mapping[str, Tensor] = load_file(file)
        features = Features(json.loads(stored["keys"].numpy().tobytes()), stored["x"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        info(f"note: cached features {file} cannot be read ({error}); they are computed anew")
        return None
    if len(features.keys) != count or len(features.x) != count:
        info(f"note: cached features {file} are of another data set; they are computed anew")
        return None
    return features
