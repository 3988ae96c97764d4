"""How far a file's weights fill a timm network, and by which layout."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from convscope.core.backbone import classifier_names
from convscope.core.checkpoint_layouts import LAYOUTS, Layout
from convscope.core.weights_file import State, first_names

# What classifiers are called; a backbone has none, so a file's classifier is left over. "head." may hold more: only
# its own weight and bias are the classifier.
CLASSIFIERS = ("fc.", "head.fc.", "classifier.")

# A norm that only the classifier reads. SparK and FCMAE train without one, so their ConvNeXt files lack it; it stays
# at its initial values (weight 1, bias 0) and is recorded as absent.
CLASSIFIER_NORM = "head.norm."

# What timm's conversion may resample to another image size. It would do the same to a patch embedding, but another
# patch size is another network.
POSITIONS = ("pos_embed", "relative_position")
OPEN_CLIP = {"visual.conv1.weight": "patch_embed.proj.weight", "visual.positional_embedding": "pos_embed"}


@dataclass(frozen=True)
class Match:
    """How far a file's weights fill a network."""

    layout: Layout
    share: float  # of the network's floating-point values that the file provides
    weights: State = field(repr=False)  # keys and shapes of the network
    selected: State = field(repr=False)  # what the layout took from the file, before timm's own conversion
    missing: list[str]
    misshapen: list[str]  # with both shapes
    left_over: list[str]
    absent: list[str]  # rightly missing: see CLASSIFIER_NORM
    dropped: list[str]  # keys of the file that the layout knows to be of training only, and its classifier
    classifier: State = field(repr=False)  # under timm's keys

    @property
    def complete(self) -> bool:
        """Whether the file holds this network, the whole of it and nothing but it."""
        return not (self.missing or self.misshapen or self.left_over)

    @property
    def percent(self) -> str:
        """The share in words, 100 % only where all is there."""
        return f"{min(self.share, 0.999 if self.share < 1 else 1):.1%}"

    @property
    def resampled(self) -> list[str]:
        """Position embeddings that were fitted to another image size."""
        named = {OPEN_CLIP.get(key, key): value for key, value in self.selected.items()}
        pairs = {key: (value, self.weights[key]) for key, value in named.items() if key in self.weights}
        # A class token more or less is no other size.
        return [key for key, (own, fitted) in pairs.items() if _is_position(key) and _rows_differ(own, fitted)]

    def problems(self) -> str:
        """What does not fit, in words."""
        kinds = {"missing": self.missing, "of another shape": self.misshapen, "left over": self.left_over}
        return "; ".join(f"{len(found)} {kind} ({first_names(found)})" for kind, found in kinds.items() if found)


def match_weights(state: State, network: nn.Module) -> Match:
    """Fit a file's tensors to a timm network, by the layout that matches most of it."""
    best: Match | None = None
    for layout in LAYOUTS:
        selected, dropped, unknown = layout.select(state)
        for weights in _conversions(selected, network):
            match = _compare(layout, selected, weights, network, dropped, unknown)
            if best is None or (match.share, -len(match.left_over)) > (best.share, -len(best.left_over)):
                best = match
        if best is not None and best.complete:
            break
    if best is None:  # an image tower beside which lies something that no layout knows
        return _compare(LAYOUTS[0], {}, {}, network, [], list(state))
    return best


def _conversions(selected: State, network: nn.Module) -> Iterator[State]:
    """The tensors as they are, and after timm's conversion from the authors' names and shapes, where it has one."""
    if not selected:
        return
    yield selected
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    try:
        converted = dict(convert(dict(selected), network)) if convert else None
    except Exception:  # it assumes the authors' keys, and fails in many ways on others
        converted = None
    if converted:
        yield converted


def _compare(
    layout: Layout, selected: State, state: State, network: nn.Module, dropped: list[str], unknown: list[str]
) -> Match:
    # Integer buffers (batch counters, index tables) follow from the architecture: they are loaded, never demanded.
    wanted = network.state_dict()
    floats = {key: value for key, value in wanted.items() if value.is_floating_point()}
    foreign = _stretched(selected, network)
    weights = {
        key: value
        for key, value in state.items()
        if key in wanted and value.shape == wanted[key].shape and key not in foreign
    }
    missing = [key for key in floats if key not in state]
    misshapen = [
        f"{key} {tuple(foreign.get(key, state[key].shape))} in the file, {tuple(value.shape)} in the network"
        for key, value in floats.items()
        if key in state and key not in weights
    ]
    extra = [key for key, value in state.items() if key not in wanted and value.is_floating_point()]
    classifier = [key for key in extra if _of_classifier(key, network)]
    no_head = not any(key.startswith("head.") for key in state)
    absent = [key for key in missing if no_head and key.startswith(CLASSIFIER_NORM)]
    provided = sum(floats[key].numel() for key in weights if key in floats)
    return Match(
        layout=layout,
        share=provided / sum(value.numel() for value in floats.values()),
        weights=weights,
        selected=selected,
        missing=[key for key in missing if key not in absent],
        misshapen=misshapen,
        left_over=[key for key in extra if key not in classifier] + unknown,
        absent=absent,
        dropped=[*dropped, *classifier],
        classifier={key: state[key] for key in classifier},
    )


def _stretched(selected: State, network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Weights with their shape in the file that timm's conversion would resample without a word, but for positions."""
    wanted = network.state_dict()
    named = {OPEN_CLIP.get(key, key): value for key, value in selected.items()}
    return {
        key: tuple(value.shape)
        for key, value in named.items()
        if key in wanted and not _is_position(key) and value.numel() != wanted[key].numel()
    }


def _is_position(key: str) -> bool:
    return any(word in key for word in POSITIONS)


def _rows_differ(own: Tensor, fitted: Tensor) -> bool:
    return own.ndim > 1 and abs(own.shape[-2] - fitted.shape[-2]) > 1


def _of_classifier(key: str, network: nn.Module) -> bool:
    heads = {"head", *classifier_names(network)}
    return key.startswith(CLASSIFIERS) or key.rpartition(".")[0] in heads
