"""Drawing procedural cue conflicts: a silhouette filled with a texture, on a plain background.

All textures have the same mean and contrast inside the silhouette, so that neither brightness nor contrast tells them
apart; position, size, angle and background say nothing of either.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from convscope.core.data.shapes_render import SHAPES, TEXTURES, Plane, rotate

SIZE = 224  # pixels per side
MEAN, CONTRAST, NOISE = 0.5, 0.16, 0.02  # of grey levels from 0 to 1; contrast and noise are standard deviations


def _marbled(u: Plane, v: Plane) -> Plane:
    """Irregular blobs: waves in three directions whose lengths share no period."""
    wave: Plane = np.sin(0.9 * u + 0.4 * v) + np.sin(1.1 * v - 0.5 * u + 1) + np.sin(0.7 * u - 0.83 * v + 2)
    return wave


FILLINGS: dict[str, Callable[[Plane, Plane], Plane]] = {
    **{name: wave for name, wave in TEXTURES.items() if name != "solid"},
    "marbled": _marbled,
}
SHAPE_NAMES, TEXTURE_NAMES = tuple(SHAPES), tuple(FILLINGS)


def render(shape: int, texture: int, instance: int, *, seed: int = 0, size: int = SIZE) -> NDArray[np.uint8]:
    """Draw one stimulus, a pure function of its arguments.

    Args:
        shape: its place in SHAPE_NAMES.
        texture: its place in TEXTURE_NAMES.
        instance: which of the drawings of this pair.
        seed: of the whole set.
        size: pixels per side.

    Returns:
        Grey pixels uint8 (size, size, 3).
    """
    rng = np.random.default_rng((seed, shape, texture, instance))
    axis = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    radius = rng.uniform(0.65, 0.9)
    cx, cy = (float(shift) for shift in rng.uniform(-1, 1, 2) * (1 - radius))
    x, y = rotate((axis[None, :] - cx) / radius, (axis[:, None] - cy) / radius, rng.uniform(-0.5, 0.5))
    mask = np.clip(0.5 - SHAPES[SHAPE_NAMES[shape]](x, y) * (radius * size / 2), 0, 1)  # an edge of one pixel
    surface = _filling(rng, TEXTURE_NAMES[texture], axis, mask)
    background = rng.choice([rng.uniform(0.0, 0.12), rng.uniform(0.88, 1.0)])
    picture = background + mask * (surface - background) + NOISE * rng.standard_normal(mask.shape, dtype=np.float32)
    grey = (picture.clip(0, 1) * 255).round().astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def _filling(rng: np.random.Generator, texture: str, axis: Plane, mask: Plane) -> Plane:
    """Grey levels whose mean and standard deviation inside the mask are MEAN and CONTRAST."""
    u, v = rotate(axis[None, :], axis[:, None], rng.uniform(0, math.pi))
    frequency = rng.uniform(18, 23)  # radians per half image: some six periods across it
    phase_u, phase_v = rng.uniform(-math.pi, math.pi, 2).tolist()
    wave = FILLINGS[texture](frequency * u + phase_u, frequency * v + phase_v)
    share = np.clip(2.5 * wave + 0.5, 0, 1)  # light and dark blend over about a pixel
    weights = mask / mask.sum()
    centred = share - (weights * share).sum()
    surface: Plane = MEAN + CONTRAST * centred / np.sqrt((weights * centred**2).sum())
    return surface
