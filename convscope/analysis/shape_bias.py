"""Stimuli in, one decision for each out (Geirhos et al. 2019)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms import v2

from convscope.analysis.category_heads import normalization
from convscope.analysis.cue_conflict import CueConflict, error_consistency, parse_name
from convscope.analysis.deciders import Decider
from convscope.analysis.observers import Answers, Kind
from convscope.analysis.sixteen_categories import CATEGORIES, Ties, decide
from convscope.core.data.image_files import ImageFiles
from convscope.core.data.stream import Transform
from convscope.core.data.transforms import interpolation_mode
from convscope.core.distributed import pick_device
from convscope.core.errors import UserError
from convscope.core.log import progress


@dataclass(frozen=True)
class Row:
    """What is known of one observer or model."""

    kind: Kind
    cues: CueConflict
    details: dict[str, Any]  # head, how the stimuli were shown, ...
    answers: Answers | None = None  # None where stimuli were shown several times
    scores: NDArray[np.float32] | None = None  # (N, 16) of models


@dataclass(frozen=True)
class Consistency:
    """Error consistency of every pair of observers."""

    kappa: NDArray[np.float64]  # (O, O), NaN without stimuli in common
    stimuli: NDArray[np.int64]  # (O, O) in common


def read_stimuli(images: ImageFiles) -> Answers:
    """The cues of every stimulus, without decisions yet.

    Raises:
        UserError: a name that does not say its two categories, or two stimuli of one name.
    """
    names = [parse_name(name, CATEGORIES) for name in images.names]
    keys = [name.key for name in names]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"{images.source} has several stimuli called {twice}; their names have to be different")
    shape = np.array([CATEGORIES.index(name.shape) for name in names])
    texture = np.array([CATEGORIES.index(name.texture) for name in names])
    return Answers("model", keys, shape, texture, np.full(len(keys), -1))


@torch.inference_mode()
def ask(
    label: str,
    decider: Decider,
    images: ImageFiles,
    stimuli: Answers,
    *,
    ties: Ties = "abstain",
    batch_size: int = 64,
    device: str = "auto",
) -> tuple[Answers, NDArray[np.float32], str]:
    """A model's decisions, its scores (N, 16), and how the stimuli were shown to it.

    Stimuli are shown as they are, without resizing or cropping; only a model that takes no such size gets them resized.

    Raises:
        UserError: an image cannot be read, or the model takes no size at all.
    """
    transform, shown = _transform(label, decider, images, device)
    normalize = normalization(decider.preprocessing, device)
    found = []
    with progress(f"shape-bias {label}", len(images)) as ticker:
        for batch in images.batches(transform, batch_size):
            found.append(decider.head.scores(normalize(batch.to(pick_device(device)))).cpu())
            ticker.advance(len(batch))
    scores = torch.cat(found)
    answers = replace(stimuli, kind=decider.kind, decisions=decide(scores, ties))
    return answers, scores.float().numpy(), shown


def _transform(label: str, decider: Decider, images: ImageFiles, device: str) -> tuple[Transform, str]:
    width, height = images.read(0).size
    if _takes(decider, (height, width), device):
        return v2.PILToTensor(), f"as they are, {height} x {width}"
    size = decider.preprocessing.size
    if not _takes(decider, size, device):
        raise UserError(f"shape-bias: {label} takes neither images of {height} x {width} pixels nor of its own size")
    resize = v2.Resize(size, interpolation=interpolation_mode(decider.preprocessing.interpolation))
    transform: Transform = v2.Compose([resize, v2.PILToTensor()])
    return transform, f"resized from {height} x {width} to {size[0]} x {size[1]}, the size that the model takes"


def _takes(decider: Decider, size: tuple[int, int], device: str) -> bool:
    """Networks of a fixed size refuse others in many ways."""
    try:
        decider.head.scores(torch.zeros(1, 3, *size, device=pick_device(device)))
    except (AssertionError, RuntimeError, ValueError):
        return False
    return True


def consistency(answers: Mapping[str, Answers]) -> Consistency:
    """Error consistency over all stimuli that each pair of observers has seen, those with agreeing cues too.

    Right is who answers with the shape, as in the publication.
    """
    correct = [one.correct() for one in answers.values()]
    kappa, stimuli = np.full((len(correct),) * 2, math.nan), np.zeros((len(correct),) * 2, dtype=np.int64)
    for i, a in enumerate(correct):
        for j, b in enumerate(correct):
            common = sorted(a.keys() & b.keys())
            kappa[i, j] = error_consistency(np.array([a[key] for key in common]), np.array([b[key] for key in common]))
            stimuli[i, j] = len(common)
    return Consistency(kappa, stimuli)


def category_order(rows: Mapping[str, Row], categories: int) -> list[int]:
    """Categories by the mean bias of people, where there are some, else of everybody; the most texture first."""
    humans = [row for row in rows.values() if row.kind == "human"] or list(rows.values())
    table = np.array([row.cues.by_category for row in humans]).reshape(-1, categories)
    known = np.isfinite(table)
    mean = np.where(known, table, 0).sum(0) / np.maximum(known.sum(0), 1)
    return sorted(range(categories), key=lambda number: (bool(known[:, number].any()), mean[number]))
