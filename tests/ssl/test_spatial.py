"""Every form of a convolution on visible units against the definition y = conv(x * M) * M, gradients too."""

import pytest
import torch
from torch import Tensor, nn

from convscope.ssl.sparse.geometry import Geometry
from convscope.ssl.sparse.pooling import max_pool
from convscope.ssl.sparse.spatial import Form, choose_form, convolve
from convscope.ssl.sparse.units import VisibleUnits

GRID = (2, 3)
LAYERS = {
    "3x3": nn.Conv2d(4, 6, 3, padding=1),
    "3x3 stride 2": nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
    "7x7 stride 2": nn.Conv2d(3, 4, 7, stride=2, padding=3),
    "5x5": nn.Conv2d(2, 3, 5, padding=2, bias=False),
    "2x2 stride 2, as a patch": nn.Conv2d(4, 6, 2, stride=2),
    "3x3 dilated": nn.Conv2d(3, 4, 3, padding=2, dilation=2),
    "1x1 stride 2": nn.Conv2d(4, 6, 1, stride=2),
    "3x5 band": nn.Conv2d(4, 4, (3, 5), padding=(1, 2)),
    "3x3 grouped": nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "3x3 stride 4": nn.Conv2d(4, 6, 3, stride=4, padding=0),
    "3x3 depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "7x7 depthwise": nn.Conv2d(3, 3, 7, padding=3, groups=3, bias=False),
    "1x11 depthwise": nn.Conv2d(3, 3, (1, 11), padding=(0, 5), groups=3),
    "13x13 depthwise": nn.Conv2d(2, 2, 13, padding=6, groups=2),
    "31x31 depthwise": nn.Conv2d(2, 2, 31, padding=15, groups=2),
}


def forms(geometry: Geometry) -> list[Form]:
    """Those that can compute such a layer."""
    found: list[Form] = ["dense", "halo"]
    if geometry.patch:
        found.append("patch")
    if geometry.groups == 1:
        found.append("taps")
    if geometry.depthwise and geometry.same:
        found.append("depthwise")
        if geometry.y == geometry.x:
            found.append("fft")
    return found


CASES = [(name, form) for name, layer in LAYERS.items() for form in forms(Geometry.of(layer))]


def by_definition(layer: nn.Conv2d, dense: Tensor, units: VisibleUnits, side: int) -> Tensor:
    """On the whole map, masked before and after."""
    mask = units.mask[:, None].to(dense.dtype)
    out = layer(dense * nn.functional.interpolate(mask, scale_factor=side))
    return out * nn.functional.interpolate(mask, scale_factor=out.shape[-1] // GRID[1])


@pytest.mark.parametrize("side", [1, 2, 4, 8])
@pytest.mark.parametrize(("name", "form"), CASES)
def test_form_equals_the_definition(name: str, form: Form, side: int) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name].double()
    if side % layer.stride[0]:
        pytest.skip("a unit is a multiple of the stride")
    geometry = Geometry.of(layer)
    units = VisibleUnits.draw(3, GRID, 0.5)
    dense = torch.randn(3, layer.in_channels, GRID[0] * side, GRID[1] * side, dtype=torch.float64)

    x = units.gather(dense).detach().requires_grad_()
    out = convolve(form, x, layer.weight, layer.bias, geometry, units)
    leaf = dense.clone().requires_grad_()
    expected = by_definition(layer, leaf, units, side)
    torch.testing.assert_close(units.scatter(out), expected, rtol=0, atol=1e-12)

    weighting = torch.randn_like(expected)
    parameters = [parameter for parameter in (layer.weight, layer.bias) if parameter is not None]
    found = torch.autograd.grad((units.scatter(out) * weighting).sum(), [x, *parameters])
    wanted = torch.autograd.grad((expected * weighting).sum(), [leaf, *parameters])
    torch.testing.assert_close(units.scatter(found[0]), wanted[0], rtol=0, atol=1e-12)
    for one, other in zip(found[1:], wanted[1:]):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "form"), [case for case in CASES if case[0] in ("3x3", "2x2 stride 2, as a patch", "3x3 depthwise")]
)
def test_an_activation_in_place_may_follow(name: str, form: Form) -> None:
    """As in VGG; autograd does not let a view be changed that a function of one's own returned."""
    layer, units = LAYERS[name].double(), VisibleUnits.draw(2, GRID, 0.5)
    x = torch.randn(2 * units.count, layer.in_channels, 4, 4, dtype=torch.float64, requires_grad=True)
    gradients = []
    for inplace in (False, True):
        out = convolve(form, x, layer.weight, layer.bias, Geometry.of(layer), units)
        gradients.append(torch.autograd.grad(nn.functional.relu(out, inplace=inplace).square().sum(), x)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("name", LAYERS)
def test_the_rule_chooses_a_form_that_can(name: str, side: int) -> None:
    geometry = Geometry.of(LAYERS[name])
    x = torch.zeros(3 * 3, LAYERS[name].in_channels, side, side)
    assert choose_form(geometry, x, VisibleUnits.draw(3, GRID, 0.5)) in forms(geometry)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(1, 1, 3),  # fewer outputs than inputs
        nn.Conv2d(1, 1, 3, padding=2),  # more
        nn.Conv2d(1, 1, 4, padding="same"),
        nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(1, 1, (1, 3), stride=(1, 2), padding=(0, 1)),
        type("Own", (nn.Conv2d,), {})(1, 1, 3, padding=1),
    ],
)
def test_what_is_not_plain_is_left_to_the_dense_form(layer: nn.Conv2d) -> None:
    assert Geometry.of(layer) is None


@pytest.mark.parametrize("side", [2, 4, 8])
@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (2, 0), (5, 2)])
def test_max_pool_equals_the_definition(kernel: int, padding: int, side: int) -> None:
    """Values below zero too: there a masked neighbour wins, as a zero, and what is beyond the image never does."""
    torch.manual_seed(0)
    pool = nn.MaxPool2d(kernel, 2, padding)
    units = VisibleUnits.draw(3, GRID, 0.5)
    dense = torch.randn(3, 4, GRID[0] * side, GRID[1] * side, dtype=torch.float64) - 1
    x = units.gather(dense).detach().requires_grad_()
    out = max_pool(x, kernel, 2, padding, units)
    leaf = dense.clone().requires_grad_()
    expected = by_definition(pool, leaf, units, side)
    torch.testing.assert_close(units.scatter(out), expected, rtol=0, atol=0)
    weighting = torch.randn_like(expected)
    (found,) = torch.autograd.grad((units.scatter(out) * weighting).sum(), x)
    (wanted,) = torch.autograd.grad((expected * weighting).sum(), leaf)
    torch.testing.assert_close(units.scatter(found), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", [3, 7, 13])
@pytest.mark.parametrize("side", [1, 2, 4, 8])
def test_both_ways_to_a_depthwise_weight_gradient(side: int, kernel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Conv2d(3, 3, kernel, padding=kernel // 2, groups=3).double()
    units = VisibleUnits.draw(3, GRID, 0.5)
    x = torch.randn(3 * units.count, 3, side, side, dtype=torch.float64)
    found = []
    for cost in (0, 1e9):  # of images: always them, never them
        monkeypatch.setattr("convscope.ssl.sparse.depthwise.IMAGE_COST", cost)
        out = convolve("depthwise", x, layer.weight, layer.bias, Geometry.of(layer), units)
        found.append(torch.autograd.grad(out.square().sum(), layer.weight)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
