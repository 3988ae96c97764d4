"""The filters command on tiny networks: what it compares, writes and refuses."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from convscope.analysis.common import load_models
from convscope.analysis.filter_drift import basis_arrays
from convscope.analysis.filters_command import FiltersCommand, _moments, main_size, measure, run
from convscope.analysis.filters_files import _drift_pictures
from convscope.analysis.filters_output import FiltersReport, details, figures
from convscope.core.backbone import Backbone, create_backbone
from convscope.core.errors import UserError
from convscope.core.models import save_backbone
from convscope.core.results import load_result

CHANNELS = {"channels": (4, 4, 8, 8)}


def tiny(seed: int = 0, smooth: float = 0.0) -> Backbone:
    """A network whose filters are mixed with blurs, as trained ones are."""
    backbone = create_backbone("resnet18_cifar", CHANNELS, seed=seed)
    for name, weight in backbone.model.named_parameters():
        if weight.ndim == 4 and weight.shape[2] == 3 and name != "conv1.weight":
            blur = weight.mean(dim=(2, 3), keepdim=True) * 9 * torch.tensor([0.5, 1, 0.5]).outer(torch.ones(3))
            weight.data.lerp_(blur, smooth)
    return backbone


def measured(backbones: dict[str, Backbone], **settings: object) -> FiltersReport:
    return measure(backbones, FiltersCommand(models=tuple(backbones), **settings))


def test_everything_is_written_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [tmp_path / f"step-{step:08d}.safetensors" for step in (10, 200)]
    for name, smooth in zip(names, (0.0, 0.9)):
        save_backbone(name, tiny(smooth=smooth))
    out = tmp_path / "out"
    run(FiltersCommand(models=tuple(map(str, names)), trajectory=True, output_dir=out))
    views = ["coefficients", "density", "depth", "drift", "eigenfilters", "layers", "training"]
    pictures = {f"filters-{view}.{kind}" for view in views for kind in ("png", "svg")}
    tables = {f"filters{name}.csv" for name in ("", "-depth", "-drift", "-eigenfilters")}
    assert {file.name for file in out.iterdir()} == {"filters.json", "filters.npz", *pictures, *tables}
    result = load_result(out / "filters.json")
    first, second = map(str, names)
    drift = result.figures[f"drift: {first} | {second}"]
    assert drift.low is not None
    assert drift.low > 0
    assert result.figures[f"{second}: variance entropy"].value < result.figures[f"{first}: variance entropy"].value
    rows = list(csv.DictReader((out / "filters.csv").open()))
    assert len(rows) == 2 * 21
    assert rows[0]["layer"] == "conv1"
    assert float(rows[0]["entropy"]) == result.details["models"][first]["layers"][0]["entropy"]
    (row,) = csv.DictReader((out / "filters-drift.csv").open())
    assert float(row["drift"]) == drift.value
    arrays = np.load(out / "filters.npz")
    assert arrays["drift_3x3"][0, 1] == pytest.approx(drift.value, rel=1e-12)
    assert arrays["counts_1"].sum() == 9 * sum(int(row["filters"]) for row in rows[21:] if row["size"] == "3x3")
    printed = capsys.readouterr().out
    assert all(word in printed for word in (first, second, "drift between", "17 of 17", "as at random initialisation"))


def test_a_fixed_basis_gives_the_same_drift_beside_other_models(tmp_path: Path) -> None:
    other = measured({"r": create_backbone("test_resnet", seed=0)})
    np.savez(tmp_path / "filters.npz", **basis_arrays({"3x3": other.main.basis}))
    backbones = {"a": tiny(smooth=0.3), "b": tiny(smooth=0.6), "c": tiny(seed=1)}
    found = []
    for labels in ("ab", "abc"):
        chosen = {label: backbones[label] for label in labels}
        fixed = measured(chosen, basis=tmp_path / "filters.npz")
        pooled = measured(chosen)
        found.append((fixed.main.basis.hash, fixed.main.drifts()[0, 1], pooled.main.basis.hash))
    assert found[0][:2] == found[1][:2]
    assert found[0][1] > 0
    assert found[0][2] != found[1][2]
    assert found[0][0] == other.main.basis.hash
    with pytest.raises(UserError, match="no basis for 7x7 filters; it has 3x3"):
        measured({"n": create_backbone("test_convnext", seed=0)}, size="7x7", basis=tmp_path / "filters.npz")


def test_folding_and_scaling_change_what_they_should() -> None:
    backbone = tiny(smooth=0.5)
    for norm in backbone.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.weight.data.uniform_(0.1, 3)
    stored, folded = measured({"a": backbone}), measured({"a": backbone}, fold_bn=True)
    for before, after in zip(stored.statistics["a"], folded.statistics["a"]):
        assert before.entropy_normalised == pytest.approx(after.entropy_normalised, abs=1e-6)  # scale-free
        assert before.orthogonality == pytest.approx(after.orthogonality, abs=1e-5)
    layers = [(one.layers("a")[3].entropy, one.entropy(one.layers("a")[3])) for one in (stored, folded)]
    assert layers[0][0] != layers[1][0]
    normalised = measured({"a": backbone}, normalise=True)
    layer = normalised.layers("a")[3]
    assert normalised.entropy(layer) == layer.entropy_normalised != layer.entropy
    assert all(details(folded)["models"]["a"]["folded"])


def test_published_bins_span_the_data() -> None:
    backbones = {"a": tiny(smooth=0.3), "b": tiny(smooth=0.6)}
    report = measured(backbones, compat="filter-db")
    bins = report.main.bins
    assert bins.count == 70
    assert -bins.low != bins.high
    counts = [one.counts.sum(axis=0) for one in report.main.distributions.values()]
    assert min(count.argmax() >= 0 for count in counts)
    assert any(count[:, 0].any() for count in counts)
    assert any(count[:, -1].any() for count in counts)


def test_depths_drift_from_the_whole_and_from_the_first_model() -> None:
    report = measured({"a": tiny(smooth=0.3), "b": tiny(smooth=0.6), "c": tiny(smooth=0.3)})
    assert report.main.from_other("c", "a").tolist() == [0.0] * 10
    assert (report.main.from_other("b", "a") > 0).sum() >= 9
    matrix = report.main.depth_drifts("a")
    assert matrix.shape == (10, 10)
    assert np.array_equal(matrix, matrix.T)
    assert (report.main.from_whole("a") > 0).all()
    lone = measured({"v": create_backbone("test_vit", seed=0)})
    assert lone.main.from_whole("v")[0] == 0  # its only layer
    assert np.isnan(lone.main.from_whole("v")[1:]).all()
    assert "degenerate layers" in figures(lone)
    assert list(_drift_pictures(lone)) == []  # nothing to compare


def test_other_sizes_are_compared_too() -> None:
    report = measured({"n": create_backbone("test_convnext", seed=0), "r": tiny()})
    assert set(report.comparisons) == {layer.size for one in report.statistics.values() for layer in one} - {"1x1"}
    assert list(report.comparisons["7x7"].distributions) == ["n"]
    assert report.size == "3x3"
    assert report.labels == ["r"]
    sizes = {"r": ["3x3"] * 16 + ["7x7", "1x1"], "c": ["7x7"] * 3 + ["2x2"] * 4 + ["1x1"] * 9, "v": ["16x16"]}
    pick = {label: [replace(report.statistics["r"][0], size=size) for size in each] for label, each in sizes.items()}
    assert main_size(pick, "auto") == "7x7"  # what most models have
    assert main_size({"r": pick["r"]}, "auto") == "3x3"
    assert main_size(pick, "2x2") == "2x2"


def test_what_is_random_by_margin_grows() -> None:
    report = measured({"a": tiny(smooth=0.15)})
    counts = list(details(report)["models"]["a"]["random layers by margin"].values())
    assert counts == sorted(counts)
    assert counts[2] == sum(layer.kind == "random" for layer in report.statistics["a"])
    assert counts[-1] > counts[0]


def test_bad_input_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name at least one MODEL"):
        load_models(())
    with pytest.raises(UserError, match="no 5x5 filters; there are 3x3"):
        measured({"a": tiny()}, size="5x5")
    for settings in ({"size": "3"}, {"sparse_ratio": 1.0}, {"margin": -1.0}, {"high_sparsity": 2.0}, {"seed": -1}):
        with pytest.raises(UserError, match=next(iter(settings)).replace("_", "-")):
            FiltersCommand(models=("a",), **settings)
    with pytest.raises(UserError, match="no convolution larger than 1x1"):
        main_size({"a": []}, "auto")
    broken = tiny()
    broken.model.layer2[0].conv1.weight.data[0, 0, 1, 1] = float("nan")
    with pytest.raises(UserError, match=r"layer2\.0\.conv1 are not finite"):
        measured({"a": broken})


def test_twins_and_checkpoints_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for step in (30, 4):
        file = tmp_path / "run" / "checkpoints" / f"step-{step:08d}.pt"
        torch.save({"state_dict": tiny().model.state_dict()}, file)
    assert [Path(name).stem for name in _moments((str(tmp_path / "run"),))] == ["step-00000004", "step-00000030"]
    assert _moments(("timm:a",)) == ["timm:a"]
    assert list(load_models(["timm:test_vit@random"], untrained_seed=1)) == [
        "timm:test_vit@random",
        "timm:test_vit@random (untrained)",
    ]
