"""Layers side by side."""

import pytest
import torch

from convscope.core.backbone import create_backbone
from convscope.core.data.shard_set import open_shards
from convscope.core.errors import UserError
from convscope.eval.common import FrozenFeatures, extract_both
from convscope.eval.layers import wanted_layers


def test_a_concatenation_is_both_layers_side_by_side(small_shards: str) -> None:
    backbone = create_backbone("resnet10t", seed=0)
    shards = [open_shards(small_shards, split) for split in ("train", "test")]
    config = FrozenFeatures(
        model="unused", data=small_shards, layers=("layer1+last", "layer1", "layer4", "pooled+layer2"), workers=0
    )
    both = extract_both(backbone, *shards, config, "cpu")
    assert list(both) == ["layer1", "layer4", "layer1+layer4", "pooled+layer2"]
    for part in (0, 1):
        one, other, joined = (both[name][part] for name in ("layer1", "layer4", "layer1+layer4"))
        assert torch.equal(joined.x, torch.cat([one.x, other.x], 1))
        assert joined.y is not None
        assert torch.equal(joined.y, one.y if one.y is not None else joined.y + 1)
    assert both["pooled+layer2"][0].x.shape == (32, 512 + 128)


def test_what_cannot_be_concatenated_is_told() -> None:
    backbone = create_backbone("resnet10t", seed=0)
    for name in ("layer4+last", "all+layer1"):
        with pytest.raises(UserError, match="names a layer twice"):
            wanted_layers(backbone, [name], "avg")
    with pytest.raises(UserError, match="no layer layer9"):
        wanted_layers(backbone, ["layer1+layer9"], "avg")
    with pytest.raises(UserError, match="at least one layer"):
        wanted_layers(backbone, [], "avg")
