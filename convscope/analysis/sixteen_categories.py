"""The 16 categories of Geirhos et al. (ICLR 2019, sec. 2.2), and a decision among them from ImageNet's 1000 classes."""

import functools
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from timm.data import ImageNetInfo
from torch import Tensor

Ties = Literal["abstain", "last"]

IMAGENET_CLASSES = 1000
ABSTAINED = -1

# Class numbers, ends included; of what lies below WordNet's words the study took a part.
CLASSES: Mapping[str, str] = {
    "airplane": "404",
    "bear": "294-297",
    "bicycle": "444 671",
    "bird": "8 10-16 18-20 22-24 80-83 87-96 98-100 127-133 135-145",
    "boat": "472 554 625 814 914",
    "bottle": "440 720 737 898-899 901 907",
    "car": "436 511 817",
    "cat": "281-286",
    "chair": "423 559 765 857",
    "clock": "409 530 892",
    "dog": "152-191 193-203 205-226 228-241 243-250 252-257 259 261-263 265-268",
    "elephant": "385-386",
    "keyboard": "508 878",
    "knife": "499",
    "oven": "766",
    "truck": "555 569 656 675 717 734 864 867",
}
CATEGORIES = tuple(CLASSES)  # alphabetical


@functools.cache
def class_indices(category: str) -> tuple[int, ...]:
    """Numbers of the ImageNet classes that make up a category, ascending."""
    ranges = [span.partition("-") for span in CLASSES[category].split()]
    return tuple(index for first, _, last in ranges for index in range(int(first), int(last or first) + 1))


@functools.cache
def category_of_class() -> Mapping[int, int]:
    """Number of the category by number of the ImageNet class; most classes have none."""
    return {index: number for number, name in enumerate(CATEGORIES) for index in class_indices(name)}


@functools.cache
def wordnet_ids() -> Mapping[str, int]:
    """Numbers of ImageNet's 1000 classes by their WordNet ids."""
    return {name: index for index, name in enumerate(ImageNetInfo().label_names())}


def category_scores(probabilities: Tensor) -> Tensor:
    """Mean probability of each category's classes.

    Args:
        probabilities: of ImageNet's classes, float32 (N, 1000).

    Returns:
        (N, 16) float64, categories in alphabetical order. Sums of float32 are exact there, so that equal probabilities
        give equal means, whatever the number of classes.
    """
    exact = probabilities.double()
    return torch.stack([exact[:, list(class_indices(name))].mean(1) for name in CATEGORIES], 1)


def decide(scores: Tensor, ties: Ties = "abstain") -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The category with the highest score.

    Args:
        scores: (N, C).
        ties: what comes of categories with the same highest score: no decision (-1), or the last of them, which is what
            model-vs-human's sorting amounts to.

    Returns:
        (N,) numbers of categories.
    """
    best = scores == scores.amax(1, keepdim=True)
    last = best.shape[1] - 1 - best.flip(1).int().argmax(1)
    single = best.sum(1) == 1  # scores that are NaN equal nothing
    chosen = torch.where(single if ties == "abstain" else best.any(1), last, ABSTAINED)
    return chosen.cpu().numpy().astype(np.int64)
