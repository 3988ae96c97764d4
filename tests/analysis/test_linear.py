"""The linear interpreter: identities in float64, and gates against the functions they stand for."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convscope.analysis.frozen_gates import FrozenGates
from convscope.analysis.linear_command import LinearCommand, run
from convscope.analysis.linear_interpreter import LinearInterpreter, by_stage, strongest
from convscope.core.backbone import Backbone, create_backbone
from convscope.core.errors import UserError
from convscope.core.results import load_result


def network(arch: str) -> Backbone:
    """With biases and norms that are not what they start from."""
    backbone = create_backbone(arch, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in [*backbone.parameters(), *backbone.buffers()]:
            if value.is_floating_point() and value.ndim == 1:
                value += 0.3 * torch.rand(value.shape, generator=generator)
    return backbone


def pictures(backbone: Backbone, count: int = 2) -> Tensor:
    size = backbone.preprocessing.size[0] if "vit" in backbone.arch else 48
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize(
    ("arch", "frozen"),
    [
        ("test_resnet", {"batch_norm"}),
        ("test_byobnet", {"batch_norm", "sigmoid"}),  # squeeze-and-excitation
        ("test_efficientnet", {"batch_norm", "sigmoid", "silu"}),
        ("test_convnext", {"gelu", "layer_norm"}),
        ("test_vit", {"gelu", "layer_norm", "scaled_dot_product_attention"}),
        ("test_nfnet", {"batch_norm", "sigmoid", "silu"}),  # standardised weights
    ],
)
def test_pixels_and_biases_add_up_to_the_network(arch: str, frozen: set[str]) -> None:
    backbone = network(arch)
    interpreter = LinearInterpreter(backbone)
    images = pictures(backbone)
    with torch.no_grad():
        expected = {**backbone.feature_maps(images), "pooled": backbone(images)}
    parts = interpreter.parts(images)
    assert set(parts) == set(expected)
    for name, part in parts.items():
        torch.testing.assert_close(part.value, expected[name], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(part.linear + part.bias, expected[name], rtol=0, atol=1e-10)
        assert part.linear.abs().max() > 1e-3
        assert part.bias.abs().max() > 1e-3
    assert interpreter.frozen == frozen


@pytest.mark.parametrize("arch", ["test_resnet", "test_convnext"])
def test_rows_and_columns_are_those_of_one_matrix(arch: str) -> None:
    interpreter = LinearInterpreter(network(arch))
    images = pictures(interpreter.backbone)
    pooled = interpreter.parts(images)["pooled"]
    outputs = torch.tensor([3, 5])
    rows, biases = interpreter.rows(images, outputs)
    added = (rows * images).flatten(1).sum(1)
    torch.testing.assert_close(added, pooled.linear[[0, 1], outputs], rtol=0, atol=1e-10)
    total = sum(biases.values(), torch.zeros(()))
    assert float(total) == pytest.approx(float(pooled.bias[[0, 1], outputs].sum()), abs=1e-10)
    column = interpreter.column(images, (20, 7, 1))["pooled"]
    torch.testing.assert_close(column[[0, 1], outputs], rows[:, :, 20, 7].sum(1), rtol=0, atol=1e-10)
    stages = [stage.name for stage in interpreter.backbone.stages]
    assert sum(by_stage(biases, stages).values()) == pytest.approx(float(total))


def test_a_rectified_network_is_its_own_tangent() -> None:
    """Between kinks the rows are the true derivative; with GELU they are not."""
    for arch, same in (("test_resnet", True), ("test_convnext", False)):
        interpreter = LinearInterpreter(network(arch))
        images = pictures(interpreter.backbone, 1)
        row, _ = interpreter.rows(images, torch.tensor([0]))
        probe = images.clone().requires_grad_()
        (true,) = torch.autograd.grad(interpreter.backbone(probe)[0, 0], probe)
        assert torch.allclose(row, true, rtol=1e-9, atol=1e-12) == same


class Odd(nn.Module):
    """Layers that no network above has."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 6)
        nn.init.normal_(self.norm.bias)
        self.acts = nn.ModuleList([nn.ReLU6(), nn.Hardswish(inplace=True), nn.Mish(), nn.ELU(), nn.Tanh(), nn.PReLU()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for act in self.acts:
            x = act(3 * x)
        gate = x.mean((2, 3), keepdim=True).sigmoid_()
        length = x.norm(p=2, dim=(1, 2), keepdim=True)
        return F.max_pool2d(x * gate + x / length, 2)


def test_gates_keep_the_value_and_are_homogeneous() -> None:
    module = Odd().double()
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with FrozenGates() as gates:
        value = module(x)
    torch.testing.assert_close(value, module(x), rtol=1e-12, atol=1e-14)
    gradients = torch.autograd.grad(value.sum(), [x, module.norm.bias])
    added = (gradients[0] * x).sum() + (gradients[1] * module.norm.bias).sum()
    assert added.item() == pytest.approx(value.sum().item(), abs=1e-10)
    assert gates.unfrozen == set()
    assert {"group_norm", "hardtanh", "hardswish", "mish", "elu", "tanh", "sigmoid", "norm"} <= gates.frozen


def test_products_of_signals_are_refused_by_name() -> None:
    interpreter = LinearInterpreter(network("test_mambaout"))
    with pytest.raises(UserError, match=r"cannot be taken apart .* it has mul between signals"):
        interpreter.parts(pictures(interpreter.backbone, 1))


def test_features_that_stand_out() -> None:
    features = torch.tensor([[0.0, 5, 1], [0.0, 1, 9], [0.0, 0, 2]])
    assert strongest(features, 1).tolist() == [[1], [2], [1]]
    assert strongest(features, 9).shape == (3, 3)


def test_command_writes_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = ("timm:test_resnet@random", "timm:test_convnext@random")
    run(LinearCommand(models=models, size=32, n_images=5, outputs=2, batch_size=2, output_dir=tmp_path, device="cpu"))
    names = {f"linear{part}{suffix}" for part in ("", "-bias") for suffix in (".png", ".svg")}
    assert {file.name for file in tmp_path.iterdir()} == names | {"linear.json", "linear.npz", "linear.csv"}
    result = load_result(tmp_path / "linear.json")
    first, second = (result.details["models"][model] for model in models)
    assert (first["exact"], second["exact"]) == (True, False)
    assert second["frozen"] == ["gelu", "layer_norm"]
    assert max(first["error"], second["error"]) < 1e-10
    arrays = np.load(tmp_path / "linear.npz")
    assert arrays["rows_1"].shape == (5, 2, 3, 32, 32)
    assert result.figures[f"{models[1]}: share of the biases"].low is not None
    printed = capsys.readouterr().out
    assert "exact as it stands" in printed
    assert "gates frozen: gelu, layer_norm" in printed


@pytest.mark.parametrize("name", ["n_images", "outputs", "batch_size"])
def test_counts_are_checked(name: str) -> None:
    with pytest.raises(UserError, match=name.replace("_", "-")):
        LinearCommand(models=("timm:test_vit@random",), **{name: 0})
