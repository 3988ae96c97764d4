"""Effective receptive field: the theory, the geometry, the areas, and what must stay untouched."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from convscope.analysis.erf import ErfConfig, ErfResult, contribution_maps
from convscope.analysis.erf import erf as erf_by_stage
from convscope.analysis.erf_areas import areas
from convscope.analysis.erf_shape import fit_gaussian, radial_profile
from convscope.analysis.token_grid import token_grid
from convscope.core.backbone import Backbone, Preprocessing, create_backbone
from convscope.core.errors import UserError


class Net(nn.Module):
    """Layers in a row, with the two things that `Backbone` asks of a timm network."""

    num_features = 1

    def __init__(self, layers: Sequence[nn.Module], stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)
        self.feature_info = [{"module": "body", "num_chs": 1, "reduction": stride}]

    def forward_intermediates(self, x: Tensor, indices: list[int], intermediates_only: bool) -> list[Tensor]:
        return [self.body(x)]


def wrap(*layers: nn.Module, stride: int = 1) -> Backbone:
    return Backbone(Net(layers, stride), arch="net", preprocessing=Preprocessing(size=(32, 32))).double()


def erf(backbone: Backbone, batches: Iterable[Tensor], config: ErfConfig) -> ErfResult:
    (result,) = erf_by_stage(backbone, batches, config).values()
    return result


def uniform(channels: int, kernel: int, stride: int = 1, padding: int = 0) -> nn.Conv2d:
    conv = nn.Conv2d(channels, 1, kernel, stride, padding, bias=False)
    nn.init.constant_(conv.weight, 1.0)
    return conv


def images(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("layers", "kernel"), [(6, 3), (4, 5), (3, 7)])
def test_stacked_uniform_layers_spread_as_theory_says(layers: int, kernel: int) -> None:
    convs = [uniform(3 if i == 0 else 1, kernel, padding=kernel // 2) for i in range(layers)]
    result = erf(wrap(*convs), [images(2, 61)], ErfConfig())
    expected = math.sqrt(layers * (kernel**2 - 1) / 12)
    assert result.sigma == pytest.approx((expected, expected), abs=1e-9)
    assert result.centroid == pytest.approx(result.centre, abs=1e-9)
    assert result.centre == (30, 30)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(7, 1, 3), (5, 2, 2), (4, 4, 0), (7, 4, 3), (3, 2, 0)])
def test_one_layer_gives_its_exact_support(kernel: int, stride: int, padding: int) -> None:
    backbone = wrap(uniform(3, kernel, stride, padding), stride=stride)
    result = erf(backbone, [images(2, 32)], ErfConfig(thresholds=(0.9999,)))
    rows, columns = np.nonzero(result.contributions)
    (area,) = result.areas["raw"]
    assert area is not None
    assert area.side == kernel == rows.max() - rows.min() + 1
    assert area.share == kernel**2 / 32**2
    assert result.centre == ((rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2)


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("resnet18", 3 * 32.0),
        ("convnext_atto", 3 * 32 + 15.5),
        ("vit_tiny_patch16_224", 7 * 16 + 7.5),
        ("swin_tiny_patch4_window7_224", 3 * 32 + 15.5),
        ("resnet10t", 3 * 32.0),
        ("resnetblur18", 3 * 32.0),
        ("tf_mobilenetv3_small_minimal_100", 3 * 32 + 31.0),  # five 3x3 layers padded at the end: 1+2+4+8+16
    ],
)
def test_token_centres_of_real_networks(arch: str, expected: float) -> None:
    grid = token_grid(create_backbone(arch, seed=0).eval(), torch.zeros(1, 3, 224, 224))
    assert grid.centre(grid.central_token) == (expected, expected)


def test_central_token_of_a_patchify_network_sees_its_own_patch_only() -> None:
    backbone = create_backbone("vit_tiny_patch16_224", {"depth": 1}, seed=0).eval()
    backbone.model.blocks = nn.Sequential(nn.Identity())  # no mixing: a token sees its patch
    result = erf(backbone, [images(1, 224).float()], ErfConfig(thresholds=(0.999,)))
    (area,) = result.areas["raw"]
    assert area is not None
    assert area.side == 16
    assert np.flatnonzero(result.contributions.sum(axis=1)).tolist() == list(range(112, 128))


def test_gradient_map_matches_one_derived_by_hand() -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
    backbone = wrap(first, nn.ReLU(), second)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, generator=generator)
    x = images(2, 9) - 0.5
    expected = np.zeros((2, 9, 9))
    with torch.no_grad():
        for b in range(2):
            before, after = first(x[b : b + 1])[0], second(first(x[b : b + 1]).relu())[0]
            gradient = torch.zeros(3, 13, 13, dtype=torch.float64)  # two pixels of margin
            for out in range(2):
                if after[out, 4, 4] <= 0:
                    continue
                for mid in range(4):
                    for i in range(3):
                        for j in range(3):
                            y, z = 4 + i - 1, 4 + j - 1
                            if before[mid, y, z] > 0:
                                gain = second.weight[out, mid, i, j] * first.weight[mid]
                                gradient[:, y + 1 : y + 4, z + 1 : z + 4] += gain
            expected[b] = gradient[:, 2:11, 2:11].clamp(min=0).sum(0).numpy()
    assert expected.max() > 0
    np.testing.assert_allclose(contribution_maps(backbone, x)["body"], expected, rtol=1e-12, atol=1e-12)


def test_sides_are_those_of_the_published_procedure_done_slowly() -> None:
    backbone = create_backbone("resnet18_cifar", {"channels": (4, 4, 8, 8), "zero_init_last": False}, seed=0)
    backbone = backbone.double().eval()
    x = images(3, 40)
    gathered = torch.zeros(40, 40, dtype=torch.float64)
    for one in x:  # batch of one, as published
        pixel = one[None].clone().requires_grad_()
        out = backbone.model.forward_features(pixel)
        centre = out[:, :, out.shape[2] // 2, out.shape[3] // 2]
        centre.clamp(min=0).sum().backward()
        gathered += pixel.grad.clamp(min=0).sum(dim=(0, 1))
    scaled = torch.log10(gathered / 3 + 1)
    scaled /= scaled.max()
    config = ErfConfig()
    expected = []
    for threshold in config.thresholds:
        sides = [
            2 * reach + 1
            for reach in range(1, 20)
            if scaled[20 - reach : 21 + reach, 20 - reach : 21 + reach].sum() / scaled.sum() > threshold
        ]
        expected.append(sides[0] if sides else None)
    found = erf(backbone, [x], config).areas["official"]
    assert [area and area.side for area in found] == expected
    assert [area and area.share for area in found] == [side and side**2 / 40**2 for side in expected]
    assert sum(side is not None for side in expected) >= 3


def slow_square(map_: np.ndarray, centre: tuple[float, float], threshold: float) -> tuple[float, float]:
    """Grow a square by half pixels until it holds more than the threshold; half a side that is a tie counts."""
    height, width = map_.shape
    for half in np.arange(0, 2 * max(height, width), 0.5):
        inside = [(y, x) for y in range(height) for x in range(width)]
        inside = [(y, x) for y, x in inside if abs(y - centre[0]) <= half and abs(x - centre[1]) <= half]
        if sum(map_[y, x] for y, x in inside) > threshold * map_.sum():
            return 2 * half + 1, len(inside) / map_.size
    raise AssertionError


@pytest.mark.parametrize("centre", [(5.0, 5.0), (4.5, 6.5), (2.0, 9.0), (7.5, 3.0)])
def test_raw_and_log_areas_match_a_slow_loop(centre: tuple[float, float]) -> None:
    map_ = np.random.default_rng(1).random((12, 11)) ** 4
    for variant, weights in (("raw", map_), ("log", np.log10(1 + 1000 * map_ / map_.max()))):
        for threshold in (0.2, 0.3, 0.5, 0.99):
            (area,) = areas(map_, centre, variant, [threshold])
            assert area is not None
            assert (area.side, area.share) == pytest.approx(slow_square(weights, centre, threshold))


@pytest.mark.parametrize("size", [12, 13])
def test_official_area_matches_a_slow_loop(size: int) -> None:
    map_ = np.random.default_rng(2).random((size, size)) * 50
    logged = np.log10(map_ + 1)
    for threshold in (0.01, 0.2, 0.5, 0.9, 0.99):
        expected = None
        for reach in range(1, size // 2):
            low, high = size // 2 - reach, size // 2 + reach + 1
            if logged[low:high, low:high].sum() / logged.sum() > threshold:
                expected = (2 * reach + 1, (2 * reach + 1) ** 2 / size**2)
                break
        (area,) = areas(map_, (0.0, 0.0), "official", [threshold])
        assert (None if area is None else (area.side, area.share)) == expected


def test_a_share_that_is_never_exceeded_is_none() -> None:
    corner = np.zeros((8, 8))
    corner[0, 0] = 1.0
    assert list(areas(corner, (4.0, 4.0), "official", [0.5])) == [None]
    assert list(areas(np.zeros((8, 8)), (4.0, 4.0), "raw", [0.5])) == [None]


def test_raw_and_log_do_not_depend_on_the_gradients_scale_but_official_does() -> None:
    map_ = np.random.default_rng(0).random((33, 33)) ** 6
    for variant in ("raw", "log"):
        assert list(areas(map_, (16, 16), variant, (0.2, 0.5))) == list(
            areas(map_ * 1e6, (16, 16), variant, (0.2, 0.5))
        )
    assert list(areas(map_, (16, 16), "official", (0.2,))) != list(areas(map_ * 1e6, (16, 16), "official", (0.2,)))


def test_radial_profile_matches_a_slow_loop() -> None:
    map_ = np.random.default_rng(0).random((6, 7))
    sums: dict[int, list[float]] = {}
    for y in range(6):
        for x in range(7):
            sums.setdefault(round(math.hypot(y - 2.5, x - 3)), []).append(map_[y, x])
    expected = [np.mean(sums.get(d, [0.0])) for d in range(max(sums) + 1)]
    np.testing.assert_allclose(radial_profile(map_, (2.5, 3)), expected)


def test_a_gaussian_is_fitted_exactly_and_noise_is_not_explained() -> None:
    y, x = np.mgrid[:60, :70]
    map_ = 3 * np.exp(-((y - 30.5) ** 2) / (2 * 4.0**2) - (x - 33) ** 2 / (2 * 6.5**2))
    fit = fit_gaussian(map_)
    assert fit is not None
    assert fit.sigma == pytest.approx((4.0, 6.5), abs=1e-6)
    assert fit.centre == pytest.approx((30.5, 33), abs=1e-6)
    assert fit.explained == pytest.approx(1)
    noise = fit_gaussian(np.random.default_rng(0).random((60, 70)))
    assert noise is None or noise.explained < 0.5
    assert fit_gaussian(np.zeros((9, 9))) is None


def test_log_and_raw_curves_meet_the_areas() -> None:
    backbone = create_backbone("resnet18_cifar", {"channels": (4, 4, 8, 8), "zero_init_last": False}, seed=0)
    result = erf(backbone, [images(3, 32).float()], ErfConfig())
    for variant in ("raw", "log"):
        covered, share = result.curves[variant]
        for threshold, area in zip((0.2, 0.3, 0.5, 0.99), result.areas[variant]):
            assert area is not None
            assert covered[(share > threshold).argmax()] == area.share


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_centring_on_the_centroid_moves_the_squares_only(precision: str) -> None:
    conv = uniform(3, 3, padding=1)
    with torch.no_grad():
        conv.weight[..., 0, :] = 0  # the upper row: its centre of mass lies half a pixel below
    backbone = wrap(conv).float()
    x = [images(6, 17).float()]
    token, mass = (erf(backbone, x, ErfConfig(centre=name, precision=precision)) for name in ("token", "centroid"))
    assert (token.centre, token.token_centre, token.centroid) == ((8, 8), (8, 8), (8.5, 8))
    assert (mass.centre, mass.token_centre) == ((8.5, 8), (8, 8))
    np.testing.assert_array_equal(token.contributions, mass.contributions)
    assert [area and area.side for area in mass.areas["raw"]] == [2, 2, 3, 3]  # 2 of 6 equal pixels are a third
    assert mass.areas["official"] == token.areas["official"]
    for interval, area in zip(mass.intervals, mass.areas["raw"]):
        assert interval is not None
        assert area is not None
        assert interval.value == area.share


def test_bf16_says_how_far_it_moves_the_map() -> None:
    backbone = create_backbone("resnet18_cifar", {"channels": (4, 4, 8, 8), "zero_init_last": False}, seed=0)
    x = images(4, 32).float()
    exact, rough = (erf(backbone, [x], ErfConfig(precision=name)) for name in ("fp32", "bf16"))
    moved = np.abs(rough.contributions - exact.contributions).sum() / exact.contributions.sum()
    assert exact.bf16_change is None
    assert rough.bf16_change == pytest.approx(moved, rel=1e-6)
    assert 0 < moved < 0.2


def test_all_stages_in_one_pass_are_those_measured_alone() -> None:
    backbone = create_backbone("test_vit", {"depth": 2}, seed=0).double()
    x = [images(2, 160), images(1, 160)]
    together = erf_by_stage(backbone, x, ErfConfig(stages=("all",)))
    assert list(together) == [stage.name for stage in backbone.stages]
    for name, result in together.items():
        alone = erf(backbone, x, ErfConfig(stages=(name,)))
        np.testing.assert_allclose(result.contributions, alone.contributions, rtol=1e-9, atol=1e-18)
        assert result.areas == alone.areas


def test_batches_give_what_single_images_give() -> None:
    backbone = create_backbone("resnet18", {"zero_init_last": False}, seed=0).double()
    x = images(6, 64)
    together = erf(backbone, [x], ErfConfig())
    apart = erf(backbone, list(x.split(1)), ErfConfig())
    np.testing.assert_allclose(together.contributions, apart.contributions, rtol=1e-9, atol=1e-18)
    assert together.intervals == apart.intervals
    assert together.images == apart.images == 6


def test_nothing_of_the_model_changes() -> None:
    backbone = create_backbone("resnet18", {"drop_path_rate": 0.5}, seed=0).train()
    backbone.model.layer1.eval()  # a mixed state must come back as it was
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    flags = [part.training for part in backbone.modules()]
    first = erf(backbone, [images(2, 64).float()], ErfConfig())
    assert [part.training for part in backbone.modules()] == flags
    second = erf(backbone.eval(), [images(2, 64).float()], ErfConfig())
    np.testing.assert_array_equal(first.contributions, second.contributions)  # measured in eval mode both times
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_mode_comes_back_after_an_error() -> None:
    backbone = create_backbone("resnet18", seed=0).train()
    with pytest.raises(UserError, match="no layer nowhere"):
        erf(backbone, [images(1, 64).float()], ErfConfig(stages=("nowhere",)))
    assert all(part.training for part in backbone.modules())


def test_earlier_stages_see_less() -> None:
    backbone = create_backbone("resnet18", {"zero_init_last": False}, seed=0)
    x = [images(2, 128).float()]
    early, late = (erf(backbone, x, ErfConfig(stages=(name,))).areas["raw"][2] for name in ("layer1", "layer3"))
    assert early is not None
    assert late is not None
    assert early.side < late.side


def test_interval_holds_the_value_and_needs_enough_images() -> None:
    backbone = create_backbone("resnet18", {"zero_init_last": False}, seed=0)
    many = erf(backbone, [images(8, 64).float()], ErfConfig())
    few = erf(backbone, [images(3, 64).float()], ErfConfig())
    for figure, area in zip(many.intervals, many.areas["raw"]):
        assert figure is not None
        assert area is not None
        assert figure.value == pytest.approx(area.share)
        assert figure.low is not None
        assert figure.high is not None
        assert figure.low <= figure.value <= figure.high
    assert few.intervals[0] is not None
    assert few.intervals[0].low is None


def test_dead_gradient_is_reported_as_none() -> None:
    conv = uniform(3, 3, padding=1)
    nn.init.constant_(conv.weight, -1.0)
    result = erf(wrap(conv), [images(2, 16)], ErfConfig())
    assert set(result.areas["raw"]) == set(result.areas["official"]) == set(result.intervals) == {None}
    assert result.centroid is None


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no images"),
        ([torch.ones(1, 3, 16, 16).double(), torch.ones(1, 3, 8, 8).double()], "one size"),
    ],
)
def test_bad_images_are_told(batches: list[Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        erf(wrap(uniform(3, 3, padding=1)), batches, ErfConfig())


@pytest.mark.parametrize("arch", ["dhvt_tiny_cifar_patch4", "test_resnet"])
def test_image_alone_has_the_map_that_it_has_among_others(arch: str) -> None:
    """DHVT's maps are views of its tokens, before BatchNorm."""
    small = {"embed_dim": 24, "num_heads": 2, "depth": 2} if arch.startswith("dhvt") else {}
    backbone = create_backbone(arch, small, seed=0).double().eval()
    pair = images(2, 32)
    (alone,), (among,) = (contribution_maps(backbone, some).values() for some in (pair[:1], pair))
    np.testing.assert_allclose(alone, among[:1], rtol=0, atol=1e-12 * among.max())


def test_diverged_weights_are_told() -> None:
    conv = uniform(3, 3, padding=1)
    nn.init.constant_(conv.weight, math.inf)
    with pytest.raises(UserError, match="not finite"):
        erf(wrap(conv), [images(1, 16)], ErfConfig())


@pytest.mark.parametrize("thresholds", [(), (0.0,), (1.0,), (0.5, 2.0)])
def test_thresholds_are_checked(thresholds: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        ErfConfig(thresholds=thresholds)
