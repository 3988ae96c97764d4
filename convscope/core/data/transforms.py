"""From a decoded image to pixels (3, H, W) uint8, and from there, on the device, to what the network takes."""

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.data.transforms import ResizeKeepRatio
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from convscope.core.backbone import Preprocessing
from convscope.core.data.crop import RandomCrop
from convscope.core.data.stream import Transform
from convscope.core.errors import UserError


def eval_transform(p: Preprocessing) -> Transform:
    """Resize to size / crop_pct and crop the centre, exactly as timm does.

    Raises:
        UserError: settings that mean nothing.
    """
    if not 0 < p.crop_pct <= 1:
        raise UserError(f"crop_pct must lie between 0 and 1, got {p.crop_pct}")
    height, width = (math.floor(side / p.crop_pct) for side in p.size)
    if p.crop_mode not in ("center", "squash"):
        raise UserError(f"crop_mode {p.crop_mode!r} is not supported; known: center, squash")
    resize: Any
    if p.crop_mode == "squash":
        resize = v2.Resize((height, width), interpolation=interpolation_mode(p.interpolation))
    elif height == width:
        resize = v2.Resize(height, interpolation=interpolation_mode(p.interpolation))
    else:
        interpolation_mode(p.interpolation)
        resize = ResizeKeepRatio((height, width), interpolation=p.interpolation)
    transform: Transform = v2.Compose([resize, v2.CenterCrop(p.size), v2.PILToTensor()])
    return transform


def crop_flip(
    size: int | tuple[int, int],
    scale: tuple[float, float] = (0.67, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bicubic",
    flip: bool = True,
    views: int = 1,
    after: Callable[[Tensor], Tensor] | None = None,
) -> RandomCrop:
    """Random crop of a share `scale` of the area, resized to `size`, mirrored half of the time.

    Args:
        size: side, or height and width, in pixels.
        scale: range of the share.
        ratio: range of how much wider than `size` the crop is, in proportion, before it is resized.
        interpolation: of the resizing.
        flip: whether to mirror.
        views: crops of one image.
        after: applied to each crop.

    Raises:
        UserError: unknown interpolation.
    """
    height, width = (size, size) if isinstance(size, int) else size
    shape = (ratio[0] * width / height, ratio[1] * width / height)
    mode = interpolation_mode(interpolation)
    return RandomCrop((height, width), scale, shape, mode, flip=flip, views=views, after=after)


class Normalize(nn.Module):
    """Subtracts the mean and divides by the standard deviation of each channel, both those of pixels in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> float32."""
        pixels = images.to(torch.float32, copy=True)
        rows, mean, std = pixels, self.mean, self.std
        if pixels.ndim == 4 and pixels.is_contiguous(memory_format=torch.channels_last):
            width = pixels.shape[3]  # whole rows at a time: a CPU is slow with three colours at a time
            rows = pixels.movedim(1, 3).flatten(2)
            mean, std = mean.flatten().repeat(width), std.flatten().repeat(width)
        rows.div_(255).sub_(mean).div_(std)
        return pixels

    def inverse(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> uint8, rounded and clipped."""
        pixels = images.float().mul(self.std).add(self.mean).mul(255)
        return pixels.round().clamp(0, 255).to(torch.uint8)


def interpolation_mode(name: str) -> InterpolationMode:
    """torchvision's mode of that name: bicubic, bilinear, nearest, lanczos, ...

    Raises:
        UserError: no such mode.
    """
    try:
        return InterpolationMode(name)
    except ValueError as error:
        known = ", ".join(mode.value for mode in InterpolationMode)
        raise UserError(f"unknown interpolation {name!r}; known: {known}") from error
