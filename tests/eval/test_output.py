"""Where results go, and that one on other data is never overwritten."""

from pathlib import Path

import numpy as np
import pytest

from convscope.core.results import EvalResult, Figure, load_result, load_samples, save_result
from convscope.eval.knn import KnnCommand, run
from convscope.eval.linear_probe import LinearProbeCommand
from convscope.eval.linear_probe import run as run_probe
from convscope.eval.output import default_output

MODEL = "timm:resnet10t@random"


def data(source: str = "/data/birds/", train: str = "f1", test: str = "f2", label: str = "cls") -> dict[str, object]:
    return {
        "source": source,
        "train": {"split": "train", "fingerprint": train, "count": 3},
        "test": {"split": "test", "fingerprint": test, "count": 2},
        "label": label,
    }


def save(run_dir: Path, measured: dict[str, object]) -> str:
    path = default_output(str(run_dir), "resnet18", "knn", measured)
    result = EvalResult(
        task="knn", protocol="a/1", model={}, data=measured, preprocessing={}, figures={"top1": Figure(0.5)}
    )
    save_result(path, result)
    return path.name


def test_another_data_set_gets_a_name_of_its_own(tmp_path: Path) -> None:
    assert save(tmp_path, data()) == "knn.json"
    assert save(tmp_path, data()) == "knn.json"
    assert save(tmp_path, data(source="/moved/birds2")) == "knn.json"  # the same images in another place
    assert save(tmp_path, data("/data/cars/train-{000..002}.tar", "g1", "g2")) == "knn-cars.json"
    assert save(tmp_path, data("builtin:shapes", "h1", "h2")) == "knn-shapes.json"
    by_texture = save(tmp_path, data("builtin:shapes", "h1", "h2", label="texture"))
    assert by_texture.startswith("knn-shapes-")
    assert save(tmp_path, data("builtin:shapes", "h1", "h2", label="texture")) == by_texture
    assert save(tmp_path, data("pipe:ssh host cat 'a b.tar'", "i1", "i2")) == "knn-ssh-host-cat-a-b.tar.json"
    assert len(list((tmp_path / "results").iterdir())) == 5
    assert load_result(tmp_path / "results" / "knn.json").data["source"] == "/moved/birds2"


def test_names_outside_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_output("timm:resnet18@random=2", "resnet18", "knn") == Path("results/resnet18@random=2-knn.json")
    assert default_output("weights.pth", "resnet18", "knn", data()) == Path("results/resnet18-knn.json")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "resnet18-knn.json").write_text("no result")
    assert default_output("weights.pth", "resnet18", "knn", data()) == Path("results/resnet18-knn.json")


def test_evaluations_keep_what_each_image_gave(small_shards: str, tmp_path: Path) -> None:
    common = {"model": MODEL, "data": small_shards, "workers": 0, "device": "cpu", "layers": ("last", "pooled")}
    run(KnnCommand(**common, k=(3,), output=tmp_path / "knn.json"))  # type: ignore[arg-type]
    run_probe(LinearProbeCommand(**common, store="fp16", min_steps=20, epochs=1, output=tmp_path / "probe.json"))  # type: ignore[arg-type]
    for name in ("knn", "probe"):
        result = load_result(tmp_path / f"{name}.json")
        samples = load_samples(tmp_path / f"{name}.json", result)
        assert list(samples) == list(result.figures)
        for figure, hits in samples.items():
            assert hits.shape == (12,)
            assert np.mean(hits) == result.figures[figure].value
