"""Numbers that the authors' own networks gave, and the weights and images that they were given.

`data/FAMILY.json` has an entry for each network: its parameters, a hash of its keys, how its weights are filled; and
for one of them an input with what comes out of the network and of some of its modules. `data/FAMILY_keys.json.gz` has
the authors' keys and shapes as lines "key:2x3x4", of the trained form and, where there is one, of that for inference.
"""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"
Entry = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]


def read_entries(family: str) -> dict[str, Entry]:
    """The networks of a family by the name under which the numbers were taken."""
    return json.loads((DATA / f"{family}.json").read_text())


def read_keys(family: str, variant: str, form: str = "train") -> Shapes:
    """The authors' keys with their shapes; `form` is train or deploy."""
    lines = json.loads(gzip.decompress((DATA / f"{family}_keys.json.gz").read_bytes()))[variant][form]
    return parse_keys(lines)


def parse_keys(lines: list[str]) -> Shapes:
    pairs = (line.rsplit(":", 1) for line in lines)
    return {key: tuple(int(size) for size in shape.split("x") if size) for key, shape in pairs}


def hash_of_keys(shapes: Mapping[str, tuple[int, ...]]) -> str:
    lines = sorted(f"{key}:{'x'.join(map(str, shape))}" for key, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def is_counter(key: str) -> bool:
    """Whether a key is an integer's."""
    return key.endswith("num_batches_tracked")


def filled(shapes: Shapes, entry: Entry, integers: Callable[[str], bool] = is_counter) -> dict[str, Tensor]:
    """A state dict in float64 that depends on keys and shapes alone; integers and `fill_untouched` are left out."""
    return {
        key: torch.as_tensor(fill(key, shape, entry["fill_rules"]))
        for key, shape in shapes.items()
        if not integers(key) and not any(re.search(pattern, key) for pattern in entry["fill_untouched"])
    }


def uniform(key: str, count: int) -> np.ndarray:
    """`count` numbers in [-1, 1) by integer arithmetic, the same on every machine."""
    low = np.uint64(0xFFFFFFFF)
    bits = (np.arange(count, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(zlib.crc32(key.encode()))) & low
    for shift, factor in ((16, 2246822507), (13, 3266489909), (16, 668265263)):
        bits = ((bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)) & low
    bits ^= bits >> np.uint64(15)
    return bits.astype(np.float64) / 2.0**31 - 1.0


def fill(key: str, shape: tuple[int, ...], rules: list[list[Any]]) -> np.ndarray:
    """The value of one tensor; `rules` are [pattern, mode, a, b], and the first pattern found in the key decides."""
    values = uniform(key, int(np.prod(shape, dtype=np.int64))).reshape(shape)
    mode, a, b = next((rule[1:] for rule in rules if re.search(rule[0], key)), None) or _usual(key, len(shape))
    if mode == "affine":
        return a + b * values
    if mode == "abs":
        return a + b * np.abs(values)
    return values * np.sqrt(3.0 * a / np.prod(shape[1:]))  # variance a / fan-in


def _usual(key: str, dimensions: int) -> tuple[str, float, float]:
    last = key.rsplit(".", 1)[-1]
    if last == "running_var":
        return "abs", 1.0, 0.1
    if last in ("running_mean", "bias", "beta", "in_proj_bias"):
        return "affine", 0.0, 0.1
    if last in ("gamma", "gamma1", "gamma2", "layer_scale_1", "layer_scale_2"):
        return "affine", 0.5, 0.1
    if last == "alpha" or (last == "weight" and dimensions in (1, 3)):
        return "affine", 1.0, 0.1
    if dimensions == 0:
        return "affine", 4.0, 1.0
    if last in ("pos_embed", "pos_embedding", "cls_token", "posi_map", "init_slots"):
        return "affine", 0.0, 0.5
    return "fan", 2.0, 0.0


def image(batch: int, channels: int, height: int, width: int) -> Tensor:
    """Waves in float64 (batch, channels, height, width)."""
    sizes = (batch, channels, height, width)
    b, c, y, x = np.meshgrid(*(np.arange(size, dtype=np.float64) for size in sizes), indexing="ij")
    slow = np.sin(0.1 * b + 0.7 * c + 0.013 * y + 0.029 * x)
    fast = np.sin(1.1 * b + 2.3 * c + 0.9 * y + 0.0007 * y * y - 1.7 * x + 0.0011 * y * x)
    return torch.from_numpy(slow + 0.5 * fast)


def outputs(model: nn.Module, images: Tensor, modules: Mapping[str, str]) -> dict[str, Tensor]:
    """What the modules (by the name that they get here) and, as "output", the network give."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: found.update({name: output[0] if isinstance(output, tuple) else output})

    handles = [model.get_submodule(path).register_forward_hook(keep(name)) for name, path in modules.items()]
    with torch.no_grad():
        found["output"] = model(images)
    for handle in handles:
        handle.remove()
    return found


def check(name: str, found: Tensor, expected: Mapping[str, Any], tolerance: float = 1e-9) -> None:
    """Compare a tensor with its shape, mean, standard deviation, norm and single values; relative to the deviation."""
    shape = tuple(expected["shape"])
    if found.ndim == 4 and len(shape) == 3:  # a map where the authors have a sequence
        found = found.flatten(2).transpose(1, 2)
    if found.ndim == 4 and tuple(found.permute(0, 3, 1, 2).shape) == shape != tuple(found.shape):
        found = found.permute(0, 3, 1, 2)
    assert tuple(found.shape) == shape, name
    scale = expected["std"]
    flat = found.reshape(-1)
    assert abs(flat.mean().item() - expected["mean"]) <= tolerance * scale, name
    assert abs(flat.std(correction=0).item() - scale) <= tolerance * scale, name
    assert abs(flat.norm().item() - expected["l2"]) <= tolerance * expected["l2"], name
    values = torch.tensor(expected["value"], dtype=torch.float64)
    assert (flat[expected["index"]] - values).abs().max().item() <= tolerance * scale, name
