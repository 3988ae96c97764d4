"""Procedural cue preference: silhouettes with another class's texture, decided by a probe of consistent pairs.

It needs no data and no classifier. It is not Geirhos' shape bias: shapes and textures are drawn, and the decision is
that of a probe of pooled features. (A probe of the flattened map would read shape without any training.)
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from convscope.analysis.category_heads import fit_probe, pooled_features
from convscope.analysis.cue_conflict import CueConflict, Numbers, summary
from convscope.analysis.sixteen_categories import decide
from convscope.core.backbone import Backbone
from convscope.core.data.cue_conflict_render import SHAPE_NAMES, SIZE, TEXTURE_NAMES, render
from convscope.core.data.image_files import ImageFiles
from convscope.core.errors import UserError

LEAST_SIZE = 32
HELD_OUT = 4  # of a consistent pair's drawings every fourth is not learned from


@dataclass(frozen=True, kw_only=True)
class CuePreferenceConfig:
    """The embedded set."""

    pairings: int = 5
    """Random pairings of shapes with textures; a probe learns each one's 8 consistent pairs."""
    per_pair: int = 16
    """Drawings of each of the 64 pairs of a shape and a texture."""
    drawing_size: int = SIZE
    """Their height and width in pixels."""

    def __post_init__(self) -> None:
        if self.pairings < 1 or self.per_pair < HELD_OUT:
            raise UserError(f"--pairings must be at least 1 and --per-pair at least {HELD_OUT}")
        if self.drawing_size < LEAST_SIZE:
            raise UserError(f"--drawing-size must be at least {LEAST_SIZE}; smaller drawings show no texture")


@dataclass(frozen=True)
class Drawings:
    """The whole grid of shapes and textures."""

    images: ImageFiles
    shape: Numbers  # (N,)
    texture: Numbers
    held_out: NDArray[np.bool_]
    size: int  # height and width in pixels


def drawings(config: CuePreferenceConfig, seed: int) -> Drawings:
    """Every pair of a shape and a texture, `per_pair` times; drawn when read."""
    cells = [
        (shape, texture, instance)
        for shape in range(len(SHAPE_NAMES))
        for texture in range(len(TEXTURE_NAMES))
        for instance in range(config.per_pair)
    ]
    names = [f"{SHAPE_NAMES[s]}/{SHAPE_NAMES[s]}{i}-{TEXTURE_NAMES[t]}{i}.png" for s, t, i in cells]
    fingerprint = f"procedural cue conflict 1, {config.drawing_size} px, seed {seed}, {config.per_pair} of each pair"

    def read(place: int) -> Image.Image:
        shape, texture, instance = cells[place]
        return Image.fromarray(render(shape, texture, instance, seed=seed, size=config.drawing_size))

    images = ImageFiles(names, [name.partition("/")[0] for name in names], "builtin", fingerprint, read)
    shape, texture, instance = np.array(cells).T
    return Drawings(images, shape, texture, instance % HELD_OUT == HELD_OUT - 1, config.drawing_size)


def random_pairings(count: int, seed: int) -> list[Numbers]:
    """For each pairing, the shape that each texture goes with (K,)."""
    rng = np.random.default_rng(seed)
    return [rng.permutation(len(TEXTURE_NAMES)) for _ in range(count)]


def measure(
    backbone: Backbone,
    drawn: Drawings,
    pairings: Sequence[Numbers],
    *,
    c: float,
    batch_size: int,
    device: str,
    seed: int,
) -> tuple[CueConflict, dict[str, Any]]:
    """Preference over all pairings, with intervals from resampling drawings, and the figures of each pairing.

    Raises:
        UserError: the model does not take images of the drawings' size, or gives NaN.
    """
    shown = backbone.at_size(drawn.size)
    shown.preprocessing = dataclasses.replace(shown.preprocessing, crop_pct=1.0)
    try:
        features = pooled_features(shown, drawn.images, range(len(drawn.images)), batch_size, device)
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"{backbone.source} does not take images of {drawn.size} px: {error}") from error
    return preference(features, drawn, pairings, c=c, seed=seed)


def preference(
    features: Tensor, drawn: Drawings, pairings: Sequence[Numbers], *, c: float, seed: int
) -> tuple[CueConflict, dict[str, Any]]:
    """The same from features (N, D)."""
    count = len(SHAPE_NAMES)
    rows = np.zeros((len(drawn.shape), 3), dtype=np.int64)
    each: list[dict[str, Any]] = []
    for pairing in pairings:
        texture = pairing[drawn.texture]  # as the shape that it goes with
        consistent = drawn.shape == texture
        learned, held_out = consistent & ~drawn.held_out, consistent & drawn.held_out
        probe = fit_probe(features[learned], torch.from_numpy(drawn.shape[learned]), c)
        decisions = decide(probe(features))
        hits = np.stack([decisions == drawn.shape, decisions == texture, np.ones(len(rows), dtype=bool)], 1)
        rows += hits & ~consistent[:, None]
        for_shape, for_texture, shown = hits[~consistent].sum(0).tolist()
        each.append(
            {
                "shapes": [SHAPE_NAMES[number] for number in pairing],
                "consistent_accuracy": float((decisions == drawn.shape)[held_out].mean()),
                "coverage": (for_shape + for_texture) / shown,
                "cue_preference": for_shape / (for_shape + for_texture) if for_shape + for_texture else None,
            }
        )
    by_category = np.full(count, np.nan)
    for number in range(count):
        for_shape, for_texture, _ = rows[drawn.shape == number].sum(0)
        if for_shape + for_texture:
            by_category[number] = for_shape / (for_shape + for_texture)
    seen = rows[:, 2] > 0
    accuracy = float(np.mean([one["consistent_accuracy"] for one in each]))
    details = {"head": "probe", "c": c, "features": "pooled", "consistent_accuracy": accuracy, "pairings": each}
    return summary(rows[seen], by_category, 2 / count, seed=seed), details
