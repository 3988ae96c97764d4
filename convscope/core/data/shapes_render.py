"""Drawing the embedded images: a large textured shape on a cluttered, noisy background.

Objects fill most of the image and their textures repeat, so that the hidden part of an image follows from the visible.
"""

import colorsys
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Plane = NDArray[np.floating[Any]]  # (size, size), float32 throughout
Picture = NDArray[np.floating[Any]]  # (size, size, 3), 0 to 1

HUES = {
    "red": 0.0,
    "orange": 0.08,
    "yellow": 0.155,
    "green": 0.35,
    "cyan": 0.5,
    "blue": 0.62,
    "purple": 0.77,
    "pink": 0.9,
}
COLOURS = tuple(HUES)
CAPTIONS = (
    "a {colour} {texture} {shape} on a {background} background",
    "a photo of a {texture} {shape} in {colour}",
    "{colour} {shape}, {texture}, {background} backdrop",
    "there is a {texture} {colour} {shape}",
)
TEST_START = 10**9  # index of the first test image, beyond any training set
JPEG_QUALITY = 95
NOISE = 0.02  # standard deviation over the range of a pixel


@dataclass(frozen=True)
class Scene:
    """What is in an image; `rng` goes on to draw where and how."""

    shape: int
    texture: int
    colour: int
    background: int
    template: int
    rng: np.random.Generator = field(repr=False)

    @property
    def names(self) -> dict[str, str]:
        """The four factors in words."""
        return {
            "shape": SHAPE_NAMES[self.shape],
            "texture": TEXTURE_NAMES[self.texture],
            "colour": COLOURS[self.colour],
            "background": COLOURS[self.background],
        }

    @property
    def label(self) -> int:
        """Shape and texture as one of 64 classes."""
        return self.shape * len(TEXTURES) + self.texture

    @property
    def caption(self) -> str:
        """One of four sentences."""
        return CAPTIONS[self.template].format(**self.names).replace("a orange", "an orange")

    def labels(self) -> dict[str, Any]:
        """The four factors as numbers and, under `<factor>_name`, in words."""
        words = {f"{factor}_name": word for factor, word in self.names.items()}
        return {factor: int(getattr(self, factor)) for factor in self.names} | words


def draw_scene(index: int, seed: int = 0) -> Scene:
    """The scene of an image, a pure function of (seed, index)."""
    rng = np.random.default_rng((seed, index))
    shape, texture, colour, step, template = (int(rng.integers(n)) for n in (8, 8, 8, 5, len(CAPTIONS)))
    return Scene(shape, texture, colour, (colour + 2 + step) % len(COLOURS), template, rng)  # never a close hue


def class_names() -> list[str]:
    """Names of the 64 classes in label order: "solid circle", "striped circle", ..."""
    return [f"{texture} {shape}" for shape in SHAPE_NAMES for texture in TEXTURE_NAMES]


def render(index: int, *, size: int = 64, seed: int = 0) -> tuple[NDArray[np.uint8], dict[str, Any], str]:
    """Draw image `index` of the sequence that `seed` fixes.

    Returns:
        Pixels uint8 (size, size, 3), the labels of `Scene.labels`, and a caption.
    """
    scene = draw_scene(index, seed)
    rng = scene.rng
    axis = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    radius = rng.uniform(0.6, 0.9)
    cx, cy = (float(shift) for shift in rng.uniform(-1, 1, 2) * (1 - radius))
    x, y = rotate((axis[None, :] - cx) / radius, (axis[:, None] - cy) / radius, rng.uniform(-0.8, 0.8))
    distance = SHAPES[SHAPE_NAMES[scene.shape]](x, y)
    mask = np.clip(0.5 - distance * (radius * size / 2), 0, 1)[..., None]  # the edge is one pixel wide
    back = _background(scene, axis)
    picture = back + mask * (_surface(scene, x, y) - back)
    picture *= rng.uniform(0.8, 1.15)
    picture += NOISE * rng.standard_normal(picture.shape, dtype=np.float32)
    return (picture.clip(0, 1) * 255).astype(np.uint8), scene.labels(), scene.caption


def encode(pixels: NDArray[np.uint8]) -> bytes:
    """JPEG bytes: about a third of a PNG's size here (noise does not compress), as fast to decode."""
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=JPEG_QUALITY)
    return encoded.getvalue()


# Shapes: signed distance to the outline, negative inside, in units of the object's radius; y points down.


def _box(x: Plane, y: Plane, width: float, height: float) -> Plane:
    return np.maximum(np.abs(x) - width, np.abs(y) - height)


def _triangle(x: Plane, y: Plane) -> Plane:
    return np.maximum(y, 0.866 * np.abs(x) - 0.5 * y) - 0.5


def _star(x: Plane, y: Plane, notch: float = 0.45) -> Plane:
    """Five points: the plane is folded into one tenth, where the outline is a line from a tip to a notch."""
    wedge = math.pi / 5
    angle = np.abs((np.arctan2(x, -y) + wedge) % (2 * wedge) - wedge)
    r = np.hypot(x, y)
    rise, run = notch * math.sin(wedge), 1 - notch * math.cos(wedge)  # of the line, the tip being at radius 1
    return ((r * np.cos(angle) - 1) * rise + r * np.sin(angle) * run) / math.hypot(rise, run)


def _cross(x: Plane, y: Plane) -> Plane:
    return np.minimum(_box(x, y, 0.28, 0.9), _box(x, y, 0.9, 0.28))


def _heart(x: Plane, y: Plane, side: float = 0.55) -> Plane:
    """A square on its corner, `2 * side` wide, and a disc on each of its two upper sides."""
    x, y = np.abs(x), y - 0.08
    middle = side / math.sqrt(2)  # of an upper side, along each axis
    distance: Plane = np.minimum((x + np.abs(y)) / math.sqrt(2), np.hypot(x - middle, y + middle)) - side
    return distance


def _crescent(x: Plane, y: Plane) -> Plane:
    distance: Plane = np.maximum(np.hypot(x, y) - 0.9, 0.72 - np.hypot(x - 0.42, y))
    return distance


SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "circle": lambda x, y: np.hypot(x, y) - 0.9,
    "square": lambda x, y: _box(x, y, 0.75, 0.75),
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.66) - 0.22,
    "heart": _heart,
    "crescent": _crescent,
}
SHAPE_NAMES = tuple(SHAPES)

# Textures: a wave that is positive where the light tone goes; u and v are in radians.


def _bricked(u: Plane, v: Plane) -> Plane:
    shifted = u + math.pi * np.floor(v / math.pi)  # every other row by half a brick
    wave: Plane = np.minimum(0.75 - np.cos(2 * v), 3 * (0.93 - np.cos(shifted)))
    return wave


TEXTURES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "solid": lambda u, v: np.ones_like(u),
    "striped": lambda u, v: np.sin(u),
    "checkered": lambda u, v: 1.5 * np.sin(u) * np.sin(v),
    "dotted": lambda u, v: np.cos(u) + np.cos(v) - 0.8,
    "wavy": lambda u, v: np.sin(v + 1.6 * np.sin(u)),
    "bricked": _bricked,
    "gridded": lambda u, v: np.maximum(np.cos(u), np.cos(v)) - 0.75,
    "ringed": lambda u, v: np.sin(1.2 * np.hypot(u, v)),
}
TEXTURE_NAMES = tuple(TEXTURES)


def _surface(scene: Scene, x: Plane, y: Plane) -> Picture:
    """The object's two tones, laid out by its texture at a random angle, scale and phase."""
    rng = scene.rng
    u, v = rotate(x, y, rng.uniform(0, math.pi))
    frequency = rng.uniform(9, 12)  # radians per radius: three to four periods across the object
    phase_u, phase_v = rng.uniform(-math.pi, math.pi, 2).tolist()
    wave = TEXTURES[TEXTURE_NAMES[scene.texture]](frequency * u + phase_u, frequency * v + phase_v)
    share = np.clip(2.5 * wave + 0.5, 0, 1)[..., None]  # 2.5: the tones blend over about a pixel
    hue, value = HUES[COLOURS[scene.colour]] + 0.012 * rng.standard_normal(), rng.uniform(0.75, 1)
    light = _rgb(hue, rng.uniform(0.75, 1), value)
    dark = _rgb(hue, rng.uniform(0.3, 0.6), value * rng.uniform(0.25, 0.5))
    surface: Picture = dark + share * (light - dark)
    return surface


def _background(scene: Scene, axis: Plane) -> Picture:
    """A dull hue under soft light and shade, with up to three small discs."""
    rng = scene.rng
    hue = HUES[COLOURS[scene.background]] + 0.012 * rng.standard_normal()
    shade = rng.uniform(0.3, 0.8) * (0.2 + 0.8 * _clouds(rng, len(axis), int(rng.integers(2, 5))))
    picture = shade[..., None] * _rgb(hue, rng.uniform(0.25, 0.6), 1)
    for _ in range(int(rng.integers(0, 4))):
        x, y, radius = rng.uniform(-1, 1), rng.uniform(-1, 1), rng.uniform(0.08, 0.2)
        distance = np.hypot(axis[None, :] - x, axis[:, None] - y) - radius
        cover = 0.8 * np.clip(0.5 - distance * (len(axis) / 2), 0, 1)[..., None]
        picture += cover * (_rgb(rng.random(), 0.6, rng.uniform(0.3, 1)) - picture)
    return picture


def _clouds(rng: np.random.Generator, size: int, cells: int) -> Plane:
    """Smooth noise from 0 to 1: random values on a grid of `cells` x `cells`, blended between."""
    blend = _blend(size, cells)
    clouds: Plane = blend @ rng.random((cells + 1, cells + 1), dtype=np.float32) @ blend.T
    return clouds


@lru_cache(maxsize=16)
def _blend(size: int, cells: int) -> Plane:
    """Weights (size, cells + 1) of the grid points along one axis."""
    position = (np.arange(size, dtype=np.float32) + 0.5) / size * cells
    near = np.clip(1 - np.abs(position[:, None] - np.arange(cells + 1, dtype=np.float32)), 0, 1)
    weights: Plane = near * near * (3 - 2 * near)
    return weights


def rotate(x: Plane, y: Plane, angle: float) -> tuple[Plane, Plane]:
    """Coordinates in axes that are turned by `angle`, in radians."""
    cos, sin = math.cos(angle), math.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


def _rgb(hue: float, saturation: float, value: float) -> Plane:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32)
