"""Depthwise convolution with a large kernel, computed the way that is fastest for its size and device.

All ways give the same sum up to rounding. `benchmarks/large_kernels.md` has what `fastest_way` was measured by.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

Way = Literal["direct", "channels_last", "fft"]

SMALLEST = 13  # kernels below are left to the library
LIBRARY_LIMIT = 13  # beyond, PyTorch's CPU convolution has no fast form but for channels-last maps


def fastest_way(kernel_size: int, device: str, gradients: bool) -> Way:
    """Measured on CPUs only: on a GPU the library decides."""
    if device != "cpu" or kernel_size < SMALLEST:
        return "direct"
    if gradients:  # PyTorch's gradients of depthwise convolutions on a CPU are slow for any large kernel
        return "fft"
    return "channels_last" if kernel_size > LIBRARY_LIMIT else "direct"


class LargeDepthwise(nn.Conv2d):
    """`nn.Conv2d` with a filter of its own for each channel, stride 1 and outputs as large as the input.

    Args:
        dim: channels.
        kernel_size: odd side of the kernel.
        bias: of the output.
    """

    def __init__(self, dim: int, kernel_size: int, *, bias: bool = True, **kwargs: Any) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=bias, **kwargs)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        gradients = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        way = fastest_way(self.kernel_size[0], input.device.type, gradients)
        if way == "fft":
            return fft_depthwise(input, self.weight, self.bias)
        if way == "channels_last" and input.is_contiguous():
            return super().forward(input.contiguous(memory_format=torch.channels_last)).contiguous()
        return super().forward(input)


def fft_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Zero-padded depthwise convolution by the convolution theorem, in float32 at least.

    Args:
        x: (B, C, H, W).
        weight: (C, 1, k, k), k odd.
        bias: (C,).

    Returns:
        (B, C, H, W), under autocast in its precision, otherwise in that of `x`.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64  # which it leaves alone
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    height, width = x.shape[-2:]
    centre = weight.shape[-1] // 2
    down, right = min(centre, height - 1), min(centre, width - 1)  # taps farther out meet nothing but padding
    kernel = weight[:, 0, centre - down : centre + down + 1, centre - right : centre + right + 1]
    size = (_fast_length(height + down), _fast_length(width + right))  # what wraps around falls on zeros
    spectrum = torch.fft.rfft2(x.to(precise), s=size) * torch.fft.rfft2(kernel.to(precise), s=size).conj()
    out: Tensor = torch.fft.irfft2(spectrum, s=size).roll((down, right), (2, 3))[..., :height, :width]
    if bias is not None:
        out = out + bias.to(precise)[:, None, None]
    return out.to(dtype)


def _fast_length(length: int) -> int:
    """The next number without a prime factor above 5: `scipy.fft.next_fast_len`, which torch.compile cannot trace."""
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 1
