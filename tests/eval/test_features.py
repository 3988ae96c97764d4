"""Features: equal to the network's own, in one pass, cached by everything that they depend on."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from convscope.core.backbone import Backbone, create_backbone
from convscope.core.data.decode import decode
from convscope.core.data.shard_set import open_shards
from convscope.core.data.transforms import Normalize, eval_transform
from convscope.core.errors import UserError
from convscope.eval.features import Features, extract, pool_map, resolve_layers

SIZE = 32


def at_size(backbone: Backbone) -> Backbone:
    backbone.preprocessing = dataclasses.replace(backbone.preprocessing, size=(SIZE, SIZE))
    return backbone


def resnet(seed: int = 0) -> Backbone:
    return at_size(create_backbone("resnet10t", seed=seed))


def vit() -> Backbone:
    return create_backbone("vit_tiny_patch16_224", {"depth": 3, "img_size": SIZE, "reg_tokens": 2}, seed=0)


def images(backbone: Backbone, data: str, split: str = "test") -> Tensor:
    shards, p = open_shards(data, split), backbone.preprocessing
    transform = eval_transform(p)
    return Normalize(p.mean, p.std)(torch.stack([transform(decode(shards[i])) for i in range(len(shards))]))


def run(backbone: Backbone, data: str, cache: Path | None = None, **options: object) -> dict[str, Features]:
    settings: dict[str, object] = {"batch_size": 5, "workers": 0, "device": "cpu", "cache": cache, **options}
    return extract(backbone, open_shards(data, "test"), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("build", [resnet, vit])
def test_all_layers_are_the_networks_own(build: object, small_shards: str) -> None:
    backbone: Backbone = build().eval()  # type: ignore[operator]
    found = run(backbone, small_shards, layers=["all"])
    pixels = images(backbone, small_shards)
    with torch.no_grad():
        maps, pooled = backbone.feature_maps(pixels), backbone(pixels)
    assert list(found) == [*maps, "pooled"]
    for name, feature_map in maps.items():
        torch.testing.assert_close(found[name].x, feature_map.mean((2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["pooled"].x, pooled, rtol=1e-4, atol=1e-5)
    for each in found.values():
        assert each.x.dtype == torch.float32
        assert each.keys == [f"{i:08d}" for i in range(12)]
        assert each.y is not None
        assert each.y.tolist() == [i % 4 for i in range(12)]


def test_only_what_is_asked_in_network_order(small_shards: str) -> None:
    backbone = resnet()
    together = run(backbone, small_shards, layers=["pooled", "last", "layer1"])
    assert list(together) == ["layer1", "layer4", "pooled"]
    for name in ("layer1", "pooled"):
        alone = run(backbone, small_shards, layers=[name])
        torch.testing.assert_close(alone[name].x, together[name].x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pool", ["avg", "max", "gem"])
def test_pooling(pool: str) -> None:
    values = torch.rand(2, 3, 4, 5) - 0.2
    for b in range(2):
        for c in range(3):
            flat = values[b, c].flatten().tolist()
            gem = (sum(max(v, 1e-6) ** 3 for v in flat) / 20) ** (1 / 3)
            expected = {"avg": sum(flat) / 20, "max": max(flat), "gem": gem}[pool]
            assert pool_map(values, pool)[b, c].item() == pytest.approx(expected, rel=1e-5)  # type: ignore[arg-type]


def test_class_token(small_shards: str) -> None:
    backbone = vit().eval()
    last = backbone.stages[-1].name
    found = run(backbone, small_shards, layers=["last", "pooled"], pool="cls")
    with torch.no_grad():  # this network pools by the class token, after its final norm
        torch.testing.assert_close(backbone.model.norm(found[last].x), found["pooled"].x, rtol=1e-4, atol=1e-5)
        pooled = backbone(images(backbone, small_shards))
    torch.testing.assert_close(found["pooled"].x, pooled, rtol=1e-4, atol=1e-5)


def test_what_a_network_cannot_give_is_told() -> None:
    with pytest.raises(UserError, match="resnet10t has no class token"):
        resolve_layers(resnet(), ["last"], "cls")
    without = create_backbone("vit_tiny_patch16_224", {"depth": 1, "class_token": False, "global_pool": "avg"}, seed=0)
    with pytest.raises(UserError, match="no class token"):
        resolve_layers(without, ["last"], "cls")
    with pytest.raises(UserError, match=r"no layer layer9.*layer4"):
        resolve_layers(resnet(), ["layer9", "pooled"])
    with pytest.raises(UserError, match="does nothing for layer pooled"):
        resolve_layers(resnet(), ["pooled"], "max")
    with pytest.raises(UserError, match="at least one layer"):
        resolve_layers(resnet(), [])


def test_training_state_and_random_state_are_left_alone(small_shards: str) -> None:
    backbone = resnet().train()
    backbone.model.layer1.eval()
    before = {name: module.training for name, module in backbone.named_modules()}
    weights, state = backbone.weights_hash(), torch.get_rng_state()
    found = run(backbone, small_shards)
    assert {name: module.training for name, module in backbone.named_modules()} == before
    assert backbone.weights_hash() == weights  # the batch norms' running statistics too
    assert torch.equal(torch.get_rng_state(), state)
    (found["pooled"].x @ torch.ones(512, 1, requires_grad=True)).sum().backward()  # not tied to inference mode


def test_bfloat16_is_near_float32(small_shards: str) -> None:
    backbone = resnet()
    exact, rough = (run(backbone, small_shards, precision=p)["pooled"].x for p in ("fp32", "bf16"))
    assert rough.dtype == torch.float32
    assert 1e-5 < (exact - rough).norm() / exact.norm() < 0.05


def files(folder: Path) -> set[Path]:
    return set(folder.glob("**/*.npy"))


def test_cache_serves_any_label_and_computes_only_missing_layers(small_shards: str, tmp_path: Path) -> None:
    backbone, passes = resnet(), []
    backbone.model.conv1.register_forward_hook(lambda *_: passes.append(1))
    first = run(backbone, small_shards, tmp_path, layers=["layer1"], batch_size=12)
    (kept,) = files(tmp_path)
    written = kept.stat().st_mtime_ns
    assert len(passes) == 2  # of one blank image, whose features are measured, and of all images
    run(backbone, small_shards, tmp_path, layers=["layer1"])
    assert len(passes) == 2
    both = run(backbone, small_shards, tmp_path, layers=["layer1", "pooled"], label="parity", batch_size=12)
    assert len(passes) == 4
    assert kept.stat().st_mtime_ns == written
    assert len(files(tmp_path)) == 2
    assert torch.equal(both["layer1"].x, first["layer1"].x)
    assert both["layer1"].keys == first["layer1"].keys
    assert both["pooled"].y is not None
    assert both["pooled"].y.tolist() == [i % 2 for i in range(12)]
    assert run(backbone, small_shards, tmp_path, label=None)["pooled"].y is None
    assert len(passes) == 4


def test_cache_tells_apart_what_changes_features(small_shards: str, tmp_path: Path) -> None:
    backbone = resnet()
    count = 0
    other_crop = resnet()
    other_crop.preprocessing = dataclasses.replace(backbone.preprocessing, crop_pct=0.7)
    for one, options in [
        (backbone, {"layers": ["layer1"]}),
        (backbone, {"layers": ["layer2"]}),
        (backbone, {"layers": ["layer1"], "pool": "max"}),
        (backbone, {"layers": ["layer1"], "precision": "bf16"}),
        (resnet(seed=1), {"layers": ["layer1"]}),
        (other_crop, {"layers": ["layer1"]}),
    ]:
        run(one, small_shards, tmp_path, **options)
        count += 1
        assert len(files(tmp_path)) == count
    extract(backbone, open_shards(small_shards, "train"), layers=["layer1"], workers=0, device="cpu", cache=tmp_path)
    assert len(files(tmp_path)) == count + 1
    run(backbone, small_shards, tmp_path, layers=["layer1"], batch_size=12)  # this changes nothing
    assert len(files(tmp_path)) == count + 1


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty", "short", "keys"])
def test_a_damaged_cache_file_is_computed_anew(
    damage: str, small_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = resnet()
    first = run(backbone, small_shards, tmp_path)["pooled"]
    before = first.x.clone()  # the map would show the damage
    (kept,) = files(tmp_path)
    whole, keys = kept.read_bytes(), kept.with_name("keys.json")
    if damage == "truncated":
        kept.write_bytes(whole[:-100])
    elif damage == "foreign":
        kept.write_bytes(b"not an array of numbers")
    elif damage == "empty":
        kept.write_bytes(b"")
    elif damage == "short":
        np.save(kept, np.load(kept)[:3])
    else:
        keys.write_text(keys.read_text()[:-1])
    again = run(backbone, small_shards, tmp_path)["pooled"]
    assert torch.equal(again.x, before)
    assert again.keys == first.keys
    assert kept.read_bytes() == whole
    assert ("computed anew" in capsys.readouterr().err) == (damage != "keys")
    assert list(kept.parent.glob("*.part")) == list(kept.parent.glob("*.done")) == []


def test_features_that_are_no_numbers_are_told(small_shards: str, tmp_path: Path) -> None:
    backbone = resnet().train()
    backbone.model.layer3[0].conv1.weight.data[0] = float("inf")
    with pytest.raises(UserError, match=r"layer3 of .* gives NaN or infinity for sample 00000000"):
        run(backbone, small_shards, tmp_path, layers=["layer2", "layer3"])
    assert sorted(path.name for path in tmp_path.glob("*/*")) == [".lock", "about.json"]
    assert backbone.model.layer1.training


def test_the_first_sample_without_numbers_is_named(small_shards: str) -> None:
    backbone, batches = resnet(), []

    def spoil(module: object, given: object, out: Tensor) -> Tensor:
        batches.append(len(out))
        if batches == [1, 5, 5]:  # a blank image, five, five
            out[2] = torch.nan
        return out

    backbone.model.layer1.register_forward_hook(spoil)
    with pytest.raises(UserError, match=r"layer layer1 of .* for sample 00000007; is it trained well"):
        run(backbone, small_shards, layers=["layer1", "pooled"])


def test_half_precision_keeps_rounded_numbers_or_refuses(small_shards: str, tmp_path: Path) -> None:
    backbone = resnet()
    exact = run(backbone, small_shards, tmp_path)["pooled"].x
    half = run(backbone, small_shards, tmp_path, store="fp16")["pooled"].x
    assert half.dtype == torch.float16
    assert torch.equal(half, exact.half())
    assert len(files(tmp_path)) == 2  # one of each
    backbone.model.global_pool.register_forward_hook(lambda *given: given[-1] * 1e6)
    with pytest.raises(UserError, match=r"for sample 00000000, more than fp16 holds \(65504\); use --store fp32"):
        run(backbone, small_shards, store="fp16")
    assert run(backbone, small_shards)["pooled"].x.max() > 65504


def test_a_missing_label_is_told(small_shards: str) -> None:
    with pytest.raises(UserError, match="colour"):
        run(resnet(), small_shards, label="colour")
