"""BatchNorm in fine-tuning: as usual, frozen, or frozen and folded into its convolution ("tune").

A frozen BatchNorm is an affine map, so convolution and BatchNorm together are one convolution with scaled weights. That
is the "Tune" mode of Efficient ConvBN Blocks (You et al. 2023, arXiv:2305.11624): the same outputs and gradients as
frozen statistics, without the map between the two layers, which backward would keep. torch.compile has it as a pass of
its inductor backend (`efficient_conv_bn_eval_fx_passes`); here it is a change of the modules, which needs no compiler.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F

from convscope.core.backbone import Backbone
from convscope.core.errors import UserError

TOLERANCE = 1e-9  # of the largest feature, in float64
SIDE = 64  # pixels of the images that the pairs are found and proved with, where the network takes that size


class _InBatchNorm(nn.Conv2d):
    """A convolution that its BatchNorm computes: it hands on its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Nothing."""
        return x


class _WithConvolution(nn.BatchNorm2d):
    """A frozen BatchNorm that computes the convolution before it too, as one convolution."""

    convolution: nn.Conv2d

    def forward(self, x: Tensor) -> Any:
        """Input of the convolution (B, C, H, W) -> output of the BatchNorm."""
        assert self.running_mean is not None
        assert self.running_var is not None
        conv = self.convolution
        scale = torch.rsqrt(self.running_var + self.eps)
        shift = -self.running_mean * scale if conv.bias is None else (conv.bias - self.running_mean) * scale
        if self.affine:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        weight = conv.weight * scale[:, None, None, None]
        out = F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)
        return self.act(self.drop(out)) if isinstance(self, BatchNormAct2d) else out


def freeze_statistics(modules: Iterable[nn.Module]) -> None:
    """Put every BatchNorm into evaluation mode: running statistics are used and stay."""
    for module in modules:
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def fold(backbone: Backbone) -> int:
    """Let every BatchNorm that directly follows a convolution compute both, in place; returns how many do.

    Parameters and keys stay as they are. Statistics have to stay frozen from then on.

    Raises:
        UserError: the network computes something else that way, such as where it reads a convolution's output twice;
            or there is no such pair.
    """
    pairs = _pairs(backbone)
    if not pairs:
        raise UserError(f"--convbn tune: {backbone.arch} has no BatchNorm behind a convolution; leave it out")
    stock = copy.deepcopy(backbone.model)
    for conv, norm in pairs:
        kind = type(norm)
        norm.__class__ = type(kind.__name__, (_WithConvolution, kind), {"__module__": kind.__module__})
        vars(norm)["convolution"] = conv  # beside the registered modules, so that no key is there twice
        conv.__class__ = type("Conv2d", (_InBatchNorm,), {"__module__": nn.Conv2d.__module__})
    _prove(backbone, stock)
    return len(pairs)


def _pairs(backbone: Backbone) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions whose very output, unchanged, is what a BatchNorm takes."""
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

    handles = []
    for module in backbone.model.modules():
        if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            handles.append(module.register_forward_hook(after_convolution))
        elif isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            handles.append(module.register_forward_pre_hook(before_norm))
    try:
        _features(backbone, _images(backbone))
    finally:
        for handle in handles:
            handle.remove()
    convs, norms = [id(conv) for conv, _ in pairs], [id(norm) for _, norm in pairs]
    return [pair for pair in pairs if convs.count(id(pair[0])) == norms.count(id(pair[1])) == 1]  # used once


def _prove(backbone: Backbone, stock: nn.Module) -> None:
    """Compare with the stock network in float64, its statistics and weights as they are."""
    folded = copy.deepcopy(backbone).double()
    original = copy.deepcopy(folded)
    original.model = stock.double()
    images = _images(folded)
    found, expected = _features(folded, images), _features(original, images)
    if not bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max()):
        raise UserError(f"--convbn tune does not compute what {backbone.arch} computes; use --convbn eval")


def _images(backbone: Backbone) -> Tensor:
    fixed = hasattr(backbone.model, "set_input_size")
    height, width = backbone.preprocessing.size if fixed else (SIDE, SIDE)
    like = next(backbone.parameters())
    ramp = torch.linspace(-2, 2, 2 * 3 * height * width, dtype=like.dtype, device=like.device)
    return ramp.view(2, 3, height, width).sin()


@torch.no_grad()
def _features(backbone: Backbone, images: Tensor) -> Tensor:
    training = backbone.training
    features: Tensor = backbone.eval()(images)
    backbone.train(training)
    return features
