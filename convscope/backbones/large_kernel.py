"""Depthwise convolutions with large kernels, and how parallel branches become one of them.

A convolution followed by BatchNorm in evaluation is a convolution (Ding et al. 2021, arXiv:2101.03697, eq. 3). A
dilated one is a larger one whose kernel is zero between its taps (Ding et al. 2024, arXiv:2311.15599, sec. 3.1). The
sum of convolutions with the same stride is the convolution with the sum of their centred kernels.
"""

import torch
from torch import Tensor, nn

from convscope.backbones.large_depthwise import SMALLEST, LargeDepthwise


def depthwise(dim: int, kernel_size: int, *, dilation: int = 1, bias: bool = False) -> nn.Conv2d:
    """A filter of its own for each channel; height and width stay as they are."""
    if kernel_size >= SMALLEST and dilation == 1:
        return LargeDepthwise(dim, kernel_size, bias=bias)
    padding = dilation * (kernel_size // 2)
    return nn.Conv2d(dim, dim, kernel_size, padding=padding, dilation=dilation, groups=dim, bias=bias)


def folded(weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one layer that does what a convolution or linear layer and `norm`, in evaluation, do."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * scale
    if bias is not None:
        shift = shift + bias * scale
    return weight * scale.view(-1, *[1] * (weight.ndim - 1)), shift


def centred(weight: Tensor, size: int, dilation: int = 1) -> Tensor:
    """The kernel (C, 1, size, size) without dilation that equals a smaller one (C, 1, k, k) with it.

    Raises:
        ValueError: it does not fit.
    """
    reach = (weight.shape[-1] - 1) * dilation + 1
    first, rest = divmod(size - reach, 2)
    if first < 0 or rest:
        raise ValueError(f"a kernel that reaches over {reach} pixels has no centred place in one of {size}")
    kernel = weight.new_zeros(*weight.shape[:-2], size, size)
    taps = slice(first, first + reach, dilation)
    kernel[..., taps, taps] = weight
    return kernel


def depthwise_of(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """A depthwise convolution with these values, in their precision and on their device."""
    with torch.no_grad():
        conv = depthwise(len(weight), weight.shape[-1], bias=True).to(weight)
        conv.weight.copy_(weight)
        assert conv.bias is not None
        conv.bias.copy_(bias)
    return conv
