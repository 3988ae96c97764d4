"""Branches as one kernel, against running the branches; and what the networks in stages share."""

import pytest
import torch
from torch import nn

from convscope.backbones.large_kernel import centred, depthwise, depthwise_of, folded
from convscope.backbones.staged import drop_path_rates


@pytest.mark.parametrize(("size", "dilation"), [(1, 1), (3, 1), (3, 5), (5, 2), (7, 2), (13, 1)])
def test_dilated_convolution_and_its_norm_are_one_large_kernel(size: int, dilation: int):
    conv, norm = depthwise(3, size, dilation=dilation, bias=True).double(), nn.BatchNorm2d(3).double()
    images = torch.randn(2, 3, 17, 20, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        norm.train()(5 * images + 1)
        weight, bias = folded(conv.weight, conv.bias, norm)
        merged = depthwise_of(centred(weight, 13, dilation), bias)
        torch.testing.assert_close(merged(images), norm.eval()(conv(images)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("size", "dilation"), [(3, 7), (15, 1), (4, 1)])
def test_kernel_without_a_centred_place_is_an_error(size: int, dilation: int):
    with pytest.raises(ValueError, match="no centred place"):
        centred(torch.ones(1, 1, size, size), 13, dilation)


def test_stochastic_depth_grows_linearly_over_all_blocks():
    assert drop_path_rates(0.3, (1, 2, 1)) == [[0.0], [pytest.approx(0.1), pytest.approx(0.2)], [pytest.approx(0.3)]]
    assert drop_path_rates(0.3, (1,)) == [[0.0]]
