"""torchvision's transformers and ConvNeXt compute the same in timm."""

from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.models.convnext import CNBlockConfig

from convscope.core.models import load_backbone
from tests.core.layouts import save

TORCHVISION = {
    "ViT": (
        lambda: torchvision.models.VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=3),
        "vit_base_patch16_224",
        {"img_size": 32, "depth": 2, "num_heads": 2, "embed_dim": 32, "mlp_ratio": 2},
    ),
    "ConvNeXt": (
        lambda: torchvision.models.ConvNeXt(
            [CNBlockConfig(4, 8, 2), CNBlockConfig(8, 12, 1), CNBlockConfig(12, 16, 1), CNBlockConfig(16, None, 1)],
            layer_scale=1.0,
        ),
        "convnext_tiny",
        {"depths": (2, 1, 1, 1), "dims": (4, 8, 12, 16)},
    ),
    "Swin": (
        lambda: torchvision.models.SwinTransformer([4, 4], 8, [2, 2], [2, 2], [4, 4], num_classes=3),
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "depths": (2, 2), "embed_dim": 8, "num_heads": (2, 2)},
    ),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_computes_the_same(name: str, tmp_path: Path):
    build, arch, model_args = TORCHVISION[name]
    source = build().eval()
    for value in source.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.randn(value.shape) * 0.1)
    backbone = load_backbone(save(tmp_path, source.state_dict()), arch=arch, model_args=model_args).eval()
    assert backbone.origin.layout == f"torchvision {name}"
    last = {"ViT": "heads", "ConvNeXt": "classifier", "Swin": "head"}[name]
    setattr(source, last, getattr(source, last)[:2] if name == "ConvNeXt" else torch.nn.Identity())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), source(images), rtol=1e-4, atol=1e-5)


def test_torchvisions_own_files_are_prepared_as_it_does(tmp_path: Path):
    source = torchvision.models.SwinTransformer([4, 4], 8, [2, 2], [2, 2], [4, 4], num_classes=3)
    file = save(tmp_path, source.state_dict(), "swin_t-704ceda3.pth")
    backbone = load_backbone(file, arch="swin_tiny_patch4_window7_224", model_args=TORCHVISION["Swin"][2])
    used = backbone.preprocessing
    assert (used.crop_pct, used.interpolation, used.size) == (224 / 232, "bicubic", (32, 32))
    file = save(tmp_path, torchvision.models.resnet18().state_dict(), "resnet18-f37072fd.pth")
    used = load_backbone(file, arch="resnet18").preprocessing
    assert (used.crop_pct, used.interpolation, used.size) == (0.875, "bilinear", (224, 224))
