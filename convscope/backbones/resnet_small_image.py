"""ResNet for small images: a 3x3 stride-1 stem and no max-pool (He et al. 2016, sec. 4.2, the CIFAR stem).

The ImageNet stem divides the resolution by 4 before the first block, which leaves a 32-pixel image a single position
at the end of the network. This one starts at full resolution: strides 1, 2, 4, 8, keys as in timm's ResNets.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from convscope.backbones.registration import config, register_model

IMAGENET_STRIDE = 4  # of the stem and max-pool that are replaced

CONFIG = config(input_size=(3, 32, 32), pool_size=(4, 4), crop_pct=1.0, first_conv="conv1", classifier="fc")
default_cfgs = generate_default_cfgs({"resnet18_cifar.untrained": CONFIG, "resnet50_cifar.untrained": CONFIG})


def _full_resolution_resnet(stem_padding: int = 1, **kwargs: Any) -> ResNet:
    """`stem_padding` is 2 in solo-learn's ResNets, whose maps are therefore wider."""
    model = ResNet(**kwargs)
    old = model.conv1
    model.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=stem_padding, bias=False).to(old.weight)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm's ResNet does
    model.maxpool = nn.Identity()
    model.stem_padding = stem_padding
    for info in model.feature_info:
        info["reduction"] = max(1, info["reduction"] // IMAGENET_STRIDE)
    return model


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 for 32-pixel images, total stride 8."""
    settings = {"block": BasicBlock, "layers": (2, 2, 2, 2), **kwargs}
    return build_model_with_cfg(_full_resolution_resnet, "resnet18_cifar", pretrained, **settings)


@register_model
def resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-50 for 32-pixel images, total stride 8."""
    settings = {"block": Bottleneck, "layers": (3, 4, 6, 3), **kwargs}
    return build_model_with_cfg(_full_resolution_resnet, "resnet50_cifar", pretrained, **settings)
