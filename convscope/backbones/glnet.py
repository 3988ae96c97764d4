"""GLNet: local convolutions beside attention among pooled slots (GLMix, Zhu et al. 2024, arXiv:2411.14429).

A GLMix block softly groups the map's positions into 64 slots, lets the slots attend to one another and spreads them
back (sec. 3.2), while a depthwise convolution sees the neighbourhood; the two are added. Late stages use plain
attention. The linear cost of the grouping is why it can stand in the early stages.
"""

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, LayerScale2d, trunc_normal_
from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, normalize

from convscope.backbones.registration import config, create, register_model, renamed
from convscope.backbones.staged import StagedNetwork, drop_path_rates

SLOTS = 64
HEAD_WIDTH = 32


class SlotMixing(nn.Module):
    """Global half of a GLMix block: positions -> slots, attention among slots, slots -> positions.

    Args:
        dim: channels.
        slots: their number, a square.
    """

    def __init__(self, dim: int, slots: int = SLOTS) -> None:
        super().__init__()
        self.side = math.isqrt(slots)
        self.scale = nn.Parameter(torch.tensor(dim**-0.5))
        self.attn = nn.MultiheadAttention(dim, dim // HEAD_WIDTH, batch_first=True)

    def forward(self, x: Tensor, origin: Tensor) -> Tensor:
        """Maps (B, C, H, W); a slot starts as the mean of one cell of an 8 x 8 grid over `origin`."""
        slots = _tokens(adaptive_avg_pool2d(origin, self.side))  # (B, S, C)
        tokens = _tokens(x)  # (B, N, C)
        likeness = self.scale * normalize(slots, dim=-1) @ normalize(tokens, dim=-1).transpose(1, 2)
        slots = likeness.softmax(-1) @ tokens
        slots = self.attn(slots, slots, slots, need_weights=False)[0]
        return _as_map(likeness.transpose(1, 2).softmax(-1) @ slots, x)


class SelfAttention(nn.Module):
    """Multi-head attention among all positions of a map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, dim // HEAD_WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        tokens = _tokens(x)
        return _as_map(self.attn(tokens, tokens, tokens, need_weights=False)[0], x)


class ResidualDepthwise(nn.Conv2d):
    """x plus its 3x3 depthwise convolution: a conditional position encoding."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        return x + super().forward(x)


class GLNetBlock(nn.Module):
    """Position encoding, spatial mixing and MLP, each around a shortcut.

    Args:
        dim: channels.
        mlp_ratio: width of the MLP over `dim`.
        glmix: slots and a depthwise convolution; otherwise attention among all positions.
        convolutional: 3x3 depthwise convolutions as position encoding and inside the MLP.
        layer_scale: initial value of the branches' scales, 0 for none.
        drop_path: rate at which a branch is dropped.
    """

    def __init__(
        self, dim: int, mlp_ratio: int, *, glmix: bool, convolutional: bool, layer_scale: float, drop_path: float
    ) -> None:
        super().__init__()
        hidden = dim * mlp_ratio
        self.pos_conv = ResidualDepthwise(dim) if convolutional else nn.Identity()
        self.norm1 = LayerNorm2d(dim)
        self.mix = SlotMixing(dim) if glmix else SelfAttention(dim)
        self.local = _local(dim) if glmix else None
        self.ls1 = LayerScale2d(dim, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = LayerNorm2d(dim)
        self.mlp = nn.Sequential(
            nn.Conv2d(dim, hidden, 1),
            ResidualDepthwise(hidden) if convolutional else nn.Identity(),
            nn.GELU(),
            nn.Conv2d(hidden, dim, 1),
        )
        self.ls2 = LayerScale2d(dim, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        origin = x
        x = self.pos_conv(x)
        normed = self.norm1(x)
        mixed = self.mix(normed) if self.local is None else self.mix(normed, origin) + self.local(normed)
        x = x + self.drop_path(self.ls1(mixed))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))  # type: ignore[no-any-return]


def _local(dim: int) -> nn.Sequential:
    """The local half of a GLMix block."""
    depthwise = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
    return nn.Sequential(nn.Conv2d(dim, dim, 1), depthwise, nn.Conv2d(dim, dim, 1))


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _as_map(tokens: Tensor, like: Tensor) -> Tensor:
    return tokens.transpose(1, 2).reshape(like.shape)


class GLNet(StagedNetwork):
    """GLNet of any size.

    Args:
        depths: blocks of each of the four stages.
        dims: channels of each stage.
        mlp_ratio: width of the MLPs over the channels.
        convolutional: overlapping patches and depthwise convolutions outside of GLMix, which all but `stl` have.
        layer_scale: initial value of the branches' scales, 0 for none.
        in_chans: channels of the images.
        num_classes: 0 for no classifier.
        drop_rate: dropout before the classifier.
        drop_path_rate: rate at which the last block's branches are dropped; earlier ones less, from 0.
    """

    def __init__(
        self,
        depths: tuple[int, int, int, int] = (4, 4, 18, 4),
        dims: tuple[int, int, int, int] = (64, 128, 256, 512),
        mlp_ratio: int = 3,
        convolutional: bool = True,
        layer_scale: float = 0.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        rates = drop_path_rates(drop_path_rate, depths)
        settings: dict[str, Any] = {"mlp_ratio": mlp_ratio, "convolutional": convolutional, "layer_scale": layer_scale}
        downsample = _overlapping if convolutional else _patches
        stages = []
        for i, dim in enumerate(dims):
            blocks = [
                GLNetBlock(dim, glmix=_has_slots(i, j, convolutional), drop_path=rate, **settings)
                for j, rate in enumerate(rates[i])
            ]
            stages.append(nn.Sequential(downsample(dims[i - 1] if i else in_chans, dim, first=i == 0), *blocks))
        norm = nn.BatchNorm2d(dims[-1])
        super().__init__(stages, dims, num_classes=num_classes, drop_rate=drop_rate, norm=norm)
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)


def _has_slots(stage: int, block: int, alternating: bool) -> bool:
    """Stages 1 and 2 are GLMix throughout, stage 4 attention; in stage 3 the two alternate, but not in `stl`."""
    return stage < 2 or (stage == 2 and (not alternating or block % 2 == 0))


def _overlapping(in_chans: int, dim: int, *, first: bool) -> nn.Sequential:
    """3x3 convolutions of stride 2, each with BatchNorm: two at the network's start, one between stages."""
    widths = (in_chans, dim // 2, dim) if first else (in_chans, dim)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.GELU()] if layers else []
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after)]
    return nn.Sequential(*layers)


def _patches(in_chans: int, dim: int, *, first: bool) -> nn.Sequential:
    """Disjoint patches: 4x4 and BatchNorm at the network's start, BatchNorm and 2x2 between stages."""
    if first:
        return nn.Sequential(nn.Conv2d(in_chans, dim, 4, stride=4), nn.BatchNorm2d(dim))
    return nn.Sequential(nn.BatchNorm2d(in_chans), nn.Conv2d(in_chans, dim, 2, stride=2))


# the authors' keys -> ours
NAMES = (
    (r"^downsample_layers\.(\d)\.", r"stages.\1.0."),
    (r"^stages\.(\d)\.blocks\.(\d+)\.", lambda found: f"stages.{found[1]}.{int(found[2]) + 1}."),
    (r"\.(relation_mha|mha_op)\.", ".mix.attn."),
    (r"\.slot_scale$", ".mix.scale"),
    (r"\.feature_conv\.", ".local."),
    (r"\.mlp\.2\.", ".mlp.3."),  # in `stl` their last stage has no place for a convolution inside the MLP
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoint with our keys and shapes."""
    state_dict = state_dict.get("model", state_dict)
    if not any(key.startswith("downsample_layers.") for key in state_dict):
        return dict(state_dict)
    overlapping = "downsample_layers.0.4.weight" in state_dict  # an identity is then the first of their layers
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    converted = {}
    for key, value in state_dict.items():
        if overlapping:
            key = re.sub(r"(?<=^downsample_layers\.0\.)\d", lambda found: str(int(found[0]) - 1), key)
        key = renamed(key, NAMES)
        if value.numel() == math.prod(shapes.get(key, ())):  # linear layers are 1x1 convolutions here
            value = value.reshape(shapes[key])
        converted[key] = value
    return converted


VARIANTS: dict[str, dict[str, Any]] = {
    "glnet_stl": {"depths": (2, 2, 6, 2), "dims": (96, 192, 384, 768), "mlp_ratio": 4, "convolutional": False},
    "glnet_4g": {},
    "glnet_9g": {"dims": (96, 192, 384, 768)},
    "glnet_16g": {"dims": (128, 256, 512, 1024), "layer_scale": 1e-4},
}
default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": config(first_conv="stages.0.0.0", license="mit") for name in VARIANTS}
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> GLNet:
    return create(GLNet, variant, pretrained, checkpoint_filter_fn, (0, 1, 2, 3), **{**VARIANTS[variant], **kwargs})


@register_model
def glnet_stl(pretrained: bool = False, **kwargs: Any) -> GLNet:
    """GLNet in Swin-Tiny's layout, the paper's comparison at equal settings."""
    return _create("glnet_stl", pretrained, **kwargs)


@register_model
def glnet_4g(pretrained: bool = False, **kwargs: Any) -> GLNet:
    """GLNet with 27 M parameters."""
    return _create("glnet_4g", pretrained, **kwargs)


@register_model
def glnet_9g(pretrained: bool = False, **kwargs: Any) -> GLNet:
    """GLNet with 60 M parameters."""
    return _create("glnet_9g", pretrained, **kwargs)


@register_model
def glnet_16g(pretrained: bool = False, **kwargs: Any) -> GLNet:
    """GLNet with 106 M parameters."""
    return _create("glnet_16g", pretrained, **kwargs)
