"""Layer-wise learning rates against the published rules, written out."""

import pytest
from torch import nn

from convscope.core.backbone import create_backbone
from convscope.core.errors import UserError
from convscope.core.training.layer_decay import lr_scales
from convscope.core.training.objective import Objective
from convscope.core.training.optimization import OptimizerConfig, Schedule, build_optimizer

SMALL = {"layers": (3, 4, 6, 3), "channels": (4, 4, 4, 4)}


def resnet_layer(name: str) -> int:
    """SparK's grouping of a ResNet-50: 0 to 6, the classifier is 7."""
    if not name.startswith("layer"):
        return 0
    stage, block = int(name[5]), int(name.split(".")[1])
    return {1: 1, 2: 2 + block // 2, 3: 4 + block // 3, 4: 6}[stage]


def convnext_layer(name: str, depth: int) -> int:
    """ConvNeXt's grouping, in which a down-sampling belongs to what follows; the head is one more."""
    if name.startswith("stem"):
        return 0
    last = 3 + -(-depth // 3)
    if name.startswith("head"):
        return last + 1
    stage = int(name.split(".")[1])
    block = int(name.split(".")[3]) if "blocks" in name else 0
    return {0: 1, 1: 2, 2: 3 + block // 3, 3: last}[stage]


def test_resnet50_is_grouped_as_spark_does() -> None:
    scales = lr_scales(create_backbone("resnet50", SMALL), 0.7, (3, 2, 3, 3))
    assert scales == pytest.approx({name: 0.7 ** (7 - resnet_layer(name)) for name in scales})
    assert len(set(scales.values())) == 7


@pytest.mark.parametrize("depth", [9, 27])
def test_convnext_is_grouped_as_published(depth: int) -> None:
    backbone = create_backbone("convnext_tiny", {"depths": (3, 3, depth, 3), "dims": (4, 4, 4, 4)})
    scales = lr_scales(backbone, 0.7, (3, 3, 3, 3))
    top = 3 + -(-depth // 3) + 1
    assert scales == pytest.approx({name: 0.7 ** (top - convnext_layer(name, depth)) for name in scales})


def test_every_block_of_a_transformer_is_a_layer() -> None:
    scales = lr_scales(create_backbone("vit_tiny_patch16_224", {"depth": 3, "embed_dim": 12, "num_heads": 2}), 0.5)
    assert scales["pos_embed"] == scales["patch_embed.proj.weight"] == 0.5**4
    assert [scales[f"blocks.{i}.attn.qkv.weight"] for i in range(3)] == [0.5**3, 0.5**2, 0.5]


def test_the_optimizer_and_the_schedule_keep_to_them() -> None:
    class Toy(Objective):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = create_backbone("resnet50", SMALL)
            self.head = nn.Linear(4, 2)

    toy, config = Toy(), OptimizerConfig(optimizer="adamw", layer_decay=0.7, lr=0.1, warmup_epochs=0, lr_end=0.0)
    optimizer = build_optimizer(toy, config, 256)
    schedule = Schedule(optimizer, config, steps=11, warmup_steps=0)
    scales = lr_scales(toy.backbone, 0.7)
    for step, factor in ((0, 1.0), (5, 0.5), (10, 0.0)):
        schedule.set(step)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in toy.backbone.model.named_parameters():
            assert rates[id(parameter)] == pytest.approx(0.1 * factor * scales[name], abs=1e-12)
        assert rates[id(toy.head.weight)] == pytest.approx(0.1 * factor, abs=1e-12)
        assert schedule.values()["lr"] == pytest.approx(0.1 * factor, abs=1e-12)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(toy.backbone.model.layer1[0].bn1.weight)] == 0 < decays[id(toy.head.weight)]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(toy.parameters()))


def test_nonsense_is_refused() -> None:
    with pytest.raises(UserError, match="number for each stage: resnet50 has 4"):
        lr_scales(create_backbone("resnet50", SMALL), 0.7, (3, 3))
    with pytest.raises(UserError, match="layer-decay"):
        OptimizerConfig(layer_decay=1.5)
