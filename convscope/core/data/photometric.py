"""Colour jitter, grey, blur and solarisation of a whole batch at once, on whatever device it is.

torchvision applies these to one image after the other: brightness, contrast, saturation and hue each in a pass with
its own rounding and clipping, in random order. Here they are one affine map of the three colours of a pixel. What
differs: the order is fixed (that one), values are clipped once at the end, and hue turns the plane of equal luma
(YIQ) where torchvision shifts HSV. docs/design.md has figures. `--colours exact` is torchvision's own way instead.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from convscope.core.data.order import uniform_at
from convscope.core.errors import UserError

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, in torchvision's digits
TO_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
IN_CACHE = 4  # images at a time on a CPU; twice as fast as a whole batch
TRUNCATE = 4.0  # standard deviations of the blur that its kernel reaches
NUMBERS = 9  # random numbers that an image takes


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
    colours: Literal["fast", "exact"] = "fast"
    """fast: jitter, grey, blur, solarisation in one pass over a batch. exact: torchvision v2's, an image at a time."""

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


def augment(images: Tensor, config: PhotometricConfig, seed: int, positions: Tensor) -> Tensor:
    """Change a training batch; the draws are those of each image's position, on whichever process it is.

    Args:
        images: (N * views, 3, H, W) uint8, the views of a position one after the other.
        config: strengths and probabilities.
        seed: of the run.
        positions: in the training stream, (N,) on the CPU.

    Returns:
        Images of 0 to 255: float32 and not rounded, or uint8 with exact colours.
    """
    views = len(images) // len(positions)
    numbers = torch.from_numpy(uniform_at(seed, positions.numpy(), NUMBERS * views)).reshape(-1, NUMBERS)
    if config.colours == "exact":
        return one_by_one(images, config, (numbers[:, 0].double() * 2**24).long().tolist())
    return photometric(images, drawn(config, numbers))


def one_by_one(images: Tensor, config: PhotometricConfig, seeds: list[int]) -> Tensor:
    """torchvision v2's ColorJitter, RandomGrayscale, GaussianBlur and RandomSolarize of each image (B, 3, H, W) uint8.

    Each takes its draws from its own seed, whatever device it is on.
    """
    reach = _reach(config.sigma[1], images)
    transform = v2.Compose(
        [
            v2.RandomApply(
                [v2.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)], config.jitter
            ),
            v2.RandomGrayscale(config.grey),
            v2.RandomApply([v2.GaussianBlur(2 * reach + 1, config.sigma)], config.blur),
            v2.RandomSolarize(128, config.solarize),
        ]
    )
    changed = []
    with torch.random.fork_rng(devices=[]):
        for image, seed in zip(images, seeds):
            torch.default_generator.manual_seed(seed)
            changed.append(transform(image))
    return torch.stack(changed)


def draw(config: PhotometricConfig, count: int, generator: torch.Generator | None = None) -> Draws:
    """Draws for `count` images from a generator."""
    return drawn(config, torch.rand(count, NUMBERS, generator=generator))


def drawn(config: PhotometricConfig, numbers: Tensor) -> Draws:
    """Draws for images from NUMBERS uniform ones in [0, 1) each, (B, NUMBERS); grey is a saturation of 0."""
    column = iter(numbers.unbind(1))

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * next(column)

    jittered = next(column) < config.jitter
    factors = [
        torch.where(jittered, uniform(1 - s, 1 + s), 1.0)
        for s in (config.brightness, config.contrast, config.saturation)
    ]
    hue = torch.where(jittered, uniform(-config.hue, config.hue), 0.0)
    grey = next(column) < config.grey
    blurred = next(column) < config.blur
    sigma = torch.where(blurred, uniform(*config.sigma), 0.0)
    return Draws(factors[0], factors[1], factors[2].where(~grey, 0.0), hue, sigma, next(column) < config.solarize)


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
    reach = _reach(float(sigma.max()), images)
    taps = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (taps / sigma[:, None]).square())
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(channels, 0)  # (B * C, taps)
    weights = weights.to(images, non_blocking=True)
    flat = F.pad(images.reshape(1, count * channels, height, width), [reach] * 4, mode="reflect")
    down = F.conv2d(flat, weights[:, None, :, None], groups=count * channels)
    across = F.conv2d(down, weights[:, None, None, :], groups=count * channels)
    return across.view(count, channels, height, width)


def _reach(sigma: float, images: Tensor) -> int:
    """Pixels on each side that a blur of `sigma` looks at; mirroring cannot reach beyond the image."""
    return min(max(1, math.ceil(TRUNCATE * sigma)), min(images.shape[-2:]) - 1)
