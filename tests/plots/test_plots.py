"""Plots: what is drawn is what was given, files are whole, nothing global changes."""

import io
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from convscope.core.errors import UserError
from convscope.core.results import Figure
from convscope.plots.curves import _running_mean, draw_figures, draw_loss
from convscope.plots.erf import ErfPanel, draw_erf, draw_sides
from convscope.plots.reconstruction import draw_reconstruction
from convscope.plots.theme import Picture, stroke, wrap


def decoded(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def panel(label: str, square: bool = True) -> ErfPanel:
    map_ = np.zeros((16, 16))
    map_[6:10, 6:10] = 1.0
    curves = {name: (np.linspace(0.01, 1, 10), np.linspace(0.1, 1, 10)) for name in ("raw", "log")}
    return ErfPanel(label, map_, curves, np.exp(-np.arange(9.0)), 1.5, (7.5, 7.5, 4.0) if square else None, "side 4 px")


def drawn(*panels: ErfPanel) -> Picture:
    return draw_erf([panels], {each.title: each for each in panels})


def test_saving_writes_both_formats_and_leaves_nothing_else(tmp_path: Path) -> None:
    drawn(panel("a"), panel("b", square=False)).save(tmp_path / "erf.png", tmp_path / "erf.svg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["erf.png", "erf.svg"]
    assert decoded((tmp_path / "erf.png").read_bytes()).shape[2] == 3
    assert b"<svg" in (tmp_path / "erf.svg").read_bytes()[:2000]


def test_the_same_drawing_gives_the_same_file() -> None:
    assert drawn(panel("a")).render("svg") == drawn(panel("a")).render("svg")


def test_drawing_leaves_matplotlibs_settings_alone() -> None:
    before = dict(matplotlib.rcParams)
    draw_loss({"a": (np.arange(3), np.ones(3))}).render()
    assert dict(matplotlib.rcParams) == before


def test_unwritable_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "erf.png").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        drawn(panel("a")).save(tmp_path / "erf.png")
    assert [p.name for p in tmp_path.iterdir()] == ["erf.png"]


def test_an_all_zero_map_can_be_drawn() -> None:
    curve = (np.linspace(0.1, 1, 5), np.zeros(5))
    zero = ErfPanel("dead", np.zeros((8, 8)), {"raw": curve, "log": curve}, np.zeros(6))
    assert decoded(drawn(zero).render()).size


def test_stages_stand_below_one_another_with_gaps_where_a_model_has_none() -> None:
    one, two = panel("a"), panel("b")
    low, high = (
        decoded(draw_erf(rows, {"a": one, "b": two}, "last stage").render())
        for rows in ([[one, two]], [[one, two], [one, None]])
    )
    assert high.shape[0] > low.shape[0]
    assert high.shape[1] == pytest.approx(low.shape[1], rel=0.05)


def test_sides_over_steps_have_gaps_and_any_order() -> None:
    svg = draw_sides([100, 0, 50], {"20%": [9.0, 3.0, 5.0], "99%": [31.0, None, 21.0]}, "side").render("svg")
    assert svg == draw_sides([0, 50, 100], {"20%": [3.0, 5.0, 9.0], "99%": [None, 21.0, 31.0]}, "side").render("svg")


def test_series_differ_without_colour() -> None:
    looks = {(stroke(i)["linestyle"], stroke(i)["marker"]) for i in range(8)}
    assert len(looks) == 8
    assert stroke(0, points=5)["markevery"] is None
    assert stroke(0, points=500)["markevery"] is not None


def test_reconstruction_shows_the_given_colours_in_order() -> None:
    red, green, blue = (np.broadcast_to(np.eye(3)[i], (2, 8, 8, 3)) for i in range(3))
    for scale in (1.0, 255):
        given = [(each * scale).astype(np.uint8 if scale == 255 else np.float32) for each in (red, green, blue)]
        pixels = decoded(draw_reconstruction(*given).render())
        middles = [np.argwhere((pixels == np.eye(3)[i] * 255).all(axis=2)).mean(axis=0)[1] for i in range(3)]
        assert middles == sorted(middles)


def test_reconstruction_takes_many_samples_and_values_out_of_range() -> None:
    wild = np.random.default_rng(0).normal(0.5, 2, (5, 8, 12, 3))
    wild[0, 0, 0, 0] = np.nan
    assert decoded(draw_reconstruction(wild, wild, wild).render()).size


def test_running_mean_matches_a_slow_loop_and_skips_what_is_not_finite() -> None:
    values = np.random.default_rng(0).random(300)
    values[[3, 50, 51]] = np.nan, np.inf, np.nan
    expected = []
    for i in range(300):
        near = [v for v in values[max(i - 3, 0) : i + 4] if np.isfinite(v)]
        expected.append(np.mean(near))
    np.testing.assert_allclose(_running_mean(values), expected)


def test_loss_that_diverged_can_be_drawn() -> None:
    values = np.concatenate([np.ones(100), np.full(100, np.nan)])
    assert decoded(draw_loss({"a": (np.arange(200), values), "b": (np.arange(1), np.ones(1))}).render()).size


def test_figures_with_gaps_and_without_intervals_can_be_drawn() -> None:
    series = {"pretrained": [Figure(0.5, 0.4, 0.6), None], "untrained": [Figure(0.2), Figure(0.3, 0.2, 0.4)]}
    svg = draw_figures(["stage 1", "stage 2"], series, chance=0.1).render("svg")
    assert b"<svg" in svg[:2000]


def test_names_break_after_separators() -> None:
    assert wrap("timm:vit_tiny_patch16_224@random", 26) == "timm:vit_tiny_patch16_224@\nrandom"
    assert wrap("short", 26) == "short"
    assert wrap("x" * 40, 26) == "x" * 40
