"""Theoretical receptive fields: what a pixel can reach, and how uniform kernels spread."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from convscope.analysis.erf import ErfConfig, erf
from convscope.analysis.receptive_field import ReceptiveField, receptive_field, uniform_sigma
from convscope.core.backbone import Backbone, create_backbone
from tests.analysis.test_erf import images, uniform, wrap


def field_of(backbone: Backbone, size: int, stage: str = "last") -> ReceptiveField:
    image = torch.zeros(1, 3, size, size, dtype=next(backbone.parameters()).dtype, requires_grad=True)
    (feature_map,) = backbone.eval().feature_maps(image, [stage]).values()
    return receptive_field(feature_map, image)


@pytest.mark.parametrize(
    ("arch", "reach"),
    [("resnet18", 435), ("resnet50", 427)],  # the stride in a bottleneck's 3x3 layer; 483 with it at a stage's end
)
def test_known_fields_of_real_networks(arch: str, reach: int) -> None:
    field = field_of(create_backbone(arch, {"base_width": 4}, seed=0) if arch == "resnet50" else small(arch), 64)
    assert field.y == field.x
    assert field.y is not None
    assert field.y.reach == reach


def small(arch: str) -> Backbone:
    return create_backbone(arch, {"channels": (4, 4, 8, 8)}, seed=0)


def test_reach_is_where_a_pixel_that_is_no_number_stops_mattering() -> None:
    backbone = create_backbone("resnet18_cifar", {"channels": (4, 4, 4, 4), "layers": (1, 1, 1, 1)}, seed=0).eval()
    field = field_of(backbone, 96)
    assert field.y is not None
    with torch.no_grad():
        rows = []
        for row in range(96):
            image = torch.zeros(1, 3, 96, 96)
            image[:, :, row] = math.nan
            (feature_map,) = backbone.feature_maps(image, ["last"]).values()
            middle = feature_map.shape[2] // 2
            if feature_map[:, :, middle, middle].isnan().any():
                rows.append(row)
    assert rows == list(range(rows[0], rows[-1] + 1))
    assert 0 < rows[0] < rows[-1] < 95
    assert len(rows) == field.y.reach


@pytest.mark.parametrize(
    ("layers", "size"),
    [
        ([(3, 1, 1), (3, 1, 1), (3, 1, 1)], 32),
        ([(5, 2, 1), (3, 1, 1), (3, 2, 1), (5, 1, 1)], 64),
        ([(3, 1, 1), (3, 1, 2), (3, 1, 4)], 48),
        ([(4, 4, 1), (7, 1, 1)], 96),
    ],
)
def test_uniform_stacks_spread_as_the_field_says(layers: list[tuple[int, int, int]], size: int) -> None:
    convs = []
    for index, (kernel, stride, dilation) in enumerate(layers):
        conv = nn.Conv2d(1 if index else 3, 1, kernel, stride, dilation * (kernel // 2), dilation, bias=False)
        nn.init.constant_(conv.weight, 1.0)
        convs.append(conv)
    backbone = wrap(*convs, stride=math.prod(stride for _, stride, _ in layers))
    (result,) = erf(backbone, [images(1, size)], ErfConfig(centre="centroid")).values()
    field = result.field
    assert field.y is not None
    assert field.y.sigma[0] == field.y.sigma[1]
    assert result.sigma == pytest.approx((field.y.sigma[0], field.y.sigma[0]), abs=1e-9)
    rows = np.flatnonzero(result.contributions.sum(axis=1))
    assert rows[-1] - rows[0] + 1 == field.y.reach


def test_the_formula_is_that_of_a_stack() -> None:
    field = field_of(wrap(*(uniform(1 if i else 3, 5, padding=2) for i in range(7))), 32)
    assert field.y is not None
    assert field.y.sigma == pytest.approx((uniform_sigma(7, 5), uniform_sigma(7, 5)), abs=1e-12)
    assert uniform_sigma(7, 5) == math.sqrt(7 * 24 / 12)


class Residual(nn.Module):
    """x + conv(conv(x)) with positive uniform weights."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(uniform(1, 3, padding=1), uniform(1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x) / 20


def test_branches_bound_the_spread_of_their_mixture() -> None:
    backbone = wrap(uniform(3, 3, padding=1), Residual(), Residual())
    (result,) = erf(backbone, [images(1, 31)], ErfConfig()).values()
    assert result.field.y is not None
    assert result.sigma is not None
    least, most = result.field.y.sigma
    assert (least, most) == (uniform_sigma(1, 3), pytest.approx(uniform_sigma(5, 3)))
    assert least < result.sigma[0] < most


@pytest.mark.parametrize(("arch", "because"), [("test_vit", "attention"), ("regnety_002", "pools over the whole map")])
def test_what_has_no_kernel_is_told(arch: str, because: str) -> None:
    backbone = create_backbone(arch, seed=0)
    field = field_of(backbone, backbone.preprocessing.size[0])
    assert field.y is None
    assert because in field.reason


class Shifted(nn.Module):
    """Mixes distant positions without any kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.roll(9, dims=2)


def test_a_map_that_reaches_further_refutes_the_field() -> None:
    (result,) = erf(wrap(uniform(3, 3, padding=1), Shifted()), [images(1, 31)], ErfConfig()).values()
    assert result.field.y is None
    assert "beyond the reach" in result.field.reason
