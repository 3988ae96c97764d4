"""Colour jitter, grey, blur and solarisation of a whole batch at once, on whatever device it is.

torchvision applies these to one image after the other: brightness, contrast, saturation and hue each in a pass with
its own rounding and clipping, in random order. Here they are one affine map of the three colours of a pixel. What
differs: the order is fixed (that one), values are clipped once at the end, and hue turns the plane of equal luma
(YIQ) where torchvision shifts HSV. docs/design.md has figures.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from convscope.core.errors import UserError

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, in torchvision's digits
TO_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
IN_CACHE = 4  # images at a time on a CPU; twice as fast as a whole batch
TRUNCATE = 4.0  # standard deviations of the blur that its kernel reaches


@dataclass(frozen=True, kw_only=True)
class PhotometricConfig:
    """Strengths and probabilities; the defaults are DINO's (Caron et al. 2021), after SimCLR (Chen et al. 2020)."""

    jitter: float = 0.8
    """Probability of the colour jitter."""
    brightness: float = 0.4
    """Factors are drawn from 1 - brightness to 1 + brightness; so for the next two."""
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    """Turns of the colour circle, drawn from -hue to hue."""
    grey: float = 0.2
    """Probability of dropping colour."""
    blur: float = 0.5
    """Probability of a Gaussian blur."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Range of its standard deviation in pixels."""
    solarize: float = 0.0
    """Probability of inverting all values of 128 and more."""

    def __post_init__(self) -> None:
        for name in ("jitter", "grey", "blur", "solarize"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} is a probability, got {getattr(self, name)}")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} must lie between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise UserError(f"--hue must lie between 0 and 0.5, got {self.hue}")
        if not 0 < self.sigma[0] <= self.sigma[1]:
            raise UserError(f"--sigma must be 0 < low <= high, got {self.sigma}")


@dataclass(frozen=True)
class Draws:
    """What is done to each image of a batch, (B,) each, on the CPU: no step has to wait for a device to know."""

    brightness: Tensor  # factors; 1 changes nothing
    contrast: Tensor
    saturation: Tensor
    hue: Tensor  # turns
    sigma: Tensor  # pixels; 0 blurs nothing
    solarize: Tensor  # bool

    def part(self, rows: slice) -> "Draws":
        """Those of some of the images."""
        return Draws(*(getattr(self, each.name)[rows] for each in fields(self)))


def draw(config: PhotometricConfig, count: int, generator: torch.Generator | None = None) -> Draws:
    """Draws for `count` images; grey is a saturation of 0."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count).uniform_(low, high, generator=generator)

    jittered = uniform(0, 1) < config.jitter
    factors = [
        torch.where(jittered, uniform(1 - s, 1 + s), 1.0)
        for s in (config.brightness, config.contrast, config.saturation)
    ]
    hue = torch.where(jittered, uniform(-config.hue, config.hue), 0.0)
    grey = uniform(0, 1) < config.grey
    blurred = uniform(0, 1) < config.blur
    sigma = torch.where(blurred, uniform(*config.sigma), 0.0)
    return Draws(factors[0], factors[1], factors[2].where(~grey, 0.0), hue, sigma, uniform(0, 1) < config.solarize)


def photometric(images: Tensor, draws: Draws) -> Tensor:
    """(B, 3, H, W) of 0 to 255, of any type -> float32 of 0 to 255, not rounded."""
    if images.device.type != "cpu":
        return _photometric(images, draws)
    changed = torch.empty_like(images, dtype=torch.float32)
    for start in range(0, len(images), IN_CACHE):
        part = slice(start, start + IN_CACHE)
        changed[part] = _photometric(images[part], draws.part(part))
    return changed


def _photometric(images: Tensor, draws: Draws) -> Tensor:
    pixels = images.float()
    matrix, offset = colour_map(draws, pixels.mean((2, 3)))
    pixels = torch.einsum("bij,bjhw->bihw", matrix, pixels) + offset[:, :, None, None]
    pixels = pixels.clamp(0, 255)
    blurred = draws.sigma.nonzero().flatten()
    if len(blurred):
        rows = blurred.to(images.device, non_blocking=True)
        pixels = pixels.index_copy(0, rows, gaussian_blur(pixels.index_select(0, rows), draws.sigma[blurred]))
    if draws.solarize.any():
        solarized = draws.solarize.to(images.device, non_blocking=True)[:, None, None, None]
        # inverts from 128 on as torchvision does, and has no step at which a pixel of 127.9999 would stay as it is
        pixels = torch.where(solarized, torch.minimum(pixels, 255 - pixels), pixels)
    return pixels


def colour_map(draws: Draws, means: Tensor) -> tuple[Tensor, Tensor]:
    """Brightness, contrast, saturation and hue, in this order, as one affine map.

    Args:
        draws: of a batch.
        means: mean colour of each image (B, 3); contrast is about the mean luma.

    Returns:
        Matrix (B, 3, 3) and offset (B, 3).
    """
    device = means.device
    eye, luma = torch.eye(3), torch.tensor(LUMA)
    saturation = draws.saturation[:, None, None] * eye + (1 - draws.saturation)[:, None, None] * luma.expand(3, 3)
    after = (_turn(draws.hue) @ saturation).to(device, non_blocking=True)
    scale = (draws.contrast * draws.brightness).to(device, non_blocking=True)
    share = ((1 - draws.contrast) * draws.brightness).to(device, non_blocking=True)
    middle = share * (means @ luma.to(device, non_blocking=True))
    return after * scale[:, None, None], (after * middle[:, None, None]).sum(2)


def _turn(hue: Tensor) -> Tensor:
    """Rotations of the chroma plane (B, 3, 3), luma kept; red goes to yellow and green, as in HSV."""
    angle = -2 * math.pi * hue
    turned = torch.zeros(len(hue), 3, 3)
    turned[:, 0, 0] = 1
    turned[:, 1, 1] = turned[:, 2, 2] = angle.cos()
    turned[:, 2, 1] = angle.sin()
    turned[:, 1, 2] = -angle.sin()
    to_yiq = torch.tensor(TO_YIQ)
    there_and_back: Tensor = torch.linalg.inv(to_yiq) @ turned @ to_yiq
    return torch.where((hue == 0)[:, None, None], torch.eye(3), there_and_back)  # exactly: no turn changes no pixel


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Each image (B, C, H, W) blurred by its own standard deviation in pixels, `sigma` (B,) > 0 on the CPU.

    Borders are mirrored, as torchvision does.
    """
    count, channels, height, width = images.shape
    reach = min(max(1, math.ceil(TRUNCATE * float(sigma.max()))), min(height, width) - 1)
    taps = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (taps / sigma[:, None]).square())
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(channels, 0)  # (B * C, taps)
    weights = weights.to(images, non_blocking=True)
    flat = F.pad(images.reshape(1, count * channels, height, width), [reach] * 4, mode="reflect")
    down = F.conv2d(flat, weights[:, None, :, None], groups=count * channels)
    across = F.conv2d(down, weights[:, None, None, :], groups=count * channels)
    return across.view(count, channels, height, width)
