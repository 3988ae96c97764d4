"""UniRepLKNet (Ding et al. 2024, arXiv:2311.15599): 13x13 depthwise kernels beside dilated small ones, which merge.

A block is a depthwise convolution, BatchNorm, squeeze-and-excitation, and a channel MLP with global response
normalisation and a BatchNorm at its end. `inference_mode=True` builds the merged form: no branches, no BatchNorm.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import DropPath, GlobalResponseNormMlp, LayerNorm2d, LayerScale2d, SEModule
from timm.layers.grn import GlobalResponseNorm
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from convscope.backbones.large_kernel import centred, depthwise, depthwise_of, folded
from convscope.backbones.registration import config, create, register_model, renamed
from convscope.backbones.staged import PoolNormNetwork, drop_path_rates, make_stage

# (kernel size, dilation) of the branches beside a large kernel; none reaches further than it does
BRANCHES = {13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5))}


class DilatedReparamConv(nn.Module):
    """The sum of a large depthwise convolution and dilated small ones, a BatchNorm behind each."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.large = depthwise(dim, kernel_size)
        self.norm = nn.BatchNorm2d(dim)
        self.branches = nn.ModuleDict()
        for size, dilation in BRANCHES[kernel_size]:
            branch = nn.Sequential()
            branch.add_module("conv", depthwise(dim, size, dilation=dilation))
            branch.add_module("norm", nn.BatchNorm2d(dim))
            self.branches[f"k{size}_{dilation}"] = branch

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        total: Tensor = self.norm(self.large(x))
        for branch in self.branches.values():
            total = total + branch(x)
        return total

    def merged(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution that it equals in evaluation."""
        weight, bias = folded(self.large.weight, None, self.norm)
        for branch in self.branches.values():
            conv: Any = branch.conv
            small, shift = folded(conv.weight, None, branch.norm)  # type: ignore[arg-type]
            weight = weight + centred(small, weight.shape[-1], conv.dilation[0])
            bias = bias + shift
        return weight, bias


class ScalingGrn(GlobalResponseNorm):  # type: ignore[misc]
    """Global response normalisation whose bias the next layer has taken over."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        norm = x.norm(p=2, dim=self.spatial_dim, keepdim=True)
        return x + self.weight * x * (norm / (norm.mean(dim=self.channel_dim, keepdim=True) + self.eps))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Depthwise convolution, squeeze-and-excitation and MLP, scaled by channel and added to the input (fig. 2)."""

    def __init__(self, dim: int, kernel_size: int, drop_path: float, layer_scale: float, inference_mode: bool) -> None:
        super().__init__()
        branched = kernel_size in BRANCHES and not inference_mode
        self.dwconv: nn.Module = (
            DilatedReparamConv(dim, kernel_size) if branched else depthwise(dim, kernel_size, bias=inference_mode)
        )
        self.norm: nn.Module = nn.Identity() if inference_mode else nn.BatchNorm2d(dim)
        self.se = SEModule(dim, rd_channels=dim // 4)
        self.mlp = GlobalResponseNormMlp(dim, 4 * dim, bias=(True, inference_mode))
        if inference_mode:
            self.mlp.grn = ScalingGrn(4 * dim)
        self.norm2: nn.Module = nn.Identity() if inference_mode else nn.BatchNorm2d(dim)
        self.ls: nn.Module = nn.Identity() if inference_mode else LayerScale2d(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        shortcut = x
        x = self.se(self.norm(self.dwconv(x)))
        x = self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return shortcut + self.drop_path(self.ls(self.norm2(x)))  # type: ignore[no-any-return]

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Merge the branches, BatchNorms, scale and the bias of the response normalisation into three layers."""
        if not isinstance(self.norm, nn.BatchNorm2d):
            return
        conv: Any = self.dwconv
        weight, bias = conv.merged() if isinstance(conv, DilatedReparamConv) else (conv.weight, None)
        self.dwconv = depthwise_of(*folded(weight, bias, self.norm))
        norm2: Any = self.norm2
        scale: Any = self.ls
        grn, fc2 = self.mlp.grn, self.mlp.fc2
        weight, bias = folded(fc2.weight, fc2.weight @ grn.bias, norm2)
        self.mlp.fc2 = nn.Linear(fc2.in_features, fc2.out_features).to(weight)
        self.mlp.fc2.weight.copy_(scale.gamma[:, None] * weight)
        self.mlp.fc2.bias.copy_(scale.gamma * bias)
        self.mlp.grn = ScalingGrn(fc2.in_features).to(weight)
        self.mlp.grn.weight.copy_(grn.weight)
        self.norm, self.norm2, self.ls = nn.Identity(), nn.Identity(), nn.Identity()


class UniRepLkNet(PoolNormNetwork):
    """UniRepLKNet.

    Args:
        depths: blocks of each stage.
        dims: width of each stage.
        third_stage: kernel sizes that the third stage's blocks take in turn; the first stage has 3x3 kernels alone,
            the second and fourth 13x13.
        in_chans: channels of the images.
        num_classes: 0 for no classifier.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        layer_scale: initial scale of every block's branch.
        inference_mode: the merged form, for weights that were re-parameterised.
    """

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        third_stage: Sequence[int] = (13,),
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale: float = 1e-6,
        inference_mode: bool = False,
    ) -> None:
        kernels: tuple[Sequence[int], ...] = ((3,), (13,), third_stage, (13,))
        stages, width = [], in_chans
        for i, (dim, rates) in enumerate(zip(dims, drop_path_rates(drop_path_rate, depths))):
            sizes = itertools.cycle(kernels[i])
            downsample = _stem(width, dim) if i == 0 else nn.Sequential(*_halve(width, dim))
            blocks = [Block(dim, size, rate, layer_scale, inference_mode) for rate, size in zip(rates, sizes)]
            stages.append(make_stage(downsample, blocks))
            width = dim
        super().__init__(stages, dims, num_classes=num_classes, drop_rate=drop_rate)


def _halve(in_chans: int, dim: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(in_chans, dim, 3, stride=2, padding=1), LayerNorm2d(dim, eps=1e-6)


def _stem(in_chans: int, dim: int) -> nn.Sequential:
    return nn.Sequential(*_halve(in_chans, dim // 2), nn.GELU(), *_halve(dim // 2, dim))


NAMES = (
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^norm\.", "pool_norm."),
    (r"dwconv\.origin_bn\.", "dwconv.norm."),
    (r"dwconv\.dil_conv_(k\d_\d)\.", r"dwconv.branches.\1.conv."),
    (r"dwconv\.dil_bn_(k\d_\d)\.", r"dwconv.branches.\1.norm."),
    (r"\.se\.down\.", ".se.fc1."),
    (r"\.se\.up\.", ".se.fc2."),
    (r"\.pwconv1\.1\.", ".mlp.fc1."),
    (r"\.act\.1\.gamma$", ".mlp.grn.weight"),
    (r"\.act\.1\.beta$", ".mlp.grn.bias"),
    (r"\.pwconv2\.0\.", ".mlp.fc2."),
    (r"\.pwconv2\.2\.", ".norm2."),
    (r"\.gamma$", ".ls.gamma"),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoint, as trained or re-parameterised, with our keys and shapes."""
    state_dict = state_dict.get("model", state_dict)
    if not any(key.startswith("downsample_layers.") for key in state_dict):
        return dict(state_dict)
    converted = {}
    for key, value in state_dict.items():
        merged = ".lk_origin." in key and key.replace(".weight", ".bias") in state_dict
        key = key.replace(".lk_origin.", "." if merged else ".large.")
        converted[renamed(key, NAMES)] = value.flatten() if ".act.1." in key else value
    return converted


default_cfgs = generate_default_cfgs(
    {
        f"unireplknet_{size}.untrained": config(first_conv="stages.0.downsample.0", license="apache-2.0")
        for size in ("a", "f", "p", "n", "t", "s", "b", "l", "xl")
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> UniRepLkNet:
    return create(UniRepLkNet, variant, pretrained, checkpoint_filter_fn, (0, 1, 2, 3), **kwargs)


@register_model
def unireplknet_a(pretrained: bool = False, **kwargs: Any) -> UniRepLkNet:
    """UniRepLKNet-A, 4.4 M parameters once merged."""
    return _create("unireplknet_a", pretrained, **{"depths": (2, 2, 6, 2), "dims": (40, 80, 160, 320), **kwargs})


@register_model
def unireplknet_f(pretrained: bool = False, **kwargs: Any) -> UniRepLkNet:
    """UniRepLKNet-F, 6.2 M parameters once merged."""
    return _create("unireplknet_f", pretrained, **{"depths": (2, 2, 6, 2), "dims": (48, 96, 192, 384), **kwargs})


@register_model
def unireplknet_p(pretrained: bool = False, **kwargs: Any) -> UniRepLkNet:
    """UniRepLKNet-P, 10.7 M parameters once merged."""
    return _create("unireplknet_p", pretrained, **{"depths": (2, 2, 6, 2), "dims": (64, 128, 256, 512), **kwargs})


@register_model
def unireplknet_n(pretrained: bool = False, **kwargs: Any) -> UniRepLkNet:
    """UniRepLKNet-N, 18.3 M parameters once merged."""
    return _create("unireplknet_n", pretrained, **{"depths": (2, 2, 8, 2), "dims": (80, 160, 320, 640), **kwargs})


@register_model
def unireplknet_t(pretrained: bool = False, **kwargs: Any) -> UniRepLkNet:
    """UniRepLKNet-T, 31 M parameters once merged."""
    return _create(
        "unireplknet_t",
        pretrained,
        **{"depths": (3, 3, 18, 3), "dims": (80, 160, 320, 640), "third_stage": (13, 3), **kwargs},
    )


@register_model
def unireplknet_s(pretrained: bool = False, **kwargs: Any) -> UniRepLkNet:
    """UniRepLKNet-S, 56 M parameters once merged."""
    return _create(
        "unireplknet_s",
        pretrained,
        **{"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768), "third_stage": (13, 3, 3), **kwargs},
    )


@register_model
def unireplknet_b(pretrained: bool = False, **kwargs: Any) -> UniRepLkNet:
    """UniRepLKNet-B, 98 M parameters once merged."""
    return _create(
        "unireplknet_b",
        pretrained,
        **{"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024), "third_stage": (13, 3, 3), **kwargs},
    )


@register_model
def unireplknet_l(pretrained: bool = False, **kwargs: Any) -> UniRepLkNet:
    """UniRepLKNet-L, 218 M parameters once merged."""
    return _create(
        "unireplknet_l",
        pretrained,
        **{"depths": (3, 3, 27, 3), "dims": (192, 384, 768, 1536), "third_stage": (13, 3, 3), **kwargs},
    )


@register_model
def unireplknet_xl(pretrained: bool = False, **kwargs: Any) -> UniRepLkNet:
    """UniRepLKNet-XL, 386 M parameters once merged."""
    return _create(
        "unireplknet_xl",
        pretrained,
        **{"depths": (3, 3, 27, 3), "dims": (256, 512, 1024, 2048), "third_stage": (13, 3, 3), **kwargs},
    )
