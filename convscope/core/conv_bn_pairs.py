"""Which BatchNorm directly follows which convolution, found by running the network once."""

from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from convscope.core.backbone import Backbone, eval_mode

SIDE = 64  # pixels; enough for most networks, and quick


def conv_bn_pairs(backbone: Backbone) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Plain convolutions whose very output, unchanged, is what a BatchNorm with running statistics takes.

    Both are used once; the weight of the convolution is what it convolves with (no weight standardisation).
    """
    made: dict[int, tuple[nn.Conv2d, Tensor, int]] = {}
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def after_convolution(module: nn.Module, inputs: Any, output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        made[id(output)] = (module, output, output._version)  # the tensor too, so that its id stays its own

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        conv, output, version = made.get(id(inputs[0]), (None, None, None))
        if conv is not None and output is inputs[0] and inputs[0]._version == version:
            assert isinstance(module, nn.BatchNorm2d)
            pairs.append((conv, module))

    images = small_images(backbone)
    handles = []
    for module in backbone.model.modules():
        if type(module) in (nn.Conv2d, Conv2dSame):
            handles.append(module.register_forward_hook(after_convolution))
        elif isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            handles.append(module.register_forward_pre_hook(before_norm))
    try:
        features_of(backbone, images)
    finally:
        for handle in handles:
            handle.remove()
    convs, norms = [id(conv) for conv, _ in pairs], [id(norm) for _, norm in pairs]
    return [pair for pair in pairs if convs.count(id(pair[0])) == norms.count(id(pair[1])) == 1]


def small_images(backbone: Backbone) -> Tensor:
    """Two images (2, 3, H, W) of 64 pixels where the network takes that, else of its own size; in the weights' type."""
    full = backbone.preprocessing.size
    if hasattr(backbone.model, "set_input_size"):  # its size is fixed
        return _waves(backbone, full)
    small = _waves(backbone, (SIDE, SIDE))
    try:
        features_of(backbone, small[:1])
    except (RuntimeError, AssertionError, ValueError):  # a size that it refuses, or a kernel larger than its map
        return _waves(backbone, full)
    return small


def _waves(backbone: Backbone, size: tuple[int, int]) -> Tensor:
    like = next(backbone.parameters())
    ramp = torch.linspace(-2, 2, 6 * size[0] * size[1], dtype=like.dtype, device=like.device)
    return ramp.view(2, 3, *size).sin()


@torch.no_grad()
def features_of(backbone: Backbone, images: Tensor) -> Tensor:
    """Features (B, num_features) in eval mode."""
    with eval_mode(backbone):
        features: Tensor = backbone(images)
    return features
