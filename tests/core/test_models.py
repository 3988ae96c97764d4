"""Every source of the grammar, every layout of weights, and what happens when they do not fit."""

import argparse
import json
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from convscope.core.backbone import Backbone, Preprocessing, create_backbone
from convscope.core.errors import UserError
from convscope.core.models import load_backbone, model_record, save_backbone, untrained_twin
from convscope.core.weights_match import match_weights

RESNET = {"layers": (1, 1, 1, 1), "channels": (4, 8, 16, 32)}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (4, 8, 12, 16)}
State = dict[str, Tensor]


@pytest.fixture
def resnet() -> State:
    """A small ResNet with a classifier, seed 5 (loading starts from seed 0)."""
    torch.manual_seed(5)
    return dict(timm.create_model("resnet50", num_classes=3, **RESNET).state_dict())


def save(path: Path, value: Any) -> str:
    torch.save(value, path)
    return str(path)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def assert_holds(backbone: Backbone, state: State) -> None:
    own = backbone.model.state_dict()
    assert own.keys() <= state.keys()
    for key, value in own.items():
        assert torch.equal(value, state[key]), key


# Layouts


def wrap_spark(state: State) -> dict[str, Any]:
    extra = {
        "dense_decoder.proj.weight": torch.ones(3, 1, 1, 1),
        "densify_norms.0.weight": torch.ones(4),
        "mask_tokens.0": torch.zeros(1, 4, 1, 1),
        "imn_m": torch.zeros(1, 3, 1, 1),
        "norm_black": torch.zeros(1, 3, 32, 32),
    }
    return {**prefixed(state, "sparse_encoder.sp_cnn."), **extra, "config": {"mask_ratio": 0.6}}


LAYOUTS = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "arch": "resnet50"},
    "model": lambda s: {"model": OrderedDict(s), "optimizer": {"state": {}}},
    "data parallel": lambda s: {"state_dict": prefixed(s, "module.")},
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "timm training": lambda s: {"state_dict": zeros(s), "state_dict_ema": s, "args": argparse.Namespace(lr=0.1)},
    "moving average": lambda s: {"model": zeros(s), "model_ema": s},
    "empty moving average": lambda s: {"model": s, "model_ema": None, "ema": {"decay": 0.9}},
    "spark": wrap_spark,
    "spark wrapped": lambda s: {"module": wrap_spark(s), "epoch": 3},
    "lightning backbone": lambda s: {"state_dict": prefixed(s, "backbone.") | {"projector.weight": torch.ones(3, 3)}},
    "lightning model": lambda s: {"state_dict": prefixed(s, "model.")},
    "lightning encoder": lambda s: {"state_dict": prefixed(s, "encoder.") | {"queue": torch.ones(3)}},
    "nested": lambda s: {"state_dict": prefixed(s, "model.backbone.")},
    "half precision": lambda s: {key: v.half() if v.is_floating_point() else v for key, v in s.items()},
    "old, without batch counters": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
}


def zeros(state: State) -> State:
    return {key: torch.zeros_like(value) for key, value in state.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_network(layout: str, resnet: State, tmp_path: Path):
    if layout == "half precision":
        resnet = {key: v.half().float() if v.is_floating_point() else v for key, v in resnet.items()}
    source = save(tmp_path / "weights.pth", LAYOUTS[layout](resnet))
    backbone = load_backbone(source, arch="resnet50", model_args=RESNET)
    assert_holds(backbone, resnet)
    assert (backbone.matched, backbone.absent, backbone.source) == (1.0, (), source)


def test_torchvision_resnet_gives_the_same_features(tmp_path: Path):
    network = torchvision.models.resnet18().eval()
    backbone = load_backbone(save(tmp_path / "r.pth", network.state_dict()), arch="resnet18").eval()
    images = torch.randn(1, 3, 64, 64)
    network.fc = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), network(images))


def test_plain_safetensors_with_arch(resnet: State, tmp_path: Path):
    save_file(resnet, tmp_path / "weights.safetensors")
    assert_holds(load_backbone(str(tmp_path / "weights.safetensors"), arch="resnet50", model_args=RESNET), resnet)


def original_convnext_names(state: State) -> State:
    """timm's ConvNeXt keys as its authors write them, without what follows the last stage."""
    named = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "head":
            continue
        if parts[0] == "stem":
            parts = ["downsample_layers", "0", *parts[1:]]
        elif parts[2] == "downsample":
            parts = ["downsample_layers", parts[1], *parts[3:]]
        else:
            parts = ["stages", parts[1], *parts[3:]]
        key = ".".join(parts).replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        named[key] = value
    return named


@pytest.mark.parametrize("wrap", [dict, wrap_spark], ids=["bare", "spark"])
def test_original_convnext_names_leave_the_classifier_norm_at_its_initial_values(
    wrap: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    torch.manual_seed(5)
    state = dict(timm.create_model("convnext_tiny", num_classes=0, **CONVNEXT).state_dict())
    source = save(tmp_path / "weights.pth", wrap(original_convnext_names(state)))
    backbone = load_backbone(source, arch="convnext_tiny", model_args=CONVNEXT)
    norm = {"head.norm.weight": torch.ones(16), "head.norm.bias": torch.zeros(16)}
    assert_holds(backbone, state | norm)
    assert set(backbone.absent) == set(norm)
    total = sum(value.numel() for value in state.values())
    assert backbone.matched == pytest.approx((total - 32) / total, abs=1e-12)
    assert "has no head.norm.weight, head.norm.bias" in capsys.readouterr().err
    assert model_record(backbone)["absent"] == list(backbone.absent)


@pytest.mark.parametrize(
    ("arch", "model_args"),
    [
        ("deit_tiny_distilled_patch16_224", {"depth": 1}),
        ("mobilenetv3_small_050", {}),
        ("convnext_tiny", CONVNEXT),
    ],
)
def test_classifiers_are_left_over_without_complaint(arch: str, model_args: dict[str, Any], tmp_path: Path):
    state = timm.create_model(arch, num_classes=3, **model_args).state_dict()
    backbone = load_backbone(save(tmp_path / "w.pth", state), arch=arch, model_args=model_args)
    assert (backbone.matched, backbone.absent) == (1.0, ())
    assert len(backbone.model.state_dict()) < len(state)
    assert_holds(backbone, dict(state))


@pytest.mark.parametrize(("key", "accepted"), [("head.fc.fc1.weight", True), ("head.fc1.weight", False)])
def test_only_what_belongs_to_a_classifier_may_be_left_over(key: str, accepted: bool, resnet: State):
    match = match_weights(resnet | {key: torch.ones(3, 3)}, create_backbone("resnet50", RESNET).model)
    assert match.left_over == ([] if accepted else [key])


def test_classifier_norm_must_be_there_when_the_file_has_a_classifier(tmp_path: Path):
    state = dict(timm.create_model("convnext_tiny", num_classes=3, **CONVNEXT).state_dict())
    del state["head.norm.weight"]
    with pytest.raises(UserError, match=r"1 missing \(head\.norm\.weight\)"):
        load_backbone(save(tmp_path / "w.pth", state), arch="convnext_tiny", model_args=CONVNEXT)


def test_vit_position_embedding_is_resampled_by_timm(tmp_path: Path):
    large = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=1, img_size=64)
    source = save(tmp_path / "vit.pth", large.state_dict())
    backbone = load_backbone(source, arch="vit_tiny_patch16_224", model_args={"depth": 1, "img_size": 32})
    assert backbone.model.pos_embed.shape == (1, 5, 192)
    assert torch.equal(backbone.model.pos_embed[:, 0], large.pos_embed[:, 0])
    assert backbone.matched == 1.0


# Official SparK checkpoints


def test_official_spark_resnet(reference: Path, tmp_path: Path):
    fixture = torch.load(reference / "spark_fixture_tiny_resnet.pt", weights_only=True)
    source = save(tmp_path / "spark.pth", {**fixture["state_dict"], "config": {"mask": 0.6}})
    backbone = load_backbone(source, arch="resnet50", model_args=RESNET).eval()
    prefix = "sparse_encoder.sp_cnn."
    own = {key[len(prefix) :]: value for key, value in fixture["state_dict"].items() if key.startswith(prefix)}
    network = timm.create_model("resnet50", num_classes=0, **RESNET).eval()
    network.load_state_dict(own, strict=True)
    assert (backbone.matched, backbone.absent) == (1.0, ())
    with torch.no_grad():
        maps = backbone.feature_maps(fixture["input"])
        expected = network.forward_intermediates(fixture["input"], intermediates_only=True)
    for found, wanted in zip(maps.values(), expected, strict=True):
        assert torch.equal(found, wanted)


def test_official_spark_convnext(reference: Path, tmp_path: Path):
    fixture = torch.load(reference / "spark_fixture_tiny_convnext.pt", weights_only=True)
    sizes = {"depths": fixture["config"]["depths"], "dims": fixture["config"]["dims"]}
    source = save(tmp_path / "spark.pth", {"module": fixture["state_dict"]})
    backbone = load_backbone(source, arch="convnext_tiny", model_args=sizes).eval()
    assert set(backbone.absent) == {"head.norm.weight", "head.norm.bias"}
    with torch.no_grad():
        maps = backbone.feature_maps(fixture["input"])
        expected = convnext_stages(fixture["state_dict"], fixture["input"], sizes["depths"])
    for found, wanted in zip(maps.values(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def convnext_stages(state: State, x: Tensor, depths: list[int]) -> list[Tensor]:
    """ConvNeXt written from the paper (Liu et al. 2022, fig. 4) on the authors' keys."""

    def weights(name: str) -> tuple[Tensor, Tensor]:
        return state[f"sparse_encoder.sp_cnn.{name}.weight"], state[f"sparse_encoder.sp_cnn.{name}.bias"]

    def channel_norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], *weights(name), eps=1e-6).permute(0, 3, 1, 2)

    stages = []
    for i, depth in enumerate(depths):
        if i == 0:
            x = channel_norm(F.conv2d(x, *weights("downsample_layers.0.0"), stride=4), "downsample_layers.0.1")
        else:
            x = channel_norm(x, f"downsample_layers.{i}.0")
            x = F.conv2d(x, *weights(f"downsample_layers.{i}.1"), stride=2)
        for j in range(depth):
            block = f"stages.{i}.{j}"
            y = F.conv2d(x, *weights(f"{block}.dwconv"), padding=3, groups=x.shape[1])
            y = channel_norm(y, f"{block}.norm").permute(0, 2, 3, 1)
            y = F.linear(F.gelu(F.linear(y, *weights(f"{block}.pwconv1"))), *weights(f"{block}.pwconv2"))
            x = x + (y * state[f"sparse_encoder.sp_cnn.{block}.gamma"]).permute(0, 3, 1, 2)
        stages.append(x)
    return stages


# Runs and exports


def small_run(folder: Path, backbone: Backbone, size: Any = 64) -> Path:
    """A run directory with one checkpoint and the settings that made it."""
    settings = {"backbone": "resnet50", "backbone_args": ["layers=1,1,1,1", "channels=4,8,16,32"]}
    settings |= {"drop_path": 0.1, "objective": {"size": size}}
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    model = prefixed(backbone.model.state_dict(), "backbone.model.") | {"reconstruction.weight": torch.ones(2)}
    save(folder / "checkpoints" / "step-00000009.pt", {"step": 9, "model": model, "ema": None, "optimizer": {}})
    (folder / "checkpoints" / "latest").write_text("step-00000009.pt\n")
    return folder


def test_unfinished_run_is_read_from_its_newest_checkpoint(tmp_path: Path):
    original = create_backbone("resnet50", RESNET, seed=3)
    run = small_run(tmp_path / "run", original)
    for source in (run, run / "checkpoints" / "step-00000009.pt"):
        backbone = load_backbone(str(source))
        assert_holds(backbone, original.model.state_dict())
        assert backbone.arch == "resnet50"
        assert backbone.preprocessing.size == (64, 64)
        assert backbone.model_args["drop_path_rate"] == 0.1


@pytest.mark.parametrize(("size", "expected"), [([64, 96], (64, 96)), (None, (224, 224))])
def test_unfinished_run_says_what_images_it_was_trained_on(tmp_path: Path, size: Any, expected: tuple[int, int]):
    run = small_run(tmp_path / "run", create_backbone("resnet50", RESNET, seed=3), size)
    assert load_backbone(str(run)).preprocessing.size == expected


def test_unfinished_run_with_a_moving_average_gives_the_average(tmp_path: Path):
    original = create_backbone("resnet50", RESNET, seed=3)
    run = small_run(tmp_path / "run", original)
    file = run / "checkpoints" / "step-00000009.pt"
    state = torch.load(file, weights_only=True)
    save(file, state | {"ema": state["model"], "model": zeros(state["model"])})
    assert_holds(load_backbone(str(run)), original.model.state_dict())


def test_finished_run_is_read_from_its_export(tmp_path: Path):
    original = create_backbone("resnet50", RESNET, seed=4)
    run = small_run(tmp_path / "run", create_backbone("resnet50", RESNET, seed=3))
    save_backbone(run / "backbone.safetensors", original)
    assert load_backbone(str(run)).weights_hash() == original.weights_hash()


def test_export_round_trip_keeps_everything(tmp_path: Path):
    original = create_backbone("convnext_atto", CONVNEXT, seed=3)
    original.preprocessing = Preprocessing(size=(48, 64), mean=(0.1, 0.2, 0.3), interpolation="bilinear", crop_pct=1.0)
    original.to(memory_format=torch.channels_last)
    path = tmp_path / "new" / "backbone.safetensors"
    save_backbone(path, original)
    backbone = load_backbone(str(path))
    assert backbone.preprocessing == original.preprocessing
    assert backbone.weights_hash() == original.weights_hash()
    assert [file.name for file in path.parent.iterdir()] == ["backbone.safetensors"]
    record = model_record(backbone)
    assert record["source"] == str(path)
    assert record["weights_hash"] == original.weights_hash()
    assert json.loads(json.dumps(record)) == record


def test_export_is_as_readable_as_any_file_of_the_user(tmp_path: Path):
    (tmp_path / "plain").touch()
    save_backbone(tmp_path / "b.safetensors", create_backbone("resnet50", RESNET))
    assert (tmp_path / "b.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_export_loads_in_timm_alone(tmp_path: Path):
    original = create_backbone("resnet50", RESNET, seed=3)
    path = tmp_path / "backbone.safetensors"
    save_backbone(path, original)
    network = timm.create_model("resnet50", num_classes=0, checkpoint_path=str(path), **RESNET)
    assert_holds(original, network.state_dict())


def test_export_of_shared_tensors(tmp_path: Path):
    original = create_backbone("resnet50", RESNET, seed=3)
    original.model.bn1.bias = original.model.bn1.weight
    save_backbone(tmp_path / "b.safetensors", original)
    assert torch.equal(load_backbone(str(tmp_path / "b.safetensors")).model.bn1.bias, original.model.bn1.weight)


def test_arguments_override_those_of_the_file(tmp_path: Path):
    save_backbone(tmp_path / "b.safetensors", create_backbone("resnet50", RESNET, seed=3))
    backbone = load_backbone(str(tmp_path / "b.safetensors"), arch="resnet50", model_args={"drop_path_rate": 0.3})
    assert backbone.model_args == {"layers": [1, 1, 1, 1], "channels": [4, 8, 16, 32], "drop_path_rate": 0.3}


def test_an_image_size_overrides_that_of_the_file(tmp_path: Path):
    small = create_backbone("vit_tiny_patch16_224", {"depth": 1, "img_size": 32}, seed=3)
    small.preprocessing = Preprocessing(size=(32, 32), mean=(0.1, 0.2, 0.3))
    save_backbone(tmp_path / "b.safetensors", small)
    assert load_backbone(str(tmp_path / "b.safetensors")).preprocessing == small.preprocessing
    larger = load_backbone(str(tmp_path / "b.safetensors"), model_args={"img_size": 64})
    assert larger.preprocessing == Preprocessing(size=(64, 64), mean=(0.1, 0.2, 0.3))
    assert larger.model.pos_embed.shape[1] == 17


# timm and random weights


def test_random_sources_are_seeded():
    default, zero, three = (load_backbone(f"timm:resnet18_cifar@random{s}") for s in ("", "=0", "=3"))
    assert default.weights_hash() == zero.weights_hash() != three.weights_hash()
    assert three.source == "timm:resnet18_cifar@random=3"
    assert load_backbone(three.source).weights_hash() == three.weights_hash()


def test_untrained_twin_differs_in_weights_only():
    original = create_backbone("resnet50", RESNET, seed=7)
    original.preprocessing = Preprocessing(size=(48, 48))
    twin = untrained_twin(original)
    assert (twin.arch, twin.model_args, twin.preprocessing) == ("resnet50", RESNET, original.preprocessing)
    assert twin.weights_hash() != original.weights_hash()
    assert untrained_twin(original, seed=7).weights_hash() == original.weights_hash()


@pytest.mark.parametrize(
    ("source", "arch", "message"),
    [
        ("timm:resnet18@best", None, "only @random or @random=SEED"),
        ("timm:resnet18@random=x", None, "only @random or @random=SEED"),
        ("timm:resnet18@random", "resnet50", "leave --arch resnet50 out"),
        ("timm:no_such_network@random", None, "timm knows no architecture"),
        ("timm:", None, "timm knows no architecture"),
        ("open_clip:ViT-B-32/laion2b", None, "name weights after a slash, a file or one of openai, "),
        ("open_clip:no-model/laion2b", None, "open_clip has no model 'no-model'"),
        ("open_clip:ViT-B-32/openai", "resnet50", "leave --arch resnet50 out"),
        (
            "local-dir:no/such/folder",
            None,
            "cannot load local-dir:no/such/folder as a timm model: Config file not found",
        ),
        ("no/such/run", None, "it is none of a run, a weights file, timm:NAME"),
        ("no/such/weights.pth", "resnet18", "it is none of a run, a weights file, timm:NAME"),
    ],
)
def test_bad_source_is_one_line(source: str, arch: str | None, message: str):
    with pytest.raises(UserError, match=message) as error:
        load_backbone(source, arch=arch)
    assert "\n" not in str(error.value)


# What does not fit


def load_resnet(path: Path, value: Any, **kwargs: Any) -> Backbone:
    return load_backbone(save(path / "weights.pth", value), arch="resnet50", model_args=RESNET, **kwargs)


def test_missing_weights_are_counted_and_named(resnet: State, tmp_path: Path):
    for key in ("layer1.0.conv1.weight", "bn1.bias", "bn1.running_mean", "layer4.0.bn1.bias"):
        del resnet[key]
    with pytest.raises(UserError, match=r"4 missing \(bn1\.bias, bn1\.running_mean, layer1\.0\.conv1\.weight, \.\.\."):
        load_resnet(tmp_path, resnet)


def test_partial_share_is_accepted_and_recorded(resnet: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    kept = {key: value for key, value in resnet.items() if not key.startswith("layer4")} | {"extra": torch.ones(1)}
    network = create_backbone("resnet50", RESNET, seed=0).model.state_dict()
    sizes = {key: value.numel() for key, value in network.items() if "num_batches" not in key}
    share = sum(size for key, size in sizes.items() if key in kept) / sum(sizes.values())
    with pytest.raises(UserError, match=f"{share:.1%} of the backbone's weights matched"):
        load_resnet(tmp_path, kept, allow_partial=share + 0.01)
    backbone = load_resnet(tmp_path, kept, allow_partial=share - 0.01)
    assert backbone.matched == pytest.approx(share, abs=1e-12)
    assert model_record(backbone)["matched"] == backbone.matched
    assert_holds(backbone, network | kept)
    assert "missing (layer4.0.conv1.weight" in capsys.readouterr().err


def test_one_missing_weight_is_not_a_share_of_100_percent(resnet: State, tmp_path: Path):
    with pytest.raises(UserError, match=r"99\.9% of the backbone's weights matched; 1 missing \(bn1\.bias\)"):
        load_resnet(tmp_path, {key: value for key, value in resnet.items() if key != "bn1.bias"})


def test_a_deeper_network_of_the_same_widths_is_refused(tmp_path: Path):
    deeper = timm.create_model("resnet50", num_classes=0, **RESNET | {"layers": (1, 1, 2, 1)}).state_dict()
    with pytest.raises(UserError, match=r"100\.0% .* left over \(layer3\.1\.conv1\.weight"):
        load_resnet(tmp_path, deeper)


def test_shape_mismatch_is_named(resnet: State, tmp_path: Path):
    resnet["conv1.weight"] = torch.ones(64, 3, 3, 3)
    with pytest.raises(UserError) as error:
        load_resnet(tmp_path, resnet)
    problem = "1 of another shape (conv1.weight (64, 3, 3, 3) in the file, (64, 3, 7, 7) in the network)"
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float, resnet: State, tmp_path: Path):
    resnet["layer2.0.conv1.weight"][0, 0] = bad
    with pytest.raises(UserError, match=r"1 weights hold NaN or infinity, the first is layer2\.0\.conv1\.weight"):
        load_resnet(tmp_path, resnet)


def test_another_architecture_matches_nothing(tmp_path: Path):
    state = timm.create_model("convnext_atto", num_classes=0, **CONVNEXT).state_dict()
    with pytest.raises(UserError, match=r"does not fit resnet50: 0\.0%"):
        load_resnet(tmp_path, state)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_allow_partial_is_a_share(share: float):
    with pytest.raises(UserError, match="--allow-partial is a share"):
        load_backbone("timm:resnet18_cifar@random", allow_partial=share)


def test_arch_is_needed_and_must_agree(resnet: State, tmp_path: Path):
    source = save(tmp_path / "weights.pth", resnet)
    with pytest.raises(UserError, match="does not say its architecture; pass --arch"):
        load_backbone(source)
    save_backbone(tmp_path / "b.safetensors", create_backbone("resnet50", RESNET))
    with pytest.raises(UserError, match="holds a resnet50, not a resnet18"):
        load_backbone(str(tmp_path / "b.safetensors"), arch="resnet18")


class Surprise:
    """An object that runs code when it is unpickled carelessly."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code ran",))


def test_pickled_code_is_not_run(resnet: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(UserError, match=r"could run code when loaded \(.*print\)") as error:
        load_resnet(tmp_path, {"state_dict": resnet, "surprise": Surprise()})
    assert "\n" not in str(error.value)
    assert "code ran" not in capsys.readouterr().out


def truncated(path: Path, state: State) -> None:
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-2000])


def truncated_safetensors(path: Path, state: State) -> None:
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-2000])


BROKEN = {
    "script.pt": lambda path, state: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path),
    "page.pth": lambda path, state: path.write_text("\n<!DOCTYPE html><html><body>404: not found</body></html>"),
    "page.safetensors": lambda path, state: path.write_text("<html>Too many requests</html>"),
    "pointer.pth": lambda path, state: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "truncated.pth": truncated,
    "truncated.safetensors": truncated_safetensors,
    "empty.pth": lambda path, state: path.write_bytes(b""),
    "empty.safetensors": lambda path, state: path.write_bytes(b""),
    "text.pt": lambda path, state: path.write_text("weights\n"),
    "text.safetensors": lambda path, state: path.write_text("weights\n"),
    "list.bin": lambda path, state: torch.save([torch.ones(2)], path),
    "tensorless.pt": lambda path, state: torch.save({"epoch": 3, "model": {}}, path),
    "pickle.pkl": lambda path, state: path.write_bytes(pickle.dumps({"a": 1}, protocol=2)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_file_that_is_no_checkpoint_is_one_line(name: str, resnet: State, tmp_path: Path):
    path = tmp_path / name
    BROKEN[name](path, resnet)
    with pytest.raises(UserError, match=name) as error:
        load_backbone(str(path), arch="resnet50", model_args=RESNET)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("page.pth", "is a web page, not weights: its download failed"),
        ("page.safetensors", "is a web page, not weights: its download failed"),
        ("pointer.pth", "is a pointer of Git LFS"),
        ("script.pt", "is a TorchScript program, not weights"),
        ("truncated.pth", "is truncated: its end is missing"),
        ("empty.pth", "is empty"),
    ],
)
def test_what_a_failed_download_leaves_is_told_apart(name: str, message: str, resnet: State, tmp_path: Path):
    BROKEN[name](tmp_path / name, resnet)
    with pytest.raises(UserError, match=message):
        load_backbone(str(tmp_path / name), arch="resnet50", model_args=RESNET)


def test_folder_that_is_no_run(tmp_path: Path):
    with pytest.raises(UserError, match=r"it has no backbone\.safetensors and no checkpoints/latest"):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"architecture": "resnet50"}, "metadata is not valid JSON"),
        ({"architecture": '"resnet50"', "model_args": "[1]"}, "model_args in its metadata is no mapping"),
        ({"architecture": "3"}, "architecture: expected str"),
        ({"architecture": '"resnet50"', "preprocessing": "{}"}, "size"),
        ({"architecture": '"hf-hub:some/repository"'}, "timm knows no architecture"),
    ],
)
def test_metadata_that_makes_no_sense(metadata: dict[str, str], message: str, resnet: State, tmp_path: Path):
    save_file(resnet, tmp_path / "b.safetensors", metadata)
    with pytest.raises(UserError, match=message):
        load_backbone(str(tmp_path / "b.safetensors"))


def test_network_with_attributes_named_like_wrappers_is_matched_plainly():
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(2, 2)
            self.model = nn.Linear(2, 2)

    network = Nested()
    match = match_weights(dict(network.state_dict()), network)
    assert match.complete
    assert match.layout.name == "plain"
