"""Networks whose weights belong to places of the image: their own layers, and other sizes than the one they are for."""

import pytest
import timm
import torch

from convscope.backbones.gmm_vit import GaussianMixtureMask
from convscope.backbones.tvconv import TVConv
from convscope.core.backbone import create_backbone
from convscope.core.errors import UserError
from tests.backbones.fixtures import check, filled, image, read_entries, read_keys

SIZES = ("TVConv_k", "TVConv_k_square", "channels", "h", "w", "stride")


def test_tvconv_layer_is_the_authors():
    entry = read_entries("tvconv")["tvconv_layer_default"]
    values = filled(read_keys("tvconv", "tvconv_layer_default"), entry, SIZES.__contains__)
    layer = TVConv(16, (14, 14)).double()
    layer.load_state_dict(
        {key.replace("posi_map", "positions").replace("weight_layers", "to_weight"): v for key, v in values.items()}
    )
    assert sum(parameter.numel() for parameter in layer.parameters()) == entry["params"]
    with torch.no_grad():
        check("output", layer(image(*entry["cases"][0]["input"])), entry["cases"][0]["output"])


@pytest.mark.parametrize(("stride", "side"), [(1, 9), (2, 9), (2, 10)])
def test_tvconv_with_the_same_weights_everywhere_is_a_depthwise_convolution(stride: int, side: int):
    out = -(-side // stride)
    layer = TVConv(4, (out, out), stride=stride).double()
    kernel, x = torch.randn(4, 1, 3, 3, dtype=torch.float64), torch.randn(2, 4, side, side, dtype=torch.float64)
    layer.to_weight = _Constant(kernel.flatten(), out)
    expected = torch.nn.functional.conv2d(x, kernel, stride=stride, padding=1, groups=4)
    torch.testing.assert_close(layer(x), expected)


class _Constant(torch.nn.Module):
    def __init__(self, weight: torch.Tensor, side: int) -> None:
        super().__init__()
        self.weight, self.side = weight, side

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return self.weight.view(1, -1, 1, 1).expand(1, -1, self.side, self.side)


def test_tvconv_refuses_another_size():
    backbone = create_backbone("mobilenetv2_tvconv_x0_1", {"img_size": 32})
    assert backbone.preprocessing.size == (32, 32)
    with pytest.raises(UserError, match="does not take images of 64 px: its weights belong to the positions of 32x32"):
        backbone.at_size(64)
    with pytest.raises(ValueError, match="32x32 outputs cannot take a map of 64x64"):
        backbone(torch.zeros(1, 3, 64, 64))


def test_gaussian_mixture_mask_is_the_sum_of_its_definition():
    mask = GaussianMixtureMask(heads=2, kernels=3, grid=(2, 3)).double()
    with torch.no_grad():
        mask.sigma.uniform_(0.5, 3)
        mask.alpha.normal_()
    found = mask()
    for head in range(2):
        for i in range(6):
            for j in range(6):
                squared = (i // 3 - j // 3) ** 2 + (i % 3 - j % 3) ** 2
                base = torch.exp(torch.tensor(-squared / 2, dtype=torch.float64))
                powers = base ** (1 / (mask.sigma[:, head, 0, 0] ** 2 + 1e-5))
                torch.testing.assert_close(found[head, i, j], (mask.alpha[:, head, 0, 0] * powers).sum())


def test_gaussian_mixture_mask_starts_as_almost_plain_attention():
    mask = timm.create_model("vit_tiny_patch4_32_gmm").blocks[0].attn.mask()
    assert mask.max() <= 1.0001
    assert mask.min() > 0.3
    assert mask.mean() > 0.8


def test_gaussian_mixture_vit_takes_another_size_after_resampling():
    arguments = {"embed_dim": 24, "num_heads": 2, "depth": 2}
    backbone = create_backbone("vit_tiny_patch4_32_gmm", arguments).at_size(48).eval()
    assert backbone.model.blocks[1].attn.mask().shape == (2, 144, 144)
    assert backbone(torch.randn(2, 3, 48, 48)).shape == (2, 24)
    with pytest.raises(AssertionError, match="48"):
        backbone(torch.randn(2, 3, 32, 32))


def test_dhvt_refuses_images_that_are_not_square():
    backbone = create_backbone("dhvt_tiny_cifar_patch4", {"embed_dim": 24, "num_heads": 2, "depth": 1}).eval()
    with pytest.raises(ValueError, match="DHVT takes square images, not a grid of 8x12 patches"):
        backbone(torch.randn(2, 3, 32, 48))
