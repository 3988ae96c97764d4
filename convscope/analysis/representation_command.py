"""`convscope analyze representation`: rank, spread and similarity of features, by stage and between models."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from convscope.analysis import representation as measure
from convscope.analysis.common import ImageSettings, data_record, model_records, one_or_all
from convscope.analysis.common import spread as spread_over
from convscope.analysis.representation_output import METRICS, POOLED, Layer, details, figures, table, write
from convscope.core.backbone import Backbone, eval_mode
from convscope.core.data.shard_set import ShardSet, open_shards
from convscope.core.data.stream import Transform, eval_batches
from convscope.core.data.transforms import Normalize, crop_flip, eval_transform
from convscope.core.distributed import pick_device
from convscope.core.errors import UserError
from convscope.core.log import Ticker, info, progress
from convscope.core.models import model_record
from convscope.core.options import AllowPartial, Arch, Device, require_at_least
from convscope.core.results import EvalResult, Figure, bootstrap

RESAMPLES = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepresentationCommand(ImageSettings):
    """Features without labels: their rank and spread by stage, collapse, similarity of layers and models (CKA)."""

    n_images: int = 500
    """Images, drawn evenly over the split; no rank can exceed their number."""
    views: int = 2
    """Random crops of each image for alignment and LiDAR; 0 leaves both out."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Share of the image that such a crop shows."""
    cka_batch_size: int | None = None
    """Images whose similarities are compared at a time; all at once by default."""
    alpha_window: tuple[int, int] | None = None
    """First and last rank that the power law is fitted on; 11 to 50 by default, all where there are few."""
    batch_size: int = 50
    """Images at a time in the network; the result does not depend on it."""
    workers: int = 0
    """Processes that decode images."""
    untrained: bool = False
    """Measure each model's randomly initialised twin too."""
    seed: int = 0
    """Of the images, crops, intervals and untrained twins."""
    arch: Arch = None
    allow_partial: AllowPartial = 1.0
    device: Device = "auto"
    output_dir: Path = Path("results")
    """Where representation.json, .npz, .csv and the plots go."""

    def __post_init__(self) -> None:
        require_at_least(self, 4, "n_images", "cka_batch_size", task="representation")
        require_at_least(self, 1, "batch_size", task="representation")
        require_at_least(self, 0, "views", "workers", "seed", task="representation")
        if self.views == 1:
            raise UserError("representation: one view has nothing to be aligned with; use --views 2, or 0")
        if self.alpha_window and not 1 <= self.alpha_window[0] <= self.alpha_window[1] - 2:
            raise UserError(f"representation: --alpha-window needs three ranks or more, got {self.alpha_window}")


def run(config: RepresentationCommand) -> None:
    """Load the models, measure, write the files and print the table."""
    result = evaluate(config.load(), open_shards(config.data, config.split), config)
    print(table(result))
    info(f"representation: wrote {config.output_dir}/representation.json, .npz, .csv and plots")


def evaluate(backbones: Mapping[str, Backbone], shards: ShardSet, config: RepresentationCommand) -> EvalResult:
    """Measure labelled backbones on one split, write the files, and return the result."""
    if len(shards) < 4:
        raise UserError(f"representation: {shards.source} has {len(shards)} images; at least 4 are needed")
    indices = spread_over(len(shards), config.n_images, config.seed)
    layers: dict[tuple[str, str], Layer] = {}
    features: dict[tuple[str, str], Tensor] = {}
    records, preprocessing = {}, {}
    for label, original in backbones.items():
        backbone = original.at_size(config.size) if config.size else original
        records[label] = model_record(original)
        preprocessing[label] = dataclasses.asdict(backbone.preprocessing)
        with progress(f"representation {label}", len(indices) * (1 + config.views)) as ticker:
            images, views = _extract(backbone, shards, indices, config, ticker)
        for name, x in images.items():
            features[label, name] = x
            layers[label, name] = _measure(x, views.get(name), config)
    cka = similarity(list(features.values()), config.cka_batch_size)
    result = EvalResult(
        task="representation",
        protocol="representation/1",
        model=model_records(records),
        data=data_record(shards, images=len(indices), views=config.views),
        preprocessing=one_or_all(preprocessing),
        figures=figures(layers, many=len(backbones) > 1),
        details={"layers": [details(key, layer) for key, layer in layers.items()]},
        seed=config.seed,
    )
    write(config.output_dir, result, layers, cka, [linear_row(features, key) for key in features])
    return result


def similarity(features: list[Tensor], batch_size: int | None) -> Tensor:
    """(L, L) unbiased CKA of layers over the same images, `batch_size` at a time; a remainder below 4 is left out."""
    cka = measure.MinibatchCka()
    for parts in zip(*(torch.split(one, batch_size or len(one)) for one in features)):
        if len(parts[0]) >= 4:
            cka.update(list(parts))
    return cka.result()


def linear_row(features: Mapping[tuple[str, str], Tensor], key: tuple[str, str]) -> list[float]:
    """Plain linear CKA of one layer with every layer, over all images at once."""
    return [measure.linear_cka(features[key], other) for other in features.values()]


def _extract(
    backbone: Backbone, shards: ShardSet, indices: list[int], config: RepresentationCommand, ticker: Ticker
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Features (N, D) of each layer, and (N, V, D) of random crops."""
    device = pick_device(config.device)
    backbone = backbone.to(device)
    p = backbone.preprocessing

    def features(transform: Transform, views: int, rows: int) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        normalize = Normalize(p.mean, p.std).to(device)
        batches = eval_batches(
            shards, transform, batch_size=rows, workers=config.workers, label=None, indices=np.asarray(indices)
        )
        for batch in batches:
            images = batch["image"].to(device)
            for name, value in pooled_layers(backbone, normalize(images.view(-1, *images.shape[-3:]))).items():
                found.setdefault(name, []).append(value.view(len(images), views, -1))
            ticker.advance(len(images) * views)
        return {name: torch.cat(parts) for name, parts in found.items()}

    with eval_mode(backbone):
        plain = features(eval_transform(p), 1, config.batch_size)
        for name, x in plain.items():
            if not torch.isfinite(x).all():
                raise UserError(f"representation: features of {backbone.source} at {name} are not finite")
        crops = {}
        if config.views:
            crop = crop_flip(p.size, config.crop_scale, interpolation=p.interpolation, views=config.views)
            crops = features(crop, config.views, max(config.batch_size // config.views, 1))
    return {name: x[:, 0] for name, x in plain.items()}, crops


@torch.inference_mode()
def pooled_layers(backbone: Backbone, images: Tensor) -> dict[str, Tensor]:
    """Mean over positions of every stage, and the network's own pooled features, of (B, 3, H, W): (B, D) on the CPU."""
    final, maps = backbone.model.forward_intermediates(images, indices=list(range(len(backbone.stages))))
    found = {stage.name: one.float().mean((2, 3)).cpu() for stage, one in zip(backbone.stages, maps)}
    found[POOLED] = backbone.model.forward_head(final, pre_logits=True).float().cpu()
    return found


def _measure(x: Tensor, views: Tensor | None, config: RepresentationCommand) -> Layer:
    n = len(x)
    spectrum = measure.singular_values(measure.centred(x))
    eigenvalues = spectrum.square() / max(n - 1, 1)
    spreads = measure.spread(x)
    found = {
        "rankme": Figure(measure.effective_rank(measure.singular_values(x)), n=n),
        "effective_rank": Figure(measure.effective_rank(spectrum), n=n),
        "nesum": Figure(measure.nesum(eigenvalues), n=n),
        "uniformity": _uniformity(x, config.seed),
        "spread": Figure(float(spreads.mean()), n=n),
        "unused": Figure(float((spreads < 0.01 * spreads.mean()).double().mean()), n=n),
    }
    law = measure.alpha_req(eigenvalues, config.alpha_window)
    if law:
        found["alpha"] = Figure(law.alpha, n=n)
    if views is not None:
        found["alignment"] = bootstrap(measure.alignment(views[:, 0], views[:, 1]).numpy(), seed=config.seed)
        found["lidar"] = Figure(measure.lidar(views), n=n)
    known = {name: found[name] for name in METRICS if name in found and np.isfinite(found[name].value)}
    return Layer(known, eigenvalues, law, measure.verdict(x), x.double().std(0))


def _uniformity(x: Tensor, seed: int) -> Figure:
    """With an interval over images; an image is never paired with its own copy in a resampling."""
    distances = measure.squared_distances(x)
    draws = np.random.default_rng(seed).multinomial(len(x), np.full(len(x), 1 / len(x)), RESAMPLES)
    low, high = np.percentile(measure.uniformity(distances, torch.from_numpy(draws)).numpy(), [2.5, 97.5])
    return Figure(float(measure.uniformity(distances)), float(low), float(high), len(x))
