"""SparK's decoders: from the encoder's features on visible units to an image.

`unet` is the published one (SparK sec. 3.3); `light` is FCMAE's (ConvNeXt-V2 sec. 3.1): one block at the smallest map.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from convscope.core.backbone import Stage
from convscope.ssl.sparse.units import VisibleUnits


class UpSample(nn.ConvTranspose2d):
    """A transposed convolution; on a CPU its bias has its gradient computed apart, for the library's way doubles the
    time of the whole backward pass."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C', 2H, 2W)."""
        if x.device.type != "cpu":
            return super().forward(x, output_size)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        with torch.autocast("cpu", enabled=False):
            parameters = self.weight.to(dtype), self.bias.to(dtype)  # type: ignore[union-attr]
            out: Tensor = _Transposed.apply(x.to(dtype), *parameters, self.stride, self.padding)
        return out


class _Transposed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return nn.functional.conv_transpose2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        needed = [ctx.needs_input_grad[0], True, False]
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            gradient, x, weight, None, ctx.stride, ctx.padding, [1, 1], True, [0, 0], 1, needed
        )
        return of_x, of_weight, gradient.sum((0, 2, 3)), None, None


class UNetBlock(nn.Module):
    """Doubles the resolution: transposed convolution, then two 3x3 convolutions."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.up_sample = UpSample(width, width, kernel_size=4, stride=2, padding=1)
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU6(inplace=True),
            nn.Conv2d(width, out, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) -> (B, out, 2H, 2W)."""
        out: Tensor = self.conv(self.up_sample(x))
        return out


class DenseDecoder(nn.Module):
    """UNet blocks from the smallest map up to the pixels; attribute names follow the official checkpoints."""

    def __init__(self, stride: int, width: int) -> None:
        super().__init__()
        widths = [width // 2**i for i in range(round(math.log2(stride)) + 1)]
        self.dec = nn.ModuleList(UNetBlock(a, b) for a, b in itertools.pairwise(widths))
        self.proj = nn.Conv2d(widths[-1], 3, kernel_size=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Densified maps from the smallest to the largest -> image (B, 3, H, W)."""
        x = maps[0]
        for i, block in enumerate(self.dec):
            x = block(x if i == 0 or i >= len(maps) else x + maps[i])
        image: Tensor = self.proj(x)
        return image


class UNetReconstruction(nn.Module):
    """Densify every scale (norm, mask token, projection) and decode with skips (SparK eq. 4-6).

    Args:
        stages: encoder stages from the smallest map to the largest.
        width: decoder width at the smallest map, halved at each doubling of resolution.
        norm: "bn" or "ln", applied to visible positions before the mask token is filled in.
    """

    def __init__(self, stages: Sequence[Stage], width: int, norm: str) -> None:
        super().__init__()
        self.dense_decoder = DenseDecoder(stages[0].stride, width)
        self.densify_norms = nn.ModuleList(
            nn.BatchNorm2d(stage.channels) if norm == "bn" else LayerNorm2d(stage.channels, eps=1e-6)
            for stage in stages
        )
        self.densify_projs = nn.ModuleList(
            _projection(stage.channels, width // 2**i, first=i == 0) for i, stage in enumerate(stages)
        )
        self.mask_tokens = nn.ParameterList(torch.empty(1, stage.channels, 1, 1) for stage in stages)
        for token in self.mask_tokens:
            nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02)

    def densify(self, features: Sequence[Tensor], units: VisibleUnits) -> list[Tensor]:
        """Units of every scale, small to large -> dense maps (B, width >> i, H_i, W_i)."""
        layers = zip(features, self.densify_norms, self.mask_tokens, self.densify_projs)
        return [proj(units.scatter(norm(x), fill=token)) for x, norm, token, proj in layers]

    def forward(self, features: Sequence[Tensor], units: VisibleUnits) -> Tensor:
        """The hidden units as painted (B*M, 3, u, u)."""
        return units.hidden.gather(self.dense_decoder(self.densify(features, units)))


class LightReconstruction(nn.Module):
    """One ConvNeXt-V2 block over the smallest map, then a linear map from each position to its stride x stride pixels.

    Args:
        stages: encoder stages from the smallest map to the largest; only the first is used.
        width: channels of the block.
    """

    def __init__(self, stages: Sequence[Stage], width: int) -> None:
        super().__init__()
        self.stride = stages[0].stride
        self.proj = nn.Conv2d(stages[0].channels, width, kernel_size=1)
        self.mask_token = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.block = ConvNeXtBlock(width, conv_mlp=False, use_grn=True, ls_init_value=None)
        self.pred = nn.Conv2d(width, 3 * self.stride**2, kernel_size=1)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: Sequence[Tensor], units: VisibleUnits) -> Tensor:
        """The hidden units as painted (B*M, 3, u, u); no pixel of a visible one is computed."""
        x = units.scatter(self.proj(features[0]), fill=self.mask_token)
        return nn.functional.pixel_shuffle(self.pred(units.hidden.gather(self.block(x))), self.stride)


def _projection(channels: int, width: int, *, first: bool) -> nn.Module:
    if first and channels == width:
        return nn.Identity()
    kernel = 1 if first else 3
    return nn.Conv2d(channels, width, kernel, padding=kernel // 2)
