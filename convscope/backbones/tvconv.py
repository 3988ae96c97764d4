"""MobileNetV2 whose depthwise convolutions vary over the image (TVConv, Chen et al. 2022, arXiv:2203.10489).

A TVConv has its own k x k weights at every position, computed from a learned map of positions by a small network (sec.
3.2): few parameters, but the size of the map is fixed. Made for aligned images, such as cropped faces.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import ConvNormAct, DropPath, make_divisible, to_2tuple
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from convscope.backbones.registration import config, create, register_model, renamed
from convscope.backbones.staged import StagedNetwork, drop_path_rates

# a stage is one resolution: (stride of its first block, ((expansion, width, number of blocks), ...))
SETTINGS: tuple[tuple[int, tuple[tuple[int, int, int], ...]], ...] = (
    (1, ((1, 16, 1),)),
    (2, ((6, 24, 2),)),
    (2, ((6, 32, 3),)),
    (2, ((6, 64, 4), (6, 96, 3))),
    (2, ((6, 160, 3), (6, 320, 1))),
)
STEM_WIDTH, LAST_WIDTH, EMBEDDING = 32, 512, 512


class TVConv(nn.Module):
    """Depthwise convolution with weights of its own at every position.

    Args:
        channels: of input and output.
        size: height and width of the *output*.
        kernel_size: side of the kernel.
        stride: of the convolution.
        position_channels: of the learned map of positions.
        inner_channels: of the network that turns positions into weights.
        inner_layers: how many layers follow that network's first.
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        kernel_size: int = 3,
        stride: int = 1,
        position_channels: int = 4,
        inner_channels: int = 16,
        inner_layers: int = 1,
    ) -> None:
        super().__init__()
        self.size, self.kernel_size, self.stride = size, kernel_size, stride
        self.positions = nn.Parameter(torch.ones(1, position_channels, *size))
        layers: list[nn.Module] = []
        width = position_channels
        for _ in range(1 + inner_layers):
            conv = nn.Conv2d(width, inner_channels, 3, padding=1, bias=False)
            layers.append(nn.Sequential(conv, nn.LayerNorm((inner_channels, *size)), nn.ReLU()))
            width = inner_channels
        layers.append(nn.Conv2d(width, channels * kernel_size**2, 3, padding=1, bias=False))
        self.to_weight = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, h, w) with h, w = `size`.

        Raises:
            ValueError: a map of another size than this layer's weights are for.
        """
        height, width = self.size
        wanted = ((height - 1) * self.stride + 1, (width - 1) * self.stride + 1)
        if not all(low <= side < low + self.stride for low, side in zip(wanted, x.shape[2:])):
            raise ValueError(f"a TVConv for {height}x{width} outputs cannot take a map of {x.shape[2]}x{x.shape[3]}")
        weight = self.to_weight(self.positions).view(1, x.shape[1], -1, height, width)
        k, s = self.kernel_size, self.stride
        around = nn.functional.pad(x, (k // 2, k // 2, k // 2, k // 2))
        out = torch.zeros_like(weight[:, :, 0])
        for tap in range(k * k):
            top, left = divmod(tap, k)
            window = around[:, :, top : top + wanted[0] : s, left : left + wanted[1] : s]
            out = out + weight[:, :, tap] * window
        return out


class InvertedResidual(nn.Module):
    """MobileNetV2's block: 1x1 expansion, spatial layer (here a TVConv), linear 1x1 projection."""

    def __init__(
        self, in_chans: int, width: int, expansion: int, stride: int, size: tuple[int, int], drop_path: float
    ) -> None:
        super().__init__()
        hidden = in_chans * expansion
        self.shortcut = stride == 1 and in_chans == width
        self.expand = ConvNormAct(in_chans, hidden, 1, act_layer=nn.ReLU6) if expansion > 1 else nn.Identity()
        self.mix = TVConv(hidden, size, stride=stride, inner_channels=64, inner_layers=3)
        self.mix_norm = nn.BatchNorm2d(hidden)
        self.mix_act = nn.ReLU6()
        self.project = ConvNormAct(hidden, width, 1, apply_act=False)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, width, H/stride, W/stride)."""
        out = self.project(self.mix_act(self.mix_norm(self.mix(self.expand(x)))))
        return x + self.drop_path(out) if self.shortcut else out  # type: ignore[no-any-return]


class EmbeddingHead(nn.Module):
    """BatchNorm, dropout, mean over positions, linear layer, BatchNorm: a face's embedding."""

    def __init__(self, in_chans: int, width: int, drop_rate: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_chans)
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(in_chans, width)
        self.fc_norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width)."""
        return self.fc_norm(self.fc(self.drop(self.norm(x)).mean((2, 3))))  # type: ignore[no-any-return]


class TVConvMobileNetV2(StagedNetwork):
    """MobileNetV2 with TVConv at a width multiplier; without a classifier it returns the embedding.

    Args:
        width_mult: of every width but the last's.
        img_size: of the images, which is fixed.
        in_chans: channels of the images.
        num_classes: 0 for the embedding.
        drop_rate: dropout before the embedding.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
    """

    pooling = "embedding"
    pool_modules = ("embedding",)

    def __init__(
        self,
        width_mult: float,
        img_size: int | tuple[int, int] = 96,
        in_chans: int = 3,
        num_classes: int = 0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        self.img_size = size = to_2tuple(img_size)
        width = make_divisible(STEM_WIDTH * width_mult)
        stem = ConvNormAct(in_chans, width, 3, padding=1, act_layer=nn.ReLU6)
        depths = [sum(count for *_, count in settings) for _, settings in SETTINGS]
        rates = itertools.chain(*drop_path_rates(drop_path_rate, depths))
        stages: list[nn.Sequential] = []
        channels = []
        for stage_stride, settings in SETTINGS:
            blocks: list[nn.Module] = [] if stages else [stem]
            size = tuple(-(-side // stage_stride) for side in size)
            stride = stage_stride
            for expansion, wanted, count in settings:
                for _ in range(count):
                    out = make_divisible(wanted * width_mult)
                    blocks.append(InvertedResidual(width, out, expansion, stride, size, next(rates)))
                    width, stride = out, 1
            stages.append(nn.Sequential(*blocks))
            channels.append(width)
        stages[-1].append(ConvNormAct(width, LAST_WIDTH, 1, act_layer=nn.ReLU6))
        channels[-1] = LAST_WIDTH
        super().__init__(stages, channels, (1, 2, 4, 8, 16), num_classes=num_classes)
        self.embedding = EmbeddingHead(LAST_WIDTH, EMBEDDING, drop_rate)
        self.apply(_init_weights)

    def pool(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 512): the embedding."""
        return self.embedding(x)  # type: ignore[no-any-return]

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Refuses any other size, as its weights belong to positions.

        Raises:
            AssertionError: as timm's networks do.
        """
        fixed = "x".join(str(side) for side in self.img_size)
        assert to_2tuple(img_size) == self.img_size, f"its weights belong to the positions of {fixed} images"


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


# of the authors' keys inside a block, after the block's own name: theirs -> ours
BLOCK_NAMES = (
    (r"^conv\.0\.0\.(?=weight$)", "expand.conv."),
    (r"^conv\.0\.1\.", "expand.bn."),
    (r"^conv\.1\.0\.", "mix."),
    (r"^conv\.1\.1\.", "mix_norm."),
    (r"^conv\.2\.", "project.conv."),
    (r"^conv\.3\.", "project.bn."),
    (r"^mix\.posi_map$", "mix.positions"),
    (r"^mix\.weight_layers\.", "mix.to_weight."),
)
HEAD_KEYS = {"layer1.": "norm.", "layer1.0.": "norm.", "layer2.0.": "fc.", "layer2.1.": "fc_norm."}
SIZES = re.compile(r"\.(TVConv_k|TVConv_k_square|stride|channels|h|w)$")  # numbers that the authors save as tensors


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoint with our keys."""
    if not any(key.startswith("features.") for key in state_dict):
        return dict(state_dict)
    blocks = [name for name, module in model.named_modules() if re.fullmatch(r"stages\.\d+\.\d+", name)]
    converted = {}
    for key, value in state_dict.items():
        if SIZES.search(key):
            continue
        root, _, rest = key.partition(".")
        if root == "output_layer":
            converted[f"embedding.{_head_key(rest)}"] = value
        elif root == "features":
            number, _, inner = rest.partition(".")
            name = blocks[int(number)]
            converted[f"{name}.{_block_key(inner, model.get_submodule(name))}"] = value
        else:
            converted[key] = value
    return converted


def _head_key(key: str) -> str:
    theirs = max((name for name in HEAD_KEYS if key.startswith(name)), key=len)
    return HEAD_KEYS[theirs] + key.removeprefix(theirs)


def _block_key(key: str, block: nn.Module) -> str:
    if not isinstance(block, InvertedResidual):
        return re.sub(r"^0\.", "conv.", re.sub(r"^1\.", "bn.", key))
    if isinstance(block.expand, nn.Identity):  # no expansion: theirs count one less
        key = re.sub(r"^conv\.(\d)", lambda found: f"conv.{int(found[1]) + 1}", key)
    return renamed(key, BLOCK_NAMES)


WIDTH_MULTS = {"x0_1": 0.1, "x0_2": 0.2, "x0_3": 0.3, "x0_5": 0.5, "x1_0": 1.0}
default_cfgs = generate_default_cfgs(
    {
        f"mobilenetv2_tvconv_{name}.untrained": config(
            num_classes=0,
            input_size=(3, 96, 96),
            fixed_input_size=True,
            pool_size=(6, 6),
            crop_pct=1.0,
            mean=IMAGENET_INCEPTION_MEAN,
            std=IMAGENET_INCEPTION_STD,
            first_conv="stages.0.0.conv",
            license="mit",
        )
        for name in WIDTH_MULTS
    }
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> TVConvMobileNetV2:
    settings = {"width_mult": WIDTH_MULTS[name], **kwargs}
    variant = f"mobilenetv2_tvconv_{name}"
    return create(TVConvMobileNetV2, variant, pretrained, checkpoint_filter_fn, (0, 1, 2, 3, 4), **settings)


@register_model
def mobilenetv2_tvconv_x0_1(pretrained: bool = False, **kwargs: Any) -> TVConvMobileNetV2:
    """A tenth of MobileNetV2's width, the paper's smallest."""
    return _create("x0_1", pretrained, **kwargs)


@register_model
def mobilenetv2_tvconv_x0_2(pretrained: bool = False, **kwargs: Any) -> TVConvMobileNetV2:
    """A fifth of MobileNetV2's width."""
    return _create("x0_2", pretrained, **kwargs)


@register_model
def mobilenetv2_tvconv_x0_3(pretrained: bool = False, **kwargs: Any) -> TVConvMobileNetV2:
    """Three tenths of MobileNetV2's width."""
    return _create("x0_3", pretrained, **kwargs)


@register_model
def mobilenetv2_tvconv_x0_5(pretrained: bool = False, **kwargs: Any) -> TVConvMobileNetV2:
    """Half of MobileNetV2's width."""
    return _create("x0_5", pretrained, **kwargs)


@register_model
def mobilenetv2_tvconv_x1_0(pretrained: bool = False, **kwargs: Any) -> TVConvMobileNetV2:
    """MobileNetV2's own width."""
    return _create("x1_0", pretrained, **kwargs)
