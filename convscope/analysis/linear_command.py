"""`convscope analyze linear`: what pixels and biases add to single features, at single images."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convscope.analysis.common import ImageSettings, data_record, model_records, one_or_all, spread, write_result
from convscope.analysis.linear_interpreter import POOLED, LinearInterpreter, Parts, by_stage, strongest
from convscope.core.backbone import Backbone
from convscope.core.data.shard_set import ShardSet, open_shards
from convscope.core.data.stream import eval_batches
from convscope.core.data.transforms import Normalize, eval_transform
from convscope.core.distributed import pick_device
from convscope.core.errors import UserError
from convscope.core.log import info, progress
from convscope.core.models import model_record
from convscope.core.options import AllowPartial, Arch, Device, require_at_least
from convscope.core.results import EvalResult, Figure, bootstrap
from convscope.plots.linear import BiasCurve, LinearPanel, draw_bias, draw_linear

MIN_IMAGES = 5  # fewer give no interval
SHOWN = 4  # images in the picture
SHARE = "share of the biases"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearCommand(ImageSettings):
    """Linear interpreter: a network as an affine function of one image, taken apart into pixels and biases."""

    n_images: int = 8
    """Images, drawn evenly over the split."""
    outputs: int = 3
    """Features shown for each image: those that stand out most from their mean over the images."""
    batch_size: int = 4
    """Images at a time; the result does not depend on it."""
    untrained: bool = False
    """Take each model's randomly initialised twin apart too."""
    seed: int = 0
    """Of the images, the interval and untrained twins."""
    arch: Arch = None
    allow_partial: AllowPartial = 1.0
    device: Device = "auto"
    output_dir: Path = Path("results")
    """Where linear.json, .npz, .csv and the plots go."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "n_images", "outputs", "batch_size", task="linear")
        require_at_least(self, 0, "seed", task="linear")


@dataclasses.dataclass(frozen=True)
class Apart:
    """One network taken apart at N images."""

    images: NDArray[Any]  # (N, H, W, 3) uint8
    shares: dict[str, NDArray[Any]]  # by layer, share of the biases (N,)
    error: float  # of the identity, relative
    outputs: NDArray[Any]  # (N, K) features that were looked at
    values: NDArray[Any]  # (N, K)
    rows: NDArray[Any]  # (N, K, 3, H, W) rows of J
    pixels: NDArray[Any]  # (N, K) what the pixels add
    column: NDArray[Any]  # (N, h, w) length over channels of the last stage's answer to a central square of one stride
    biases: dict[str, float]  # by stage, what its biases add to all N x K features together
    frozen: list[str]


def run(config: LinearCommand) -> None:
    """Load the models, take them apart, write the files and print the shares."""
    result = evaluate(config.load(), open_shards(config.data, config.split), config)
    print(table(result))
    info(f"linear: wrote {config.output_dir}/linear.json, .npz, .csv and plots (linear.png, linear-bias.png, .svg)")


def evaluate(backbones: Mapping[str, Backbone], shards: ShardSet, config: LinearCommand) -> EvalResult:
    """Take labelled backbones apart, write the files, and return the result."""
    if len(shards) == 0:
        raise UserError(f"linear: {shards.source} is empty")
    indices = spread(len(shards), config.n_images, config.seed)
    found: dict[str, Apart] = {}
    records, preprocessing = {}, {}
    for label, original in backbones.items():
        records[label] = model_record(original)
        backbone = original.at_size(config.size) if config.size else original
        preprocessing[label] = dataclasses.asdict(backbone.preprocessing)
        found[label] = take_apart(label, backbone, shards, indices, config)
    result = EvalResult(
        task="linear",
        protocol="linear/1",
        model=model_records(records),
        data=data_record(shards, images=len(indices)),
        preprocessing=one_or_all(preprocessing),
        figures={
            "share of the biases" if len(found) == 1 else f"{label}: share of the biases": _figure(
                one.shares[POOLED], config
            )
            for label, one in found.items()
        },
        details={
            "models": {
                label: {
                    "exact": not set(one.frozen) - {"batch_norm"},
                    "frozen": one.frozen,
                    "error": one.error,
                    SHARE: {layer: float(share.mean()) for layer, share in one.shares.items()},
                    "added by stage": one.biases,
                }
                for label, one in found.items()
            }
        },
        seed=config.seed,
    )
    _write(config.output_dir, result, found)
    return result


def take_apart(label: str, backbone: Backbone, shards: ShardSet, indices: list[int], config: LinearCommand) -> Apart:
    """Two forward derivatives, a backward one for each output, and one for the central pixel.

    Raises:
        UserError: the network has operations that cannot be frozen, or weights that are not finite.
    """
    device = pick_device(config.device)
    interpreter = LinearInterpreter(backbone.to(device))
    p = backbone.preprocessing
    normalize = Normalize(p.mean, p.std).to(device)
    batches = list(
        eval_batches(shards, eval_transform(p), batch_size=config.batch_size, label=None, indices=np.asarray(indices))
    )
    side = min(backbone.stride, *p.size)  # one pixel alone may reach no token of an untrained network
    square = (p.size[0] // 2 // side * side, p.size[1] // 2 // side * side, side)
    pieces: list[dict[str, Any]] = []
    with progress(f"linear {label}", len(indices)) as ticker:
        for batch in batches:
            images = normalize(batch["image"].to(device)).double()
            column = interpreter.column(images, square)
            pieces.append(
                {"images": images, "parts": interpreter.parts(images), "column": column[backbone.stages[-1].name]}
            )
            ticker.advance(len(images))
    parts: dict[str, list[Parts]] = {name: [piece["parts"][name] for piece in pieces] for name in pieces[0]["parts"]}
    value = torch.cat([part.value for part in parts[POOLED]])
    outputs = strongest(value, config.outputs)  # (N, K)
    every = torch.cat([piece["images"] for piece in pieces])
    rows, biases = _rows(interpreter, every, outputs, config.batch_size)
    return Apart(
        images=torch.cat([batch["image"] for batch in batches]).permute(0, 2, 3, 1).numpy(),
        shares={name: _numpy(torch.cat([part.bias_share for part in own])) for name, own in parts.items()},
        error=max(part.error for own in parts.values() for part in own),
        outputs=_numpy(outputs),
        values=_numpy(value.gather(1, outputs)),
        rows=_numpy(rows),
        pixels=_numpy((rows * every[:, None]).flatten(2).sum(2)),
        column=_numpy(torch.cat([piece["column"] for piece in pieces]).norm(dim=1)),
        biases=biases,
        frozen=sorted(interpreter.frozen),
    )


def _rows(
    interpreter: LinearInterpreter, images: Tensor, outputs: Tensor, batch_size: int
) -> tuple[Tensor, dict[str, float]]:
    """Rows of J (N, K, 3, H, W), and what each stage's biases add to all of the features together."""
    stages = [stage.name for stage in interpreter.backbone.stages]
    rows, biases = [], dict.fromkeys([*stages, "other"], 0.0)
    for some, chosen in zip(torch.split(images, batch_size), torch.split(outputs, batch_size)):
        mine = []
        for output in chosen.T:
            row, contributions = interpreter.rows(some, output)
            mine.append(row)
            for stage, amount in by_stage(contributions, stages).items():
                biases[stage] += amount
        rows.append(torch.stack(mine, 1))
    return torch.cat(rows), biases


def table(result: EvalResult) -> str:
    """Aligned text: the share of the biases at every layer, and whether gates were frozen."""
    lines = []
    for label, details in result.details["models"].items():
        shares = "  ".join(f"{layer} {share:.0%}" for layer, share in details[SHARE].items())
        how = "exact as it stands" if details["exact"] else f"gates frozen: {', '.join(details['frozen'])}"
        lines += [label, f"  share of the biases: {shares}", f"  {how}; identity to {details['error']:.0e}"]
    return "\n".join(lines)


def _numpy(x: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = x.detach().cpu().numpy()
    return array


def _figure(shares: NDArray[Any], config: LinearCommand) -> Figure:
    if len(shares) < MIN_IMAGES:
        return Figure(float(shares.mean()), n=len(shares))
    return bootstrap(shares, seed=config.seed)


def _write(folder: Path, result: EvalResult, found: Mapping[str, Apart]) -> None:
    arrays: dict[str, Any] = {"labels": np.array(list(found))}
    rows: list[tuple[Any, ...]] = []
    for index, (label, one) in enumerate(found.items()):
        arrays[f"rows_{index}"] = one.rows.astype(np.float32)
        arrays[f"column_{index}"] = one.column.astype(np.float32)
        for name in ("images", "outputs", "values", "pixels"):
            arrays[f"{name}_{index}"] = getattr(one, name)
        for layer, share in one.shares.items():
            rows += [(label, layer, image, float(value)) for image, value in enumerate(share)]
    panels = [
        LinearPanel(label, one.images[i], one.rows[i], one.outputs[i], one.values[i], one.pixels[i], one.column[i])
        for label, one in found.items()
        for i in range(min(len(one.images), max(1, SHOWN // len(found))))
    ]
    curves = [
        BiasCurve(label, list(one.shares), np.stack(list(one.shares.values()), 1)) for label, one in found.items()
    ]
    write_result(
        folder,
        "linear",
        result,
        arrays=arrays,
        tables={"linear": (("model", "layer", "image", SHARE), rows)},
        pictures={"linear": draw_linear(panels), "linear-bias": draw_bias(curves)},
    )
