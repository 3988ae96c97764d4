"""Which head a model decides with, and the same for its untrained twin."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from convscope.analysis.category_heads import (
    Head,
    HeadName,
    LabelledImages,
    category_head,
    knn_head,
    linear_head,
    own_head,
    pooled_features,
    stored_head,
    zero_shot_head,
)
from convscope.analysis.observers import Kind
from convscope.analysis.sixteen_categories import IMAGENET_CLASSES
from convscope.core.backbone import Backbone, Preprocessing
from convscope.core.classifier import load_classifier, untrained_classifier
from convscope.core.distributed import pick_device
from convscope.core.errors import UserError
from convscope.core.models import load_backbone, model_record, untrained_twin
from convscope.core.options import AllowPartial, Arch, Device, require_at_least
from convscope.core.pairs.model import DESCRIPTION, EXPORT
from convscope.core.pairs.pair import load_pair
from convscope.core.pairs.prompts import template_list

UNTRAINED = "an untrained model, whose classifier is untrained too"


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """How a model that was not trained on the categories decides among them."""

    head: Literal["auto", HeadName] = "auto"
    """own: the model's classifier of ImageNet's classes; linear-probe, knn: one learned from --train-data, or a --probe
    file; probe-16: a classifier of the 16 categories from --train-data; zero-shot: the names of ImageNet's classes.
    auto: the first of own, linear-probe, probe-16, zero-shot that is possible."""
    train_data: str | None = None
    """Labelled images to learn from: class folders, a zip of them, or shards; labels are ImageNet's classes (WordNet
    ids or numbers), or, for probe-16, the 16 categories too."""
    train_split: str = "train"
    """Split of shards."""
    label: str = "cls"
    """Member or json field of shards that holds the label."""
    probe: Path | None = None
    """File with the weight (1000, D) and bias of a published linear classifier, for linear-probe and one MODEL."""
    k: int = 20
    """Neighbours of knn."""
    temperature: float = 0.07
    """Of knn's weights."""
    c: float = 1.0
    """Inverse strength of a probe's penalty, on standardised features."""
    templates: str = "simple"
    """Sentences of zero-shot: simple, imagenet (CLIP's 80), or a file with a sentence a line and {} for the name."""
    batch_size: int = 64
    """Images at a time; the result does not depend on it."""
    device: Device = "auto"
    seed: int = 0
    """Of the untrained twins and the intervals."""
    arch: Arch = None
    allow_partial: AllowPartial = 1.0

    def __post_init__(self) -> None:
        require_at_least(self, 1, "k", "batch_size")
        require_at_least(self, 0, "seed")
        for name in ("temperature", "c"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} must be above 0, got {getattr(self, name)}")
        if self.probe is not None and self.head not in ("auto", "linear-probe"):
            raise UserError(f"--probe holds a linear classifier: it has no meaning with --head {self.head}")


@dataclass(frozen=True)
class Decider:
    """A model with its head."""

    kind: Kind
    head: Head
    why: str  # of the head
    preprocessing: Preprocessing
    record: dict[str, Any] = field(repr=False)


def deciders(source: str, config: HeadConfig, train: LabelledImages | None) -> Iterator[tuple[str, Decider]]:
    """A MODEL and then its untrained twin with the same kind of head, by their labels.

    Args:
        source: the MODEL.
        config: its head.
        train: images to learn from.

    Raises:
        UserError: no such model, or no head that it can have.
    """
    taught = train is not None or config.probe is not None
    if config.head == "zero-shot" or (config.head == "auto" and is_image_text(source) and not taught):
        yield from _by_names(source, config)
        return
    backbone = load_backbone(source, arch=config.arch, allow_partial=config.allow_partial).eval()
    twin = untrained_twin(backbone, config.seed).eval()
    is_untrained = source.startswith("timm:") and "@random" in source
    name, classifier, why = _choose(source, backbone, is_untrained, config, train)
    kind: Kind = "untrained" if is_untrained else "model"
    yield source, _decider(kind, name, why, backbone, classifier, config, train)
    if twin.weights_hash() != backbone.weights_hash():
        fresh = untrained_classifier(twin, IMAGENET_CLASSES, config.seed) if name == "own" else None
        yield f"{source} (untrained)", _decider("untrained", name, "as its model", twin, fresh, config, train)


def is_image_text(source: str) -> bool:
    """Whether a MODEL has a text tower, as far as its name or folder tells."""
    path = Path(source)
    return (
        source.startswith("open_clip:")
        or path.name == EXPORT
        or any((path / name).is_file() for name in (EXPORT, DESCRIPTION))
    )


def _by_names(source: str, config: HeadConfig) -> Iterator[tuple[str, Decider]]:
    from open_clip import IMAGENET_CLASSNAMES

    pair, record = load_pair(source)
    templates = template_list(config.templates)
    twin = pair.untrained(config.seed)
    for label, one, kind, why in (
        (source, pair, "model", "an image-text model: class names need no further training"),
        (f"{source} (untrained)", twin, "untrained", "as its model, whose text tower it has"),
    ):
        one.eval().to(pick_device(config.device))
        head = zero_shot_head(one, IMAGENET_CLASSNAMES, templates)
        known: Kind = "model" if kind == "model" else "untrained"
        own = record if one is pair else {**record, "source": label, "weights_hash": one.weights_hash()}
        yield label, Decider(known, head, why, one.preprocessing, own)


def _choose(
    source: str, backbone: Backbone, is_untrained: bool, config: HeadConfig, train: LabelledImages | None
) -> tuple[HeadName, nn.Module | None, str]:
    """The head's name, the classifier if that is the head, and why it was taken."""
    if config.head in ("linear-probe", "knn", "probe-16"):
        _require_teaching(config.head, config, train)
        return config.head, None, "as asked for"
    classifier, lacks = _own(backbone)
    if classifier is not None:
        return "own", classifier, "its own classifier of ImageNet's classes"
    if config.head == "auto" and config.probe is not None:
        return "linear-probe", None, f"{lacks}; a linear classifier was given"
    if config.head == "auto" and train is not None:
        if train.kind == "classes":
            return "linear-probe", None, f"{lacks}; the images to learn from have ImageNet's classes"
        return "probe-16", None, f"{lacks}; the images to learn from have the 16 categories only"
    if is_untrained:
        return "own", untrained_classifier(backbone, IMAGENET_CLASSES, config.seed), UNTRAINED
    raise UserError(
        f"{source}: {lacks}; give images of ImageNet's classes or of the 16 categories with --train-data, a linear "
        "classifier with --probe, or --head zero-shot for an image-text model"
    )


def _own(backbone: Backbone) -> tuple[nn.Module | None, str]:
    """The model's classifier of ImageNet's classes, or what it has instead."""
    classifier = load_classifier(backbone)
    if classifier is None:
        return None, "it has no classifier"
    with torch.inference_mode():
        classes = classifier.eval()(torch.zeros(1, 3, *backbone.preprocessing.size)).shape[1]
    if classes != IMAGENET_CLASSES:
        return None, f"its classifier is of {classes} classes, not ImageNet's {IMAGENET_CLASSES}"
    return classifier, ""


def _require_teaching(head: str, config: HeadConfig, train: LabelledImages | None) -> None:
    if train is None and not (head == "linear-probe" and config.probe is not None):
        raise UserError(f"--head {head} learns from labelled images: give them with --train-data")
    if train is not None and train.kind == "categories" and head != "probe-16":
        raise UserError(
            f"{train.images.source} has labels of the 16 categories; --head {head} needs ImageNet's classes, "
            "--head probe-16 does not"
        )


def _decider(
    kind: Kind,
    name: HeadName,
    why: str,
    backbone: Backbone,
    classifier: nn.Module | None,
    config: HeadConfig,
    train: LabelledImages | None,
) -> Decider:
    record = model_record(backbone)
    backbone.to(pick_device(config.device))
    if classifier is not None:
        head = own_head(classifier.to(pick_device(config.device)), {"classes": IMAGENET_CLASSES})
    elif config.probe is not None:
        head = stored_head(backbone, config.probe)
    else:
        assert train is not None
        features = pooled_features(backbone, train.images, train.places, config.batch_size, config.device)
        if name == "knn":
            head = knn_head(backbone, train, features, config.k, config.temperature)
        elif name == "linear-probe":
            head = linear_head(backbone, train, features, config.c)
        else:
            head = category_head(backbone, train, features, config.c)
    return Decider(kind, head, why, backbone.preprocessing, record)
