"""RepLKNet (Ding et al. 2022, arXiv:2203.06717): depthwise kernels up to 31x31, with 5x5 ones that merge into them.

Blocks alternate: a large kernel between two 1x1 convolutions, and a channel MLP; BatchNorm before and inside both.
`inference_mode=True` builds the merged form, one convolution with a bias in place of both kernels and their BatchNorms;
the other BatchNorms stay. Convolutions start from PyTorch's initial values, as the authors'.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import ConvNormAct, DropPath
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from convscope.backbones.large_kernel import centred, depthwise, depthwise_of, folded
from convscope.backbones.registration import config, create, register_model, renamed
from convscope.backbones.staged import StagedNetwork, drop_path_rates, make_stage


def _conv(in_chans: int, dim: int, size: int = 1, *, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Module:
    """Convolution, BatchNorm and, if asked for, ReLU."""
    return ConvNormAct(  # type: ignore[no-any-return]
        in_chans, dim, size, stride=stride, padding=size // 2, groups=groups, apply_act=act
    )


class ReparamLargeKernel(nn.Module):
    """The sum of a large depthwise convolution and, where `small` is one, a small one, a BatchNorm behind each."""

    def __init__(self, dim: int, kernel_size: int, small: int) -> None:
        super().__init__()
        self.large = _conv(dim, dim, kernel_size, groups=dim, act=False)
        self.small = _conv(dim, dim, small, groups=dim, act=False) if small else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        large: Tensor = self.large(x)
        return large if self.small is None else large + self.small(x)

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """The one convolution that it equals in evaluation; timm's `reparameterize_model` calls this."""
        large: Any = self.large
        weight, bias = folded(large.conv.weight, None, large.bn)
        if self.small is not None:
            small: Any = self.small
            kernel, shift = folded(small.conv.weight, None, small.bn)
            weight, bias = weight + centred(kernel, weight.shape[-1]), bias + shift
        return depthwise_of(weight, bias)


class LargeKernelBlock(nn.Module):
    """BatchNorm, 1x1 convolution, large kernel, ReLU, 1x1 convolution, added to the input."""

    def __init__(
        self, dim: int, width: int, kernel_size: int, small: int, drop_path: float, inference_mode: bool
    ) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.pw1 = _conv(dim, width)
        self.large_kernel = (
            depthwise(width, kernel_size, bias=True)
            if inference_mode
            else ReparamLargeKernel(width, kernel_size, small)
        )
        self.act = nn.ReLU()
        self.pw2 = _conv(width, dim, act=False)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        branch = self.act(self.large_kernel(self.pw1(self.norm(x))))
        return x + self.drop_path(self.pw2(branch))  # type: ignore[no-any-return]


class ConvFfn(nn.Module):
    """BatchNorm, 1x1 convolution to a larger width, GELU, 1x1 convolution back, added to the input."""

    def __init__(self, dim: int, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.pw1 = _conv(dim, hidden, act=False)
        self.act = nn.GELU()
        self.pw2 = _conv(hidden, dim, act=False)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + self.drop_path(self.pw2(self.act(self.pw1(self.norm(x)))))  # type: ignore[no-any-return]


class RepLkNet(StagedNetwork):
    """RepLKNet.

    Args:
        depths: pairs of a large kernel and an MLP in each stage.
        dims: width of each stage.
        kernel_sizes: of each stage.
        small_kernel: of the convolution beside each large one, 0 for none.
        width_ratio: width of the large kernels over the stage's.
        in_chans: channels of the images.
        num_classes: 0 for no classifier.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last pair; it grows linearly from 0.
        inference_mode: the merged form, for weights that were re-parameterised.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 18, 2),
        dims: Sequence[int] = (128, 256, 512, 1024),
        kernel_sizes: Sequence[int] = (31, 29, 27, 13),
        small_kernel: int = 5,
        width_ratio: float = 1.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        inference_mode: bool = False,
    ) -> None:
        stages, before = [], in_chans
        for i, (dim, size, rates) in enumerate(zip(dims, kernel_sizes, drop_path_rates(drop_path_rate, depths))):
            width = int(dim * width_ratio)
            blocks: list[nn.Module] = []
            for rate in rates:
                blocks.append(LargeKernelBlock(dim, width, size, small_kernel, rate, inference_mode))
                blocks.append(ConvFfn(dim, 4 * dim, rate))
            stages.append(make_stage(_stem(before, dim) if i == 0 else _transition(before, dim), blocks))
            before = dim
        norm = nn.BatchNorm2d(before)
        super().__init__(stages, dims, num_classes=num_classes, drop_rate=drop_rate, norm=norm)


def _stem(in_chans: int, dim: int) -> nn.Sequential:
    return nn.Sequential(
        _conv(in_chans, dim, 3, stride=2),
        _conv(dim, dim, 3, groups=dim),
        _conv(dim, dim),
        _conv(dim, dim, 3, stride=2, groups=dim),
    )


def _transition(in_chans: int, dim: int) -> nn.Sequential:
    return nn.Sequential(_conv(in_chans, dim), _conv(dim, dim, 3, stride=2, groups=dim))


NAMES = (
    (r"^stem\.", "stages.0.downsample."),
    (r"^transitions\.(\d)\.", lambda found: f"stages.{int(found[1]) + 1}.downsample."),
    (r"\.pre(lkb|ffn)_bn\.", ".norm."),
    (r"\.large_kernel\.lkb_origin\.", ".large_kernel.large."),
    (r"\.large_kernel\.small_conv\.", ".large_kernel.small."),
    (r"\.large_kernel\.lkb_reparam\.", ".large_kernel."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoint, as trained or re-parameterised, with our keys."""
    state_dict = state_dict.get("model", state_dict)
    return {renamed(key, NAMES): value for key, value in state_dict.items()}


default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": config(first_conv="stages.0.downsample.0.conv", license="mit")
        for name in ("replknet_31b", "replknet_31l", "replknet_xl")
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> RepLkNet:
    return create(RepLkNet, variant, pretrained, checkpoint_filter_fn, (0, 1, 2, 3), **kwargs)


@register_model
def replknet_31b(pretrained: bool = False, **kwargs: Any) -> RepLkNet:
    """RepLKNet-31B, 79 M parameters."""
    return _create("replknet_31b", pretrained, **kwargs)


@register_model
def replknet_31l(pretrained: bool = False, **kwargs: Any) -> RepLkNet:
    """RepLKNet-31L, 172 M parameters."""
    return _create("replknet_31l", pretrained, **{"dims": (192, 384, 768, 1536), **kwargs})


@register_model
def replknet_xl(pretrained: bool = False, **kwargs: Any) -> RepLkNet:
    """RepLKNet-XL, 335 M parameters: kernels of 27 alone, at one and a half times the stage's width."""
    settings = {"dims": (256, 512, 1024, 2048), "kernel_sizes": (27, 27, 27, 13), "small_kernel": 0, "width_ratio": 1.5}
    return _create("replknet_xl", pretrained, **{**settings, **kwargs})
