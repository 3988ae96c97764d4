"""Small networks saved in every layout compute the same once loaded, and what does not belong to one is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from convscope.core.backbone import Backbone
from convscope.core.backbone_loading import parts
from convscope.core.checkpoint_layouts import CLIP_MEAN, IMAGENET_MEAN
from convscope.core.errors import UserError
from convscope.core.models import load_backbone, model_record
from tests.core.layouts import (
    CASES,
    CONVNEXT,
    RESNET,
    VIT,
    VITS,
    chunked,
    dino_full,
    facebook_convnext,
    minkowski,
    mlp,
    moco,
    network,
    prefixed,
    save,
)


def assert_equal(backbone: Backbone, expected: torch.nn.Module, size: int = 32) -> None:
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(backbone.eval().model.forward_features(images), expected.forward_features(images))


@pytest.mark.parametrize("name", CASES)
def test_layout_computes_what_its_source_computes(name: str, tmp_path: Path):
    case = CASES[name]
    source = network(case.arch, **case.model_args)
    file = save(tmp_path, case.save(dict(source.state_dict())))
    backbone = load_backbone(file, arch=case.arch, model_args=case.model_args)
    assert_equal(backbone, source)
    assert (backbone.origin.layout, set(backbone.origin.dropped)) == (case.layout, case.dropped)
    assert set(backbone.absent) <= {"head.norm.weight", "head.norm.bias"}
    assert model_record(backbone)["layout"] == case.layout


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.layout != "plain"])
def test_what_no_layout_names_is_refused(name: str, tmp_path: Path):
    case = CASES[name]
    saved = case.save(dict(network(case.arch, **case.model_args).state_dict()))
    inner = next((saved[key] for key in ("teacher", "state_dict", "model") if key in saved), saved)
    inner["surprising.weight"] = torch.ones(3)
    with pytest.raises(UserError, match=r"1 left over \(surprising\.weight\)"):
        load_backbone(save(tmp_path, saved), arch=case.arch, model_args=case.model_args)


@pytest.mark.parametrize("name", CASES)
def test_a_lost_weight_is_named(name: str, tmp_path: Path):
    case = CASES[name]
    state = dict(network(case.arch, **case.model_args).state_dict())
    lost = next(key for key in state if key.startswith(("layer3", "blocks.1.mlp", "stages.2")))
    del state[lost]
    with pytest.raises(UserError, match=f"1 missing .{lost}") as error:
        load_backbone(save(tmp_path, case.save(state)), arch=case.arch, model_args=case.model_args)
    assert "\n" not in str(error.value)


# What shapes do not tell


def test_minkowski_kernels_are_what_the_authors_make_of_them():
    """The authors' conversion: permute, reshape to squares, exchange the last two axes."""
    state = dict(network("convnextv2_atto", **CONVNEXT).state_dict())
    dense, sparse = facebook_convnext(state), minkowski(state)
    deep, wide = sparse["stages.2.0.dwconv.kernel"], sparse["downsample_layers.2.1.kernel"]
    assert (deep.shape, wide.shape) == ((49, 12), (4, 8, 12))
    assert torch.equal(deep.T.reshape(12, 1, 7, 7).transpose(3, 2), dense["stages.2.0.dwconv.weight"])
    remade = wide.permute(2, 1, 0).reshape(12, 8, 2, 2).transpose(3, 2)
    assert torch.equal(remade, dense["downsample_layers.2.1.weight"])


def test_mae_fine_tuned_has_its_norm_after_the_pooling(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = network(VITS, **VIT, global_pool="avg")
    file = save(tmp_path, {"model": dict(source.state_dict()) | {"head.weight": torch.ones(5, 24)}})
    backbone = load_backbone(file, arch=VITS, model_args=VIT).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), source(images))
    assert backbone.model_args["global_pool"] == "avg"
    assert "it was trained with global_pool=avg" in capsys.readouterr().err


def test_moco_v3_small_has_twelve_heads(tmp_path: Path):
    sizes = {"depth": 1, "img_size": 32}
    source = network(VITS, **sizes, num_heads=12)
    file = save(tmp_path, moco(dict(source.state_dict())) | {"arch": "vit_small"})
    backbone = load_backbone(file, model_args=sizes)
    assert (backbone.arch, backbone.model_args["num_heads"]) == (VITS, 12)
    assert_equal(backbone, source)
    assert load_backbone(file, model_args={**sizes, "num_heads": 6}).model_args["num_heads"] == 6


def test_positions_decide_on_the_image_size_and_are_resampled_only_on_demand(tmp_path: Path):
    source = network("vit_small_patch14_dinov2", **VIT | {"img_size": 56, "patch_size": 14})
    file = save(tmp_path, chunked(dict(source.state_dict())))
    sizes = {"depth": 2, "embed_dim": 24, "num_heads": 3}
    exact = load_backbone(file, arch="vit_small_patch14_dinov2", model_args=sizes)
    assert (exact.preprocessing.size, exact.origin.resampled) == ((56, 56), ())
    assert torch.equal(exact.model.pos_embed, source.pos_embed)
    fitted = load_backbone(file, arch="vit_small_patch14_dinov2", model_args={**sizes, "img_size": 112})
    expected = timm.layers.resample_abs_pos_embed(source.pos_embed, new_size=[8, 8], num_prefix_tokens=1)
    assert torch.equal(fitted.model.pos_embed, expected)
    assert fitted.origin.resampled == ("pos_embed",)


def test_patches_of_another_size_are_another_network(tmp_path: Path):
    file = save(tmp_path, dict(network(VITS, **VIT).state_dict()))
    with pytest.raises(UserError, match=r"patch_embed\.proj\.weight \(24, 3, 16, 16\) in the file, \(24, 3, 8, 8\)"):
        load_backbone(file, arch="vit_small_patch8_224", model_args={**VIT, "img_size": 16})


def solo_learn(arch: str, **model_args: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
    source = network(arch, **model_args)
    state = prefixed(dict(source.state_dict()), "backbone.") | {"classifier.weight": torch.ones(3, 9)}
    return source, {"state_dict": state}


def test_solo_learn_pads_its_small_stem_by_two(tmp_path: Path):
    layers = {"layers": (1, 1, 1, 1)}
    source, saved = solo_learn("resnet18_cifar", **layers, stem_padding=2)
    file = save(tmp_path, saved)
    with pytest.raises(UserError, match="does not say how its 3x3 stem pads: pass --model-args stem_padding=2"):
        load_backbone(file, arch="resnet18_cifar", model_args=layers)
    assert_equal(load_backbone(file, arch="resnet18_cifar", model_args={**layers, "stem_padding": 2}), source)
    settings = {"method": "simclr", "backbone": {"name": "resnet18"}, "data": {"dataset": "cifar100"}}
    (tmp_path / "args.json").write_text(json.dumps(settings))
    assert_equal(load_backbone(file, model_args=layers), source)
    with pytest.raises(UserError, match=r"Its stem is that of small images: pass --arch resnet18_cifar"):
        load_backbone(file, arch="resnet18", model_args=layers)


# Preprocessing


@pytest.mark.parametrize(
    ("name", "mean", "crop_pct", "interpolation"),
    [
        ("mae pretraining", IMAGENET_MEAN, 0.875, "bicubic"),
        ("dino vit", IMAGENET_MEAN, 0.875, "bicubic"),
        ("moco v3 vit", IMAGENET_MEAN, 0.875, "bilinear"),
        ("open_clip, convnext tower", CLIP_MEAN, 1.0, "bicubic"),
        ("fcmae pretraining", IMAGENET_MEAN, 0.875, "bicubic"),
    ],
)
def test_layout_knows_how_images_are_prepared(
    name: str, mean: tuple[float, ...], crop_pct: float, interpolation: str, tmp_path: Path
):
    case = CASES[name]
    file = save(tmp_path, case.save(dict(network(case.arch, **case.model_args).state_dict())))
    backbone = load_backbone(file, arch=case.arch, model_args=case.model_args)
    used = backbone.preprocessing
    assert (used.mean, used.crop_pct, used.interpolation) == (mean, crop_pct, interpolation)
    assert backbone.origin.preprocessing == f"that of {case.layout}"


def test_unknown_preprocessing_is_said_and_a_tag_settles_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = save(tmp_path, dict(network("vit_base_patch16_224", **VIT).state_dict()))
    assumed = load_backbone(file, arch="vit_base_patch16_224", model_args=VIT)
    assert assumed.preprocessing.mean == (0.5, 0.5, 0.5)
    assert "it does not say how images are prepared" in capsys.readouterr().err
    settled = load_backbone(file, arch="vit_base_patch16_224.mae", model_args=VIT)
    assert settled.preprocessing.mean == IMAGENET_MEAN
    assert settled.origin.preprocessing == "timm's for vit_base_patch16_224.mae"
    assert "prepared" not in capsys.readouterr().err


def test_open_clip_config_beside_a_file_says_how_images_are_prepared(tmp_path: Path):
    case = CASES["open_clip, timm tower"]
    file = save(tmp_path, case.save(dict(network(case.arch, **case.model_args).state_dict())))
    shown = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}, "preprocess_cfg": shown}))
    used = load_backbone(file, arch=case.arch, model_args=case.model_args).preprocessing
    assert (used.mean, used.interpolation, used.crop_mode) == ((0.1, 0.2, 0.3), "bilinear", "squash")
    assert used.size == (32, 32)


# Architectures that files name


@pytest.mark.parametrize(
    ("said", "arch"),
    [
        ({"arch": "resnet50"}, "resnet50"),  # timm, SparK, torchvision
        ({"model": "resnet50"}, "resnet50"),
        ({"args": {"model": "resnet50"}}, "resnet50"),
        ({"hyper_parameters": {"backbone": "resnet50"}}, "resnet50"),
    ],
)
def test_settings_in_a_checkpoint_name_the_architecture(said: dict[str, Any], arch: str, tmp_path: Path):
    source = network(arch, **RESNET)
    backbone = load_backbone(save(tmp_path, {"state_dict": source.state_dict(), **said}), model_args=RESNET)
    assert backbone.arch == arch
    assert_equal(backbone, source)


def test_spark_says_its_image_size(tmp_path: Path):
    source = prefixed(dict(network("resnet50", **RESNET).state_dict()), "sparse_encoder.sp_cnn.")
    file = save(tmp_path, {"arch": "resnet50", "input_size": 384, "module": source, "is_pretrain": True})
    assert load_backbone(file, model_args=RESNET).preprocessing.size == (384, 384)


@pytest.mark.parametrize(
    ("said", "arch"),
    [
        ({"args": {"model": "mae_vit_base_patch16"}}, "vit_base_patch16_224"),
        ({"args": {"model": "vit_large_patch16"}}, "vit_large_patch16_224"),
        ({"args": {"arch": "vit_small", "patch_size": 8}}, "vit_small_patch8_224"),
        ({"args": {"arch": "deit_small", "patch_size": 16}}, "vit_small_patch16_224"),
    ],
)
def test_names_of_the_authors_become_timms(said: dict[str, Any], arch: str, tmp_path: Path):
    patch = 8 if "patch8" in arch else 16
    source = network(arch, **VIT | {"img_size": 2 * patch})
    backbone = load_backbone(
        save(tmp_path, {"model": source.state_dict(), **said}), model_args=VIT | {"img_size": 2 * patch}
    )
    assert backbone.arch == arch


def test_published_file_names_are_known(tmp_path: Path):
    file = save(tmp_path, dict(network(VITS, **VIT).state_dict()), "dino_deitsmall16_pretrain.pth")
    for arch in (None, VITS):
        backbone = load_backbone(file, arch=arch, model_args=VIT)
        assert (backbone.arch, backbone.preprocessing.mean) == ("vit_small_patch16_224.dino", IMAGENET_MEAN)


def test_a_wrong_name_in_a_file_is_no_excuse(tmp_path: Path):
    saved = {"arch": "resnet18", "state_dict": network("resnet50", **RESNET).state_dict()}
    with pytest.raises(UserError, match=r"does not fit resnet18 \(its arch\)"):
        load_backbone(save(tmp_path, saved))


def test_the_student_is_not_taken_for_the_teacher(tmp_path: Path):
    source = network(VITS, **VIT)
    saved = dino_full(dict(source.state_dict()))
    backbone = load_backbone(save(tmp_path, saved), arch=VITS, model_args=VIT)
    assert backbone.origin.container == "teacher"
    only = {"student": saved["student"]}
    with pytest.raises(UserError, match="holds no weights"):
        load_backbone(save(tmp_path, only), arch=VITS, model_args=VIT)


# timm's own format


def hub_folder(folder: Path, source: torch.nn.Module) -> None:
    shown = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 64, 64], "crop_pct": 0.9, "tag": "mine"}
    config = {"architecture": "resnet50", "num_classes": 3, "model_args": RESNET, "pretrained_cfg": shown}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(source.state_dict()) | {"fc.weight": torch.ones(3, 128)}, folder / "model.safetensors")


def assert_from_hub(backbone: Backbone, source: torch.nn.Module) -> None:
    assert_equal(backbone, source, 64)
    used = backbone.preprocessing
    assert (used.size, used.mean, used.crop_pct) == ((64, 64), (0.1, 0.2, 0.3), 0.9)
    assert (backbone.origin.preprocessing, backbone.origin.dropped) == ("the file's own", ("fc",))


def test_local_folder_in_the_format_of_timms_hub(tmp_path: Path):
    source = network("resnet50", **RESNET)
    hub_folder(tmp_path / "model", source)
    assert_from_hub(load_backbone(f"local-dir:{tmp_path / 'model'}"), source)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"cannot load local-dir:.* as a timm model") as error:
        load_backbone(f"local-dir:{tmp_path / 'model'}")
    assert "\n" not in str(error.value)


def test_hub_model_from_the_hubs_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    source = network("resnet50", **RESNET)
    cached = tmp_path / "models--somebody--resnet"
    hub_folder(cached / "snapshots" / ("0" * 40), source)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_from_hub(load_backbone("hf-hub:somebody/resnet"), source)
    with pytest.raises(UserError, match="cannot load hf-hub:somebody/absent as a timm model") as error:
        load_backbone("hf-hub:somebody/absent")
    assert "\n" not in str(error.value)


# Names


def test_parts_are_the_modules_that_keys_belong_to():
    keys = ["fc.weight", "decoder.0.bias", "decoder.1.bias", "teacher.head.mlp.0.weight", "queue", *mlp("head", 3)]
    assert parts(keys) == ["fc", "decoder", "teacher.head", "queue", "head.0", "head.1"]
