"""SimpleNet: thirteen plain 3x3 convolutions, no shortcuts (Hasanpour et al. 2016, arXiv:1608.06037).

Every layer is convolution (with bias), BatchNorm, ReLU and optional dropout of channels; two of them are 1x1. The
CIFAR networks halve the resolution by max-pooling, those for ImageNet also by strides in their first layers. A global
*max*-pool ends them.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from convscope.backbones.registration import config, create, register_model
from convscope.backbones.staged import StagedNetwork

# A stage is a list of layers: a width, or (width, kernel size) where it is not 3. All stages but the first of a CIFAR
# network start at half the resolution of the one before.
Stages = tuple[tuple[int | tuple[int, int], ...], ...]

CIFAR: dict[str, Stages] = {
    "simplenet_cifar_310k": ((64, 32, 32, 32), (32, 32, 64), (64, 64), (128, (256, 1), (64, 1)), (64,)),
    "simplenet_cifar_460k": ((32, 32, 32, 64), (64, 64, 64), (64, 64), (96, (96, 1), (96, 1)), (100,)),
    "simplenet_cifar_5m": ((64, 128, 128, 128), (128, 128, 256), (256, 256), (512, (2048, 1), (256, 1)), (256,)),
    "simplenet_cifar_5m_extra_pool": (
        (64, 128, 128, 128),
        (128, 128, 256),
        (256, 256),
        (512,),
        ((2048, 1), (256, 1)),
        (256,),
    ),
}
# width of the first layer, of the next five, of the body, before the 1x1 layers, of the first 1x1 layer
WIDTHS = {"5m": (64, 128, 256, 512, 2048), "9m": (128, 192, 320, 640, 2560)}
STRIDED = {"m1": (0, 1, 2), "m2": (0, 1, 3)}  # the layers with stride 2


class ConvLayer(nn.Module):
    """Convolution, BatchNorm, ReLU, dropout of whole channels."""

    def __init__(self, in_chans: int, width: int, kernel_size: int, stride: int, drop_rate: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, width, kernel_size, stride, kernel_size // 2)
        self.norm = nn.BatchNorm2d(width, momentum=0.05)
        self.act = nn.ReLU()
        self.drop = nn.Dropout2d(drop_rate)
        nn.init.xavier_uniform_(self.conv.weight, gain=nn.init.calculate_gain("relu"))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, width, H/stride, W/stride)."""
        return self.drop(self.act(self.norm(self.conv(x))))  # type: ignore[no-any-return]


class SimpleNet(StagedNetwork):
    """SimpleNet of any widths.

    Args:
        stages: the widths of each stage's layers, see `Stages`.
        starts: how each stage halves the resolution: "pool", "stride", or "" for not at all.
        in_chans: channels of the images.
        num_classes: 0 for no classifier.
        drop_rate: dropout of channels before the classifier.
        layer_drop_rate: dropout of channels after every layer.
    """

    pooling = "max"

    def __init__(
        self,
        stages: Stages,
        starts: tuple[str, ...],
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        layer_drop_rate: float = 0.0,
    ) -> None:
        built, channels, strides, width, total = [], [], [], in_chans, 1
        for layers, start in zip(stages, starts, strict=True):
            stage = nn.Sequential()
            if start == "pool":
                stage.add_module("pool", nn.MaxPool2d(2))
            for i, layer in enumerate(layers):
                wanted, size = (layer, 3) if isinstance(layer, int) else layer
                stride = 2 if start == "stride" and i == 0 else 1
                stage.add_module(f"layer{i}", ConvLayer(width, wanted, size, stride, layer_drop_rate))
                width = wanted
            total *= 2 if start else 1
            built.append(stage)
            channels.append(width)
            strides.append(total)
        super().__init__(built, channels, strides, num_classes=num_classes, drop_rate=drop_rate)

    def pool(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C): the maximum over positions."""
        return x.amax((2, 3))


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoint with our keys; theirs number all layers, dropout and pooling included, in one list."""
    if not any(key.startswith("features.") for key in state_dict):
        return dict(state_dict)
    numbers = sorted({int(key.split(".")[1]) for key in state_dict if key.startswith("features.")})
    ours = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))]
    names = {f"features.{number}.": f"{name}." for number, name in zip(numbers, ours, strict=True)}
    return {
        re.sub(r"^features\.\d+\.", lambda found: names[found[0]], key).replace("classifier.", "head."): value
        for key, value in state_dict.items()
    }


def _create(variant: str, pretrained: bool, **kwargs: Any) -> SimpleNet:
    out_indices = tuple(range(len(kwargs["stages"])))
    return create(SimpleNet, variant, pretrained, checkpoint_filter_fn, out_indices, **kwargs)


def _cifar(variant: str, pretrained: bool, **kwargs: Any) -> SimpleNet:
    stages = CIFAR[variant]
    starts = ("",) + ("pool",) * (len(stages) - 1)
    return _create(variant, pretrained, **{"stages": stages, "starts": starts, **kwargs})


def _imagenet(variant: str, pretrained: bool, size: str, mode: str, scale: float, **kwargs: Any) -> SimpleNet:
    first, early, body, late, widest = (round(width * scale) for width in WIDTHS[size])
    layers = (first, *(early,) * 5)
    bounds = (*STRIDED[mode], len(layers))
    stages: Stages = tuple(layers[a:b] for a, b in itertools.pairwise(bounds))
    stages += ((body, body, body, late), ((widest, 1), (body, 1), body))
    starts = ("stride", "stride", "stride", "pool", "pool")
    return _create(variant, pretrained, **{"stages": stages, "starts": starts, **kwargs})


def _config(size: int, crop_pct: float) -> dict[str, Any]:
    return config(
        input_size=(3, size, size),
        pool_size=None,
        crop_pct=crop_pct,
        first_conv="stages.0.layer0.conv",
        license="mit",
    )


IMAGENET = (
    "simplenetv1_small_m1_05",
    "simplenetv1_small_m2_05",
    "simplenetv1_small_m1_075",
    "simplenetv1_small_m2_075",
    "simplenetv1_5m_m1",
    "simplenetv1_5m_m2",
    "simplenetv1_9m_m1",
    "simplenetv1_9m_m2",
)
default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": _config(32, 1.0) for name in CIFAR}
    | {f"{name}.untrained": _config(224, 0.875) for name in IMAGENET}
)


@register_model
def simplenet_cifar_310k(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """SimpleNet with 0.3 M parameters for 32-pixel images."""
    return _cifar("simplenet_cifar_310k", pretrained, **kwargs)


@register_model
def simplenet_cifar_460k(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """SimpleNet with 0.5 M parameters for 32-pixel images."""
    return _cifar("simplenet_cifar_460k", pretrained, **kwargs)


@register_model
def simplenet_cifar_5m(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """SimpleNet with 5.5 M parameters for 32-pixel images."""
    return _cifar("simplenet_cifar_5m", pretrained, **kwargs)


@register_model
def simplenet_cifar_5m_extra_pool(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """The same with one more pooling layer, as in the authors' first PyTorch release."""
    return _cifar("simplenet_cifar_5m_extra_pool", pretrained, **kwargs)


@register_model
def simplenetv1_small_m1_05(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """SimpleNet for ImageNet at half width, strides in layers 1 to 3."""
    return _imagenet("simplenetv1_small_m1_05", pretrained, "5m", "m1", 0.5, **kwargs)


@register_model
def simplenetv1_small_m2_05(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """SimpleNet for ImageNet at half width, strides in layers 1, 2 and 4."""
    return _imagenet("simplenetv1_small_m2_05", pretrained, "5m", "m2", 0.5, **kwargs)


@register_model
def simplenetv1_small_m1_075(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """SimpleNet for ImageNet at three quarters of the width, strides in layers 1 to 3."""
    return _imagenet("simplenetv1_small_m1_075", pretrained, "5m", "m1", 0.75, **kwargs)


@register_model
def simplenetv1_small_m2_075(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """SimpleNet for ImageNet at three quarters of the width, strides in layers 1, 2 and 4."""
    return _imagenet("simplenetv1_small_m2_075", pretrained, "5m", "m2", 0.75, **kwargs)


@register_model
def simplenetv1_5m_m1(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """SimpleNet with 5.8 M parameters for ImageNet, strides in layers 1 to 3."""
    return _imagenet("simplenetv1_5m_m1", pretrained, "5m", "m1", 1.0, **kwargs)


@register_model
def simplenetv1_5m_m2(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """SimpleNet with 5.8 M parameters for ImageNet, strides in layers 1, 2 and 4."""
    return _imagenet("simplenetv1_5m_m2", pretrained, "5m", "m2", 1.0, **kwargs)


@register_model
def simplenetv1_9m_m1(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """SimpleNet with 9.5 M parameters for ImageNet, strides in layers 1 to 3."""
    return _imagenet("simplenetv1_9m_m1", pretrained, "9m", "m1", 1.0, **kwargs)


@register_model
def simplenetv1_9m_m2(pretrained: bool = False, **kwargs: Any) -> SimpleNet:
    """SimpleNet with 9.5 M parameters for ImageNet, strides in layers 1, 2 and 4."""
    return _imagenet("simplenetv1_9m_m2", pretrained, "9m", "m2", 1.0, **kwargs)
