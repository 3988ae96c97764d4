"""Linear SVMs: VISSL's arithmetic written out, whitening, views, mistakes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC
from torch import Tensor

from convscope.core.errors import UserError
from convscope.core.results import load_result
from convscope.eval.features import Features
from convscope.eval.svm import (
    SvmCommand,
    SvmConfig,
    average_precision,
    mean_average_precision,
    prepare,
    preset,
    run,
    svm,
)
from convscope.eval.svm_fit import FitSettings, fit_classes

CONFIG = SvmConfig(costs=(0.1, 1, 10), device="cpu")


def multi_label(count: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(3, 8, generator=torch.Generator().manual_seed(7))
    present = (torch.rand(count, 3, generator=generator) < 0.4).float()
    x = present @ directions + torch.randn(count, 8, generator=generator)
    return Features([f"{seed}-{i}" for i in range(count)], x, present)


def single_label(count: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 3
    x = torch.eye(3, 6)[y] + 0.5 * torch.randn(count, 6, generator=generator)
    return Features([f"{seed}-{i}" for i in range(count)], x, y)


def slow_average_precision(truth: list[bool], scores: list[float]) -> float:
    """PASCAL VOC's rule, point by point: the best precision at this recall or a higher one."""
    ranked = [hit for _, hit in sorted(zip(scores, truth), key=lambda pair: -pair[0])]
    points = [(sum(ranked[:end]) / sum(truth), sum(ranked[:end]) / end) for end in range(1, len(ranked) + 1)]
    total, before = 0.0, 0.0
    for recall, _ in points:
        total += (recall - before) * max(precision for other, precision in points if other >= recall)
        before = recall
    return total


def test_average_precision_over_all_points() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        truth, scores = rng.random(30) < 0.3, rng.standard_normal(30)
        truth[0] = True
        order = np.argsort(-scores)
        found = average_precision(truth[order], np.ones(30))
        assert found == pytest.approx(slow_average_precision(truth.tolist(), scores.tolist()))
        assert found >= average_precision_score(truth, scores) - 1e-12  # which has no monotone curve
    assert average_precision(np.array([True, False, True]), np.ones(3)) == pytest.approx((1 + 2 / 3) / 2)


def test_equals_vissls_loop() -> None:
    train, test = multi_label(90, 0), multi_label(60, 1)
    assert train.y is not None
    assert test.y is not None
    train.y[:4, 0] = -1  # absent while training
    test.y[:9, 1] = -1  # ignored
    found = svm(train, test, CONFIG)
    unit = [
        (x / (np.linalg.norm(x, axis=1) + 1e-5)[:, None]) for x in (train.x.double().numpy(), test.x.double().numpy())
    ]
    values, chosen = [], []
    for number in range(3):
        truth = np.where(train.y[:, number].numpy() == 1, 1, -1)
        best = (-1.0, 0.0)
        for cost in CONFIG.costs:
            folds = []
            for fitted, held in StratifiedKFold(3).split(unit[0], truth):
                model = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, max_iter=2000, dual=True, random_state=0)
                scores = model.fit(unit[0][fitted], truth[fitted]).decision_function(unit[0][held])
                folds.append(average_precision_score(truth[held], scores))
            best = max(best, (float(np.mean(folds)), cost), key=lambda pair: pair[0])
        model = LinearSVC(C=best[1], class_weight={1: 2, -1: 1}, max_iter=2000, dual=True, random_state=0)
        kept = test.y[:, number].numpy() != -1
        scores = model.fit(unit[0], truth).decision_function(unit[1])[kept]
        values.append(slow_average_precision((test.y[kept, number] == 1).tolist(), scores.tolist()))
        chosen.append(best[1])
    assert found.details["costs"] == chosen
    assert found.figures["map"].value == pytest.approx(np.mean(values))
    assert set(found.figures) == {"map"}


def test_one_class_an_image() -> None:
    train, test = single_label(60, 0), single_label(45, 1)
    found = svm(train, test, CONFIG)
    assert set(found.figures) == {"map", "top1"}
    assert 0.6 < found.figures["top1"].value < 1
    assert 1 / 3 < found.holdout <= 1
    figure = found.figures["map"]
    assert figure.low is not None
    assert figure.high is not None
    assert figure.low < figure.value < figure.high


def test_a_class_without_a_test_image_is_left_out_of_the_mean() -> None:
    test = single_label(30, 1)
    assert test.y is not None
    scores, classes = test.x[:, :3].double(), torch.nn.functional.one_hot(test.y, 3)
    values = [mean_average_precision(scores[:, [c]], classes[:, [c]], 0).value for c in range(3)]
    classes[:, 1] = 0
    assert mean_average_precision(scores, classes, 0).value == pytest.approx((values[0] + values[2]) / 2)


def test_processes_give_the_same_numbers() -> None:
    train = single_label(60, 0)
    assert train.y is not None
    x, present = train.x.double().numpy(), torch.nn.functional.one_hot(train.y).bool().numpy()
    settings = FitSettings(costs=(0.1, 10), folds=3, positive_weight=2, max_iter=2000, seed=0)
    one, two = (list(fit_classes(x, present, np.arange(60), x[:9], settings, count)) for count in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert (a.cost, a.average_precision, a.unfinished) == (b.cost, b.average_precision, b.unfinished)
        np.testing.assert_array_equal(a.scores, b.scores)


def test_interval_equals_a_plain_bootstrap() -> None:
    test = multi_label(40, 3)
    assert test.y is not None
    scores = test.x[:, :3].double()
    found = mean_average_precision(scores, test.y, 0)
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(2000):
        rows = torch.from_numpy(rng.integers(0, 40, 40))
        values = []
        for number in range(3):
            order = torch.argsort(scores[rows, number], descending=True, stable=True)
            truth = test.y[rows][order, number].numpy() == 1
            if truth.any():
                values.append(average_precision(truth, np.ones(40)))
        draws.append(np.mean(values))
    # Copies of an image share a rank there and follow one another here, which moves a draw by less than one place.
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])), abs=0.01)


def test_whitening() -> None:
    x = torch.randn(80, 6, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 6) + 1
    plain, _ = prepare(x, x, 0)
    np.testing.assert_allclose(np.linalg.norm(plain, axis=1), 1, rtol=1e-4)
    white, other = prepare(x, x[:7], 4)
    np.testing.assert_allclose(white[:7], other)
    assert white.shape == (80, 4)
    np.testing.assert_allclose(np.linalg.norm(white, axis=1), 1, rtol=1e-4)
    centred = plain - plain.mean(0)
    left, _, _ = np.linalg.svd(centred, full_matrices=False)
    ours, expected = white @ white.T, left[:, :4] / np.linalg.norm(left[:, :4], axis=1)[:, None]
    np.testing.assert_allclose(ours, expected @ expected.T, atol=1e-4)
    assert prepare(x, x, 500)[0].shape == (80, 6)  # as many as there are
    with pytest.raises(UserError, match="nothing to whiten"):
        prepare(torch.ones(5, 3), x[:, :3], 2)


def test_views_of_an_image_stay_together_and_their_scores_are_averaged() -> None:
    train, test = single_label(30, 0), single_label(12, 1)
    assert train.y is not None
    assert test.y is not None

    def twice(one: Features, y: Tensor) -> Features:
        return Features(one.keys * 2, torch.cat([one.x, one.x.flip(1).roll(3, 1)]), torch.cat([y, y]))

    found = svm(twice(train, train.y), twice(test, test.y), CONFIG)
    assert found.figures["top1"].n == 12
    # Had the copies of a held-out image been trained on, these random labels would be found again.
    noise = torch.randint(0, 2, (30,), generator=torch.Generator().manual_seed(5))
    copies = Features(train.keys * 3, torch.randn(30, 40).repeat(3, 1), noise.repeat(3))
    assert svm(copies, copies, SvmConfig(costs=(100,), device="cpu")).holdout < 0.9


def test_presets() -> None:
    assert (
        SvmConfig(**{k: tuple(v) if k == "costs" else v for k, v in preset(SvmCommand, "vissl", []).items()})
        == SvmConfig()
    )
    assert preset(SvmCommand, "off-the-shelf", [])["whiten"] == 500
    with pytest.raises(UserError, match="no preset 'voc'"):
        preset(SvmCommand, "voc", [])


def test_mistakes_are_told() -> None:
    train, test = multi_label(30, 0), multi_label(20, 1)
    assert train.y is not None
    few = train.y.clone()
    few[:, 1] = 0
    few[:2, 1] = 1
    wrong: list[tuple[Features, str]] = [
        (Features(train.keys, train.x, train.y[:, :2]), "do not fit"),
        (Features(train.keys, train.x * float("nan"), train.y), "NaN"),
        (Features(train.keys, train.x, train.y * 2), "must be 1"),
        (Features(train.keys, train.x, few), "class 1 has 2 images"),
        (Features(train.keys, train.x, few * 0), "class 0 is in no train image"),
        (Features(train.keys, train.x, None), "no labels"),
    ]
    for one, message in wrong:
        with pytest.raises(UserError, match=message):
            svm(one, test, CONFIG)
    for name, value in (("costs", ()), ("folds", 1), ("whiten", -1), ("positive_weight", 0.0), ("processes", 0)):
        with pytest.raises(UserError, match=name.replace("_", "-")):
            SvmConfig(**{name: value})  # type: ignore[arg-type]


def test_command(small_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "svm.json"
    run(
        SvmCommand(
            model="timm:resnet10t@random",
            data=small_shards,
            device="cpu",
            workers=0,
            output=output,
            costs=(1.0,),
            whiten=8,
        )
    )
    result = load_result(output)
    assert set(result.figures) == {"map", "top1"}
    assert result.details["layers"]["pooled"]["dimensions"] == 8
    assert "cross-validated mAP" in capsys.readouterr().out
