"""Procedural cue conflicts: pure, and equal in brightness and contrast."""

import numpy as np
import pytest

from convscope.core.data.cue_conflict_render import CONTRAST, MEAN, SHAPE_NAMES, TEXTURE_NAMES, _filling, render
from convscope.core.data.shapes_render import SHAPES


def test_a_pure_function_of_its_arguments() -> None:
    first = render(3, 2, 5, seed=1, size=48)
    assert first.shape == (48, 48, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, render(3, 2, 5, seed=1, size=48))
    for other in (render(3, 2, 6, seed=1, size=48), render(3, 2, 5, seed=2, size=48), render(3, 1, 5, seed=1, size=48)):
        assert not np.array_equal(first, other)


@pytest.mark.parametrize("texture", TEXTURE_NAMES)
def test_textures_differ_neither_in_brightness_nor_in_contrast(texture: str) -> None:
    axis = ((np.arange(96) + 0.5) / 96 * 2 - 1).astype(np.float32)
    for seed, outline in enumerate(SHAPES.values()):
        mask = np.clip(0.5 - outline(axis[None, :] / 0.7, axis[:, None] / 0.7) * 34, 0, 1)
        surface = _filling(np.random.default_rng(seed), texture, axis, mask)
        mean = (mask * surface).sum() / mask.sum()
        assert mean == pytest.approx(MEAN, abs=1e-4)
        assert (mask * (surface - mean) ** 2).sum() / mask.sum() == pytest.approx(CONTRAST**2, rel=1e-3)
        assert surface[mask > 0].min() > 0  # nothing is clipped
        assert surface[mask > 0].max() < 1


def test_eight_of_each() -> None:
    assert len(SHAPE_NAMES) == len(TEXTURE_NAMES) == 8
    assert "solid" not in TEXTURE_NAMES
