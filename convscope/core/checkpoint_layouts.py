"""Weights on disk, whoever wrote them, as a state dict with the network's own keys.

A layout is one function from a file's tensors to those of the backbone, and one line in `LAYOUTS`. All of them are
tried, and the one that matches most of the network is taken, so none has to prove whose file it is.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from timm.models import clean_state_dict
from torch import Tensor, nn

from convscope.core.checkpoint import load_checkpoint
from convscope.core.errors import UserError

State = dict[str, Tensor]
Layout = Callable[[State], State]  # the backbone's part of a file, empty where the layout does not apply


def under(prefix: str) -> Layout:
    """The layout that keeps the backbone below `prefix`."""
    return lambda state: {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


LAYOUTS: dict[str, Layout] = {
    "plain": lambda state: state,  # timm's keys, which are torchvision's for ResNets
    "convscope": under("backbone.model."),
    "SparK": under("sparse_encoder.sp_cnn."),
    "module with a backbone": under("backbone."),  # LightningModules and the like, by the attribute's usual names
    "module with a model": under("model."),
    "module with an encoder": under("encoder."),
    "module with a model.backbone": under("model.backbone."),
}

# Where training code puts the state dict; moving averages first, as timm does.
WRAPPERS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model", "module")

# What classifiers are called; a backbone has none, so a file's classifier is left over.
CLASSIFIERS = (
    "fc.",
    "head.fc.",
    "classifier.",
)  # "head." may hold more: only its own weight and bias are the classifier

# A norm that only the classifier reads. SparK and FCMAE train without one, so their ConvNeXt files lack it; it stays
# at its initial values (weight 1, bias 0) and is recorded as absent.
CLASSIFIER_NORM = "head.norm."


@dataclass(frozen=True)
class Match:
    """How far a file's weights fill a network."""

    layout: str
    share: float  # of the network's floating-point values that the file provides
    weights: State = field(repr=False)  # keys and shapes of the network
    missing: list[str]
    misshapen: list[str]  # with both shapes
    left_over: list[str]
    absent: list[str]  # rightly missing: see CLASSIFIER_NORM

    @property
    def complete(self) -> bool:
        """Whether the file holds this network, the whole of it and nothing but it."""
        return not (self.missing or self.misshapen or self.left_over)

    def problems(self) -> str:
        """What does not fit, in words."""
        kinds = {"missing": self.missing, "of another shape": self.misshapen, "left over": self.left_over}
        return "; ".join(f"{len(found)} {kind} ({_first(found)})" for kind, found in kinds.items() if found)


def read_tensors(path: Path) -> tuple[State, dict[str, str]]:
    """All tensors of a weights file, unwrapped, and its metadata (safetensors only).

    Raises:
        UserError: unreadable, not a checkpoint, or without any weights.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                state, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is no readable safetensors file: {error}") from error
        state = clean_state_dict(state)
    else:
        state, metadata = unwrap(_load_untrusted(path)), {}
    if not state:
        raise UserError(f"{path} holds no weights")
    return state, metadata


def unwrap(loaded: Mapping[str, Any]) -> State:
    """The state dict inside what training code saved; entries that are no tensors (settings, counters) are dropped."""
    for key in WRAPPERS:
        if isinstance(inner := loaded.get(key), Mapping) and (state := unwrap(inner)):
            return state
    tensors = {key: value for key, value in loaded.items() if isinstance(value, Tensor)}
    cleaned: State = clean_state_dict(tensors)  # drops the prefixes of DDP and torch.compile
    return cleaned


def match_weights(state: State, network: nn.Module) -> Match:
    """Fit a file's tensors to a timm network, by the layout that matches most of it."""
    best: Match | None = None
    for layout, weights in _candidates(state, network):
        match = _compare(layout, weights, network)
        if best is None or (match.share, -len(match.left_over)) > (best.share, -len(best.left_over)):
            best = match
        if match.complete:
            break
    assert best is not None  # the plain layout always applies
    return best


def _candidates(state: State, network: nn.Module) -> Iterator[tuple[str, State]]:
    for name, layout in LAYOUTS.items():
        if weights := layout(state):
            yield name, weights
            if renamed := _timm_names(weights, network):
                yield f"{name}, original names", renamed


def _timm_names(state: State, network: nn.Module) -> State | None:
    """timm's own conversion from the names and shapes that the architecture's authors use, where timm has one."""
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    try:
        return dict(convert(dict(state), network)) if convert else None
    except Exception:  # it assumes the authors' keys, and fails in many ways on others
        return None


def _compare(layout: str, state: State, network: nn.Module) -> Match:
    # Integer buffers (batch counters, index tables) follow from the architecture: they are loaded, never demanded.
    wanted = network.state_dict()
    floats = {key: value for key, value in wanted.items() if value.is_floating_point()}
    weights = {key: value for key, value in state.items() if key in wanted and value.shape == wanted[key].shape}
    missing = [key for key in floats if key not in state]
    misshapen = [
        f"{key} {tuple(state[key].shape)} in the file, {tuple(value.shape)} in the network"
        for key, value in floats.items()
        if key in state and key not in weights
    ]
    classifier = _classifier_names(network)
    left_over = [
        key
        for key, value in state.items()
        if key not in wanted
        and value.is_floating_point()
        and not key.startswith(CLASSIFIERS)
        and key.rpartition(".")[0] not in classifier
    ]
    no_head = not any(key.startswith("head.") for key in state)
    absent = [key for key in missing if no_head and key.startswith(CLASSIFIER_NORM)]
    provided = sum(floats[key].numel() for key in weights if key in floats)
    return Match(
        layout=layout,
        share=provided / sum(value.numel() for value in floats.values()),
        weights=weights,
        missing=[key for key in missing if key not in absent],
        misshapen=misshapen,
        left_over=left_over,
        absent=absent,
    )


def _classifier_names(network: nn.Module) -> set[str]:
    config: Any = getattr(network, "pretrained_cfg", None) or {}
    names = config.get("classifier") or ()
    return {"head", *([names] if isinstance(names, str) else names)}


def _load_untrusted(path: Path) -> dict[str, Any]:
    if not path.stat().st_size:
        raise UserError(f"{path} is empty")
    # Published checkpoints often carry their command line as a Namespace, a plain bag of values.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return load_checkpoint(path)
        except UserError as error:
            if not (blocked := _blocked_objects(path)):
                raise
            raise UserError(
                f"{path} holds Python objects that could run code when loaded ({_first(blocked)}); "
                "save its state dict alone and pass that file"
            ) from error


def _blocked_objects(path: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not a checkpoint at all: the error of reading it says so
        return []


def _first(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
