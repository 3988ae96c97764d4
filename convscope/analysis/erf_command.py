"""`convscope analyze erf`: effective receptive fields of one or several models."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from torch import Tensor

from convscope.analysis.common import load_models, one_or_all
from convscope.analysis.erf import VARIANTS, Area, ErfConfig, ErfResult, erf
from convscope.core.backbone import Backbone
from convscope.core.data.shard_set import ShardSet, open_shards
from convscope.core.data.stream import eval_batches
from convscope.core.data.transforms import Normalize, eval_transform
from convscope.core.distributed import pick_device
from convscope.core.errors import UserError
from convscope.core.files import atomic_write
from convscope.core.log import Ticker, info, progress
from convscope.core.models import model_record
from convscope.core.results import EvalResult, Figure, save_result
from convscope.plots.erf import ErfPanel, draw_erf

SHOWN = 0.5  # threshold of the square drawn on the heat maps


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErfCommand(ErfConfig):
    """Effective receptive field: which pixels the central token depends on."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """One or more MODELs."""
    data: str = "builtin:shapes"
    """Folder of shards, or builtin:shapes."""
    split: str = "test"
    """Split to draw images from."""
    size: int = 224
    """Height and width of the images in pixels; the published figures are at 1024."""
    n_images: int = 50
    """Images to average over, drawn evenly over the split."""
    batch_size: int = 4
    """Images at a time; the result does not depend on it."""
    untrained: bool = False
    """Measure each model's randomly initialised twin too."""
    compat: Literal["none", "replknet"] = "none"
    """replknet: the result's figures and the drawn square are those of the published procedure."""
    arch: str | None = None
    """Architecture of weights that do not name their own."""
    allow_partial: float = 1.0
    """Accepted share of the backbone's weights that a checkpoint provides."""
    device: str = "auto"
    """cuda, cpu, or auto."""
    output_dir: Path = Path("results")
    """Where erf.json, erf.npz, erf.png and erf.svg go."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("size", "n_images", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"erf: {name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise UserError(f"erf: seed must be at least 0, got {self.seed}")

    @property
    def headline(self) -> str:
        """The variant that the result's figures are of."""
        return "official" if self.compat == "replknet" else "raw"


def run(config: ErfCommand) -> None:
    """Load the models, measure, write the files and print the areas."""
    backbones = load_models(
        config.models,
        arch=config.arch,
        allow_partial=config.allow_partial,
        untrained_seed=config.seed if config.untrained else None,
    )
    result = evaluate(backbones, open_shards(config.data, config.split), config)
    print(area_table(result))
    info(f"erf: wrote {config.output_dir}/erf.json, .npz, .png and .svg")


def evaluate(backbones: Mapping[str, Backbone], shards: ShardSet, config: ErfCommand) -> EvalResult:
    """Measure labelled backbones on one split, write erf.json, .npz, .png and .svg, and return the result."""
    indices = spread(len(shards), config.n_images, config.seed)
    measured: dict[str, ErfResult] = {}
    records: dict[str, dict[str, Any]] = {}
    preprocessing: dict[str, dict[str, Any]] = {}
    for label, original in backbones.items():
        backbone = _at_size(original, config.size).to(pick_device(config.device))
        with progress(f"erf {label}", len(indices)) as ticker:
            try:
                found = erf(backbone, _images(backbone, shards, indices, config, ticker), config)
            except AssertionError as error:  # timm's way to refuse a size
                raise UserError(
                    f"erf: {label} does not take images of {config.size} px ({error}); try --size"
                ) from error
        measured[label], preprocessing[label] = found, dataclasses.asdict(backbone.preprocessing)
        records[label] = model_record(original)
    result = EvalResult(
        task="erf",
        protocol="erf-replknet/1" if config.compat == "replknet" else "erf-corrected/1",
        model=one_or_all(records, {"source": ", ".join(records)}),
        data={
            "source": shards.source,
            "split": shards.split,
            "fingerprint": shards.fingerprint,
            "images": len(indices),
        },
        preprocessing=one_or_all(preprocessing, {}),
        figures=_figures(measured, config),
        details={
            "stage": config.stage,
            "thresholds": list(config.thresholds),
            "models": {label: _details(one) for label, one in measured.items()},
        },
        seed=config.seed,
    )
    _write(config.output_dir, result, measured, config)
    return result


def spread(size: int, count: int, seed: int) -> list[int]:
    """Indices of up to `count` samples, one drawn from each of `count` equal stretches of the data set.

    The first samples of an ordered data set are all of one class, and a fixed step can be too.
    """
    if size == 0:
        raise UserError("erf: the data set is empty")
    edges = np.linspace(0, size, min(count, size) + 1).astype(int)
    rng = np.random.default_rng(seed)
    return [int(rng.integers(first, last)) for first, last in itertools.pairwise(edges)]


def area_table(result: EvalResult) -> str:
    """Areas at every threshold in every variant as aligned text: per cent of the image and the square's side."""
    intervals = {name: figure for name, figure in result.figures.items() if figure.low is not None}
    lines: list[tuple[str, ...]] = [("model", "t", *VARIANTS)]
    for label, details in result.details["models"].items():
        for index, threshold in enumerate(result.details["thresholds"]):
            cells = [_cell(details["areas"][variant][index]) for variant in VARIANTS]
            figure = intervals.get(_name(label, threshold, len(result.details["models"])))
            if figure and figure.low is not None and figure.high is not None:
                cells[1] += f" [{figure.low:.2%}, {figure.high:.2%}]"
            lines.append((label if index == 0 else "", f"{100 * threshold:g}%", *cells))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    return "\n".join(["Area of the smallest square that holds a share t of the contribution:", *text])


def _cell(area: Mapping[str, float] | None) -> str:
    return "never met" if area is None else f"{area['share']:.2%} ({area['side']:g} px)"


def _name(label: str, threshold: float, models: int) -> str:
    return f"area at {100 * threshold:g}%" if models == 1 else f"{label}: area at {100 * threshold:g}%"


def _figures(measured: Mapping[str, ErfResult], config: ErfCommand) -> dict[str, Figure]:
    """The headline variant's areas; thresholds that are never met are left out."""
    figures: dict[str, Figure] = {}
    for label, one in measured.items():
        for index, threshold in enumerate(config.thresholds):
            area, figure = one.areas[config.headline][index], one.intervals[index]
            if config.headline != "raw":
                figure = None if area is None else Figure(area.share, n=one.images)
            if figure is not None:
                figures[_name(label, threshold, len(measured))] = figure
    return figures


def _details(one: ErfResult) -> dict[str, Any]:
    return {
        "images": one.images,
        "token": one.token,
        "centre": one.centre,
        "centroid": one.centroid,
        "sigma": one.sigma,
        "areas": {name: [area and dataclasses.asdict(area) for area in row] for name, row in one.areas.items()},
    }


def _at_size(backbone: Backbone, size: int) -> Backbone:
    """The backbone at `size`, showing the whole short side of an image."""
    backbone = backbone.at_size(size)
    backbone.preprocessing = dataclasses.replace(backbone.preprocessing, crop_pct=1.0)
    return backbone


def _images(
    backbone: Backbone, shards: ShardSet, indices: Sequence[int], config: ErfCommand, ticker: Ticker
) -> Iterator[Tensor]:
    device = next(backbone.parameters()).device
    normalize = Normalize(backbone.preprocessing.mean, backbone.preprocessing.std).to(device)
    transform = eval_transform(backbone.preprocessing)
    for batch in eval_batches(shards, transform, batch_size=config.batch_size, label=None, indices=np.asarray(indices)):
        yield normalize(batch["image"].to(device))
        ticker.advance(len(batch["image"]))


def _write(folder: Path, result: EvalResult, measured: Mapping[str, ErfResult], config: ErfCommand) -> None:
    arrays: dict[str, Any] = {"labels": np.array(list(measured))}
    for index, one in enumerate(measured.values()):
        arrays[f"contributions_{index}"] = one.contributions.astype(np.float32)
        arrays[f"area_{index}"], arrays[f"share_{index}"] = one.curve
        arrays[f"radial_{index}"] = one.radial
    with atomic_write(folder / "erf.npz") as file:
        np.savez_compressed(file, **arrays)
    draw_erf([_panel(label, one, config) for label, one in measured.items()]).save(
        folder / "erf.png", folder / "erf.svg"
    )
    save_result(folder / "erf.json", result)


def _panel(label: str, one: ErfResult, config: ErfCommand) -> ErfPanel:
    nearest = int(np.argmin([abs(t - SHOWN) for t in config.thresholds]))
    area: Area | None = one.areas[config.headline][nearest]
    if area is None:
        return ErfPanel(label, one.contributions, one.curve)
    height, width = one.contributions.shape
    centre = (height // 2, width // 2) if config.headline == "official" else one.centre
    note = f"square: {config.thresholds[nearest]:.0%} of the total, side {area.side:g} px"
    return ErfPanel(label, one.contributions, one.curve, (*centre, area.side), note)
