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
from convscope.core.conv_bn_pairs import conv_bn_pairs, features_of, small_images
from convscope.core.errors import UserError

TOLERANCE = 1e-9  # of the largest feature, in float64


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
    """The pairs whose convolution `_WithConvolution` computes."""
    return [
        (conv, norm)
        for conv, norm in conv_bn_pairs(backbone)
        if type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    ]


def _prove(backbone: Backbone, stock: nn.Module) -> None:
    """Compare with the stock network in float64, its statistics and weights as they are."""
    folded = copy.deepcopy(backbone).double()
    original = copy.deepcopy(folded)
    original.model = stock.double()
    images = small_images(folded)
    found, expected = features_of(folded, images), features_of(original, images)
    if not bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max()):
        raise UserError(f"--convbn tune does not compute what {backbone.arch} computes; use --convbn eval")
