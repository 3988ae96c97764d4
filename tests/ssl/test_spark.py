"""The SparK objective against the official implementation's numbers and an obvious reference."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from convscope.core.backbone import Backbone, create_backbone
from convscope.core.errors import UserError
from convscope.core.models import load_backbone
from convscope.ssl.objectives.spark import Spark, SparkConfig, normalise_patches
from convscope.ssl.objectives.spark_decoders import LightReconstruction, UNetReconstruction, UpSample
from convscope.ssl.sparse.rules import convert
from convscope.ssl.sparse.spatial import choose_form
from convscope.ssl.sparse.units import VisibleUnits
from tests.processes import run_on_two
from tests.ssl.dense_reference import DenseMasked
from tests.ssl.test_sparse import FAMILIES

NETWORKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "resnet": ("resnet50", {"layers": (1, 1, 1, 1), "channels": (4, 8, 16, 32)}, 32),
    "convnext": ("convnext_tiny", {"depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64)}, 64),
}
DECODER_KEYS = ("dense_decoder.", "densify_norms.", "densify_projs.", "mask_tokens.")


def official(folder: Path, name: str, tmp_path: Path) -> tuple[Spark, dict[str, Any]]:
    """The objective with the official weights, its encoder read through the model loader."""
    fixture = torch.load(folder / f"spark_fixture_tiny_{name}.pt", weights_only=True)
    arch, arguments, width = NETWORKS[name]
    torch.save(fixture["state_dict"], tmp_path / "official.pth")
    backbone = load_backbone(str(tmp_path / "official.pth"), arch=arch, model_args=arguments)
    objective = SparkConfig(size=96, decoder_width=width).build(backbone)
    state = {key: value for key, value in fixture["state_dict"].items() if key.startswith(DECODER_KEYS)}
    objective.reconstruction.load_state_dict(state)
    return objective, fixture


def close(found: Tensor, expected: Tensor, share: float, what: str = "") -> None:
    """Within `share` of the largest expected value."""
    difference = float((found.detach().double() - expected.double()).abs().max())
    assert difference <= share * float(expected.abs().max()), f"{what}: {difference}"


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", NETWORKS)
def test_official_numbers(reference: Path, tmp_path: Path, name: str, dtype: torch.dtype, mode: str) -> None:
    objective, fixture = official(reference, name, tmp_path)
    objective.to(dtype).train(mode == "train")
    share = 1e-4 if (name, mode) == ("resnet", "train") else 1e-5  # what the official fp32 run itself is good for
    expected = fixture[mode]
    images, visible = fixture["input"].to(dtype), fixture["active_b1ff"][:, 0]
    out = objective({"image": images, "visible": visible})
    out.loss.backward()
    if dtype == torch.float64:
        assert abs(out.loss.item() - float(expected["loss_f64"])) <= 1e-9
    close(out.loss, torch.as_tensor(expected["loss"]), share)
    if mode == "train":
        check_gradients(objective, expected)
        check_buffers(objective, expected)
    else:
        units = VisibleUnits.from_mask(visible)
        features = objective.encode(images, units)
        for found, wanted in zip(reversed(features), expected["feats"]):
            close(units.scatter(found), wanted, share, "feature map")
        dense = objective.reconstruction.densify(features, units)
        for found, wanted in zip(dense, expected["to_dec"]):
            close(found, wanted, share, "densified map")
        close(objective.reconstruction.dense_decoder(dense), expected["rec"], share, "reconstruction")
        close(objective.reconstruct(images, units), expected["vis_rec_or_inp"], share, "picture")


def check_gradients(objective: Spark, expected: dict[str, Any]) -> None:
    """Every gradient: the decoder's by name, the encoder's through the converter that loaded its weights.

    The official gradients exist in fp32 only and are good to about 2e-5 of each maximum (our fp64 ones differ by that).
    """
    share = 1e-4
    gradients = expected["grads"]
    named = dict(objective.reconstruction.named_parameters())
    assert all(key in gradients for key in named)
    for key, parameter in named.items():
        close(parameter.grad, gradients[key], share, key)
    encoder = {k.removeprefix("sparse_encoder.sp_cnn."): v for k, v in gradients.items() if k.startswith("sparse_enc")}
    if objective.backbone.arch.startswith("convnext"):
        from timm.models.convnext import checkpoint_filter_fn

        encoder = checkpoint_filter_fn(encoder, objective.backbone.model)
    trained = {key: p for key, p in objective.backbone.model.named_parameters() if p.grad is not None}
    assert set(trained) == set(encoder)
    for key, parameter in trained.items():
        close(parameter.grad, encoder[key].view_as(parameter), share, key)


def check_buffers(objective: Spark, expected: dict[str, Any]) -> None:
    """Running statistics after the step."""
    state = {f"sparse_encoder.sp_cnn.{key}": value for key, value in objective.backbone.model.state_dict().items()}
    state |= objective.reconstruction.state_dict()
    checked = 0
    for key, wanted in expected["buffers_after"].items():
        if "running" in key:
            close(state[key], wanted, 1e-4, key)
            checked += 1
    assert checked >= 20


def slow_loss(painted: Tensor, images: Tensor, visible: Tensor, side: int) -> Tensor:
    """Patch by patch, from the definition."""
    total, count = torch.zeros((), dtype=painted.dtype), 0
    for b, y, x in (~visible).nonzero().tolist():
        window = (b, slice(None), slice(y * side, (y + 1) * side), slice(x * side, (x + 1) * side))
        patch = images[window]
        target = (patch - patch.mean()) / (patch.var(correction=1) + 1e-6).sqrt()
        total = total + (painted[window] - target).square().mean()
        count += 1
    return total / count


def whole_image(
    decoder: UNetReconstruction | LightReconstruction, features: list[Tensor], units: VisibleUnits
) -> Tensor:
    """What a decoder paints, visible units too (B, 3, H, W)."""
    if isinstance(decoder, UNetReconstruction):
        return decoder.dense_decoder(decoder.densify(features, units))
    dense = units.scatter(decoder.proj(features[0]), fill=decoder.mask_token)
    return torch.nn.functional.pixel_shuffle(decoder.pred(decoder.block(dense)), decoder.stride)


@pytest.mark.parametrize(("unit", "columns"), [(32, 2), (64, 2), (96, 2), (32, 3)])
@pytest.mark.parametrize("decoder", ["unet", "light"])
def test_loss_and_gradients_against_a_dense_reference(decoder: Any, unit: int, columns: int) -> None:
    """Without the official fixtures: the same decoder on dense-masked features, the loss patch by patch."""
    size = (2 * unit, columns * unit)
    config = SparkConfig(size=size, mask_unit=unit, decoder=decoder, decoder_width=32, mask_ratio=0.5)
    objectives = []
    for _ in range(2):
        torch.manual_seed(0)
        objective = config.build(create_backbone("resnet18", {"channels": (4, 6, 8, 10)}, seed=0)).double()
        with torch.no_grad():  # as initialised, residual branches and the decoder's output are next to nothing
            for parameter in objective.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        objectives.append(objective)
    ours, reference = objectives
    images = torch.randn(4, 3, *size, dtype=torch.float64)
    units = VisibleUnits.draw(4, (2, columns), 0.5)
    loss = ours({"image": images, "visible": units.mask}).loss
    loss.backward()

    names = [reference.backbone.stages[i].name for i in reference.scales]
    maps = DenseMasked(reference.backbone.model)(reference.backbone, images, units.mask, names)
    painted = whole_image(reference.reconstruction, [units.gather(feature_map) for feature_map in maps], units)
    expected = slow_loss(painted, images, units.mask, unit)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    largest = max(float(other.grad.abs().max()) for other in reference.parameters() if other.grad is not None)
    for (name, one), other in zip(ours.named_parameters(), reference.parameters()):
        assert (one.grad is None) == (other.grad is None), name
        if other.grad is not None:
            difference = float((one.grad - other.grad).abs().max())
            assert difference <= 1e-10 * float(other.grad.abs().max()) + 1e-12 * largest, name


@pytest.mark.parametrize("arch", FAMILIES)
def test_the_published_way_gives_the_same_step(arch: str) -> None:
    """`--reference` computes what is masked too: same loss, gradients and running statistics."""
    batch = {"image": torch.randn(3, 3, 96, 96, dtype=torch.float64)}
    objectives = []
    for reference in (False, True):
        torch.manual_seed(0)
        config = SparkConfig(size=96, decoder_width=32, reference=reference)
        objective = config.build(create_backbone(arch, FAMILIES[arch], seed=0)).double().train()
        torch.manual_seed(1)
        objectives.append((objective, objective(batch).loss))
        objectives[-1][1].backward()
    (ours, loss), (published, expected) = objectives
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    largest = max(float(p.grad.abs().max()) for p in published.parameters() if p.grad is not None)
    for (name, one), other in zip(ours.named_parameters(), published.parameters()):
        assert (one.grad is None) == (other.grad is None), name
        if other.grad is not None:
            difference = float((one.grad - other.grad).abs().max())
            assert difference <= 1e-10 * float(other.grad.abs().max()) + 1e-12 * largest, name
    for (name, one), other in zip(ours.named_buffers(), published.buffers()):
        if "running" in name:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12, msg=name)


class Recorder(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("decoder", ["unet", "light"])
@pytest.mark.parametrize("arch", ["resnet18", "convnext_atto"])
def test_a_step_never_waits_for_the_device(arch: str, decoder: Any) -> None:
    """No value is read back and no shape depends on values, so a GPU can be kept busy."""
    config = SparkConfig(size=96, decoder=decoder, decoder_width=32)
    objective = config.build(create_backbone(arch, FAMILIES[arch], seed=0))
    with Recorder() as recorder:
        objective({"image": torch.randn(2, 3, 96, 96)}).loss.backward()
    assert "aten::convolution" in recorder.names
    waiting = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2")
    assert not recorder.names & set(waiting)


def test_a_compiled_step_is_one_graph_with_the_same_gradients() -> None:
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        config = SparkConfig(size=96, decoder="light", decoder_width=32)
        objective = config.build(create_backbone("convnext_atto", FAMILIES["convnext_atto"], seed=0)).double()
        step = torch.compile(objective, backend="aot_eager", fullgraph=True) if compiled else objective
        torch.manual_seed(1)  # of the mask
        loss = step({"image": torch.linspace(-1, 1, 2 * 3 * 96 * 96, dtype=torch.float64).view(2, 3, 96, 96)}).loss
        loss.backward()
        found.append([loss, *(p.grad for p in objective.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 20
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_another_rule_may_choose_the_forms() -> None:
    found = []
    for choose in (choose_form, lambda *_: "dense"):
        backbone = create_backbone("resnet18", FAMILIES["resnet18"], seed=0).double()
        units = VisibleUnits.from_mask(torch.tensor([[[True, False], [True, False]]]))
        convert(backbone.model, "resnet18", choose).units = units
        found.append(backbone.feature_maps(units.gather(torch.ones(1, 3, 64, 64, dtype=torch.float64)))["layer4"])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_after_a_step_the_backbone_takes_whole_images() -> None:
    objective = build_small()
    objective(joined_batch()).loss.backward()
    objective.after_update()
    assert objective.backbone(joined_batch()["image"]).shape == (4, 6)
    units = objective.draw_units(joined_batch()["image"])
    assert objective.reconstruct(joined_batch()["image"], units).shape == (4, 3, 64, 64)
    assert objective.backbone(joined_batch()["image"]).shape == (4, 6)


def test_a_mask_shared_by_the_batch() -> None:
    objective = SparkConfig(size=96, decoder="light", shared_mask=True).build(create_backbone("resnet18"))
    masks = [objective.draw_units(torch.empty(5, 3, 96, 96)).mask for _ in range(8)]
    assert all(bool((mask == mask[0]).all()) for mask in masks)
    assert len({tuple(mask[0].flatten().tolist()) for mask in masks}) > 1
    assert torch.isfinite(objective({"image": torch.randn(5, 3, 96, 96)}).loss)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_up_sampling_equals_the_library(dtype: torch.dtype) -> None:
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    ours = UpSample(6, 6, kernel_size=4, stride=2, padding=1).to(kept)
    found = []
    for layer in (ours, torch.nn.ConvTranspose2d(6, 6, kernel_size=4, stride=2, padding=1).to(kept)):
        layer.load_state_dict(ours.state_dict())
        x = torch.linspace(-1, 1, 2 * 6 * 5 * 7, dtype=kept).view(2, 6, 5, 7).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = layer(x)
        assert out.dtype == dtype
        found.append((out.detach(), *torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])))
    share = 1e-6 if dtype == torch.float64 else 2e-2  # the sum above is in float32; bf16 keeps eight bits
    for one, other in zip(*found):
        close(one, other, share)


def test_targets_are_normalised_within_each_patch() -> None:
    patches = torch.randn(5, 3, 8, 8, dtype=torch.float64) * 3 + 1
    target = normalise_patches(patches).flatten(1)
    torch.testing.assert_close(target.mean(1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(target.var(1, correction=1), torch.ones(5, dtype=torch.float64), rtol=1e-6, atol=0)
    assert torch.isfinite(normalise_patches(torch.zeros(1, 3, 4, 4))).all()  # a flat patch is no division by zero


def build_small() -> Spark:
    torch.manual_seed(0)
    backbone = create_backbone("resnet18", {"channels": (4, 4, 6, 6)}, seed=0)
    return SparkConfig(size=64, decoder_width=32, mask_ratio=0.5).build(backbone).double()


def joined_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64, generator=generator)
    visible = torch.zeros(4, 2, 2, dtype=torch.bool)
    for i, (a, b) in enumerate([(0, 1), (2, 3), (0, 3), (1, 2)]):
        visible[i].view(-1)[[a, b]] = True
    return {"image": images, "visible": visible}


def distributed_step(rank: int) -> dict[str, Any]:
    from convscope.core import distributed

    with pytest.raises(UserError, match="one process"):
        SparkConfig(size=64, decoder="light", reference=True).build(create_backbone("resnet18"))
    cpu = torch.device("cpu")
    objective = distributed.sync_batchnorm(build_small(), cpu)
    batch = {key: value[2 * rank : 2 * rank + 2] for key, value in joined_batch().items()}
    model = distributed.wrap(objective, cpu)  # averages gradients for as long as it lives
    loss = model(batch).loss
    loss.backward()
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.requires_grad}
    mean = distributed.mean_over_ranks({"loss": loss})["loss"]
    return {"loss": mean, "gradients": gradients, "buffers": dict(objective.named_buffers())}


def test_two_processes_equal_one_with_the_joined_batch(tmp_path: Path) -> None:
    objective = build_small()
    loss = objective(joined_batch()).loss
    loss.backward()
    for found in run_on_two(distributed_step, tmp_path):
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-10)
        for name, parameter in objective.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(found["gradients"][name], parameter.grad, rtol=1e-7, atol=1e-10, msg=name)
        for name, buffer in objective.named_buffers():
            torch.testing.assert_close(found["buffers"][name], buffer, rtol=1e-9, atol=1e-12, msg=name)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        objective = build_small().train()
        objective.backbone.model.set_grad_checkpointing(checkpointing)
        objective(joined_batch()).loss.backward()
        found.append([p.grad for p in objective.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 10
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_weight_decay_spares_the_mask_tokens() -> None:
    assert build_small().no_weight_decay() == {f"reconstruction.mask_tokens.{i}" for i in range(4)}


@pytest.mark.parametrize(
    ("config", "arch", "words"),
    [
        ({"size": 100}, "resnet18", "multiple of the mask unit"),
        ({"size": 32}, "resnet18", "hold two"),
        ({"size": (64, 100)}, "resnet18", "--size 64 100"),
        ({"size": 96, "mask_unit": 48}, "resnet18", "no multiple"),
        ({"size": 64, "decoder_width": 100}, "resnet18", "halved"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(config: dict[str, Any], arch: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        SparkConfig(**config).build(create_backbone(arch))


def test_ratios_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="mask-ratio"):
        SparkConfig(mask_ratio=1.0)
    with pytest.raises(UserError, match="crop-scale"):
        SparkConfig(crop_scale=(0.9, 0.5))


def test_backbones_are_left_dense_for_evaluation() -> None:
    objective = build_small().eval()
    images = joined_batch()["image"]
    with torch.no_grad():
        objective(joined_batch())
        objective.load_state_dict(objective.state_dict())
        twin: Backbone = create_backbone("resnet18", {"channels": (4, 4, 6, 6)}, seed=0).double().eval()
        twin.model.load_state_dict(objective.backbone.model.state_dict())
        assert torch.equal(objective.backbone(images), twin(images))
