"""Where results go, and that one measured otherwise is never overwritten."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convscope.core.errors import UserError
from convscope.core.results import EvalResult, Figure, load_result, load_samples
from convscope.eval.few_shot import FewShotCommand
from convscope.eval.few_shot import run as run_few_shot
from convscope.eval.knn import KnnCommand, run
from convscope.eval.linear_probe import LinearProbeCommand
from convscope.eval.linear_probe import run as run_probe
from convscope.eval.logistic_regression import LogRegCommand
from convscope.eval.logistic_regression import run as run_logreg
from convscope.eval.output import save_by_name
from convscope.eval.retrieval import RetrievalCommand
from convscope.eval.retrieval import run as run_retrieval
from convscope.eval.svm import SvmCommand
from convscope.eval.svm import run as run_svm
from convscope.report.runs import ReportCommand
from convscope.report.runs import run as report

MODEL = "timm:resnet10t@random"


def data(source: str = "/data/birds/", train: str = "f1", test: str = "f2", label: str = "cls") -> dict[str, object]:
    return {
        "source": source,
        "train": {"split": "train", "fingerprint": train, "count": 3},
        "test": {"split": "test", "fingerprint": test, "count": 2},
        "label": label,
    }


def result(**changes: Any) -> EvalResult:
    values: dict[str, Any] = {"task": "knn", "protocol": "a/1", "model": {"arch": "resnet18"}, "data": data()}
    return EvalResult(**{**values, "preprocessing": {}, "figures": {"top1": Figure(0.5)}, **changes})


def save(run_dir: Path, **changes: Any) -> str:
    return save_by_name(result(**changes), str(run_dir)).name


def test_another_data_set_gets_a_name_of_its_own(tmp_path: Path) -> None:
    assert save(tmp_path) == "knn.json"
    assert save(tmp_path) == "knn.json"
    assert save(tmp_path, data=data(source="/moved/birds2")) == "knn.json"  # the same images in another place
    assert save(tmp_path, data=data("/data/cars/train-{000..002}.tar", "g1", "g2")) == "knn-cars.json"
    assert save(tmp_path, data=data("builtin:shapes", "h1", "h2")) == "knn-shapes.json"
    assert save(tmp_path, data=data("builtin:shapes", "h1", "h2", label="texture")) == "knn-shapes-texture.json"
    others = [save(tmp_path, data=data("/other/shapes", f"{part}1", f"{part}2")) for part in "ij"]
    assert len(set(others)) == 2
    assert all(re.fullmatch(r"knn-shapes-[0-9a-f]{8}\.json", name) for name in others)
    assert save(tmp_path, data=data("/other/shapes", "i1", "i2")) == others[0]
    assert save(tmp_path, data=data("pipe:ssh host cat 'a b.tar'", "k1", "k2")) == "knn-ssh-host-cat-a-b.tar.json"
    assert len(list((tmp_path / "results").glob("*.json"))) == 7
    assert load_result(tmp_path / "results" / "knn.json").data["source"] == "/moved/birds2"


def test_what_is_measured_otherwise_gets_a_name_of_its_own(tmp_path: Path) -> None:
    def measured(protocol: str = "image-image/2", seed: int = 0, **changes: Any) -> str:
        details = {"layers": ["pooled"], "pool": "avg", "settings": {"k": (5,), "skip_self": False}, "found": 1}
        return save(tmp_path, task="retrieval", protocol=protocol, details={**details, **changes}, seed=seed)

    assert measured() == "retrieval.json"
    assert measured(found=2) == "retrieval.json"  # what came of it
    expected = {
        "retrieval-ivf.json": {"protocol": "image-image-ivf/2", "index": {"nlist": 2}},
        "retrieval-layer3-layer4-max.json": {"layers": {"layer3": {}, "layer4": {}}, "pool": "max"},
        "retrieval-k-5-10-skip_self.json": {"settings": {"k": [5, 10], "skip_self": True}},
        "retrieval-seed-1.json": {"seed": 1},
    }
    for _ in range(2):
        assert [measured(**changes) for changes in expected.values()] == list(expected)  # type: ignore[arg-type]
    assert measured(settings={"k": tuple(range(99))}).startswith("retrieval-")
    assert measured(settings={}) == "retrieval.json"  # of a version that did not record them
    assert len(list((tmp_path / "results").glob("*.json"))) == 6


def test_names_outside_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def named(model: str, weights: str, task: str | None = None) -> str:
        record = {"arch": "resnet18", "source": model, "weights_hash": weights}
        return save_by_name(result(model=record), model, task).as_posix()

    assert named("timm:resnet18@random=2", "a") == "results/resnet18@random=2-knn.json"
    (tmp_path / "results" / "resnet18-knn.json").write_text("no result")
    assert named("weights.pth", "b") == "results/resnet18-knn.json"
    assert named("moved.pth", "b") == "results/resnet18-knn.json"  # the same weights in another place
    assert named("runs/best.pth", "c") == "results/resnet18-knn-best.json"
    assert named("moved.pth", "0123456789") == "results/resnet18-knn-01234567.json"  # a file that was written anew
    assert named("weights.pth", "b", "knn-cached") == "results/resnet18-knn-cached.json"


def test_commands_that_end_together_keep_both_results(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda k: save(tmp_path, details={"settings": {"k": [k]}}), range(8)))
    found = {load_result(tmp_path / "results" / name).details["settings"]["k"][0] for name in names}
    assert found == set(range(8))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write to .*results: .*; --output names another file"):
        save(tmp_path)


def test_a_result_that_could_not_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path, Path("knn.npz")):
        with pytest.raises(UserError, match=r"name a file that ends in \.json"):
            KnnCommand(model=MODEL, data="data", output=output)
    with pytest.raises(UserError, match="file is no folder"):
        KnnCommand(model=MODEL, data="data", output=tmp_path / "file" / "knn.json")
    assert KnnCommand(model=MODEL, data="data", output=tmp_path / "a" / "b" / "knn.json").output is not None


@pytest.mark.parametrize("command", [SvmCommand, RetrievalCommand])
def test_numbers_are_no_labels(command: type[SvmCommand | RetrievalCommand]) -> None:
    with pytest.raises(UserError, match="--targets regression is for linear-probe alone"):
        command(model=MODEL, data="data", targets="regression")


def test_a_report_shows_both_protocols(
    small_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common: dict[str, Any] = {"model": MODEL, "data": small_shards, "workers": 0, "device": "cpu"}
    for protocol in ("holdout", "cached", "cached"):
        run_probe(LinearProbeCommand(**common, protocol=protocol, min_steps=20, epochs=1, lrs=(1.0,)))
    run(KnnCommand(**common, k=(3,)))
    run(KnnCommand(**common, k=(3,), layers=("layer1",)))
    stem = MODEL.removeprefix("timm:")
    files = [f"{stem}-{name}.json" for name in ("knn", "knn-layer1", "linear-probe", "linear-probe-cached")]
    assert sorted(path.name for path in Path("results").glob("*.json")) == sorted(files)
    capsys.readouterr()
    report(ReportCommand(runs=(Path("results"),), output=(Path("page.html"),)))
    said = capsys.readouterr().out
    assert all(f"| results ({Path(name).stem}) " in said for name in files)
    assert said.count("not comparable") == 1
    assert (
        "linear-probe: protocol differs, so these rows are not comparable "
        "(setting A: protocol holdout/1; B: protocol cached/1)" in said
    )


def test_evaluations_keep_what_each_image_gave(small_shards: str, tmp_path: Path) -> None:
    """Of both layers, or of the one that was chosen; NaN where an image was not asked."""
    common: dict[str, Any] = {"model": MODEL, "data": small_shards, "workers": 0, "device": "cpu"}
    common |= {"layers": ("last", "pooled")}
    outputs = {
        name: tmp_path / f"{name}.json"
        for name in ("knn", "probe", "logreg", "svm", "few-shot", "retrieval", "retrieval-ivf")
    }
    run(KnnCommand(**common, k=(3,), output=outputs["knn"]))
    run_probe(LinearProbeCommand(**common, store="fp16", min_steps=20, epochs=1, output=outputs["probe"]))
    run_logreg(LogRegCommand(**common, c_count=2, output=outputs["logreg"]))
    run_svm(SvmCommand(**common, costs=(1.0,), output=outputs["svm"]))
    run_few_shot(FewShotCommand(**common, shots=(1, 2), tries=3, output=outputs["few-shot"]))
    run_retrieval(RetrievalCommand(**common, output=outputs["retrieval"]))
    run_retrieval(RetrievalCommand(**common, index="ivf", nlist=2, output=outputs["retrieval-ivf"]))
    for name, path in outputs.items():
        found = load_result(path)
        samples = load_samples(path, found)
        assert list(samples) == [figure for figure in found.figures if (name, figure) != ("svm", "map")]
        for figure, values in samples.items():
            assert values.shape == (12,)
            assert np.mean(values) == pytest.approx(found.figures[figure].value, rel=1e-12)
