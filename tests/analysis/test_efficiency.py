"""What layers cost, by formula; how time is told apart; what the command writes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from convscope.analysis.efficiency import ROOT, Machine, layer_costs, seconds_by_layer
from convscope.analysis.efficiency_command import EfficiencyCommand, run
from convscope.analysis.latency import latencies, layer_latencies
from convscope.core.backbone import create_backbone
from convscope.core.errors import UserError
from convscope.core.results import load_result


class Residual(nn.Module):
    """x + pointwise(relu(depthwise(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(6, 6, 5, padding=2, groups=6)
        self.act = nn.ReLU()
        self.pointwise = nn.Conv2d(6, 6, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pointwise(self.act(self.depthwise(x)))


class Tiny(nn.Module):
    """A convolution, the residual block twice with the same weights, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.block = Residual()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.block(self.stem(x)))
        return self.head(x.mean((2, 3)))


def test_costs_of_layers_are_their_formulas() -> None:
    b, positions = 2, 8 * 8
    costs = layer_costs(Tiny().eval(), torch.randn(b, 3, 16, 16))
    maps = b * 6 * positions  # elements of each map behind the stem
    macs = {name: cost.macs for name, cost in costs.items()}
    assert macs == {
        "stem": b * positions * 6 * 3 * 9,
        "block.depthwise": 2 * b * positions * 6 * 25,
        "block.act": 0,
        "block.pointwise": 2 * b * positions * 6 * 6,
        "block": 0,
        ROOT: 0,
        "head": b * 6 * 4,
    }
    assert {name: cost.bytes / 4 for name, cost in costs.items()} == {
        "stem": b * 3 * 256 + (6 * 3 * 9 + 6) + maps,
        "block.depthwise": 2 * (maps + (6 * 25 + 6) + maps),
        "block.act": 2 * 2 * maps,
        "block.pointwise": 2 * (maps + 36 + maps),
        "block": 2 * 3 * maps,
        ROOT: maps + b * 6,
        "head": b * 6 + (24 + 4) + b * 4,
    }
    assert costs["block.pointwise"].kind == "Conv2d"


def test_attention_products_count_without_computing_anything() -> None:
    backbone = create_backbone("test_vit", seed=0).eval().to("meta")
    size = backbone.preprocessing.size
    costs = layer_costs(backbone, torch.empty(1, 3, *size, device="meta"))
    width, depth = backbone.model.embed_dim, len(backbone.model.blocks)
    patch = backbone.model.patch_embed.patch_size[0]
    tokens = (size[0] // patch) * (size[1] // patch) + backbone.model.num_prefix_tokens
    hidden = backbone.model.blocks[0].mlp.fc1.out_features
    linear = tokens * (3 * width * width + width * width + 2 * width * hidden)
    products = 2 * tokens * tokens * width
    stem = (size[0] // patch) * (size[1] // patch) * width * 3 * patch * patch
    assert sum(cost.macs for cost in costs.values()) == stem + depth * (linear + products)
    assert costs["model.blocks.0.attn"].macs == products


def test_the_waterline_is_the_larger_of_both_times() -> None:
    costs = layer_costs(Tiny().eval(), torch.empty(2, 3, 16, 16))
    machine = Machine(peak=1e3, bandwidth=1e2)
    for cost in costs.values():
        assert machine.waterline(cost) == max(cost.macs / 1e3, cost.bytes / 1e2)
    assert machine.waterline(costs["block.act"]) == machine.transfer(costs["block.act"].bytes)


def test_time_of_a_layer_excludes_that_of_layers_inside() -> None:
    marks = [(0.0, "a"), (1.0, "a.b"), (4.0, "a"), (4.5, "a.c"), (6.0, "a"), (6.25, "end")]
    assert seconds_by_layer(marks) == {"a": 1.75, "a.b": 3.0, "a.c": 1.5}


def test_every_layer_is_timed_and_hooks_are_gone_afterwards() -> None:
    network, images = Tiny().eval(), torch.randn(1, 3, 16, 16)
    timed = layer_latencies(network, images, repeats=4)
    assert set(timed) == set(layer_costs(network, images))
    assert all(times.shape == (4,) and (times > 0).all() for times in timed.values())
    assert latencies(network, images, repeats=3, warmup=1).shape == (3,)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_command_writes_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = ("timm:test_resnet@random", "timm:test_vit@random")
    settings = {"size": 32, "repeats": 3, "warmup": 1, "peak": 10.0, "device": "cpu", "output_dir": tmp_path}
    run(EfficiencyCommand(models=models, accuracy=(40, 50.5), bandwidth=5, threads=1, **settings))  # type: ignore[arg-type]
    names = {"efficiency.json", "efficiency.npz", "efficiency.csv", "efficiency-layers.csv"}
    names |= {f"efficiency{part}{suffix}" for part in ("", "-waterline") for suffix in (".png", ".svg")}
    assert {file.name for file in tmp_path.iterdir()} == names
    result = load_result(tmp_path / "efficiency.json")
    arrays = np.load(tmp_path / "efficiency.npz")
    for index, (label, one) in enumerate(result.details["models"].items()):
        value = {name: result.figures[f"{label}: {name}"].value for name in ("GMACs", "latency (ms)", "efficiency")}
        latency = float(np.median(arrays[f"seconds_{index}"]))
        assert value["latency (ms)"] == pytest.approx(latency * 1e3)
        assert value["GMACs"] == pytest.approx(arrays[f"macs_{index}"].sum() / 1e9)
        assert value["efficiency"] == pytest.approx(value["GMACs"] / latency / 10)
        assert sum(row["waterline_seconds"] for row in one["layers"]) == pytest.approx(
            np.maximum(arrays[f"macs_{index}"] / 10e9, arrays[f"bytes_{index}"] / 5e9).sum()
        )
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("of peak", "slowest layers", "as given", *models))


def test_a_lower_precision_moves_fewer_bytes_and_leaves_the_weights_alone(tmp_path: Path) -> None:
    moved = {}
    for dtype in ("float32", "bfloat16"):
        model = ("timm:test_resnet@random",)
        settings = {"size": 32, "repeats": 1, "warmup": 0, "peak": 1.0, "bandwidth": 1.0, "device": "cpu"}
        run(EfficiencyCommand(models=model, dtype=dtype, output_dir=tmp_path / dtype, **settings))  # type: ignore[arg-type]
        moved[dtype] = load_result(tmp_path / dtype / "efficiency.json")
    assert moved["float32"].model["weights_hash"] == moved["bfloat16"].model["weights_hash"]
    sizes = [one.figures["megabytes moved"].value for one in moved.values()]
    assert 0.45 < sizes[1] / sizes[0] < 0.6


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"batch_size": 0}, "batch-size must be at least 1"),
        ({"peak": 0.0}, "--peak must be more than 0"),
        ({"accuracy": (50.0, 60.0)}, "1 models need as many"),
        ({"accuracy": (120.0,)}, "per cent"),
    ],
)
def test_settings_that_mean_nothing_are_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        EfficiencyCommand(models=("timm:test_vit@random",), **given)  # type: ignore[arg-type]


def test_a_size_that_a_network_refuses_is_told(tmp_path: Path) -> None:
    settings = {"size": 2, "peak": 1.0, "bandwidth": 1.0, "device": "cpu", "output_dir": tmp_path}
    with pytest.raises(UserError, match=r"test_vit.*2 px"):
        run(EfficiencyCommand(models=("timm:test_vit@random",), **settings))  # type: ignore[arg-type]
