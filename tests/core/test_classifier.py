"""A model's own classifier, wherever it lies."""

from pathlib import Path

import pytest
import timm
import torch
import torchvision

from convscope.core.backbone import create_backbone
from convscope.core.checkpoint import RunDirectory
from convscope.core.classifier import load_classifier, untrained_classifier
from convscope.core.models import load_backbone, save_backbone
from convscope.eval.classification import Classification


@pytest.mark.parametrize("arch", ["test_resnet", "test_convnext", "test_vit"])
def test_a_file_with_a_classifier(arch: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = timm.create_model(arch, num_classes=30).eval()
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    backbone = load_backbone(str(tmp_path / "w.pth"), arch=arch).eval()
    before = backbone.weights_hash()
    classifier = load_classifier(backbone)
    assert classifier is not None
    images = torch.randn(2, 3, *backbone.preprocessing.size)
    with torch.no_grad():
        torch.testing.assert_close(classifier.eval()(images), whole(images))
    assert backbone.weights_hash() == before  # the backbone itself stays without one


def test_torchvisions_names(tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=5).eval()
    torch.nn.init.normal_(whole.heads.head.weight)
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    arguments = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    backbone = load_backbone(str(tmp_path / "w.pth"), arch="vit_tiny_patch16_224", model_args=arguments)
    classifier = load_classifier(backbone)
    assert classifier is not None
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(classifier.eval()(images), whole(images), rtol=1e-4, atol=1e-4)


def test_none_where_there_is_none(tmp_path: Path) -> None:
    backbone = create_backbone("test_resnet", seed=0)
    save_backbone(tmp_path / "b.safetensors", backbone)
    assert load_classifier(load_backbone(str(tmp_path / "b.safetensors"))) is None
    assert load_classifier(backbone) is None  # @random


def test_the_head_of_a_fine_tuned_run(tmp_path: Path) -> None:
    trained = Classification(create_backbone("test_resnet", seed=2), 7).eval()
    torch.nn.init.normal_(trained.head.weight)
    save_backbone(tmp_path / "backbone.safetensors", trained.backbone)
    with RunDirectory(tmp_path) as run:
        run.start_attempt()
        run.save(1, {"model": trained.state_dict(), "ema": None}, keep=1)
    classifier = load_classifier(load_backbone(str(tmp_path)).eval())
    assert classifier is not None
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(classifier(images), trained.logits(images))


def test_an_untrained_one_depends_on_its_seed_alone() -> None:
    backbone = create_backbone("test_resnet", seed=0).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        first, same, other = (untrained_classifier(backbone, 9, seed)(images) for seed in (1, 1, 2))
    assert first.shape == (2, 9)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
