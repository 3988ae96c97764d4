"""The plots of cue conflicts: what is drawn is what was given."""

import io

import numpy as np
from PIL import Image

from convscope.plots.shape_bias import CueSeries, draw_consistency, draw_cue_bias


def series(label: str, bias: float | None, human: bool = False) -> CueSeries:
    by_category = np.array([0.1, np.nan, 0.9])
    return CueSeries(label, human, not human, bias, by_category, 0.3, 0.4)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3)


def has(picture: np.ndarray, colour: str) -> bool:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((picture == wanted).all(1).any())


def test_a_bias_that_means_nothing_is_not_drawn() -> None:
    categories, order = ["cat", "dog", "oven"], [2, 0, 1]
    with_bias, without = (
        pixels(draw_cue_bias([series("a", bias)], categories, order, 2 / 3).render()) for bias in (0.4, None)
    )
    line = np.array([0x00, 0x72, 0xB2])
    count = [int((picture == line).all(1).sum()) for picture in (with_bias, without)]
    assert count[0] > 1000
    assert count[1] < 200  # of the other there is the outline of its marker beside its name
    for picture in (with_bias, without):
        assert has(picture, "#3d4f5f")  # the bars tell the shares of either
        assert has(picture, "#a8b6c1")


def test_the_order_and_the_labels_change_the_picture() -> None:
    rows = [series("people", 0.9, human=True), series("a long/name_of-a.model:with-many-parts", 0.4)]
    names = ["x", "y", "z"]
    first, second = (draw_cue_bias(rows, names, order, 2 / 3).render("svg") for order in ([0, 1, 2], [2, 1, 0]))
    assert first != second
    assert first == draw_cue_bias(rows, names, [0, 1, 2], 2 / 3).render("svg")


def test_consistency_without_common_stimuli() -> None:
    kappa = np.array([[1.0, np.nan], [np.nan, 1.0]])
    assert len(pixels(draw_consistency(["a", "b"], kappa).render()))
    dark = pixels(draw_consistency(["a", "b"], np.array([[1.0, 0.9], [0.9, 1.0]])).render())
    assert has(dark, "#08306b")  # the end of the scale
