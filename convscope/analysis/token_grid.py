"""Where the tokens of a feature map sit on the image, in pixels."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import BlurPool2d
from torch import Tensor, nn

from convscope.core.backbone import Backbone

STRIDED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, BlurPool2d)


@dataclass(frozen=True)
class TokenGrid:
    """Token (i, j) has its receptive field centred at pixel origin + (i, j) * stride; pixel 0 is the first."""

    origin: tuple[float, float]
    stride: tuple[int, int]
    shape: tuple[int, int]  # tokens down and across

    @property
    def central_token(self) -> tuple[int, int]:
        """The token that the ERF is taken at: (H // 2, W // 2)."""
        return self.shape[0] // 2, self.shape[1] // 2

    def centre(self, token: tuple[int, int]) -> tuple[float, float]:
        """Pixel (y, x) at the middle of a token's receptive field; half-integers lie between two pixels."""
        (y0, x0), (sy, sx) = self.origin, self.stride
        return y0 + token[0] * sy, x0 + token[1] * sx


def token_grid(backbone: Backbone, image: Tensor, stage: str = "last") -> TokenGrid:
    """Work out a stage's grid from the geometry of the strided layers that an image (1, 3, H, W) passes.

    Only strided layers displace the grid: the others pad evenly. Where branches run in parallel the first one
    counts (a ResNet's residual branch). Downsampling that is no layer of its own (Swin's patch merging) is taken
    as merging neighbours.
    """
    level = backbone.stages[backbone.stage_indices([stage])[0]]
    with torch.no_grad(), _recorded(backbone) as calls:
        feature_map = backbone.feature_maps(image, [level.name])[level.name]
    rows, columns = (_axis(calls, axis, image.shape[2 + axis], level.stride) for axis in (0, 1))
    shape = (feature_map.shape[2], feature_map.shape[3])
    return TokenGrid((rows, columns), (level.stride, level.stride), shape)


@contextmanager
def _recorded(backbone: Backbone) -> Iterator[list[tuple[nn.Module, torch.Size, torch.Size]]]:
    """The strided layers in the order they run, each with the shapes of its input and output."""
    calls: list[tuple[nn.Module, torch.Size, torch.Size]] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((module, inputs[0].shape, output.shape))

    hooks = [module.register_forward_hook(record) for module in backbone.modules() if isinstance(module, STRIDED)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _axis(calls: list[tuple[nn.Module, torch.Size, torch.Size]], axis: int, size: int, stride: int) -> float:
    """Pixel position of token 0 along one axis."""
    origin, jump = 0.0, 1  # of the map reached so far: first position and spacing, in pixels
    for module, given, made in calls:
        step = _pair(module.stride, axis)
        if step == 1 or given[2 + axis] != size or jump == stride:
            continue
        kernel = _pair(module.filt_size if isinstance(module, BlurPool2d) else module.kernel_size, axis)
        reach = (kernel - 1) * _pair(getattr(module, "dilation", 1), axis)
        size = made[2 + axis]
        if type(module).__name__.endswith("Same"):  # TensorFlow's rule: pads while running, the odd pixel at the end
            padding = max((size - 1) * step + reach + 1 - given[2 + axis], 0) // 2
        else:
            padding = _pair(module.padding, axis)
        origin += (reach / 2 - padding) * jump
        jump *= step
    return origin + (stride / jump - 1) / 2 * jump


def _pair(value: Any, axis: int) -> int:
    return int(value[axis] if isinstance(value, (tuple, list)) else value)
