"""Every way to compute a large depthwise convolution is the convolution."""

import pytest
import torch
from torch import nn

from convscope.backbones.large_depthwise import LargeDepthwise, fastest_way, fft_depthwise
from convscope.backbones.large_kernel import depthwise


def pair(kernel_size: int, bias: bool) -> tuple[LargeDepthwise, nn.Conv2d]:
    torch.manual_seed(0)
    ours = LargeDepthwise(3, kernel_size, bias=bias).double()
    plain = nn.Conv2d(3, 3, kernel_size, padding=kernel_size // 2, groups=3, bias=bias).double()
    plain.load_state_dict(ours.state_dict())
    return ours, plain


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (17, 14)])
@pytest.mark.parametrize("kernel_size", [3, 13, 31])
def test_output_and_gradients_are_the_convolution_s(kernel_size: int, size: tuple[int, int]):
    ours, plain = pair(kernel_size, bias=kernel_size != 13)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    coefficients = torch.randn_like(x)
    inputs, outputs = [x.clone().requires_grad_() for _ in range(2)], []
    for conv, images in zip((ours, plain), inputs):
        outputs.append(conv(images))
        (outputs[-1] * coefficients).sum().backward()
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for (key, one), other in zip(ours.named_parameters(), plain.parameters()):
        torch.testing.assert_close(one.grad, other.grad, msg=key)
    torch.testing.assert_close(fft_depthwise(x, ours.weight, ours.bias), outputs[1])
    with torch.no_grad():
        for layout in (torch.contiguous_format, torch.channels_last):
            torch.testing.assert_close(ours(x.contiguous(memory_format=layout)), outputs[1])


def test_rule_is_the_measured_one():
    assert fastest_way(31, "cpu", gradients=True) == "fft"
    assert fastest_way(13, "cpu", gradients=True) == "fft"
    assert fastest_way(13, "cpu", gradients=False) == "direct"
    assert fastest_way(15, "cpu", gradients=False) == "channels_last"
    assert fastest_way(31, "cuda", gradients=True) == "direct"
    assert fastest_way(7, "cpu", gradients=True) == "direct"


def test_layout_of_the_input_is_kept():
    conv, x = LargeDepthwise(4, 15), torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        assert conv(x).is_contiguous()
        assert conv(x.contiguous(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


def test_precision_is_the_convolution_s():
    ours, plain = (conv.float() for conv in pair(13, bias=True))
    x = torch.randn(2, 3, 16, 16)
    exact = plain.double()(x.double())
    torch.testing.assert_close(ours(x).double(), exact, rtol=0, atol=2e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours(x)
        assert ours.double()(x.double()).dtype == torch.float64
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=2e-6)  # rounded once
    half = ours.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16


def test_networks_use_it_for_large_kernels_only():
    assert type(depthwise(4, 13)) is LargeDepthwise
    assert type(depthwise(4, 11)) is nn.Conv2d
    assert type(depthwise(4, 13, dilation=2)) is nn.Conv2d
    assert depthwise(4, 13).state_dict().keys() == nn.Conv2d(4, 4, 13, groups=4, bias=False).state_dict().keys()
