"""SparK: masked modeling for convolutional networks (Tian et al. 2023, "Designing BERT for Convolutional Networks").

The encoder sees the visible units of an image alone, a decoder paints the masked ones, and the loss is the squared
error on masked units against pixels normalised within each unit.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convscope.core import distributed
from convscope.core.backbone import Backbone
from convscope.core.data.stream import Transform
from convscope.core.data.transforms import crop_flip
from convscope.core.errors import UserError
from convscope.core.training.objective import Batch, Objective, StepOutput
from convscope.ssl.objectives.spark_decoders import LightReconstruction, UNetReconstruction
from convscope.ssl.sparse.reference import convert_reference
from convscope.ssl.sparse.rules import convert
from convscope.ssl.sparse.units import VisibleUnits
from convscope.ssl.sparse.verify import verify

SCALES = 4  # SparK decodes from the four smallest maps


@dataclass(frozen=True, kw_only=True)
class SparkConfig:
    """Settings of the SparK objective; the defaults are the published ones."""

    mask_ratio: float = 0.6
    """Share of units that are hidden."""
    mask_unit: int | None = None
    """Side of a mask unit in pixels, a multiple of the backbone's total stride; default: the stride itself."""
    decoder: Literal["unet", "light"] = "unet"
    """unet: the published decoder. light: one ConvNeXt-V2 block at the smallest map (FCMAE)."""
    decoder_width: int | None = None
    """Channels of the decoder at the smallest map; default 768 (unet) or 512 (light)."""
    shared_mask: bool = False
    """One mask for all images of a batch."""
    size: int | tuple[int, int] | None = None
    """Side, or height and width, of the training crop in pixels; default: the backbone's own input size."""
    crop_scale: tuple[float, float] = (0.67, 1.0)
    """Range of the random crop's area."""
    interpolation: str = "bicubic"
    """Resampling of the random crop."""
    flip: bool = True
    """Mirror images at random."""
    reference: bool = False
    """Compute masked positions too and throw them away, as the published code does: slow, and the same result."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise UserError(f"--mask-ratio must lie between 0 and 1, got {self.mask_ratio}")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise UserError(f"--crop-scale must be 0 < low <= high <= 1, got {self.crop_scale}")

    def build(self, backbone: Backbone) -> "Spark":
        """The objective around `backbone`, which is converted in place and proved exact.

        Raises:
            UserError: the backbone has a layer without a sparse rule, or the sizes do not fit.
        """
        return Spark(backbone, self)

    def transform(self, backbone: Backbone) -> Transform:
        """Random resized crop and flip."""
        size = self.crop_size(backbone)
        transform: Transform = crop_flip(size, scale=self.crop_scale, interpolation=self.interpolation, flip=self.flip)
        return transform

    def crop_size(self, backbone: Backbone) -> tuple[int, int]:
        """Height and width of the training crop in pixels."""
        if self.size is None:
            return backbone.preprocessing.size
        return (self.size, self.size) if isinstance(self.size, int) else self.size


class Spark(Objective):
    """Masked modeling on `backbone`; see SparkConfig."""

    def __init__(self, backbone: Backbone, config: SparkConfig) -> None:
        super().__init__()
        if config.reference and distributed.world() > 1:
            raise UserError("--reference runs in one process: its BatchNorm takes statistics of one process alone")
        self.backbone = backbone
        self.mask_ratio = config.mask_ratio
        self.shared_mask = config.shared_mask
        self.mask_unit = config.mask_unit or backbone.stride
        _check_sizes(backbone, self.mask_unit, config.crop_size(backbone))
        self.scales = hierarchy(backbone)  # small to large
        stages = [backbone.stages[i] for i in self.scales]
        self.reconstruction: nn.Module
        if config.decoder == "light":
            self.reconstruction = LightReconstruction(stages, config.decoder_width or 512)
        else:
            width = config.decoder_width or 768
            if width % backbone.stride:
                raise UserError(
                    f"--decoder-width {width} is halved down to the pixels: give a multiple of {backbone.stride}"
                )
            self.reconstruction = UNetReconstruction(stages, width, densify_norm(backbone))
        self.reference = config.reference
        stock = copy.deepcopy(backbone.model) if config.reference else None
        self.mask_context = convert(backbone.model, backbone.arch)
        self.untrained = verify(backbone, self.mask_context, self.mask_unit)
        if stock is not None:
            backbone.model, self.mask_context = stock, convert_reference(stock)
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(name not in self.untrained)

    def forward(self, batch: Batch) -> StepOutput:
        """Loss on a batch of normalised images (B, 3, H, W); `batch["visible"]` (B, h, w) fixes the mask."""
        images: Tensor = batch["image"]
        visible = batch.get("visible")
        units = self.draw_units(images) if visible is None else VisibleUnits.from_mask(visible)
        painted = self.reconstruction(self.encode(images, units), units)
        target = normalise_patches(units.hidden.gather(images))
        return StepOutput((painted.to(target.dtype) - target).square().mean())

    def draw_units(self, images: Tensor) -> VisibleUnits:
        """A random mask for each image, or for all of them."""
        grid = (images.shape[-2] // self.mask_unit, images.shape[-1] // self.mask_unit)
        return VisibleUnits.draw(len(images), grid, self.mask_ratio, device=images.device, shared=self.shared_mask)

    def encode(self, images: Tensor, units: VisibleUnits) -> list[Tensor]:
        """Features of the visible units at every scale, small to large, each (B*K, C, b, b)."""
        self.mask_context.units = units  # stays set: gradient checkpointing runs the layers again in backward
        names = [self.backbone.stages[i].name for i in self.scales]
        if self.reference:
            maps = self.backbone.feature_maps(units.scatter(units.gather(images)), names)
            return [units.gather(maps[name]) for name in names]
        maps = self.backbone.feature_maps(units.gather(images), names)
        return [maps[name] for name in names]

    @torch.no_grad()
    def after_update(self) -> None:
        """Make the backbone an ordinary dense network again, until the next batch."""
        self.mask_context.units = None

    @torch.no_grad()
    def reconstruct(self, images: Tensor, units: VisibleUnits) -> Tensor:
        """What the network paints: visible units as they are, masked ones from the prediction, in pixel space.

        images (B, 3, H, W) normalised -> the same shape. Each unit takes its own true mean and deviation, as the
        published pictures do, since the loss never sees them.
        """
        painted = self.reconstruction(self.encode(images, units), units).to(images.dtype)
        self.mask_context.units = None
        truth = units.hidden.gather(images)
        mean, deviation = _patch_statistics(truth)
        canvas = units.hidden.scatter(painted * deviation + mean)
        shown = torch.nn.functional.interpolate(units.mask[:, None].float(), scale_factor=float(self.mask_unit))
        return torch.where(shown > 0, images, canvas)

    def no_weight_decay(self) -> set[str]:
        """Mask tokens; biases and 1-d parameters (norms, layer scales) are left alone anyway."""
        return {name for name, _ in self.named_parameters() if "mask_token" in name}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load weights; afterwards the network is again an ordinary dense one until the next batch."""
        self.mask_context.units = None
        return super().load_state_dict(state_dict, *args, **kwargs)


def hierarchy(backbone: Backbone) -> list[int]:
    """Stages that SparK decodes from, small to large: the last stage at each of the four largest strides above 1."""
    last: dict[int, int] = {}
    for i, stage in enumerate(backbone.stages):
        if stage.stride > 1:
            last[stage.stride] = i
    return [last[stride] for stride in sorted(last, reverse=True)[:SCALES]]


def densify_norm(backbone: Backbone) -> Literal["bn", "ln"]:
    """The kind of norm that the backbone itself uses: BatchNorm if it has any, else LayerNorm."""
    return "bn" if any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules()) else "ln"


def normalise_patches(patches: Tensor) -> Tensor:
    """(p - mean) / sqrt(var + 1e-6) within each patch (N, 3, p, p), unbiased variance over all its values."""
    mean, deviation = _patch_statistics(patches)
    return (patches - mean) / deviation


def _patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    mean = patches.mean(dim=(1, 2, 3), keepdim=True)
    return mean, (patches.var(dim=(1, 2, 3), keepdim=True) + 1e-6).sqrt()


def _check_sizes(backbone: Backbone, mask_unit: int, size: tuple[int, int]) -> None:
    stride = backbone.stride
    if stride & (stride - 1):
        raise UserError(f"SparK needs a total stride that is a power of two; {backbone.arch} has {stride}")
    if mask_unit % stride:
        raise UserError(f"--mask-unit {mask_unit} is no multiple of {backbone.arch}'s total stride {stride}")
    if any(side % mask_unit for side in size) or (size[0] // mask_unit) * (size[1] // mask_unit) < 2:
        shown = " ".join(map(str, sorted(set(size), key=size.index)))
        raise UserError(
            f"--size {shown} must be a multiple of the mask unit ({mask_unit} px), and hold two of them; "
            "pass --size, --mask-unit, or a backbone with a smaller stride"
        )
