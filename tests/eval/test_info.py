"""What `eval info` says is what was loaded."""

import json
from pathlib import Path

import pytest
import torch

from convscope.cli import main
from convscope.core.models import load_backbone
from tests.core.layouts import CASES, network


@pytest.fixture
def weights(tmp_path: Path) -> list[str]:
    """A MoCo v3 checkpoint, as the command line names it."""
    case = CASES["moco v3 resnet"]
    saved = case.save(dict(network(case.arch, **case.model_args).state_dict()))
    torch.save({**saved, "arch": "resnet50"}, tmp_path / "moco.pth.tar")
    return [str(tmp_path / "moco.pth.tar"), "--model-args", "layers=1,1,1,1", "channels=4,8,16,32"]


def test_json_says_what_was_recognised(weights: list[str], capsys: pytest.CaptureFixture[str]):
    main(["eval", "info", *weights, "--json"])
    said = json.loads(capsys.readouterr().out)
    backbone = load_backbone(weights[0], model_args={"layers": [1, 1, 1, 1], "channels": [4, 8, 16, 32]})
    assert said["weights_hash"] == backbone.weights_hash()
    expected = {"arch": "resnet50", "layout": "MoCo v3", "matched": 1.0, "absent": [], "container": "state_dict"}
    assert expected.items() <= said.items()
    assert said["dropped"] == ["base_encoder.fc", "momentum_encoder", "predictor"]
    assert said["architecture_named_by"] == "its arch"
    assert said["parameters"] == sum(value.numel() for value in backbone.model.parameters())
    assert said["stages"][-1] == {"name": "layer4", "channels": 128, "stride": 32}
    shown = said["preprocessing"]
    assert (shown["size"], shown["interpolation"], shown["from"]) == ([224, 224], "bilinear", "that of MoCo v3")


def test_tables_say_the_same(weights: list[str], capsys: pytest.CaptureFixture[str]):
    main(["eval", "info", *weights])
    shown = capsys.readouterr().out
    for words in ("MoCo v3", "base_encoder.fc, momentum_encoder, predictor", "layer4", "bilinear"):
        assert words in shown


def test_random_initialisation_has_no_layout_of_others(capsys: pytest.CaptureFixture[str]):
    main(["eval", "info", "timm:resnet18_cifar@random", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert (said["source"], said["layout"], said["dropped"]) == ("timm:resnet18_cifar@random", "timm", [])


def test_another_model_is_one_line(weights: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["eval", "info", weights[0], "--arch", "convnext_atto"])
    error = capsys.readouterr().err
    assert error.startswith("convscope: error: ")
    assert "does not fit convnext_atto: 0.0% of the backbone's weights matched" in error
    assert error.count("\n") == 1
