"""Heads: each against the same by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from convscope.analysis.category_heads import (
    LabelledImages,
    category_head,
    fit_probe,
    knn_head,
    labelled_images,
    linear_head,
    own_head,
    soft_vote,
    stored_head,
)
from convscope.analysis.sixteen_categories import CATEGORIES, category_scores, class_indices, wordnet_ids
from convscope.core.backbone import create_backbone
from convscope.core.data.image_files import ImageFiles
from convscope.core.errors import UserError

CLASSES = [class_indices(name)[0] for name in CATEGORIES]
IDS = [list(wordnet_ids())[index] for index in CLASSES]
GENERATOR = torch.Generator().manual_seed(0)


class Pixels(nn.Module):
    """A backbone whose features are the first values of an image."""

    num_features, arch = 16, "pixels"

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :16]


def files(labels: list[str]) -> ImageFiles:
    return ImageFiles([f"{i}.png" for i in range(len(labels))], labels, "here", "f", lambda _: Image.new("RGB", (2, 2)))


def learned() -> tuple[LabelledImages, Tensor]:
    """Three images of a class of each category, whose features are near its unit vector."""
    images = labelled_images(files([str(index) for index in CLASSES for _ in range(3)]))
    features = torch.eye(16).repeat_interleave(3, 0) + 0.05 * torch.randn(48, 16, generator=GENERATOR)
    return images, features


def shown() -> Tensor:
    return torch.eye(16)[:, None, None, :].repeat(1, 3, 2, 1)  # first 16 values: a unit vector


@pytest.mark.parametrize(
    "labels", [list(CATEGORIES), [list(wordnet_ids())[i] for i in CLASSES], list(map(str, CLASSES))]
)
def test_kinds_of_labels(labels: list[str]) -> None:
    found = labelled_images(files([*labels, "something else"]))
    assert found.places == list(range(16))
    named = labels == list(CATEGORIES)
    assert found.kind == ("categories" if named else "classes")
    assert found.y.tolist() == (list(range(16)) if named else CLASSES)


@pytest.mark.parametrize("labels", [["cat", "dog"], ["fish"], ["3", "5"]])
def test_other_labels_are_told(labels: list[str]) -> None:
    with pytest.raises(UserError, match="has no image of airplane"):
        labelled_images(files(labels))


def test_own_classifier() -> None:
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(12, 1000))
    images = torch.randn(4, 3, 2, 2, generator=GENERATOR)
    expected = category_scores(torch.softmax(classifier(images), 1))
    torch.testing.assert_close(own_head(classifier, {}).scores(images), expected)


def test_vote_against_a_loop() -> None:
    similarity, labels = torch.rand(3, 5, generator=GENERATOR), torch.tensor([[1, 1, 2, 9, 9]] * 3)
    vote = soft_vote(similarity, labels, 0.1)
    for row in range(3):
        weights = np.exp(similarity[row].double().numpy() / 0.1)
        for label in (1, 2, 9):
            share = weights[labels[row].numpy() == label].sum() / weights.sum()
            assert float(vote[row, label]) == pytest.approx(share, rel=1e-5)
    torch.testing.assert_close(vote.sum(1), torch.ones(3))


def test_probe_is_scikit_learns() -> None:
    x, y = torch.randn(60, 4, generator=GENERATOR), torch.arange(60) % 3
    x[:, 0] += y
    x[:, 3] = 2.0  # constant
    scaled = ((x - x.mean(0)) / torch.where(x.std(0, correction=0) > 0, x.std(0, correction=0), 1.0)).numpy()
    theirs = LogisticRegression(C=0.5, tol=1e-9, max_iter=2000).fit(scaled, y.numpy())
    ours = fit_probe(x, y, 0.5)(x).softmax(1)
    assert np.allclose(ours.numpy(), theirs.predict_proba(scaled), atol=1e-4)


def test_heads_that_learn_decide_rightly() -> None:
    train, features = learned()
    backbone = Pixels()
    for head in (
        linear_head(backbone, train, features, 10.0),
        knn_head(backbone, train, features, 3, 0.07),
        category_head(backbone, train, features, 10.0),
    ):
        scores = head.scores(shown())
        assert scores.shape == (16, 16)
        assert scores.argmax(1).tolist() == list(range(16)), head.name
        assert head.details["train"]["images"] == 48


def test_a_probe_of_some_classes_leaves_nothing_to_the_others() -> None:
    train, features = learned()
    scores = linear_head(Pixels(), train, features, 10.0).scores(shown())
    sizes = torch.tensor([len(class_indices(name)) for name in CATEGORIES])
    of_learned = (scores * sizes).sum(1).float()  # one class of each category was learned
    torch.testing.assert_close(of_learned, torch.ones(16))


def test_a_stored_probe(tmp_path: Path) -> None:
    weight, bias = torch.randn(1000, 16, generator=GENERATOR), torch.randn(1000, generator=GENERATOR)
    torch.save({"state_dict": {"module.linear.weight": weight, "module.linear.bias": bias}}, tmp_path / "probe.pth")
    backbone = create_backbone("resnet18_cifar", {"channels": [4, 4, 8, 16]}, seed=0).eval()
    images = torch.randn(3, 3, 16, 16, generator=GENERATOR)
    with torch.no_grad():
        expected = category_scores((backbone(images) @ weight.T + bias).softmax(1))
        torch.testing.assert_close(stored_head(backbone, tmp_path / "probe.pth").scores(images), expected)
    torch.save({"linear.weight": weight[:, :5], "linear.bias": bias}, tmp_path / "narrow.pth")
    with pytest.raises(UserError, match=r"needs one weight \(1000, 16\)"):
        stored_head(backbone, tmp_path / "narrow.pth")
