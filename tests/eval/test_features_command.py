"""`eval features`: arrays that need nothing of ours to be read."""

import json
from pathlib import Path

import numpy as np
import pytest

from convscope.core.errors import UserError
from convscope.core.models import load_backbone
from convscope.eval.features_command import FeaturesCommand, run
from tests.core.data.tars import png, write_tar
from tests.eval.test_features import run as extracted

MODEL = "timm:resnet10t@random"


def command(data: str, output: Path, **changes: object) -> FeaturesCommand:
    values: dict[str, object] = {"workers": 0, "device": "cpu", "batch_size": 5, **changes}
    return FeaturesCommand(model=MODEL, data=data, output=output, **values)  # type: ignore[arg-type]


def test_arrays_keys_and_labels_of_every_split(small_shards: str, tmp_path: Path) -> None:
    run(command(small_shards, tmp_path, layers=("layer1", "pooled")))
    expected = extracted(load_backbone(MODEL), small_shards, layers=["layer1", "pooled"])
    for layer, features in expected.items():
        np.testing.assert_array_equal(np.load(tmp_path / "test" / f"{layer}.npy"), features.x.numpy())
    assert json.loads((tmp_path / "test" / "keys.json").read_text()) == [f"{i:08d}" for i in range(12)]
    assert np.load(tmp_path / "test" / "labels.npy").tolist() == [i % 4 for i in range(12)]
    assert np.load(tmp_path / "train" / "pooled.npy").shape == (32, 512)
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["model"]["source"] == MODEL
    assert about["data"]["train"]["count"] == 32
    assert about["layers"] == ["layer1", "pooled"]


def test_images_without_labels_have_features_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "data" / "train" / "a.tar", [(f"{i}.png", png(i)) for i in range(3)])
    run(command(str(tmp_path / "data"), tmp_path / "out", splits=("train",), store="fp16", cache=False))
    assert np.load(tmp_path / "out" / "train" / "pooled.npy").dtype == np.float16
    assert sorted(path.name for path in (tmp_path / "out" / "train").iterdir()) == ["keys.json", "pooled.npy"]
    assert "no labels are written: sample 0 has no label" in capsys.readouterr().err


def test_settings_that_make_no_sense_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one split"):
        command("data", tmp_path, splits=())
    with pytest.raises(UserError, match="--batch-size must be at least 1"):
        command("data", tmp_path, batch_size=0)
