"""Visual Attention Network (Guo et al. 2022, arXiv:2202.09741): attention maps made by decomposed large kernels.

A large kernel is a 5x5 depthwise convolution, a 7x7 one with dilation 3 and a 1x1 convolution (eq. 3); their output
multiplies the input (eq. 4). Blocks use BatchNorm, every stage ends in a LayerNorm.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from timm.layers import DropPath, LayerNorm2d, LayerScale2d, trunc_normal_
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from convscope.backbones.registration import config, create, register_model, renamed
from convscope.backbones.staged import StagedNetwork, drop_path_rates


class LargeKernelAttention(nn.Module):
    """The input times an attention map of the same shape, with a reach of 23 pixels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.local = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.dilated = nn.Conv2d(dim, dim, 7, padding=9, dilation=3, groups=dim)
        self.pointwise = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * self.pointwise(self.dilated(self.local(x)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """1x1 convolution, GELU, large kernel attention, 1x1 convolution, and a shortcut around all."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.act = nn.GELU()
        self.lka = LargeKernelAttention(dim)
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + self.proj_out(self.lka(self.act(self.proj_in(x))))  # type: ignore[no-any-return]


class ConvolutionalMlp(nn.Module):
    """1x1 convolution to a larger width, 3x3 depthwise convolution, GELU, 1x1 convolution back."""

    def __init__(self, dim: int, hidden: int, drop_rate: float) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.drop(self.act(self.depthwise(self.fc1(x))))
        return self.drop(self.fc2(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and MLP, each behind a BatchNorm, scaled by channel and added to its input."""

    def __init__(self, dim: int, mlp_ratio: float, drop_rate: float, drop_path: float, layer_scale: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim)
        self.attn = Attention(dim)
        self.ls1 = LayerScale2d(dim, layer_scale)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = ConvolutionalMlp(dim, int(dim * mlp_ratio), drop_rate)
        self.ls2 = LayerScale2d(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))  # type: ignore[no-any-return]


class Stage(nn.Module):
    """Overlapping patches (a strided convolution and BatchNorm), blocks, LayerNorm."""

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.downsample = nn.Sequential()
        self.downsample.add_module("conv", nn.Conv2d(in_chans, dim, kernel_size, stride, kernel_size // 2))
        self.downsample.add_module("norm", nn.BatchNorm2d(dim))
        self.blocks = nn.Sequential(*blocks)
        self.norm = LayerNorm2d(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, dim, H/stride, W/stride)."""
        return self.norm(self.blocks(self.downsample(x)))  # type: ignore[no-any-return]


class Van(StagedNetwork):
    """Visual Attention Network.

    Args:
        depths: blocks of each stage.
        dims: width of each stage.
        mlp_ratios: width of each stage's MLP over the stage's.
        in_chans: channels of the images.
        num_classes: 0 for no classifier.
        drop_rate: dropout in MLPs and before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        layer_scale: initial scale of every branch.
    """

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale: float = 1e-2,
    ) -> None:
        stages, width = [], in_chans
        for i, (dim, ratio, rates) in enumerate(zip(dims, mlp_ratios, drop_path_rates(drop_path_rate, depths))):
            kernel_size, stride = (7, 4) if i == 0 else (3, 2)
            blocks = [Block(dim, ratio, drop_rate, rate, layer_scale) for rate in rates]
            stages.append(Stage(width, dim, kernel_size, stride, blocks))
            width = dim
        super().__init__(stages, dims, num_classes=num_classes, drop_rate=drop_rate)
        self.apply(_initialise)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(
            module.weight, std=(2 / (module.weight[0, 0].numel() * module.out_channels / module.groups)) ** 0.5
        )
    elif isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


NAMES = (
    (r"^patch_embed(\d)\.proj\.", lambda found: f"stages.{int(found[1]) - 1}.downsample.conv."),
    (r"^patch_embed(\d)\.", lambda found: f"stages.{int(found[1]) - 1}.downsample."),
    (r"^block(\d)\.", lambda found: f"stages.{int(found[1]) - 1}.blocks."),
    (r"^norm(\d)\.", lambda found: f"stages.{int(found[1]) - 1}.norm."),
    (r"attn\.spatial_gating_unit\.conv0\.", "attn.lka.local."),
    (r"attn\.spatial_gating_unit\.conv_spatial\.", "attn.lka.dilated."),
    (r"attn\.spatial_gating_unit\.conv1\.", "attn.lka.pointwise."),
    (r"attn\.proj_1\.", "attn.proj_in."),
    (r"attn\.proj_2\.", "attn.proj_out."),
    (r"mlp\.dwconv\.dwconv\.", "mlp.depthwise."),
    (r"layer_scale_(\d)$", r"ls\1.gamma"),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoint with our keys."""
    state_dict = state_dict.get("state_dict", state_dict)
    if "patch_embed1.proj.weight" not in state_dict:
        return dict(state_dict)
    return {renamed(key, NAMES): value for key, value in state_dict.items()}


default_cfgs = generate_default_cfgs(
    {
        f"van_b{size}.untrained": config(crop_pct=0.9, first_conv="stages.0.downsample.conv", license="apache-2.0")
        for size in range(7)
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> Van:
    return create(Van, variant, pretrained, checkpoint_filter_fn, (0, 1, 2, 3), **kwargs)


@register_model
def van_b0(pretrained: bool = False, **kwargs: Any) -> Van:
    """VAN-B0, 4.1 M parameters."""
    return _create("van_b0", pretrained, **{"depths": (3, 3, 5, 2), "dims": (32, 64, 160, 256), **kwargs})


@register_model
def van_b1(pretrained: bool = False, **kwargs: Any) -> Van:
    """VAN-B1, 13.9 M parameters."""
    return _create("van_b1", pretrained, **{"depths": (2, 2, 4, 2), "dims": (64, 128, 320, 512), **kwargs})


@register_model
def van_b2(pretrained: bool = False, **kwargs: Any) -> Van:
    """VAN-B2, 26.6 M parameters."""
    return _create("van_b2", pretrained, **{"depths": (3, 3, 12, 3), "dims": (64, 128, 320, 512), **kwargs})


@register_model
def van_b3(pretrained: bool = False, **kwargs: Any) -> Van:
    """VAN-B3, 44.8 M parameters."""
    return _create("van_b3", pretrained, **{"depths": (3, 5, 27, 3), "dims": (64, 128, 320, 512), **kwargs})


@register_model
def van_b4(pretrained: bool = False, **kwargs: Any) -> Van:
    """VAN-B4, 60.3 M parameters."""
    return _create("van_b4", pretrained, **{"depths": (3, 6, 40, 3), "dims": (64, 128, 320, 512), **kwargs})


@register_model
def van_b5(pretrained: bool = False, **kwargs: Any) -> Van:
    """VAN-B5, 90.0 M parameters."""
    return _create("van_b5", pretrained, **{"depths": (3, 3, 24, 3), "dims": (96, 192, 480, 768), **kwargs})


@register_model
def van_b6(pretrained: bool = False, **kwargs: Any) -> Van:
    """VAN-B6, 200 M parameters."""
    return _create("van_b6", pretrained, **{"depths": (6, 6, 90, 6), "dims": (96, 192, 384, 768), **kwargs})
