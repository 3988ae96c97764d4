"""The 16 categories: which classes, what they score, how ties end."""

import numpy as np
import torch
from timm.data import ImageNetInfo

from convscope.analysis.sixteen_categories import (
    CATEGORIES,
    category_of_class,
    category_scores,
    class_indices,
    decide,
    wordnet_ids,
)

SIZES = {
    "airplane": 1,
    "bear": 4,
    "bicycle": 2,
    "bird": 49,
    "boat": 5,
    "bottle": 7,
    "car": 3,
    "cat": 6,
    "chair": 4,
    "clock": 3,
    "dog": 109,
    "elephant": 2,
    "keyboard": 2,
    "knife": 1,
    "oven": 1,
    "truck": 8,
}


def test_sizes_as_published() -> None:
    assert {name: len(class_indices(name)) for name in CATEGORIES} == SIZES
    assert list(CATEGORIES) == sorted(CATEGORIES)
    assert len(category_of_class()) == sum(SIZES.values()) == 207  # none is in two categories


def test_classes_are_called_after_their_category() -> None:
    info = ImageNetInfo()
    names = {name: [info.index_to_description(index) for index in class_indices(name)] for name in CATEGORIES}
    for category in ("bear", "bottle", "chair", "clock", "elephant", "keyboard", "truck"):
        assert any(category in name for name in names[category]), names[category]
    assert names["airplane"] == ["airliner"]
    assert all("cat" in name or "cougar" in name for name in names["cat"])
    # ImageNet's classes are in the order of WordNet ids, in which dogs are one stretch and birds lie in three.
    ids = list(wordnet_ids())
    assert all("n02085620" <= ids[index] <= "n02113978" for index in class_indices("dog"))
    assert all("n01514668" <= ids[index] <= "n02058221" for index in class_indices("bird"))


def test_scores_are_means_over_classes() -> None:
    probabilities = torch.randn(5, 1000, generator=torch.Generator().manual_seed(1)).mul(3).softmax(1)
    scores = category_scores(probabilities)
    for row in range(5):
        for number, name in enumerate(CATEGORIES):
            slow = np.mean([float(probabilities[row, index]) for index in class_indices(name)])
            assert abs(float(scores[row, number]) - slow) < 1e-15


def test_the_mean_and_not_the_sum_decides() -> None:
    probabilities = torch.zeros(1, 1000)
    probabilities[0, list(class_indices("dog"))] = 0.5 / 109
    probabilities[0, list(class_indices("knife"))] = 0.1
    assert CATEGORIES[int(decide(category_scores(probabilities))[0])] == "knife"


def test_equal_probabilities_tie_exactly() -> None:
    assert decide(category_scores(torch.zeros(1, 1000).softmax(1))).tolist() == [-1]


def test_ties() -> None:
    scores = torch.tensor([[0.2, 0.5, 0.5, 0.1], [0.25, 0.25, 0.25, 0.25], [0.1, 0.2, 0.9, 0.3], [torch.nan] * 4])
    assert decide(scores).tolist() == [-1, -1, 2, -1]
    assert decide(scores, "last").tolist() == [2, 3, 2, -1]
