"""Result files and intervals."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from convscope import __version__
from convscope.core.errors import UserError
from convscope.core.results import (
    EvalResult,
    Figure,
    bootstrap,
    environment,
    load_result,
    load_samples,
    paired_difference,
    save_result,
)


def result(**changes: object) -> EvalResult:
    values: dict[str, object] = {
        "task": "knn",
        "protocol": "dino-vote/1",
        "model": {"source": "timm:resnet18", "output": Path("runs/a")},
        "data": {"fingerprint": "f"},
        "preprocessing": {"size": (64, 32)},
        "figures": {"top1": Figure(0.5, 0.4, 0.6, 100), "images": Figure(3.0)},
        "details": {"k": [10, 20]},
        "seed": 7,
    }
    return EvalResult(**{**values, **changes})  # type: ignore[arg-type]


def test_file_reads_back_and_states_versions(tmp_path: Path) -> None:
    path = tmp_path / "results" / "knn.json"
    save_result(path, result())
    back = load_result(path)
    assert back.figures == result().figures
    assert (back.task, back.protocol, back.seed, back.details) == ("knn", "dino-vote/1", 7, {"k": [10, 20]})
    assert back.model["output"] == "runs/a"
    assert back.preprocessing["size"] == [64, 32]
    values = json.loads(path.read_text())
    assert values["versions"]["convscope"] == __version__
    assert values["host"]["cores"] >= 1


@pytest.mark.parametrize("figure", [Figure(math.nan), Figure(0.5, 0.4, math.inf, 3)])
def test_nothing_is_written_for_a_figure_that_is_no_number(tmp_path: Path, figure: Figure) -> None:
    with pytest.raises(UserError, match="knn: top1 is not a finite number"):
        save_result(tmp_path / "knn.json", result(figures={"top1": figure, "top5": Figure(0.5)}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["{}", "[]", '{"figures": {"top1": {"nonsense": 1}}}', '{"figures": {"top1": 3}}'])
def test_other_json_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(UserError, match="is not a convscope result file"):
        load_result(path)


def test_interval_of_hits_is_that_of_resampling() -> None:
    hits = np.random.default_rng(0).random(300) < 0.8
    rng = np.random.default_rng(1)
    draws = [np.mean([hits[i] for i in rng.integers(0, 300, 300)]) for _ in range(4000)]
    found = bootstrap(hits, resamples=40000)
    assert (found.value, found.n) == (pytest.approx(hits.mean(), abs=1e-15), 300)
    assert found.low is not None
    assert found.high is not None
    # Both ends lie on multiples of 1/300; 4000 draws leave an end uncertain by about one of them.
    assert np.abs([found.low, found.high] - np.percentile(draws, [2.5, 97.5])).max() < 1.01 / 300
    assert bootstrap(hits) == bootstrap(hits.astype(np.float64))


def test_interval_of_a_mean_has_the_standard_errors_width() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 1000)
    found = bootstrap(values, seed=4)
    error = values.std() / math.sqrt(1000)
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    assert found == bootstrap(values, seed=4) != bootstrap(values, seed=5)


def test_few_different_values_are_resampled_as_any_others() -> None:
    values = np.random.default_rng(0).choice([-1.0, 0.0, 1.0, 2.5], 400)
    rng = np.random.default_rng(1)
    draws = [np.mean([values[i] for i in rng.integers(0, 400, 400)]) for _ in range(4000)]
    found = bootstrap(values, resamples=40000)
    assert found.value == pytest.approx(values.mean(), abs=1e-15)
    error = np.std(draws)
    assert [found.low, found.high] == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.1 * error)


def test_paired_difference_is_that_of_resampled_samples() -> None:
    rng = np.random.default_rng(0)
    easy = rng.random(300)  # both find the same images hard
    a, b = rng.random(300) < easy, rng.random(300) < easy
    draws = []
    for _ in range(4000):
        drawn = rng.integers(0, 300, 300)
        draws.append(sum(float(a[i]) - float(b[i]) for i in drawn) / 300)
    found = paired_difference(a, b, resamples=40000)
    assert found.value == pytest.approx(a.mean() - b.mean(), abs=1e-12)
    assert found.n == 300
    assert np.abs([found.low, found.high] - np.percentile(draws, [2.5, 97.5])).max() < 1.01 / 300
    scores = rng.random((2, 300))
    error = (scores[0] - scores[1]).std() / math.sqrt(300)
    figure = paired_difference(*scores, 3)
    assert figure.high - figure.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert figure == paired_difference(*scores, 3) != paired_difference(*scores, 4)


def test_pairing_sees_a_difference_that_two_intervals_hide() -> None:
    a = np.arange(1000) < 520
    b = np.arange(1000) < 500  # right wherever a is, but for twenty
    one, other = bootstrap(a), bootstrap(b)
    assert one.low < other.high
    found = paired_difference(a, b)
    assert (found.value, found.low > 0) == (pytest.approx(0.02), True)
    assert paired_difference(a, a) == Figure(0.0, 0.0, 0.0, 1000)
    mirrored = paired_difference(b, a)
    assert mirrored.value == -found.value
    assert mirrored.low == pytest.approx(-found.high, abs=0.002)


def test_pairs_leave_out_what_one_was_not_asked() -> None:
    found = paired_difference(np.array([1.0, np.nan, 0.5, 3.0]), np.array([0.0, 1.0, 0.5, np.nan]))
    assert (found.value, found.n) == (0.5, 2)
    with pytest.raises(UserError, match="at least one sample"):
        paired_difference(np.array([np.nan]), np.array([1.0]))
    with pytest.raises(UserError, match=r"have to be the same, got \(3,\) and \(2,\)"):
        paired_difference(np.ones(3), np.ones(2))


def test_samples_are_kept_beside_the_result_they_belong_to(tmp_path: Path) -> None:
    hits = np.array([True, False, True, False])
    given = result(samples={"top1": hits}, data={"test": {"fingerprint": "f"}})
    path = tmp_path / "knn.json"
    save_result(path, given)
    assert "samples" not in json.loads(path.read_text())
    stored = load_result(path)
    assert load_samples(path, stored)["top1"].tolist() == hits.tolist()
    for other in (
        result(data={"test": {"fingerprint": "g"}}),
        result(data={"test": {"fingerprint": "f"}}, figures={"top1": Figure(0.75)}),
        result(data={"test": {"fingerprint": "f"}}, figures={"top5": Figure(0.5)}),
    ):
        assert load_samples(path, other) == {}
    arrays = path.with_suffix(".npz")
    whole = arrays.read_bytes()
    for damaged in (whole[:-30], b"", b"PK rubbish"):
        arrays.write_bytes(damaged)
        assert load_samples(path, stored) == {}
    np.savez(arrays, top1=hits)  # some other array file
    assert load_samples(path, stored) == {}
    arrays.unlink()
    assert load_samples(path, stored) == {}


def test_statistic_sees_whole_rows() -> None:
    rows = np.stack([np.arange(50.0), np.arange(50.0)], axis=1)
    found = bootstrap(rows, lambda sample: float(np.corrcoef(sample.T)[0, 1]), resamples=50)
    assert found.low == pytest.approx(1.0) == found.high
    ones = bootstrap(np.array([0, 1, 1]), lambda sample: float(sample.sum()), resamples=20)
    assert ones.value == 2


def test_certainty_and_emptiness() -> None:
    assert bootstrap(np.ones(5)) == Figure(1.0, 1.0, 1.0, 5)
    with pytest.raises(UserError, match="at least one sample"):
        bootstrap(np.array([]))


def test_environment_is_json() -> None:
    stated = json.loads(json.dumps(environment()))
    assert {"versions", "host", "git_commit", "command"} <= stated.keys()
    assert {"torch", "timm", "numpy"} <= stated["versions"].keys()


def test_the_environment_is_recorded_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert environment()["git_commit"] is None
