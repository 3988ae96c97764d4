"""The ERF command: which images it takes, what it writes, what it prints."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convscope.analysis.common import spread
from convscope.analysis.erf_command import ErfCommand, evaluate, run
from convscope.core.backbone import create_backbone
from convscope.core.data.shard_set import open_shards
from convscope.core.errors import UserError
from convscope.core.results import load_result


def test_images_cover_every_class_whatever_the_order() -> None:
    size, classes = 1000, 10
    by_class, in_turn = np.arange(size) * classes // size, np.arange(size) % classes
    taken = spread(size, 100, seed=0)
    assert len(set(taken)) == 100
    for labels in (by_class, in_turn):
        assert set(labels[taken]) == set(range(classes))
    assert [index // 10 for index in taken] == list(range(100))  # one from each stretch of ten
    assert taken == spread(size, 100, seed=0) != spread(size, 100, seed=1)
    assert spread(3, 50, seed=0) == [0, 1, 2]


def test_an_empty_data_set_is_told() -> None:
    with pytest.raises(UserError, match="empty"):
        spread(0, 5, seed=0)


@pytest.mark.parametrize("name", ["size", "n_images", "batch_size"])
def test_counts_are_checked(name: str) -> None:
    with pytest.raises(UserError, match=name.replace("_", "-")):
        ErfCommand(models=("timm:resnet10t@random",), **{name: 0})


def test_command_writes_everything_and_prints_all_variants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = ("timm:resnet10t@random", "timm:vit_tiny_patch16_224@random")
    run(ErfCommand(models=models, size=48, n_images=6, batch_size=4, output_dir=tmp_path, device="cpu"))
    written = {"erf.json", "erf.npz", "erf.png", "erf.svg", "erf.csv", "erf-spread.csv", "erf-curves.csv"}
    assert {p.name for p in tmp_path.iterdir()} == written
    result = load_result(tmp_path / "erf.json")
    assert set(result.details["models"]) == set(models)
    assert result.figures[f"{models[0]}: area at 50%"].n == 6
    assert result.data["fingerprint"]
    arrays = np.load(tmp_path / "erf.npz")
    assert arrays["labels"].tolist() == list(models)
    assert arrays["contributions_1"].shape == (48, 48)
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("official", "raw", "log", "99%", *models))


def only(by_stage: dict[str, Any]) -> dict[str, Any]:
    (one,) = by_stage.values()
    return one


def test_untrained_row_and_published_figures(tmp_path: Path) -> None:
    config = ErfCommand(
        models=("timm:resnet10t@random=3",), size=48, n_images=5, untrained=True, compat="replknet", output_dir=tmp_path
    )
    run(config)
    result = load_result(tmp_path / "erf.json")
    trained, untrained = (only(by_stage) for by_stage in result.details["models"].values())
    assert trained["areas"].keys() == untrained["areas"].keys()
    arrays = np.load(tmp_path / "erf.npz")
    assert not np.array_equal(arrays["contributions_0"], arrays["contributions_1"])  # seed 3, and its twin of seed 0
    label = next(iter(result.details["models"]))
    official = trained["areas"]["official"][2]
    assert official is None or result.figures[f"{label}: area at 50%"].value == official["share"]
    assert result.protocol == "erf-replknet/1"


def test_evaluate_leaves_the_callers_backbone_alone(tmp_path: Path) -> None:
    backbone = create_backbone("vit_tiny_patch16_224", {"depth": 1}, seed=0)
    weights, preprocessing = backbone.weights_hash(), backbone.preprocessing
    shards = open_shards("builtin:shapes", "test")
    result = evaluate({"vit": backbone}, shards, ErfCommand(models=(), size=48, n_images=3, output_dir=tmp_path))
    assert (backbone.weights_hash(), backbone.preprocessing) == (weights, preprocessing)
    assert result.preprocessing["size"] == (48, 48)
    assert result.model["weights_hash"] == weights
    assert "area at 50%" in result.figures


def test_no_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one MODEL"):
        run(ErfCommand(models=(), output_dir=tmp_path))


def test_checkpoints_of_a_run_are_drawn_over_their_steps(tmp_path: Path) -> None:
    args = {"channels": (4, 4, 8, 8)}
    models = {
        f"runs/x/checkpoints/step-{step:08d}.pt": create_backbone("resnet18_cifar", args, seed=step)
        for step in (0, 200, 1000)
    }
    config = ErfCommand(models=(), size=32, n_images=5, stages=("layer1", "last"), output_dir=tmp_path, device="cpu")
    result = evaluate(models, open_shards("builtin:shapes", "test"), config)
    assert (tmp_path / "erf-steps.png").is_file()
    label = list(models)[1]
    with open(tmp_path / "erf.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == label and row["variant"] == "raw"]
    assert [(row["stage"], row["threshold"]) for row in rows] == [
        (stage, t) for stage in ("layer1", "layer4") for t in ("0.2", "0.3", "0.5", "0.99")
    ]
    figure = result.figures[f"{label}: layer4: area at 50%"]
    assert float(rows[6]["share"]) == figure.value
    assert (float(rows[6]["low"]), float(rows[6]["high"])) == (figure.low, figure.high)
    arrays = np.load(tmp_path / "erf.npz")
    assert arrays["stages"].tolist() == ["layer1", "layer4"] * 3
    assert arrays["raw_5"][-1] == pytest.approx(1)
