"""Global descriptors of whole pictures: pooled at one or several scales, whitened."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from sklearn.decomposition import PCA
from torch import Tensor
from torch.nn import functional as F

from convscope.core.backbone import Backbone
from convscope.core.data.transforms import Normalize
from convscope.core.distributed import pick_device
from convscope.core.errors import UserError
from convscope.core.log import progress
from convscope.core.models import LoadsModel
from convscope.core.options import AllowPartial, Arch, require_at_least
from convscope.core.results import EvalResult, Figure
from convscope.eval.common import EvalSettings, percent, print_table, require_file_name, save_at
from convscope.eval.pictures import Fit, PictureFiles, Pictures, find_pictures, picture_batches

Pooling = Literal["gem", "avg", "max", "cls", "cls+gem", "pooled"]

NOISE = 1e-9  # directions with less than this share of the largest variance are rounding errors
GEM_FLOOR = 1e-6  # as in the published code


@dataclass(frozen=True, kw_only=True)
class DescriptorCommand(LoadsModel, EvalSettings):
    """Which descriptor of which model."""

    model: tyro.conf.Positional[str]
    """Checkpoint, run directory, or timm:NAME (docs/design.md, Models)."""
    image_size: int = 1024
    """Pixels of the longest side; larger pictures are made smaller."""
    pooling: Pooling = "gem"
    """How the last map becomes a vector; cls+gem is the class token and the pooled rest side by side, pooled is the
    network's own way."""
    gem_power: float = 3.0
    """Exponent p of generalized-mean pooling: 1 is the average, a large one the maximum."""
    whiten_images: Path | None = None
    """Folder of images, others than those of the benchmark, from which PCA whitening is learned."""
    whiten_dimensions: int | None = None
    """How many are kept; default all."""
    arch: Arch = None
    model_args: tuple[str, ...] = ()
    """Its arguments; a transformer takes pictures of any shape with dynamic_img_size=True dynamic_img_pad=True."""
    allow_partial: AllowPartial = 1.0
    batch_size: int = 32
    """Images of one shape at a time; the result does not depend on it."""
    workers: int = 2
    """Processes that decode images."""
    output: Path | None = None
    """Result file; default RUN/results/TASK.json for a run, else results/ARCH-TASK.json."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "batch_size", "image_size")
        require_at_least(self, 0, "workers")
        require_file_name(self.output)
        if not self.gem_power > 0:
            raise UserError(f"--gem-power must be above 0, got {self.gem_power}")
        if self.whiten_dimensions is not None:
            require_at_least(self, 1, "whiten_dimensions")
            if self.whiten_images is None:
                raise UserError("--whiten-dimensions needs --whiten-images")


@dataclass(frozen=True)
class Whitening:
    """Takes vectors to uncorrelated numbers of unit variance, over the images that it was learned from."""

    mean: Tensor  # (D,)
    projection: Tensor  # (D, K)

    def __call__(self, x: Tensor) -> Tensor:
        """(N, D) -> unit vectors (N, K)."""
        return F.normalize((x - self.mean) @ self.projection, dim=1)


def learn_whitening(x: Tensor, dimensions: int | None = None) -> Whitening:
    """PCA whitening from vectors (N, D), with the K <= `dimensions` directions of most variance.

    Raises:
        UserError: more dimensions are asked for than these vectors have.
    """
    if len(x) < 2:
        raise UserError(f"whitening needs at least two images, got {len(x)}")
    pca = PCA(svd_solver="full").fit(x.double().numpy())
    variance = torch.from_numpy(pca.explained_variance_)
    present = int((variance > NOISE * variance[0]).sum())
    if (dimensions or 1) > present:
        raise UserError(f"--whiten-dimensions {dimensions}: {len(x)} images show {present}; give more or ask for fewer")
    kept = dimensions or present
    projection = torch.from_numpy(pca.components_[:kept]).T / variance[:kept].sqrt()
    return Whitening(torch.from_numpy(pca.mean_).float(), projection.float())


def gem(tokens: Tensor, power: float) -> Tensor:
    """Generalized mean over the places of a map, (B, T, C) -> (B, C): (mean of x^p)^(1/p), x at least 1e-6
    (Radenović et al., arXiv:1711.02512, eq. 3).
    """
    return tokens.clamp_min(GEM_FLOOR).pow(power).mean(1).pow(1 / power)


def pool_tokens(cls: Tensor | None, tokens: Tensor, pooling: Pooling, power: float) -> Tensor:
    """A vector for each image. cls (B, C) where the network has a class token, tokens (B, T, C) -> (B, C or 2 C)."""
    if pooling in ("cls", "cls+gem"):
        if cls is None:
            raise UserError(f"this network has no class token for --pooling {pooling}; use gem, avg or max")
        return cls if pooling == "cls" else torch.cat([cls, gem(tokens, power)], dim=1)
    if pooling == "max":
        return tokens.amax(1)
    return gem(tokens, power) if pooling == "gem" else tokens.mean(1)


def last_tokens(backbone: Backbone, images: Tensor) -> tuple[Tensor | None, Tensor]:
    """Class token (B, C), if there is one, and the places (B, T, C) of the network's last map, after its final norm."""
    found = backbone.model.forward_features(images)
    if found.ndim == 4:
        last = getattr(backbone.model, "output_fmt", "NCHW")
        return None, found.flatten(1, 2) if str(last).endswith("NHWC") else found.flatten(2).transpose(1, 2)
    has_class = getattr(backbone.model, "cls_token", None) is not None
    return found[:, 0] if has_class else None, found[:, getattr(backbone.model, "num_prefix_tokens", 0) :]


def over_scales(rows: Sequence[Tensor], power: float = 1.0) -> Tensor:
    """Descriptors of one image at several scales as one unit vector: the generalized mean of unit vectors (B, D).

    Raises:
        UserError: a power other than 1 with negative numbers.
    """
    units = torch.stack([F.normalize(row, dim=1) for row in rows])
    if power != 1 and bool((units < 0).any()):
        raise UserError("--scale-power needs descriptors without negative numbers, such as those of gem")
    return F.normalize(units.pow(power).mean(0).pow(1 / power), dim=1)


@torch.inference_mode()
def describe(
    backbone: Backbone,
    pictures: Pictures,
    config: DescriptorCommand,
    *,
    fit: Fit,
    scales: Sequence[float] = (1.0,),
    scale_power: float = 1.0,
    label: str = "descriptors",
) -> Tensor:
    """Descriptors (N, D) float32 on the CPU: unit vectors over several scales, as they are at a single one.

    Args:
        backbone: is moved to the device and put into evaluation mode.
        pictures: N of them.
        config: size, pooling, device.
        fit: whether `image_size` is the longest side or a square's.
        scales: factors by which the sides are changed once more (bilinear).
        scale_power: of the mean over scales.
        label: of the progress bar.

    Raises:
        UserError: a picture that cannot be read, a shape that the network does not take, NaN.
    """
    device = pick_device(config.device)
    backbone = (backbone.at_size(config.image_size) if fit == "square" else backbone).to(device).eval()
    normalize = Normalize(backbone.preprocessing.mean, backbone.preprocessing.std).to(device)
    found = []
    with progress(label, len(pictures)) as ticker:
        for batch in picture_batches(
            pictures, config.image_size, fit, batch_size=config.batch_size, workers=config.workers
        ):
            images = normalize(batch.to(device))
            rows = [_descriptor(backbone, _scaled(images, scale), config) for scale in scales]
            row = rows[0] if len(rows) == 1 else over_scales(rows, scale_power)
            if not row.isfinite().all():
                raise UserError(f"{backbone.source} gives NaN or infinity; is it trained well?")
            found.append(row.cpu())
            ticker.advance(len(images))
    return torch.cat(found)


def whitening_of(config: DescriptorCommand, described: Callable[[PictureFiles], Tensor]) -> Whitening | None:
    """What is learned from the folder that the settings name, if any, once its images are described."""
    if config.whiten_images is None:
        return None
    x = described(PictureFiles(find_pictures(config.whiten_images)))
    return learn_whitening(x, config.whiten_dimensions)


def settings_record(backbone: Backbone, config: DescriptorCommand, *, fit: Fit, **more: Any) -> dict[str, Any]:
    """How pixels became descriptors."""
    p = backbone.preprocessing
    record = {"image_size": config.image_size, "fit": fit, "mean": p.mean, "std": p.std, "pooling": config.pooling}
    return {**record, "gem_power": config.gem_power, **more}


def report(result: EvalResult, config: DescriptorCommand, figures: Mapping[str, Figure]) -> None:
    """Print a table and write the result where the settings say."""
    rows = [[name, percent(figure)] for name, figure in figures.items()]
    print_table(f"{result.task} {config.model}", ["figure", "value"], rows)
    save_at(result, config.output, config.model)


def _descriptor(backbone: Backbone, images: Tensor, config: DescriptorCommand) -> Tensor:
    try:
        if config.pooling == "pooled":
            pooled: Tensor = backbone(images)
            return pooled.float()
        return pool_tokens(*last_tokens(backbone, images), config.pooling, config.gem_power).float()
    except (AssertionError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "size" not in str(error):
            raise
        height, width = images.shape[2:]
        cause = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"{backbone.arch} does not take pictures of {width} x {height} pixels ({cause}); a transformer may with "
            "--model-args dynamic_img_size=True dynamic_img_pad=True"
        ) from error


def _scaled(images: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return images
    return F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
