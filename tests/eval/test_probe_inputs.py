"""What heads of augmented probes see, against hooks on the network."""

import pytest
import torch
from torch import Tensor, nn

from convscope.core.backbone import Backbone, create_backbone
from convscope.core.errors import UserError
from convscope.eval.features import pool_map
from convscope.eval.probe_inputs import block_inputs, layer_inputs, position_inputs

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 5, "num_heads": 2}


def hooked(backbone: Backbone, images: Tensor, modules: list[nn.Module]) -> list[Tensor]:
    """Outputs of modules in one plain forward pass."""
    found: dict[int, Tensor] = {}
    handles = [m.register_forward_hook(lambda _, __, out, i=i: found.update({i: out})) for i, m in enumerate(modules)]
    with torch.no_grad():
        backbone.model.forward_features(images)
    for handle in handles:
        handle.remove()
    return [found[i] for i in range(len(modules))]


@pytest.mark.parametrize("extra", [{}, {"reg_tokens": 3}, {"reg_tokens": 2, "init_values": 0.5, "global_pool": "avg"}])
def test_blocks_are_dinov2s(extra: dict[str, object]) -> None:
    backbone = create_backbone("vit_tiny_patch16_224", {**VIT, **extra}, seed=0).eval()
    nn.init.normal_(backbone.model.cls_token)
    for parameter in backbone.model.norm.parameters():
        nn.init.normal_(parameter)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        blocks = [backbone.model.norm(x) for x in hooked(backbone, images, list(backbone.model.blocks))]
    prefix = 1 + int(str(extra.get("reg_tokens", 0)))
    tokens = [x[:, 0] for x in blocks]
    patches = blocks[-1][:, prefix:].mean(1)
    expected = {
        "blocks=1 avgpool=no": tokens[-1],
        "blocks=1 avgpool=yes": torch.cat([tokens[-1], patches], 1),
        "blocks=4 avgpool=no": torch.cat(tokens[-4:], 1),
        "blocks=4 avgpool=yes": torch.cat([*tokens[-4:], patches], 1),
    }
    inputs = block_inputs(backbone)
    assert list(inputs.inputs) == list(expected)
    for found, wanted in zip(inputs(backbone, images), expected.values()):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert inputs.widths(backbone) == [24, 48, 96, 120]


def test_blocks_without_class_tokens_are_stages() -> None:
    backbone = create_backbone("resnet10t", seed=0).eval()
    images = torch.randn(2, 3, 64, 64)
    model = backbone.model
    maps = hooked(backbone, images, [model.layer1, model.layer2, model.layer3, model.layer4])
    inputs = block_inputs(backbone)
    assert list(inputs.inputs) == ["stages=1", "stages=4"]
    last, all_four = inputs(backbone, images)
    torch.testing.assert_close(last, maps[-1].mean((2, 3)))
    torch.testing.assert_close(all_four, torch.cat([x.mean((2, 3)) for x in maps], 1))


@pytest.mark.parametrize("arch", ["resnet10t", "convnext_atto"])
@pytest.mark.parametrize("pool", ["avg", "max", "gem"])
def test_layers_are_those_of_extracted_features(arch: str, pool: str) -> None:
    backbone = create_backbone(arch, seed=0).eval()
    first, last = backbone.stages[-2].name, backbone.stages[-1].name
    images = torch.randn(2, 3, 64, 64)
    inputs = layer_inputs(backbone, [f"{last}+{first}", "pooled", first], pool)  # type: ignore[arg-type]
    maps = {name: pool_map(x, pool) for name, x in backbone.feature_maps(images).items()}  # type: ignore[arg-type]
    found = dict(zip(inputs.inputs, inputs(backbone, images)))
    assert list(found) == [first, "pooled", f"{last}+{first}"]
    torch.testing.assert_close(found[first], maps[first])
    torch.testing.assert_close(found["pooled"], backbone(images))
    torch.testing.assert_close(found[f"{last}+{first}"], torch.cat([maps[last], maps[first]], 1))
    assert all(not x.requires_grad for x in found.values())


def test_class_tokens_of_layers() -> None:
    backbone = create_backbone("vit_tiny_patch16_224", VIT, seed=0).eval()
    images = torch.randn(2, 3, 32, 32)
    block = hooked(backbone, images, [backbone.model.blocks[1]])[0]
    (found,) = layer_inputs(backbone, ["blocks.1"], "cls")(backbone, images)
    torch.testing.assert_close(found, block[:, 0])


def test_positions_of_a_stage() -> None:
    images = torch.randn(2, 3, 32, 32)
    vit = create_backbone("vit_tiny_patch16_224", {**VIT, "reg_tokens": 3}, seed=0).eval()
    block = hooked(vit, images, [vit.model.blocks[-1]])[0]
    (found,) = position_inputs(vit, [])(vit, images)
    torch.testing.assert_close(found, block[:, 4:])
    resnet = create_backbone("resnet10t", seed=0).eval()
    (layer2,) = hooked(resnet, images, [resnet.model.layer2])
    (found,) = position_inputs(resnet, ["layer2"])(resnet, images)
    assert found.shape == (2, 16, 128)
    torch.testing.assert_close(found[:, 5], layer2[:, :, 1, 1])
    for layers in (["layer1", "layer2"], ["pooled"], ["layer1+layer2"], ["all"]):
        with pytest.raises(UserError, match="one stage"):
            position_inputs(resnet, layers)
