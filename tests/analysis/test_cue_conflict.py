"""Shape bias and error consistency against loops."""

import math

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from convscope.analysis.cue_conflict import cue_conflict, error_consistency, parse_name, resampled
from convscope.analysis.sixteen_categories import CATEGORIES
from convscope.core.errors import UserError

RNG = np.random.default_rng(3)
SHAPE, TEXTURE = RNG.integers(0, 4, 400), RNG.integers(0, 4, 400)
DECISIONS = np.where(RNG.random(400) < 0.5, SHAPE, np.where(RNG.random(400) < 0.6, TEXTURE, -1))


@pytest.mark.parametrize(
    ("path", "key", "shape", "texture"),
    [
        ("cat/cat3-elephant2.png", "cat3-elephant2", "cat", "elephant"),
        ("a/b/cat/cat3-elephant2.png", "cat3-elephant2", "cat", "elephant"),
        ("cat3-elephant2", "cat3-elephant2", "cat", "elephant"),
        ("0001_cue_dnn_0_dog_00_dog10-bird2.png", "dog10-bird2", "dog", "bird"),
        ("session-1/0001_s5n_s01_0_bird_00_bird3-bird2.png", "bird3-bird2", "bird", "bird"),
        ("oven/truck1-car2.png", "truck1-car2", "oven", "car"),  # the folder decides
        ("cat/cat3.png", "cat3", "cat", "cat"),  # without a second category both cues are the same
    ],
)
def test_names(path: str, key: str, shape: str, texture: str) -> None:
    found = parse_name(path, CATEGORIES)
    assert (found.key, found.shape, found.texture) == (key, shape, texture)


@pytest.mark.parametrize("path", ["cat/cat3-unicorn1.png", "photos/img-dog1.png", "1-cat.png"])
def test_other_names_are_told(path: str) -> None:
    with pytest.raises(UserError, match=path):
        parse_name(path, CATEGORIES)


def test_against_a_loop() -> None:
    found = cue_conflict(DECISIONS, SHAPE, TEXTURE, 4)
    by_shape = by_texture = conflicts = 0
    rows: dict[int, list[int]] = {number: [0, 0] for number in range(4)}
    for decision, shape, texture in zip(DECISIONS, SHAPE, TEXTURE):
        if shape == texture:
            continue
        conflicts += 1
        by_shape += decision == shape
        by_texture += decision == texture
        rows[shape][0] += decision == shape
        rows[shape][1] += decision == texture
    assert found.stimuli == conflicts < 400
    assert found.bias is not None
    assert found.bias.value == by_shape / (by_shape + by_texture)
    assert found.shape.value == by_shape / conflicts
    assert found.texture.value == by_texture / conflicts
    assert found.coverage.value == pytest.approx((by_shape + by_texture) / conflicts)
    assert found.by_category.tolist() == [s / (s + t) for s, t in rows.values()]


def test_shares_of_all_stimuli_for_comparison_with_the_toolbox() -> None:
    ours, theirs = (cue_conflict(DECISIONS, SHAPE, TEXTURE, 4, all_stimuli=every) for every in (False, True))
    assert theirs.shape.value == pytest.approx(ours.shape.value * ours.stimuli / 400)
    assert ours.bias is not None
    assert theirs.bias is not None
    assert theirs.bias.value == ours.bias.value


def test_interval_is_that_of_resampled_stimuli() -> None:
    found = cue_conflict(DECISIONS, SHAPE, TEXTURE, 4).bias
    conflict = np.flatnonzero(SHAPE != TEXTURE)
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(2000):
        drawn = rng.choice(conflict, len(conflict))
        shape, texture = (DECISIONS[drawn] == SHAPE[drawn]).sum(), (DECISIONS[drawn] == TEXTURE[drawn]).sum()
        draws.append(shape / (shape + texture))
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    low, high = np.percentile(draws, [2.5, 97.5])
    assert abs(found.low - low) < 0.1 * (high - low)
    assert abs(found.high - high) < 0.1 * (high - low)


def test_resampled_sums_keep_mean_and_variance() -> None:
    rows = RNG.integers(0, 3, (50, 2))
    sums = resampled(rows, 0, 20_000)
    assert np.allclose(sums.mean(0), rows.sum(0), rtol=0.01)
    assert np.allclose(sums.var(0), 50 * rows.var(0), rtol=0.05)


def test_a_category_without_a_hit_is_nan() -> None:
    found = cue_conflict(np.where(SHAPE == 2, -1, SHAPE), SHAPE, TEXTURE, 4)
    assert np.isnan(found.by_category).tolist() == [False, False, True, False]


def test_no_bias_where_coverage_is_at_chance() -> None:
    shape, texture = np.arange(160) % 16, (np.arange(160) + 1 + np.arange(160) // 16) % 16
    guesses = np.random.default_rng(1).integers(0, 16, 160)
    found = cue_conflict(guesses, shape, texture, 16)
    assert found.bias is None
    assert "not above chance" in found.reason
    assert cue_conflict(shape, shape, texture, 16).bias is not None


def test_no_conflict_is_told() -> None:
    with pytest.raises(UserError, match="disagree"):
        cue_conflict(SHAPE, SHAPE, SHAPE, 4)


def test_error_consistency_is_cohens_kappa() -> None:
    a, b = RNG.random(300) < 0.7, RNG.random(300) < 0.6
    assert error_consistency(a, b) == pytest.approx(cohen_kappa_score(a, b), abs=1e-12)
    assert error_consistency(a, a) == 1.0
    assert error_consistency(np.ones(5, bool), np.ones(5, bool)) == 1.0  # where kappa alone would be 0 / 0
    assert math.isnan(error_consistency(a[:0], b[:0]))
