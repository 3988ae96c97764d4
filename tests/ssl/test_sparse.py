"""Computation on visible units equals the dense-masked definition, for every family of networks."""

import copy

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from convscope.core.backbone import Backbone, create_backbone
from convscope.core.errors import UserError
from convscope.ssl.objectives.spark import SparkConfig, hierarchy
from convscope.ssl.sparse.reference import convert_reference
from convscope.ssl.sparse.rules import convert, on_whole_maps
from convscope.ssl.sparse.units import VisibleUnits
from convscope.ssl.sparse.verify import verify
from tests.ssl.dense_reference import DenseMasked

FAMILIES = {
    "resnet18": {"channels": (4, 8, 12, 16)},
    "resnet50": {"layers": (1, 1, 1, 1), "channels": (4, 8, 12, 16)},
    "resnet26d": {"layers": (1, 1, 1, 1), "channels": (4, 8, 12, 16)},
    "seresnet50": {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)},
    "resnet50_gn": {"layers": (1, 1, 1, 1), "channels": (32, 32, 32, 32)},
    "ecaresnet26t": {"channels": (8, 8, 8, 8)},
    "resnext50_32x4d": {"layers": (1, 1, 1, 1)},
    "convnext_atto": {"depths": (1, 1, 2, 1), "dims": (4, 8, 12, 16)},
    "convnext_tiny": {"depths": (1, 1, 2, 1), "dims": (4, 8, 12, 16)},
    "convnextv2_tiny": {"depths": (1, 1, 2, 1), "dims": (4, 8, 12, 16)},
    "convnextv2_atto": {"depths": (1, 1, 2, 1), "dims": (4, 8, 12, 16)},
    "inception_next_atto": {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40)},
    "regnetx_002": {},
    "regnety_002": {},
    "efficientnet_b0": {},
    "mobilenetv2_050": {},
    "mobilenetv3_small_050": {},
    "mobilenetv4_conv_small": {},
    "convnext_pico": {"depths": (1, 1, 1, 1), "dims": (4, 8, 12, 16), "kernel_sizes": (13,) * 4},
    "convnext_nano": {"depths": (1, 1, 1, 1), "dims": (4, 8, 12, 16), "kernel_sizes": (31,) * 4},
}


def randomised(arch: str, **arguments: object) -> Backbone:
    """A float64 backbone in which no branch is switched off by its initial weights."""
    backbone = create_backbone(arch, arguments, seed=0).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.05)
    return backbone


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("arch", FAMILIES)
def test_units_equal_dense_masked_computation(arch: str, training: bool) -> None:
    sparse = randomised(arch, **FAMILIES[arch]).train(training)
    dense = copy.deepcopy(sparse)
    unit = sparse.stride
    names = [sparse.stages[i].name for i in hierarchy(sparse)]
    images = torch.randn(2, 3, 2 * unit, 3 * unit, dtype=torch.float64)
    units = VisibleUnits.draw(2, (2, 3), 0.5)

    context = convert(sparse.model, arch)
    context.units = units
    maps = sparse.feature_maps(units.gather(images), names)
    found = [maps[name] for name in names]
    expected = DenseMasked(dense.model)(dense, images, units.mask, names)
    for one, other in zip(found, expected):
        torch.testing.assert_close(units.scatter(one), other, rtol=0, atol=1e-10 * float(other.detach().abs().max()))

    weights = [torch.randn_like(other) for other in expected]
    sum((units.scatter(one) * weight).sum() for one, weight in zip(found, weights)).backward()
    sum((other * weight).sum() for other, weight in zip(expected, weights)).backward()
    largest = max(float(other.grad.abs().max()) for other in dense.parameters() if other.grad is not None)
    for (name, one), other in zip(sparse.named_parameters(), dense.parameters()):
        assert (one.grad is None) == (other.grad is None), name
        if other.grad is not None:  # a bias before BatchNorm has no gradient but rounding: hence the second term
            tolerance = 1e-10 * float(other.grad.abs().max()) + 1e-12 * largest
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=tolerance, msg=name)
    for (name, one), other in zip(sparse.named_buffers(), dense.buffers()):
        if "running" in name:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("arch", FAMILIES)
def test_reference_mode_equals_units(arch: str) -> None:
    """The dense-masked rules of `--reference`, on networks whose linear layers have biases at masked places too."""
    fast = randomised(arch, **FAMILIES[arch]).train()
    slow = copy.deepcopy(fast)
    unit = fast.stride
    names = [fast.stages[i].name for i in hierarchy(fast)]
    images = torch.randn(2, 3, 2 * unit, 3 * unit, dtype=torch.float64)
    units = VisibleUnits.draw(2, (2, 3), 0.5)
    convert(fast.model, arch).units = units
    convert_reference(slow.model).units = units
    found = fast.feature_maps(units.gather(images), names)
    expected = slow.feature_maps(units.scatter(units.gather(images)), names)
    for name in names:
        atol = 1e-10 * float(expected[name].detach().abs().max())
        torch.testing.assert_close(units.scatter(found[name]), expected[name], rtol=0, atol=atol)


def test_masked_pixels_cannot_reach_the_features() -> None:
    backbone = randomised("convnext_atto", **FAMILIES["convnext_atto"]).eval()
    objective = SparkConfig(size=96, decoder_width=32).build(backbone).double()
    images = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    units = VisibleUnits.draw(2, (3, 3), 0.6)
    hidden = nn.functional.interpolate(1.0 - units.mask[:, None].double(), scale_factor=32)
    before = objective.encode(images, units)
    after = objective.encode(images + 100 * hidden, units)
    assert all(torch.equal(one, other) for one, other in zip(before, after))


def test_conversion_keeps_keys_and_the_dense_pass() -> None:
    backbone = randomised("regnety_002").eval()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    keys, expected = list(backbone.state_dict()), backbone(images)
    context = convert(backbone.model, "regnety_002")
    assert list(backbone.state_dict()) == keys
    assert context.units is None
    assert torch.equal(backbone(images), expected)


def test_convolutions_without_a_fast_form_are_counted() -> None:
    plain, standardised = create_backbone("resnet18"), create_backbone("nf_resnet26")
    for backbone in (plain, standardised):
        convert(backbone.model, backbone.arch)
    assert not on_whole_maps(plain.model)
    assert on_whole_maps(standardised.model) == {"ScaledStdConv2d": 29}


def test_copies_have_masks_of_their_own() -> None:
    backbone = create_backbone("resnet18", {"channels": (4, 4, 4, 4)})
    context = convert(backbone.model, "resnet18")
    twin, twin_context = copy.deepcopy((backbone, context))
    twin_context.units = VisibleUnits.draw(1, (2, 2), 0.5)
    assert context.units is None
    assert twin.model.conv1.mask_context is twin_context


def test_stochastic_depth_drops_whole_images() -> None:
    network = nn.Sequential(DropPath(0.5))
    context = convert(network, "drop")
    context.units = VisibleUnits.draw(64, (2, 2), 0.5)
    out = network.train()(torch.ones(128, 4, 2, 2)).view(64, 2, -1)
    kept = (out != 0).flatten(1)
    assert (kept.all(1) | (~kept).all(1)).all()  # an image is dropped as a whole
    assert 0 < int(kept.all(1).sum()) < 64


@pytest.mark.parametrize(
    ("arch", "culprit"),
    [
        ("skresnet18", "layer1.0.conv1.attn"),
        ("mobilenetv4_hybrid_medium", "blocks.2.4.attn"),
        ("focalnet_tiny_srf", "modulation"),
        ("vit_tiny_patch16_224", "visible units"),
    ],
)
def test_networks_without_an_exact_rule_are_refused_by_name(arch: str, culprit: str) -> None:
    with pytest.raises(UserError, match=arch) as error:
        SparkConfig(size=224, decoder="light").build(create_backbone(arch))
    assert culprit in str(error.value)
    assert "\n" not in str(error.value)


def test_verification_catches_spatial_code_outside_of_layers() -> None:
    class Blur(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.avg_pool2d(x, 3, 1, 1)

    backbone = create_backbone("resnet18", {"channels": (4, 4, 4, 4)})
    backbone.model.layer2[0].act1 = Blur()
    with pytest.raises(UserError, match=r"layer2\.0\.act1 \(Blur\)"):
        verify(backbone, convert(backbone.model, "resnet18"), 32)


def test_verification_names_parameters_behind_the_last_map() -> None:
    backbone = create_backbone("mobilenetv3_small_050")
    unreached = verify(backbone, convert(backbone.model, "x"), 32)
    assert unreached == ["model.conv_head.weight", "model.conv_head.bias"]


def test_gather_and_scatter_are_inverse_and_adjoint() -> None:
    units = VisibleUnits.draw(3, (2, 4), 0.4)
    dense = torch.randn(3, 5, 6, 12, dtype=torch.float64)
    taken = units.gather(dense)
    assert taken.shape == (3 * units.count, 5, 3, 3)
    visible = nn.functional.interpolate(units.mask[:, None].double(), scale_factor=3)
    torch.testing.assert_close(units.scatter(taken), dense * visible, rtol=0, atol=0)
    first = int(units.indices[1, 0])
    y, x = first // 4 * 3, first % 4 * 3
    assert torch.equal(taken[units.count], dense[1, :, y : y + 3, x : x + 3])
    leaf = dense.clone().requires_grad_()
    assert torch.autograd.gradcheck(units.gather, leaf[:, :1, :, :].detach().requires_grad_())


def test_drawn_masks_keep_the_published_number_uniformly() -> None:
    units = VisibleUnits.draw(4000, (7, 7), 0.6)
    assert units.count == 20  # SparK keeps 20 of 49
    assert bool((units.mask.flatten(1).sum(1) == 20).all())
    share = units.mask.float().mean(0)
    assert float((share - 20 / 49).abs().max()) < 5 * (0.41 * 0.59 / 4000) ** 0.5
    hidden = units.hidden
    assert hidden.count == 29
    assert bool((hidden.mask ^ units.mask).all())


def test_from_mask_needs_equal_counts() -> None:
    mask = torch.tensor([[[True, False]], [[True, True]]])
    with pytest.raises(ValueError, match="same number"):
        VisibleUnits.from_mask(mask)
