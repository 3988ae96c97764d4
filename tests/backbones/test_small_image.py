"""Networks for small images: strides, sizes, and everything timm promises of a registered model."""

import pytest
import timm
import torch
from torch import nn

from convscope.core.backbone import create_backbone

NETWORKS = {
    # name: image side, channels, strides
    "resnet18_cifar": (32, [64, 64, 128, 256, 512], [1, 1, 2, 4, 8]),
    "convnext_mini_s8": (64, [32, 64, 128, 192], [2, 4, 8, 8]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_features_have_the_promised_widths_and_strides(name: str):
    side, channels, strides = NETWORKS[name]
    expected = [(2, c, side // s, side // s) for c, s in zip(channels, strides)]
    images = torch.randn(2, 3, side, side)
    listed = timm.create_model(name, features_only=True).eval()
    assert listed.feature_info.reduction() == strides
    assert [tuple(x.shape) for x in listed(images)] == expected
    model = timm.create_model(name).eval()
    last, maps = model.forward_intermediates(images)
    assert [tuple(x.shape) for x in maps] == expected
    torch.testing.assert_close(last, model.forward_features(images))


@pytest.mark.parametrize("name", NETWORKS)
def test_usual_timm_arguments_work(name: str):
    side = NETWORKS[name][0]
    model = timm.create_model(name, num_classes=7, in_chans=4, drop_path_rate=0.5)
    images = torch.randn(2, 4, side, side)
    assert model(images).shape == (2, 7)
    for parameter in model.parameters():  # residual branches start at zero, which would hide the drops
        nn.init.normal_(parameter, std=0.1)
    trained = [model.forward_features(images) for _ in range(2)]
    assert not torch.equal(*trained)  # stochastic depth is on
    model.eval()
    assert torch.equal(model(images), model(images))
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features)


@pytest.mark.parametrize("name", NETWORKS)
def test_default_preprocessing_is_the_small_image(name: str):
    backbone = create_backbone(name)
    assert backbone.preprocessing.size == (NETWORKS[name][0],) * 2
    assert backbone.preprocessing.crop_pct == 1.0
    assert backbone.stride == 8


@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_is_trained(name: str):
    side = NETWORKS[name][0]
    model = timm.create_model(name, num_classes=3)
    model(torch.randn(4, 3, side, side)).square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


def test_resnet18_cifar_has_the_keys_of_resnet18():
    small, large = timm.create_model("resnet18_cifar").state_dict(), timm.create_model("resnet18").state_dict()
    assert small.keys() == large.keys()
    assert [key for key in small if small[key].shape != large[key].shape] == ["conv1.weight"]


def test_replaced_layers_are_initialised_as_timm_does():
    stem = timm.create_model("resnet18_cifar").conv1.weight
    assert stem.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)
    model = timm.create_model("convnext_mini_s8")
    for conv in (model.stem[0], model.stages[3].downsample[1]):
        assert isinstance(conv, nn.Conv2d)
        assert conv.weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert torch.count_nonzero(conv.bias) == 0
