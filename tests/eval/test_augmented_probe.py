"""Probes on augmented images: heads against plain loops over the same images, resuming, two processes, what is told."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convscope.core.backbone import Backbone, create_backbone
from convscope.core.config import parse_assignments
from convscope.core.data.shard_set import open_shards
from convscope.core.data.stream import train_batches
from convscope.core.data.transforms import Normalize, crop_flip
from convscope.core.errors import UserError
from convscope.core.results import load_result
from convscope.core.training.config import Hook, LoopState
from convscope.core.training.loop import train
from convscope.eval import augmented_probe as module
from convscope.eval.augmented_probe import augmented_probe, build_probe
from convscope.eval.linear_probe import LinearProbeCommand
from convscope.eval.probe_objective import FrozenProbe, LinearHeads
from tests.eval.probes import VIT, command
from tests.processes import run_on_two

CLASSES = torch.arange(4)


def small_vit() -> Backbone:
    return create_backbone("vit_tiny_patch16_224", parse_assignments(VIT), seed=0)


def batches(data: str, backbone: Backbone, steps: int, interpolation: str) -> Iterator[tuple[Tensor, Tensor]]:
    """16 images and labels of every step, as a plain loop would read them."""
    preprocessing = backbone.preprocessing
    normalize = Normalize(preprocessing.mean, preprocessing.std)
    transform = crop_flip(32, scale=(0.08, 1.0), interpolation=interpolation)
    shards = open_shards(data, "train")
    for batch in train_batches(shards, transform, batch_size=16, seed=0, stop=steps * 16, label="cls"):
        yield normalize(batch["image"]), batch["label"]


def blocks_of(backbone: Backbone, images: Tensor) -> list[Tensor]:
    """Normed tokens of every block, by hooks."""
    found: list[Tensor] = []
    handles = [b.register_forward_hook(lambda _, __, out: found.append(out)) for b in backbone.model.blocks]
    with torch.no_grad():
        backbone.model.forward_features(images)
        for handle in handles:
            handle.remove()
        return [backbone.model.norm(x) for x in found]


def trained(config: LinearProbeCommand, monkeypatch: pytest.MonkeyPatch) -> tuple[FrozenProbe, FrozenProbe]:
    """The probe as it starts and as it ends."""
    seen: list[Any] = []

    def spy(objective: Any, *arguments: Any) -> Any:
        seen.append(train(objective, *arguments))
        return seen[-1]

    monkeypatch.setattr(module, "train", spy)
    augmented_probe(config)
    return build_probe(small_vit().eval(), CLASSES, config), seen[0]


def plain_loop(
    steps: list[tuple[Tensor, Tensor]],
    layer: nn.Module,
    optimizer: torch.optim.Optimizer,
    factor: Callable[[int], float],
) -> None:
    """Train `layer` on inputs and labels, the learning rate times `factor(step)`."""
    peak = optimizer.param_groups[0]["lr"]
    for step, (x, y) in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * factor(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(layer(x), y).backward()
        optimizer.step()


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], len(weight))
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def test_each_of_the_52_heads_equals_one_trained_alone(
    small_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, end = trained(command(small_shards, tmp_path), monkeypatch)
    assert isinstance(start.heads, LinearHeads)
    assert isinstance(end.heads, LinearHeads)
    assert end.heads.count == 52
    backbone = small_vit().eval()
    seen = [(blocks_of(backbone, images), y) for images, y in batches(small_shards, backbone, 6, "bicubic")]
    for i, (count, pooled) in enumerate([(1, False), (1, True), (4, False), (4, True)]):
        inputs = []
        for blocks, y in seen:
            tokens = [block[:, 0] for block in blocks[-count:]]
            patches = [blocks[-1][:, 3:].mean(1)] if pooled else []
            inputs.append((torch.cat([*tokens, *patches], 1), y))
        for h, lr in enumerate(module.DINOV2_LRS):
            rows = slice(4 * h, 4 * h + 4)
            layer = linear(start.heads.weights[i][rows], start.heads.biases[i][rows])
            assert layer.weight.std().item() == pytest.approx(0.01, rel=0.4)
            assert not layer.bias.any()
            optimizer = torch.optim.SGD(layer.parameters(), lr=lr * 16 / 256, momentum=0.9, weight_decay=0)
            plain_loop(inputs, layer, optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / 6)))
            torch.testing.assert_close(end.heads.weights[i][rows], layer.weight, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(end.heads.biases[i][rows], layer.bias, rtol=1e-4, atol=1e-6)
            assert not torch.equal(end.heads.weights[i][rows], start.heads.weights[i][rows])


class PublishedLars(torch.optim.Optimizer):
    """LARS as MAE's paper uses it: matrices adapt, biases do not; momentum 0.9."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                step = p.grad
                if p.ndim > 1:
                    step = step * (0.001 * p.norm() / step.norm())
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.mul_(0.9).add_(step)
                p.sub_(group["lr"] * velocity)


def test_mae(small_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = command(small_shards, tmp_path, protocol="mae", epochs=24)  # 48 steps, of which 20 warm up
    start, end = trained(config, monkeypatch)
    assert isinstance(start.heads, LinearHeads)
    assert isinstance(end.heads, LinearHeads)
    backbone = small_vit().eval()
    with torch.no_grad():
        seen = [(backbone(images), y) for images, y in batches(small_shards, backbone, 48, "bicubic")]
    norm = nn.BatchNorm1d(24, affine=False, eps=1e-6)
    layer = nn.Sequential(norm, linear(start.heads.weights[0], start.heads.biases[0]))

    def factor(step: int) -> float:
        epoch = step / 2
        return epoch / 10 if epoch < 10 else 0.5 * (1 + math.cos(math.pi * (epoch - 10) / (24 - 10)))

    plain_loop(seen, layer, PublishedLars(layer.parameters(), 0.1 * 16 / 256), factor)
    torch.testing.assert_close(end.heads.weights[0], layer[1].weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(end.heads.biases[0], layer[1].bias, rtol=1e-4, atol=1e-6)
    # the loop's last step has learning rate 0, but its images are seen by the running statistics
    more = list(batches(small_shards, backbone, 49, "bicubic"))[-1][0]
    with torch.no_grad():
        norm(backbone(more))
    torch.testing.assert_close(end.heads.norms[0].running_mean, norm.running_mean)
    torch.testing.assert_close(end.heads.norms[0].running_var, norm.running_var)


def test_lightly(small_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = command(small_shards, tmp_path, protocol="lightly", epochs=3, layers=("blocks.2+pooled",))
    start, end = trained(config, monkeypatch)
    assert isinstance(start.heads, LinearHeads)
    assert isinstance(end.heads, LinearHeads)
    backbone = small_vit().eval()
    inputs = []
    for images, y in batches(small_shards, backbone, 6, "bilinear"):
        with torch.no_grad():
            inputs.append((torch.cat([backbone.feature_maps(images)["blocks.2"].mean((2, 3)), backbone(images)], 1), y))
    layer = linear(start.heads.weights[0], start.heads.biases[0])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1 * 16 / 256, momentum=0.9)
    plain_loop(inputs, layer, optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / 5)))
    torch.testing.assert_close(end.heads.weights[0], layer.weight, rtol=1e-4, atol=1e-6)
    bound = 1 / math.sqrt(48)
    assert 0.8 * bound < start.heads.weights[0].abs().max() <= bound
    result = load_result(tmp_path / "results" / "linear-probe-lightly.json")
    by_step = result.details["top1_by_step"]
    assert list(by_step) == ["2", "4", "6"]
    assert by_step["6"] == result.figures["top1"].value
    assert result.figures["top1_best_epoch"].value == max(by_step.values())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {str(line["step"]): line["eval/top1"] for line in lines if "eval/top1" in line} == by_step


class StopAt(Hook):
    """Dies in the middle."""

    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, state: LoopState) -> None:
        if state.step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("protocol", ["dinov2", "mae", "lightly"])
def test_a_stopped_run_goes_on_exactly(
    protocol: str, small_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"protocol": protocol, "epochs": 4, "checkpoint_every": 2}
    whole = augmented_probe(command(small_shards, tmp_path / "whole", **changes))
    stopping = module._hooks

    def with_stop(*arguments: Any) -> list[Hook]:
        return [*stopping(*arguments), StopAt(5)]

    with monkeypatch.context() as patched:
        patched.setattr(module, "_hooks", with_stop)
        with pytest.raises(KeyboardInterrupt):
            augmented_probe(command(small_shards, tmp_path / "cut", **changes))
    again = augmented_probe(command(small_shards, tmp_path / "cut", **changes, batch_size=5))
    assert whole is not None
    assert again is not None
    assert again.figures == whole.figures
    assert again.details["heads"] == whole.details["heads"]
    assert again.details.get("top1_by_step") == whole.details.get("top1_by_step")
    with pytest.raises(UserError, match="holds a run with other settings"):
        augmented_probe(command(small_shards, tmp_path / "cut", **changes, seed=1))


def on_process(rank: int, data: str, folder: str) -> Any:
    found = {}
    for protocol in ("dinov2", "mae", "lightly"):
        config = command(data, Path(folder) / protocol, protocol=protocol, epochs=3)
        result = augmented_probe(config)
        found[protocol] = None if result is None else [row["top1"] for row in result.details["heads"]]
    return found


def test_two_processes_are_one(small_shards: str, tmp_path: Path) -> None:
    one = on_process(0, small_shards, str(tmp_path / "one"))
    main, other = run_on_two(on_process, tmp_path, small_shards, str(tmp_path / "two"))
    assert main == one
    assert set(other.values()) == {None}
    for protocol in ("dinov2", "mae", "lightly"):
        states = [
            torch.load(sorted((tmp_path / folder / protocol / "checkpoints").glob("*.pt"))[-1], weights_only=True)
            for folder in ("one", "two")
        ]
        for name, value in states[0]["model"].items():
            torch.testing.assert_close(states[1]["model"][name], value, rtol=1e-4, atol=1e-6)


def test_the_backbone_stays_as_it_is(small_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = command(
        small_shards, tmp_path, model="timm:resnet18_cifar@random", model_args=("channels=8,8,16,16",), iterations=2
    )
    seen: list[Any] = []
    monkeypatch.setattr(module, "train", lambda objective, *rest: seen.append(train(objective, *rest)) or seen[-1])
    result = augmented_probe(config)
    assert result is not None
    start = create_backbone("resnet18_cifar", {"channels": (8, 8, 16, 16)}, seed=0)
    assert seen[0].backbone.weights_hash() == start.weights_hash() == result.model["weights_hash"]
    assert [row["input"] for row in result.details["heads"]] == ["stages=1"] * 13 + ["stages=4"] * 13
    seen[0].train()
    assert not seen[0].backbone.training
    assert not any(parameter.requires_grad for parameter in seen[0].backbone.parameters())
