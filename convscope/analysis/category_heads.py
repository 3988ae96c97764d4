"""From a model to a decision among the 16 categories: its own classifier, a probe, neighbours, or class names."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convscope.analysis.sixteen_categories import (
    CATEGORIES,
    IMAGENET_CLASSES,
    category_of_class,
    category_scores,
    wordnet_ids,
)
from convscope.core.backbone import Backbone, Preprocessing
from convscope.core.data.image_files import ImageFiles
from convscope.core.data.transforms import Normalize, eval_transform
from convscope.core.distributed import pick_device
from convscope.core.errors import UserError
from convscope.core.log import progress
from convscope.core.neighbours import neighbours
from convscope.core.pairs.embed import embed_classes
from convscope.core.pairs.pair import Pair
from convscope.core.softmax_regression import softmax_regression
from convscope.core.weights_file import read_weights

HeadName = Literal["own", "linear-probe", "knn", "probe-16", "zero-shot"]
Scores = Callable[[Tensor], Tensor]  # normalised images (B, 3, H, W) -> a score for each category (B, 16)


@dataclass(frozen=True)
class Head:
    """How a model decides."""

    name: HeadName
    scores: Scores = field(repr=False)
    details: dict[str, Any]  # what the scores depend on


@dataclass(frozen=True)
class LabelledImages:
    """Images to learn from, with ImageNet's class or one of the 16 categories each."""

    images: ImageFiles
    places: list[int]
    y: Tensor  # (N,)
    kind: Literal["classes", "categories"]

    def about(self) -> dict[str, Any]:
        """What a result says of them."""
        count = len(torch.unique(self.y))
        return {"source": self.images.source, "fingerprint": self.images.fingerprint, "images": len(self.places)} | {
            self.kind: count
        }


def labelled_images(images: ImageFiles) -> LabelledImages:
    """Understand labels that are names of the 16 categories, WordNet ids of ImageNet's classes, or their numbers.

    Images of other classes are left out where the labels are names.

    Raises:
        UserError: labels of another kind, or a category without an image.
    """
    ids = wordnet_ids()
    names = set(images.labels)
    if names & set(CATEGORIES):
        kind: Literal["classes", "categories"] = "categories"
        known = {name: number for number, name in enumerate(CATEGORIES)}
    else:
        kind = "classes"
        known = {**ids, **{str(number): number for number in range(IMAGENET_CLASSES)}}
    places = [place for place, label in enumerate(images.labels) if label in known]
    y = torch.tensor([known[images.labels[place]] for place in places], dtype=torch.int64)
    seen = set(y.tolist()) if kind == "categories" else {category_of_class().get(one) for one in y.tolist()}
    if absent := [name for number, name in enumerate(CATEGORIES) if number not in seen]:
        raise UserError(
            f"{images.source} has no image of {', '.join(absent)}; its labels have to be the 16 categories, or "
            "ImageNet's 1000 classes as WordNet ids or numbers, so that every category is among them"
        )
    return LabelledImages(images, places, y, kind)


def own_head(classifier: nn.Module, details: dict[str, Any]) -> Head:
    """The mean over each category of the classifier's softmax, in float32."""
    classifier.eval()
    return Head("own", lambda images: category_scores(classifier(images).float().softmax(1)), details)


def linear_head(backbone: Backbone, train: LabelledImages, features: Tensor, c: float) -> Head:
    """A 1000-way softmax regression on standardised pooled features (N, D), then as `own_head`."""
    probe, known = _fit(features, train.y, c)

    def scores(images: Tensor) -> Tensor:
        return category_scores(_spread(probe(backbone(images)).softmax(1), known))

    return Head("linear-probe", scores, {"train": train.about(), "c": c, "features": "pooled"})


def stored_head(backbone: Backbone, file: Path) -> Head:
    """A published linear classifier on pooled features, then as `own_head`.

    Raises:
        UserError: the file does not hold one weight (1000, D) and its bias.
    """
    state = read_weights(file).state
    weights = [value for key, value in state.items() if key.endswith("weight") and value.ndim == 2]
    biases = [value for key, value in state.items() if key.endswith("bias") and value.shape == (IMAGENET_CLASSES,)]
    shape = (IMAGENET_CLASSES, backbone.num_features)
    if len(weights) != 1 or len(biases) != 1 or tuple(weights[0].shape) != shape:
        raise UserError(
            f"{file} is no linear classifier of {backbone.arch}: it needs one weight {shape} and one bias, and has "
            f"{', '.join(f'{key} {tuple(value.shape)}' for key, value in list(state.items())[:4])}"
        )
    device = next(backbone.parameters()).device
    weight, bias = weights[0].float().to(device), biases[0].float().to(device)
    return Head(
        "linear-probe",
        lambda images: category_scores(torch.addmm(bias, backbone(images).float(), weight.T).softmax(1)),
        {"probe": str(file), "features": "pooled"},
    )


def knn_head(backbone: Backbone, train: LabelledImages, features: Tensor, k: int, temperature: float) -> Head:
    """The vote of the k nearest train images as a distribution over ImageNet's classes, then as `own_head`."""
    k = min(k, len(features))

    def scores(images: Tensor) -> Tensor:
        near, index = neighbours(features, backbone(images).float().cpu(), k, device=images.device)
        return category_scores(soft_vote(near, train.y[index], temperature))

    return Head("knn", scores, {"train": train.about(), "k": k, "temperature": temperature, "features": "pooled"})


def soft_vote(similarity: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Shares of ImageNet's classes (N, 1000) in a vote weighted by softmax(similarity / temperature).

    Args:
        similarity: of the neighbours (N, k).
        labels: their classes (N, k).
        temperature: of the softmax.
    """
    weights = (similarity.float() / temperature).softmax(1)
    return torch.zeros(len(labels), IMAGENET_CLASSES).scatter_add_(1, labels, weights)


def category_head(backbone: Backbone, train: LabelledImages, features: Tensor, c: float) -> Head:
    """A 16-way softmax regression on standardised pooled features (N, D) of images of the categories."""
    y = train.y
    if train.kind == "classes":
        of_class = category_of_class()
        y = torch.tensor([of_class.get(one, -1) for one in y.tolist()])
    probe, _ = _fit(features[y >= 0], y[y >= 0], c)
    details = {"train": train.about(), "c": c, "features": "pooled"}
    return Head("probe-16", lambda images: probe(backbone(images)).softmax(1), details)


def zero_shot_head(pair: Pair, names: Sequence[str], templates: Sequence[str]) -> Head:
    """The softmax over the names of ImageNet's classes, then as `own_head`."""
    classes = embed_classes(pair, names, templates).to(pair.logit_scale.device)

    def scores(images: Tensor) -> Tensor:
        logits = pair.logit_scale.exp() * pair.encode_image(images) @ classes.T
        return category_scores(logits.float().softmax(1))

    return Head("zero-shot", scores, {"templates": list(templates), "classes": "open_clip's ImageNet names"})


@torch.inference_mode()
def pooled_features(
    backbone: Backbone, images: ImageFiles, places: Sequence[int], batch_size: int, device: str
) -> Tensor:
    """Pooled features (N, D), float32 on the CPU, of images prepared as the backbone's preprocessing says."""
    backbone.eval().to(pick_device(device))
    transform, normalize = eval_transform(backbone.preprocessing), normalization(backbone.preprocessing, device)
    found = []
    with progress(f"features of {images.source}", len(places)) as ticker:
        for batch in images.batches(transform, batch_size, places):
            found.append(backbone(normalize(batch.to(pick_device(device)))).float().cpu())
            ticker.advance(len(batch))
    features = torch.cat(found)
    if not features.isfinite().all():
        raise UserError(f"{backbone.source} gives NaN or infinity for images of {images.source}; is it trained well?")
    return features


def normalization(preprocessing: Preprocessing, device: str) -> Normalize:
    """What follows the transform, on the device."""
    return Normalize(preprocessing.mean, preprocessing.std).to(pick_device(device))


def fit_probe(features: Tensor, y: Tensor, c: float) -> Callable[[Tensor], Tensor]:
    """Softmax regression on standardised features.

    Args:
        features: (N, D).
        y: classes (N,), every one of 0 ... K-1.
        c: inverse strength of the penalty, as scikit-learn counts it.

    Returns:
        Features (M, D) -> logits (M, K), float32, on the features' device.
    """
    std, mean = torch.std_mean(features, 0, correction=0)
    scale = torch.where(std > 1e-6 * mean.abs(), std, 1.0)
    solution = next(softmax_regression((features - mean) / scale, y, int(y.max()) + 1, [c]))

    def logits(x: Tensor) -> Tensor:
        standardised = (x.float().cpu() - mean) / scale
        return solution.logits(standardised).float().to(x.device)

    return logits


def _fit(features: Tensor, y: Tensor, c: float) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A probe of the classes that occur, and their numbers."""
    known, numbered = torch.unique(y, return_inverse=True)
    return fit_probe(features, numbered, c), known


def _spread(probabilities: Tensor, known: Tensor) -> Tensor:
    """Probabilities (N, K) of some classes as those of all (N, 1000)."""
    everything = probabilities.new_zeros(len(probabilities), IMAGENET_CLASSES)
    everything[:, known.to(probabilities.device)] = probabilities
    return everything
