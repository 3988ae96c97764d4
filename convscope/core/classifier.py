"""The classifier that a model was published or trained with, on top of its backbone."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from convscope.core.backbone import Backbone, classifier_names
from convscope.core.checkpoint import latest_checkpoint, load_checkpoint
from convscope.core.errors import UserError

HEAD = "head.weight", "head.bias"  # of a fine-tuned network in a run's checkpoints


class PooledClassifier(nn.Module):
    """A linear classifier on what the backbone pools."""

    def __init__(self, backbone: Backbone, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(weight.shape[1], weight.shape[0])
        self.head.load_state_dict({"weight": weight, "bias": bias})

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) normalised -> logits (B, C)."""
        logits: Tensor = self.head(self.backbone(images))
        return logits


def load_classifier(backbone: Backbone) -> nn.Module | None:
    """The network with its own classifier: images (B, 3, H, W) normalised -> logits (B, C); None where it has none.

    Args:
        backbone: as `load_backbone` returned it.

    Raises:
        UserError: its published weights cannot be fetched again.
    """
    scheme, _, name = backbone.source.partition(":")
    published = scheme == "timm" and "@" not in name
    weights = _published(backbone) if published else backbone.classifier
    if weights:
        return _with_classifier(backbone, weights)
    path = Path(backbone.source)
    if path.is_dir() and (head := _trained_head(path, backbone.num_features)):
        return PooledClassifier(backbone, *head)
    return None


def untrained_classifier(backbone: Backbone, classes: int, seed: int = 0) -> nn.Module:
    """The network with a classifier at its initial values.

    Raises:
        UserError: an architecture that cannot have one.
    """
    network: nn.Module = copy.deepcopy(backbone.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _reset(network, classes, backbone.arch)
    return network


def _published(backbone: Backbone) -> dict[str, Tensor]:
    """The classifier among timm's weights, which a backbone is built without."""
    try:
        whole = timm.create_model(backbone.arch, pretrained=True, **backbone.model_args)
    except OSError as error:
        raise UserError(f"cannot fetch the classifier of {backbone.arch}: {str(error).splitlines()[0]}") from error
    prefixes = tuple(f"{name}." for name in classifier_names(whole))
    return {key: value for key, value in whole.state_dict().items() if key.startswith(prefixes)}


def _with_classifier(backbone: Backbone, weights: Mapping[str, Tensor]) -> nn.Module | None:
    """None where the tensors do not fill the architecture's classifier."""
    rows = {len(value) for value in weights.values()}
    if len(rows) != 1:
        return None
    network: nn.Module = copy.deepcopy(backbone.model)
    _reset(network, rows.pop(), backbone.arch)
    try:
        network.load_state_dict({**backbone.model.state_dict(), **weights})
    except RuntimeError:
        return None
    return network


def _reset(network: Any, classes: int, arch: str) -> None:
    device = next(network.parameters()).device
    try:
        network.reset_classifier(classes)
    except (AttributeError, NotImplementedError, AssertionError) as error:
        raise UserError(f"timm cannot put a classifier on {arch}") from error
    network.to(device)


def _trained_head(run: Path, width: int) -> tuple[Tensor, Tensor] | None:
    """Weight (C, D) and bias (C,) of a fine-tuned network's head."""
    newest = latest_checkpoint(run)
    if newest is None:
        return None
    saved = load_checkpoint(newest)
    state = saved.get("ema") or saved.get("model") or {}
    weight, bias = (state.get(key) for key in HEAD)
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor) or weight.ndim != 2 or weight.shape[1] != width:
        return None
    return weight, bias
