"""ConvNeXt for small images: a 2x2 patch stem and a last stage that keeps its resolution.

timm's strides 4, 8, 16, 32 leave a 64-pixel image four positions, too few to mask or to pool over, and its
`output_stride` dilates the 7x7 kernels past the map instead. Here the strides are 2, 4, 8, 8 without dilation; keys
are as in timm's ConvNeXt.
"""

from typing import Any

from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models.convnext import ConvNeXt
from torch import nn

from convscope.backbones.registration import config, register_model

STRIDES = (2, 4, 8, 8)

default_cfgs = generate_default_cfgs(
    {
        "convnext_mini_s8.untrained": config(
            input_size=(3, 64, 64), pool_size=(8, 8), crop_pct=1.0, first_conv="stem.0", classifier="head.fc"
        )
    }
)


def _stride_8_convnext(**kwargs: Any) -> ConvNeXt:
    model = ConvNeXt(**kwargs)
    model.stem[0] = _patch_conv(model.stem[0], 2)
    downsample = model.stages[3].downsample
    downsample[1] = _patch_conv(downsample[1], 1)
    for info, stride in zip(model.feature_info, STRIDES):
        info["reduction"] = stride
    return model


def _patch_conv(old: nn.Conv2d, size: int) -> nn.Conv2d:
    conv = nn.Conv2d(old.in_channels, old.out_channels, size, stride=size, bias=old.bias is not None).to(old.weight)
    trunc_normal_(conv.weight, std=0.02)  # as timm's ConvNeXt does
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


@register_model
def convnext_mini_s8(pretrained: bool = False, **kwargs: Any) -> ConvNeXt:
    """ConvNeXt with 1.3 M parameters before the classifier for 64-pixel images, total stride 8."""
    settings = {"depths": (2, 2, 4, 2), "dims": (32, 64, 128, 192), **kwargs}
    return build_model_with_cfg(
        _stride_8_convnext,
        "convnext_mini_s8",
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **settings,
    )
