"""A timm network as named stages: widths, strides, hashes, and errors."""

import pytest
import torch

from convscope.core.backbone import create_backbone
from convscope.core.errors import UserError

ARCHITECTURES = [
    ("resnet18", 64, {}),
    ("convnext_atto", 64, {}),
    ("convnextv2_atto", 64, {}),
    ("regnety_002", 64, {}),
    ("efficientnet_b0", 64, {}),
    ("mobilenetv3_small_100", 64, {}),
    ("mobilenetv4_conv_small", 64, {}),
    ("vit_tiny_patch16_224", 64, {"img_size": 64}),
    ("densenet121", 64, {}),
    ("swin_tiny_patch4_window7_224", 64, {"img_size": 64, "depths": (1, 1, 1, 1)}),
]


@pytest.mark.parametrize(("arch", "side", "model_args"), ARCHITECTURES)
def test_stages_and_width_describe_what_the_network_returns(arch: str, side: int, model_args: dict[str, object]):
    backbone = create_backbone(arch, model_args, seed=0).eval()
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        assert backbone(images).shape == (2, backbone.num_features)
        maps = backbone.feature_maps(images)
    expected = {s.name: (2, s.channels, side // s.stride, side // s.stride) for s in backbone.stages}
    assert {name: tuple(x.shape) for name, x in maps.items()} == expected
    assert backbone.stride == backbone.stages[-1].stride


def test_feature_maps_of_chosen_stages_are_those_of_a_hook():
    backbone = create_backbone("resnet18", seed=0).eval()
    images = torch.randn(1, 3, 64, 64)
    seen = {}
    backbone.model.layer2.register_forward_hook(lambda module, inputs, output: seen.update(layer2=output))
    maps = backbone.feature_maps(images, ["last", "layer2"])
    assert list(maps) == ["layer2", "layer4"]
    torch.testing.assert_close(maps["layer2"], seen["layer2"])
    torch.testing.assert_close(maps["layer4"], backbone.model.forward_features(images))


def test_img_size_sets_the_preprocessing_size():
    assert create_backbone("vit_tiny_patch16_224", {"img_size": 64, "depth": 1}).preprocessing.size == (64, 64)
    assert create_backbone("vit_tiny_patch16_224", {"img_size": (32, 64), "depth": 1}).preprocessing.size == (32, 64)


def test_seed_fixes_the_weights_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    one, two, other = (create_backbone("resnet18_cifar", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.weights_hash() == two.weights_hash() != other.weights_hash()


def test_hash_sees_one_value_and_the_arguments_but_not_their_container():
    sizes = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}
    backbone = create_backbone("convnext_atto", sizes, seed=0)
    original = backbone.weights_hash()
    twin = create_backbone("convnext_atto", {key: tuple(value) for key, value in sizes.items()}, seed=0)
    assert twin.weights_hash() == original
    assert create_backbone("convnext_atto", sizes | {"drop_rate": 0.1}, seed=0).weights_hash() != original
    with torch.no_grad():
        backbone.model.stem[0].bias[3] += 1e-6
    assert backbone.weights_hash() != original


@pytest.mark.parametrize(
    ("arch", "model_args", "message"),
    [
        ("resnet1818", {}, "timm knows no architecture"),
        ("resnet18", {"layers": 3}, "cannot build resnet18 with"),
        ("resnet18", {"no_such": 3}, "no_such"),
        ("resnet18", {"num_classes": 3}, "model arguments cannot set num_classes"),
        ("resnet18", {"features_only": True, "checkpoint_path": "x"}, "checkpoint_path, features_only"),
    ],
)
def test_what_cannot_be_built_is_one_line(arch: str, model_args: dict[str, object], message: str):
    with pytest.raises(UserError, match=message) as error:
        create_backbone(arch, model_args)
    assert "\n" not in str(error.value)


def test_pretrained_weights_that_timm_does_not_have():
    with pytest.raises(UserError, match="no weights for resnet18_cifar; timm:resnet18_cifar@random"):
        create_backbone("resnet18_cifar", pretrained=True)


def test_unknown_stage_names_the_known_ones():
    with pytest.raises(UserError, match="no layer layer9; its layers are: act1, layer1"):
        create_backbone("resnet18_cifar").stage_indices(["layer9"])
