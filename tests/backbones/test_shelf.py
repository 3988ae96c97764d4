"""Every architecture of `convscope/backbones`: the authors' numbers, and all that timm and SparK ask of a network."""

import copy
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.func import functional_call

from convscope.backbones.staged import StagedNetwork
from convscope.core.backbone import Backbone, create_backbone
from convscope.core.errors import UserError
from convscope.core.models import load_backbone, save_backbone
from convscope.core.reparameterization import reparameterized
from convscope.ssl.objectives.spark import SparkConfig, hierarchy
from convscope.ssl.sparse.rules import convert
from convscope.ssl.sparse.units import VisibleUnits
from convscope.ssl.sparse.verify import verify
from tests.backbones.families import FAMILIES
from tests.backbones.fixtures import (
    Entry,
    Shapes,
    check,
    filled,
    hash_of_keys,
    image,
    is_counter,
    outputs,
    read_entries,
    read_keys,
    uniform,
)
from tests.ssl.dense_reference import DenseMasked

STATISTICS = ("running_mean", "running_var")
VARIANTS = [(name, variant) for name, family in FAMILIES.items() for variant in family.variants]
CASES = [(name, variant, i) for name, variant in VARIANTS for i in range(len(read_entries(name)[variant]["cases"]))]
# one image at a time was given to these, whose gradients torch's BatchNorm then gets wrong (`core.gradients`)
WRONG_GRADIENTS = ("van_b0", "dhvt_tiny_imagenet_patch16")
PUBLISHED = [(arch, size, family.merges) for family in FAMILIES.values() for arch, size in family.published.items()]
CONVOLUTIONAL = [name for name, family in FAMILIES.items() if not family.refused_by_spark]
MERGING = [name for name, family in FAMILIES.items() if family.merges]
STAGED = [name for name, family in FAMILIES.items() if isinstance(family.small.build(), StagedNetwork)]
REFUSED = [name for name, family in FAMILIES.items() if family.refused_by_spark]

SOON_COMPILED = ("simplenet", "gmm_vit")  # the others take a C++ compiler minutes


def randomised(model: nn.Module) -> nn.Module:
    """In float64, every parameter made to matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.05)
    return model


def small(name: str, **further: object) -> nn.Module:
    torch.manual_seed(0)
    return randomised(FAMILIES[name].small.build(**further))


def small_backbone(name: str) -> Backbone:
    variant = FAMILIES[name].small
    backbone = create_backbone(variant.arch, dict(variant.arguments), seed=0)
    randomised(backbone.model)
    return backbone


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_parameters_and_keys_are_the_authors(name: str, variant: str):
    family, entry = FAMILIES[name], read_entries(name)[variant]
    forms = {"train": ({}, entry), "deploy": ({"inference_mode": True}, entry.get("deploy"))}
    for form, (arguments, numbers) in forms.items():
        if numbers is None:
            continue
        shapes = read_keys(name, variant, form)
        assert hash_of_keys(shapes) == numbers["keys_sha256"]
        with torch.device("meta"):
            model = family.variants[variant].build(**arguments)
            theirs = {key: torch.empty(shape) for key, shape in shapes.items()}
        converted = family.module.checkpoint_filter_fn(theirs, model)
        assert {key: value.shape for key, value in converted.items()} == {
            key: value.shape for key, value in model.state_dict().items()
        }
        assert sum(parameter.numel() for parameter in model.parameters()) == numbers["params"]


@pytest.mark.parametrize(("arch", "millions", "merged"), PUBLISHED)
def test_size_is_the_published_one(arch: str, millions: float, merged: bool):
    with torch.device("meta"):
        model = timm.create_model(arch, **({"inference_mode": True} if merged else {}))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(1e6 * millions, rel=0.015)
    config = model.pretrained_cfg
    assert isinstance(model.get_submodule(config["classifier"]), nn.Linear)
    assert model.get_submodule(config["first_conv"]).in_channels == 3


def load(name: str, variant: str, entry: Entry, model: nn.Module, shapes: Shapes) -> None:
    state = FAMILIES[name].module.checkpoint_filter_fn(filled(shapes, entry), model)
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert all(not model.state_dict()[key].is_floating_point() for key in result.missing_keys)  # but for counters


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_are_the_authors(name: str):
    """In float64, of one variant and of modules on the way; a large one is cut short."""
    family, cut = FAMILIES[name], FAMILIES[name].truncation
    entry = read_entries(name)[family.computed]
    case = min(entry["cases"], key=lambda case: math.prod(case["input"]))
    model = family.variants[family.computed].build(**({"num_classes": 0, **cut.arguments} if cut else {}))
    if cut:
        model.norm = nn.Identity()  # of another width than the whole network's
    load(name, family.computed, entry, model.double().eval(), computed_keys(name))
    compare(name, model, case, cut.whole if cut else (*case["stages"], "output"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variant", "case"), CASES)
def test_outputs_of_every_variant_are_the_authors(name: str, variant: str, case: int):
    entry, model = read_entries(name)[variant], FAMILIES[name].variants[variant].build().double().eval()
    load(name, variant, entry, model, read_keys(name, variant))
    compare(name, model, entry["cases"][case], (*entry["cases"][case]["stages"], "output"))


def compare(name: str, model: nn.Module, case: Entry, which: Sequence[str]) -> None:
    """The network's output and those of modules, by the authors' names, with the numbers of a case."""
    modules = {stage: FAMILIES[name].module_name(f"{stage}.").removesuffix(".") for stage in case["stages"]}
    found = outputs(model, image(*case["input"]), {stage: modules[stage] for stage in which if stage != "output"})
    for stage in which:
        check(stage, found[stage], {**case["stages"], "output": case["output"]}[stage])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variant"), [each for each in VARIANTS if each[1] not in WRONG_GRADIENTS])
def test_gradients_are_the_authors(name: str, variant: str):
    """Norms in float64 by the authors' keys, through the converter, of a weighted sum of the outputs."""
    family, entry = FAMILIES[name], read_entries(name)[variant]
    model = family.variants[variant].build().double().eval()
    weights = filled(read_keys(name, variant), entry)
    learned = {key: value.requires_grad_() for key, value in weights.items() if not key.endswith(STATISTICS)}
    converted = family.module.checkpoint_filter_fn(weights, model)
    output = functional_call(model, converted, image(*entry["cases"][0]["input"]))
    (output * torch.from_numpy(uniform("grad", output.numel())).reshape(output.shape)).sum().backward()
    norms = {key: float(value.grad.norm()) for key, value in learned.items() if value.grad is not None}
    found = {key: norms[key] for key in entry["gradients"]["l2"]}
    assert found == pytest.approx(entry["gradients"]["l2"], rel=1e-9)
    assert math.hypot(*norms.values()) == pytest.approx(entry["gradients"]["total_l2"], rel=1e-9)


def computed_keys(name: str) -> Shapes:
    """The authors' keys of the network that is computed, without those that a truncated one lacks."""
    cut, shapes = FAMILIES[name].truncation, read_keys(name, FAMILIES[name].computed)
    return {key: shape for key, shape in shapes.items() if not (cut and re.search(cut.left_out, key))}


@pytest.mark.parametrize("name", FAMILIES)
def test_official_checkpoint_loads_from_a_file(name: str, tmp_path: Path):
    family, cut = FAMILIES[name], FAMILIES[name].truncation
    variant = family.variants[family.computed]
    state = {
        key: torch.zeros(shape, dtype=torch.int64 if is_counter(key) else torch.half)
        for key, shape in computed_keys(name).items()
    }
    torch.save({"state_dict": state}, tmp_path / "official.pth")
    backbone = load_backbone(
        str(tmp_path / "official.pth"),
        arch=variant.arch,
        model_args={**variant.arguments, **(cut.arguments if cut else {})},
        allow_partial=0.99 if cut else 1,
    )
    kept = [key for key, parameter in backbone.model.named_parameters() if parameter.any()]
    assert kept == (["norm.weight"] if cut else [])  # the last norm of a truncated network is not in the file


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_have_the_promised_widths_and_strides(name: str):
    family = FAMILIES[name]
    listed = family.small.build(features_only=True).eval()
    model = family.small.build(num_classes=0).eval()
    widths, strides = listed.feature_info.channels(), listed.feature_info.reduction()
    for height, width in family.sizes:
        images = torch.randn(2, 3, height, width)
        expected = [(2, c, height // s, width // s) for c, s in zip(widths, strides)]
        assert [tuple(x.shape) for x in listed(images)] == expected
        last, maps = model.forward_intermediates(images)
        assert [tuple(x.shape) for x in maps] == expected
        torch.testing.assert_close(last, model.forward_features(images))
        assert model(images).shape == (2, model.num_features)
    chosen = family.small.build(features_only=True, out_indices=(0, 2)).eval()
    assert [tuple(x.shape) for x in chosen(images)] == [expected[0], expected[2]]


@pytest.mark.parametrize("name", STAGED)
def test_first_stages_run_without_the_others(name: str):
    model = FAMILIES[name].small.build(num_classes=0).eval()
    images = torch.randn(2, 3, *FAMILIES[name].sizes[0])
    expected = model.forward_intermediates(images, indices=[0, 1], intermediates_only=True)
    final, maps = model.forward_intermediates(images, indices=[0, 1], stop_early=True)
    torch.testing.assert_close([final, *maps], [expected[1], *expected])
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(model.stages) == 2
    torch.testing.assert_close(model.forward_features(images), expected[1])


@pytest.mark.parametrize("name", STAGED)
def test_maps_may_stay_unpooled(name: str):
    images = torch.randn(2, 3, *FAMILIES[name].sizes[0])
    model = FAMILIES[name].small.build(num_classes=0, global_pool="").eval()
    torch.testing.assert_close(model(images), model.forward_features(images))
    model.reset_classifier(3, model.pooling)
    assert model(images).shape == (2, 3)
    for bad in (
        lambda: model.reset_classifier(3, ""),
        lambda: FAMILIES[name].small.build(num_classes=3, global_pool=""),
    ):
        with pytest.raises(ValueError, match="needs pooled features"):
            bad()
    with pytest.raises(ValueError, match="pools by"):
        FAMILIES[name].small.build(global_pool="avgmax")


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_alone_need_all_that_is_kept(name: str):
    model = FAMILIES[name].small.build(features_only=True).train()
    sum(x.square().sum() for x in model(torch.randn(2, 3, *FAMILIES[name].sizes[0]))).backward()
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("name", ["dhvt", "gmm_vit"])
def test_arguments_of_a_vit_have_their_effect_or_are_refused(name: str):
    for argument in ("qkv_bias", "qk_norm", "reg_tokens", "patch_drop_rate"):
        with pytest.raises(TypeError, match=argument):
            FAMILIES[name].small.build(**{argument: 1})
    images = torch.randn(2, 3, *FAMILIES[name].sizes[0])
    model = FAMILIES[name].small.build(pos_drop_rate=0.5).train()
    assert not torch.equal(model.forward_features(images), model.forward_features(images))


@pytest.mark.parametrize("name", FAMILIES)
def test_usual_timm_arguments_work(name: str):
    height, width = FAMILIES[name].sizes[0]
    images = torch.randn(2, 4, height, width, dtype=torch.float64)
    model = small(name, num_classes=7, in_chans=4, drop_rate=0.1, **FAMILIES[name].drops)
    assert model(images).shape == (2, 7)
    model.train()
    assert not torch.equal(model.forward_features(images), model.forward_features(images))
    model.eval()
    assert torch.equal(model(images), model(images))
    torch.testing.assert_close(
        model.get_classifier()(model.forward_head(model.forward_features(images), pre_logits=True)), model(images)
    )
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features)
    model.reset_classifier(5)
    assert model.double()(images).shape == (2, 5)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_every_parameter(name: str):
    """The same ones with activations recomputed in the backward pass."""
    images = torch.randn(2, 3, *FAMILIES[name].sizes[0], dtype=torch.float64)
    gradients = []
    for recompute in (False, True):
        model = small(name, num_classes=3).train()
        model.set_grad_checkpointing(recompute)
        model(images).square().sum().backward()
        assert [
            key for key, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
        ] == []
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", FAMILIES)
def test_backbone_survives_a_file(name: str, tmp_path: Path):
    backbone = small_backbone(name).float().eval()
    save_backbone(tmp_path / "backbone.safetensors", backbone)
    loaded = load_backbone(str(tmp_path / "backbone.safetensors")).eval()
    images = torch.randn(2, 3, *FAMILIES[name].sizes[0])
    assert torch.equal(loaded(images), backbone(images))
    model = FAMILIES[name].small.build(num_classes=0, checkpoint_path=str(tmp_path / "backbone.safetensors")).eval()
    assert torch.equal(model(images), backbone(images))


@pytest.mark.parametrize("name", FAMILIES)
def test_network_compiles_as_one_graph(name: str):
    """With the backend that runs the traced graph as it is: what a faster one makes of it is torch's part."""
    model = small(name, num_classes=3).eval()
    images = torch.randn(2, 3, *FAMILIES[name].sizes[0], dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(images), model(images))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", FAMILIES if "CONVSCOPE_COMPILE_ALL" in os.environ else SOON_COMPILED)
def test_network_compiles_to_machine_code(name: str):
    """Outputs and gradients, in training mode; CONVSCOPE_COMPILE_ALL=1 takes all families and many minutes."""
    images = torch.randn(2, 3, *FAMILIES[name].sizes[0], dtype=torch.float64)
    found = []
    for compiled in (False, True):
        model = small(name, num_classes=3).train()
        output = (torch.compile(model, fullgraph=True) if compiled else model)(images)
        output.square().sum().backward()
        found.append((output.detach(), {key: p.grad for key, p in model.named_parameters() if p.requires_grad}))
    (plain, gradients), (output, compiled_gradients) = found
    torch.testing.assert_close(output, plain, rtol=0, atol=1e-10 * float(plain.std()))
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for key, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[key], gradient, rtol=0, atol=1e-10 * largest, msg=key)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_spark_is_exact_on_visible_units(name: str):
    sparse = small_backbone(name).train()
    dense = copy.deepcopy(sparse)
    unit, names = sparse.stride, [sparse.stages[i].name for i in hierarchy(sparse)]
    images = torch.randn(2, 3, 2 * unit, 3 * unit, dtype=torch.float64)
    units = VisibleUnits.draw(2, (2, 3), 0.5)
    context = convert(sparse.model, name)
    verify(sparse, context, unit)
    context.units = units
    found = sparse.feature_maps(units.gather(images), names)
    expected = DenseMasked(dense.model)(dense, images, units.mask, names)
    for stage, other in zip(names, expected):
        atol = 1e-10 * float(other.detach().abs().max())
        torch.testing.assert_close(units.scatter(found[stage]), other, rtol=0, atol=atol)
    sum(found[stage].square().sum() for stage in names).backward()
    sum(other.square().sum() for other in expected).backward()
    largest = max(float(p.grad.abs().max()) for p in dense.parameters() if p.grad is not None)
    for (key, one), other in zip(sparse.named_parameters(), dense.parameters()):
        assert (one.grad is None) == (other.grad is None), key
        if other.grad is not None:  # a bias before BatchNorm has no gradient but rounding: hence the second term
            atol = 1e-10 * float(other.grad.abs().max()) + 1e-12 * largest
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=atol, msg=key)


@pytest.mark.parametrize("name", MERGING)
def test_reparameterised_network_is_equal(name: str):
    """In float64, statistics of BatchNorm that are not the initial ones included."""
    backbone, images = small_backbone(name), torch.randn(2, 3, 96, 64, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(2):
            backbone.train()(images)
        expected = backbone.eval()(images)
        merged = reparameterized(backbone)
        torch.testing.assert_close(merged(images), expected, rtol=0, atol=1e-10 * expected.std().item())
    assert sum(p.numel() for p in merged.parameters()) < sum(p.numel() for p in backbone.parameters())
    assert any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())  # the trained form stays


@pytest.mark.parametrize("name", REFUSED)
def test_spark_refuses_by_name(name: str):
    family = FAMILIES[name]
    with pytest.raises(UserError, match=family.small.arch) as error:
        SparkConfig(size=64, decoder="light").build(small_backbone(name))
    assert family.refused_by_spark in str(error.value)
