"""HorNet (Rao et al. 2022, arXiv:2207.14284): recursive gated convolutions, products of wider and wider parts.

The parts come from one depthwise convolution, 7x7 or, in the last two stages of the `gf` networks, half of the channels
3x3 and half a filter over the whole map in the frequency domain. Blocks are otherwise ConvNeXt's.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, LayerNorm2d, LayerScale, LayerScale2d, Mlp
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from convscope.backbones.large_kernel import depthwise
from convscope.backbones.registration import config, create, register_model, renamed
from convscope.backbones.staged import PoolNormNetwork, drop_path_rates, make_stage

SCALE = 1 / 3  # of the depthwise convolution's output


class GlobalLocalFilter(nn.Module):
    """A 3x3 depthwise convolution on half of the channels, a learned filter over all frequencies on the other half.

    The filter is resized to the map, so any size works; its results alternate with the convolution's.
    """

    def __init__(self, dim: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.pre_norm = LayerNorm2d(dim, eps=1e-6)
        self.local = depthwise(dim // 2, 3)
        self.filter = nn.Parameter(torch.randn(dim // 2, size[0], size[1] // 2 + 1, 2) * 0.02)  # real, imaginary
        self.post_norm = LayerNorm2d(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        near, far = self.pre_norm(x).chunk(2, dim=1)
        both = torch.stack([self.local(near), self._filtered(far).to(x.dtype)], dim=2)
        return self.post_norm(both.flatten(1, 2))  # type: ignore[no-any-return]

    def _filtered(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        # No half precision has an FFT for every size; shapes alone have no autocast.
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            spectrum = torch.fft.rfft2(x if x.dtype == torch.float64 else x.float(), norm="ortho")
            weight = self.filter.to(spectrum.real.dtype)
            if weight.shape[1:3] != spectrum.shape[-2:]:
                weight = nn.functional.interpolate(
                    weight.permute(3, 0, 1, 2), spectrum.shape[-2:], mode="bilinear", align_corners=True
                ).permute(1, 2, 3, 0)
            product = spectrum * torch.view_as_complex(weight.contiguous())
            return torch.fft.irfft2(product, s=(height, width), norm="ortho")  # type: ignore[no-any-return]


class GatedConv(nn.Module):
    """Recursive gated convolution of an order (sec. 3.1, eq. 3): widths dim / 2^(order-1), ..., dim / 2, dim."""

    def __init__(self, dim: int, order: int, conv: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.dims = [dim // 2**i for i in reversed(range(order))]
        self.proj_in = nn.Conv2d(dim, 2 * dim, 1)
        self.conv = conv(sum(self.dims))
        self.pointwise = nn.ModuleList(nn.Conv2d(narrow, 2 * narrow, 1) for narrow in self.dims[:-1])
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x, gates = self.proj_in(x).split((self.dims[0], sum(self.dims)), dim=1)
        first, *others = (SCALE * self.conv(gates)).split(self.dims, dim=1)
        x = x * first
        for layer, gate in zip(self.pointwise, others):
            x = layer(x) * gate
        return self.proj_out(x)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Gated convolution and channel MLP, each behind a LayerNorm, scaled by channel and added to its input."""

    def __init__(
        self, dim: int, order: int, conv: Callable[[int], nn.Module], drop_path: float, layer_scale: float
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm2d(dim, eps=1e-6)
        self.gated_conv = GatedConv(dim, order, conv)
        self.ls1 = LayerScale2d(dim, layer_scale)
        self.norm2 = LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.ls2 = LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x + self.drop_path(self.ls1(self.gated_conv(self.norm1(x))))
        branch = self.ls2(self.mlp(self.norm2(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return x + self.drop_path(branch)  # type: ignore[no-any-return]


class HorNet(PoolNormNetwork):
    """HorNet.

    Args:
        dims: width of each stage; the stages' orders are 2, 3, 4, 5.
        depths: blocks of each stage.
        filter_size: height and width of the third stage's maps on images of the training size, for networks with
            global filters, half of it in the fourth stage; None for 7x7 convolutions everywhere.
        in_chans: channels of the images.
        num_classes: 0 for no classifier.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        layer_scale: initial scale of every branch.
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int] = (2, 3, 18, 2),
        filter_size: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale: float = 1e-6,
    ) -> None:
        conv: Callable[[int], nn.Module] = partial(depthwise, kernel_size=7, bias=True)
        convs = [conv] * 4
        if filter_size is not None:
            sizes = filter_size, filter_size // 2
            convs[2:] = [partial(GlobalLocalFilter, size=(size, size)) for size in sizes]
        stages, width = [], in_chans
        for i, (dim, rates) in enumerate(zip(dims, drop_path_rates(drop_path_rate, depths))):
            downsample = _stem(width, dim) if i == 0 else _halve(width, dim)
            blocks = [Block(dim, i + 2, convs[i], rate, layer_scale) for rate in rates]
            stages.append(make_stage(downsample, blocks))
            width = dim
        super().__init__(stages, dims, num_classes=num_classes, drop_rate=drop_rate)


def _stem(in_chans: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_chans, dim, 4, stride=4), LayerNorm2d(dim, eps=1e-6))


def _halve(in_chans: int, dim: int) -> nn.Sequential:
    return nn.Sequential(LayerNorm2d(in_chans, eps=1e-6), nn.Conv2d(in_chans, dim, 2, stride=2))


NAMES = (
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^norm\.", "pool_norm."),
    (r"\.gnconv\.dwconv\.dw\.", ".gnconv.dwconv.local."),
    (r"\.gnconv\.dwconv\.complex_weight$", ".gnconv.dwconv.filter"),
    (r"\.gnconv\.dwconv\.", ".gnconv.conv."),
    (r"\.gnconv\.pws\.", ".gnconv.pointwise."),
    (r"\.gnconv\.", ".gated_conv."),
    (r"\.gamma(\d)$", r".ls\1.gamma"),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoint with our keys."""
    state_dict = state_dict.get("model", state_dict)
    if not any(key.startswith("downsample_layers.") for key in state_dict):
        return dict(state_dict)
    return {renamed(key, NAMES): value for key, value in state_dict.items()}


default_cfgs = generate_default_cfgs(
    {
        f"hornet_{size}_{kind}.untrained": config(first_conv="stages.0.downsample.0", license="mit")
        for size in ("tiny", "small", "base", "large")
        for kind in ("7x7", "gf")
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> HorNet:
    return create(HorNet, variant, pretrained, checkpoint_filter_fn, (0, 1, 2, 3), **kwargs)


@register_model
def hornet_tiny_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-Tiny with 7x7 convolutions, 22 M parameters."""
    return _create("hornet_tiny_7x7", pretrained, **{"dims": (64, 128, 256, 512), **kwargs})


@register_model
def hornet_tiny_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-Tiny with global filters, 23 M parameters."""
    return _create("hornet_tiny_gf", pretrained, **{"dims": (64, 128, 256, 512), "filter_size": 14, **kwargs})


@register_model
def hornet_small_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-Small with 7x7 convolutions, 50 M parameters."""
    return _create("hornet_small_7x7", pretrained, **{"dims": (96, 192, 384, 768), **kwargs})


@register_model
def hornet_small_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-Small with global filters, 50 M parameters."""
    return _create("hornet_small_gf", pretrained, **{"dims": (96, 192, 384, 768), "filter_size": 14, **kwargs})


@register_model
def hornet_base_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-Base with 7x7 convolutions, 87 M parameters."""
    return _create("hornet_base_7x7", pretrained, **{"dims": (128, 256, 512, 1024), **kwargs})


@register_model
def hornet_base_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-Base with global filters, 88 M parameters."""
    return _create("hornet_base_gf", pretrained, **{"dims": (128, 256, 512, 1024), "filter_size": 14, **kwargs})


@register_model
def hornet_large_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-Large with 7x7 convolutions, 195 M parameters."""
    return _create("hornet_large_7x7", pretrained, **{"dims": (192, 384, 768, 1536), **kwargs})


@register_model
def hornet_large_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-Large with global filters, 196 M parameters."""
    return _create("hornet_large_gf", pretrained, **{"dims": (192, 384, 768, 1536), "filter_size": 14, **kwargs})
