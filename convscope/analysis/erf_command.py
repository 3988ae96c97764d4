"""`convscope analyze erf`: effective receptive fields of one or several models."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import tyro
from torch import nn

from convscope.analysis.common import (
    ImageSettings,
    data_record,
    model_records,
    normalized_batches,
    one_or_all,
    spread,
    write_result,
)
from convscope.analysis.erf import ErfConfig, ErfResult, erf
from convscope.analysis.erf_output import area_table, arrays, details, figures, pictures, tables
from convscope.core.backbone import Backbone
from convscope.core.data.shard_set import ShardSet, open_shards
from convscope.core.distributed import pick_device
from convscope.core.errors import UserError
from convscope.core.log import info, progress
from convscope.core.models import model_record
from convscope.core.options import AllowPartial, Arch, Device, require_at_least
from convscope.core.results import EvalResult

MOVED = 0.01  # change of a map by bf16 that is told


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErfCommand(ImageSettings, ErfConfig):
    """Effective receptive field: which pixels the central token depends on."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """One or more MODELs; checkpoints of one run (RUN/checkpoints/*.pt) are drawn over their steps too."""
    size: int = 224
    """Height and width of the images in pixels; the published figures are at 1024."""
    n_images: int = 50
    """Images to average over, drawn evenly over the split."""
    batch_size: int = 10
    """Images at a time; the result does not depend on it."""
    untrained: bool = False
    """Measure each model's randomly initialised twin too."""
    compat: Literal["none", "replknet"] = "none"
    """replknet: the result's figures and the drawn square are those of the published procedure."""
    arch: Arch = None
    allow_partial: AllowPartial = 1.0
    device: Device = "auto"
    output_dir: Path = Path("results")
    """Where erf.json, .npz, .csv, .png and .svg go."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "size", "n_images", "batch_size", task="erf")
        require_at_least(self, 0, "seed", task="erf")

    @property
    def headline(self) -> str:
        """The variant that the result's figures are of."""
        return "official" if self.compat == "replknet" else "raw"


def run(config: ErfCommand) -> None:
    """Load the models, measure, write the files and print the areas."""
    result = evaluate(config.load(), open_shards(config.data, config.split), config)
    print(area_table(result))
    info(f"erf: wrote {config.output_dir}/erf.json, .npz, .csv, .png and .svg")


def evaluate(backbones: Mapping[str, Backbone], shards: ShardSet, config: ErfCommand) -> EvalResult:
    """Measure labelled backbones on one split, write the files, and return the result."""
    indices = spread(len(shards), config.n_images, config.seed)
    measured: dict[str, dict[str, ErfResult]] = {}
    records: dict[str, dict[str, Any]] = {}
    preprocessing: dict[str, dict[str, Any]] = {}
    for label, original in backbones.items():
        backbone = _at_size(original, config.size).to(pick_device(config.device))
        with progress(f"erf {label}", len(indices)) as ticker:
            images = normalized_batches(backbone, shards, indices, config.batch_size, ticker)
            try:
                measured[label] = erf(backbone, images, config)
            except AssertionError as error:  # timm's way to refuse a size
                raise UserError(
                    f"erf: {label} does not take images of {config.size} px ({error}); try --size"
                ) from error
        preprocessing[label], records[label] = dataclasses.asdict(backbone.preprocessing), model_record(original)
        _notes(label, original, measured[label])
    result = EvalResult(
        task="erf",
        protocol="erf-replknet/1" if config.compat == "replknet" else "erf-corrected/2",
        model=model_records(records),
        data=data_record(shards, images=len(indices)),
        preprocessing=one_or_all(preprocessing),
        figures=figures(measured, config.headline, config.thresholds),
        details={
            "centre": config.centre,
            "precision": config.precision,
            "thresholds": list(config.thresholds),
            "models": details(measured),
        },
        seed=config.seed,
    )
    write_result(
        config.output_dir,
        "erf",
        result,
        arrays=arrays(measured),
        tables=tables(measured, config.thresholds),
        pictures=pictures(measured, config.headline, config.thresholds),
    )
    return result


def _at_size(backbone: Backbone, size: int) -> Backbone:
    """The backbone at `size`, showing the whole short side of an image."""
    backbone = backbone.at_size(size)
    backbone.preprocessing = dataclasses.replace(backbone.preprocessing, crop_pct=1.0)
    return backbone


def _notes(label: str, backbone: Backbone, stages: Mapping[str, ErfResult]) -> None:
    norms = [part for part in backbone.modules() if isinstance(part, nn.BatchNorm2d) and part.weight is not None]
    silent = sum(not bool(norm.weight.any()) for norm in norms)
    if silent:
        info(f"note: {label}: {silent} of {len(norms)} BatchNorms have weights of zero; their branches are silent")
    if any(_elsewhere(one) for one in stages.values()):
        info(f"note: {label}: contributions lie beside the token's field, for branches may pad otherwise; see --centre")
    changes = [one.bf16_change for one in stages.values() if one.bf16_change is not None]
    if changes:
        told = f"note: {label}: bf16 changes the map of the first images by {max(changes):.1%}"
        info(told + ("; fp32 is safer" if max(changes) > MOVED else ""))


def _elsewhere(one: ErfResult) -> bool:
    """Whether the map's centre of mass is far from the token's, as its spread goes."""
    if one.centroid is None or one.sigma is None:
        return False
    return any(abs(m - c) > s / 2 for m, c, s in zip(one.centroid, one.token_centre, one.sigma))
