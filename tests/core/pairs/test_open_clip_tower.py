"""Image towers of open_clip as backbones: the features are open_clip's own."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer

from convscope.core.backbone import Backbone
from convscope.core.errors import UserError
from convscope.core.models import load_backbone

TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 8}
TIMM = {"timm_model_name": "resnet18_cifar", "timm_pool": "", "timm_proj": "linear", "image_size": 32}
SHOWN = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "resize_mode": "squash"}


def save_folder(folder: Path, vision: dict[str, Any], **model: Any) -> Any:
    """A model with random weights in open_clip's format; the model as open_clip loads it."""
    folder.mkdir()
    config = {"model_cfg": {"embed_dim": 12, "vision_cfg": vision, "text_cfg": TEXT, **model}, "preprocess_cfg": SHOWN}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    built = open_clip.CustomTextCLIP if "timm_model_name" in vision else open_clip.CLIP
    written = built(embed_dim=12, vision_cfg=vision, text_cfg=TEXT, quick_gelu=model.get("quick_gelu", False))
    torch.save(written.state_dict(), folder / "open_clip_pytorch_model.bin")
    return open_clip.create_model(f"local-dir:{folder}").eval()


@pytest.mark.parametrize("quick", [False, True])
def test_transformer_of_a_folder(quick: bool, tmp_path: Path):
    model = save_folder(tmp_path / "clip", VIT, **({"quick_gelu": True} if quick else {}))
    backbone = load_backbone(f"open_clip:{tmp_path / 'clip'}").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images) @ model.visual.proj, model.visual(images), rtol=1e-4, atol=1e-5)
    assert ("quickgelu" in backbone.arch) == quick
    assert (backbone.num_features, [stage.stride for stage in backbone.stages]) == (32, [16, 16])
    used = backbone.preprocessing
    assert (used.size, used.mean, used.crop_mode, used.crop_pct) == ((32, 32), (0.1, 0.2, 0.3), "squash", 1.0)
    assert (backbone.matched, backbone.origin.layout) == (1.0, "open_clip")
    assert {"text tower", "visual.proj"} <= set(backbone.origin.dropped)


def test_tower_that_is_timms_own(tmp_path: Path):
    model = save_folder(tmp_path / "clip", TIMM, custom_text=True)
    backbone = load_backbone(f"open_clip:{tmp_path / 'clip'}").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.visual.head(backbone(images)), model.visual(images))
    assert (backbone.arch, backbone.origin.layout) == ("resnet18_cifar", "open_clip, timm tower")


def file_of(tower: torch.nn.Module, path: Path) -> str:
    state = {f"visual.{key}": value for key, value in tower.state_dict().items()}
    torch.save({"state_dict": state | {"logit_scale": torch.ones(())}}, path)
    return str(path)


def vit_tower(act_layer: type = torch.nn.GELU) -> VisionTransformer:
    return VisionTransformer(32, 16, 64, 2, 2, 4.0, output_dim=12, act_layer=act_layer).eval()


@pytest.mark.parametrize("name", ["vit_base_patch32_clip_224", "vit_base_patch32_clip_quickgelu_224"])
def test_transformer_in_a_file_takes_its_activation_from_the_architecture(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tower = vit_tower(QuickGELU if "quick" in name else torch.nn.GELU)
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2}
    backbone = load_backbone(file_of(tower, tmp_path / "clip.pt"), arch=name, model_args=sizes).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images) @ tower.proj, tower(images), rtol=1e-4, atol=1e-5)
    assert ("need the _quickgelu_ architecture" in capsys.readouterr().err) == ("quick" not in name)


def test_modified_resnet_of_a_folder_and_of_its_file(tmp_path: Path):
    vision = {"layers": [3, 4, 6, 3], "width": 64, "image_size": 64}
    tower = save_folder(tmp_path / "clip", vision).visual
    backbone = load_backbone(f"open_clip:{tmp_path / 'clip'}").eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(tower.attnpool.c_proj(backbone(images)), tower(images), rtol=1e-3, atol=1e-5)
    assert (backbone.arch, backbone.preprocessing.size) == ("resnet50_clip", (64, 64))
    file = tmp_path / "clip" / "open_clip_pytorch_model.bin"
    from_file = load_backbone(str(file), arch="resnet50_clip", model_args={"img_size": (64, 64)})
    assert from_file.weights_hash() == backbone.weights_hash()
    assert from_file.preprocessing == backbone.preprocessing


def test_positions_for_another_image_size_are_resampled_on_demand(tmp_path: Path):
    save_folder(tmp_path / "clip", VIT)
    backbone = load_backbone(f"open_clip:{tmp_path / 'clip'}", model_args={"img_size": 64})
    assert isinstance(backbone, Backbone)
    assert (backbone.preprocessing.size, backbone.origin.resampled) == ((64, 64), ("pos_embed",))


def test_average_pooling_of_a_tower(tmp_path: Path):
    model = save_folder(tmp_path / "clip", {**VIT, "pool_type": "avg"})
    backbone = load_backbone(f"open_clip:{tmp_path / 'clip'}").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images) @ model.visual.proj, model.visual(images), rtol=1e-4, atol=1e-5)


def test_what_timm_cannot_compute_is_refused(tmp_path: Path):
    save_folder(tmp_path / "clip", {**VIT, "attentional_pool": True, "attn_pooler_heads": 2})
    with pytest.raises(UserError, match="left over") as error:
        load_backbone(f"open_clip:{tmp_path / 'clip'}")
    save_folder(tmp_path / "late", {**VIT, "pool_type": "avg", "final_ln_after_pool": True})
    with pytest.raises(UserError, match="computes other features") as late:
        load_backbone(f"open_clip:{tmp_path / 'late'}")
    assert "\n" not in str(error.value) + str(late.value)
