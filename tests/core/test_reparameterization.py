"""`export backbone --reparameterize`: the file's network computes what the trained one does."""

from pathlib import Path

import pytest
import timm
import torch

from convscope.core.backbone import Backbone, create_backbone
from convscope.core.errors import UserError
from convscope.core.export import ExportBackbone, run_backbone
from convscope.core.models import load_backbone, save_backbone
from convscope.core.reparameterization import reparameterized

SMALL = {
    "unireplknet_a": {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 20)},
    "replknet_31b": {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 20)},
    "fastvit_t8": {"layers": (1, 1, 1, 1), "embed_dims": (8, 16, 32, 64)},
}


def trained(arch: str) -> Backbone:
    """A backbone in which every branch matters and BatchNorm has seen images."""
    backbone = create_backbone(arch, SMALL[arch], seed=0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        backbone.train()(torch.randn(2, 3, 64, 64))
    return backbone.eval()


@pytest.mark.parametrize("arch", SMALL)
def test_exported_file_loads_and_computes_the_same(arch: str, tmp_path: Path):
    before, images = trained(arch), torch.randn(2, 3, 96, 64)
    save_backbone(tmp_path / "trained.safetensors", before)
    output = tmp_path / "merged.safetensors"
    run_backbone(ExportBackbone(model=str(tmp_path / "trained.safetensors"), output=output, reparameterize=True))
    after = load_backbone(str(output)).eval()
    assert after.model_args["inference_mode"] is True
    with torch.no_grad():
        expected = before(images)
        torch.testing.assert_close(after(images), expected, rtol=0, atol=1e-4 * expected.std().item())
        alone = timm.create_model(arch, num_classes=0, checkpoint_path=str(output), inference_mode=True, **SMALL[arch])
        assert torch.equal(alone.eval()(images), after(images))
    with pytest.raises(UserError, match="already"):
        reparameterized(after)


def test_network_without_such_a_form_is_refused_by_name():
    with pytest.raises(UserError, match="resnet18 has no form for inference") as error:
        reparameterized(create_backbone("resnet18", {"channels": (4, 4, 4, 4)}))
    assert "\n" not in str(error.value)
