"""The analyses that `analyze all` runs, what each needs of a model, and its results in plain words."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from convscope.core.backbone import Backbone

ERF_SIZE = 224  # pixels, of models with images of several sizes


def _anything(backbone: Backbone) -> str | None:
    return None


def _nothing(backbones: Sequence[Backbone]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """One command of `convscope analyze`."""

    title: str
    module: str
    config: str  # class of the command's settings, in that module
    meaning: str  # what is seen, for somebody who has not read the paper
    captions: Mapping[str, str]  # by the end of a picture's name
    settings: Mapping[str, Any] = field(default_factory=dict)  # where they differ from the command's own
    settings_for: Callable[[Sequence[Backbone]], dict[str, Any]] = _nothing
    applies: Callable[[Backbone], str | None] = _anything  # why not, or None

    def caption(self, stem: str) -> str:
        """What a picture shows."""
        fitting = [end for end in self.captions if stem.endswith(end)]
        return self.captions[max(fitting, key=len)] if fitting else stem


def _has_filters(backbone: Backbone) -> str | None:
    convs = [part for part in backbone.modules() if isinstance(part, nn.Conv2d)]
    return None if any(max(conv.kernel_size) > 1 for conv in convs) else "it has no convolution larger than 1x1"


def _common_size(backbones: Sequence[Backbone]) -> dict[str, Any]:
    sizes = {backbone.preprocessing.size for backbone in backbones}
    return {"size": max(sizes.pop()) if len(sizes) == 1 else ERF_SIZE}


ANALYSES: Mapping[str, Analysis] = {
    "erf": Analysis(
        title="Effective receptive field",
        module="convscope.analysis.erf_command",
        config="ErfCommand",
        settings={"stages": ("all",), "n_images": 25},
        settings_for=_common_size,
        meaning="Which pixels the middle position of a feature map depends on: bright pixels move it most. Early "
        "layers see a small patch; how fast the patch grows, and whether it fades out or ends sharply, tells how far "
        "the network gathers evidence. An untrained network's patch is smaller than its kernels would allow.",
        captions={
            "erf": "Contribution of each pixel (logarithmic colours, brightest = 1) and the square that holds half of "
            "it. Below: how much a square holds as it grows, of the contribution and of its logarithm, and how "
            "the contribution falls with the distance.",
            "erf-steps": "Side of the squares over the training.",
        },
    ),
    "filters": Analysis(
        title="Convolution filters",
        module="convscope.analysis.filters_command",
        config="FiltersCommand",
        applies=_has_filters,
        meaning="What the kernels look like, without any image. Layers whose filters are nearly zero, nearly all "
        "alike or as varied as noise have learned little; drift says how differently two sets of filters are "
        "distributed.",
        captions={
            "layers": "Sparsity, variance entropy and orthogonality of each layer over the depth. Entropy near the "
            "threshold line is what random filters have; near zero, all filters are alike.",
            "eigenfilters": "The patterns that filters are made of, the most common first, with the share of the "
            "variance below.",
            "coefficients": "How much of each pattern the filters hold.",
            "density": "The two most common patterns against each other: round clouds are untrained, spikes are "
            "layers with filters on few axes.",
            "drift": "How differently filters are distributed; dark is alike.",
            "depth": "Drift of each tenth of the depth.",
            "training": "Drift over the training.",
        },
    ),
    "representation": Analysis(
        title="Representation",
        module="convscope.analysis.representation_command",
        config="RepresentationCommand",
        settings={"n_images": 200},
        meaning="How many directions the features of images use, layer by layer, without labels. Few directions "
        "mean collapse. CKA says which layers hold the same information up to rotation.",
        captions={
            "representation": "Ranks, spread and alignment over the layers; at the bottom, how fast the variance "
            "falls from one direction to the next.",
            "cka": "Similarity of layers, and of models where there are several: 1 is the same up to rotation and "
            "scale.",
        },
    ),
    "linear": Analysis(
        title="Linear interpreter",
        module="convscope.analysis.linear_command",
        config="LinearCommand",
        settings={"n_images": 4},
        meaning="At one image a network is a linear map of its pixels plus what its biases add. The pictures show "
        "which pixels speak for a feature, and the curve how much of each layer comes from biases alone.",
        captions={
            "linear": "Images, and what their pixels add to the features that stand out.",
            "bias": "Share of the biases over the layers; the rest comes from the pixels.",
        },
    ),
    "efficiency": Analysis(
        title="Efficiency",
        module="convscope.analysis.efficiency_command",
        config="EfficiencyCommand",
        settings={"repeats": 5, "warmup": 1},
        meaning="How much of this machine's arithmetic the network uses, on one image of noise. Layers above the "
        "waterline wait for something else than arithmetic and memory, such as the start of an operation.",
        captions={
            "efficiency": "Measured latency against what the machine's peak would allow; the diagonal is the peak.",
            "waterline": "Latency of each layer, and the least that its arithmetic and its bytes need.",
        },
    ),
    "shape-bias": Analysis(
        title="Shape or texture",
        module="convscope.analysis.shape_bias_command",
        config="ShapeBiasCommand",
        settings={"per_pair": 4},
        meaning="Silhouettes filled with another class's texture: does a simple classifier of the features follow "
        "the shape or the texture? These are drawn images, so this is a procedural cue preference and no shape bias as "
        "people are measured by; compare it with the untrained network's.",
        captions={
            "cue-preference": "Share of decisions for the texture, by category; the line is the mean.",
            "shape-bias": "Share of decisions for the texture, by category; the line is the mean.",
            "consistency": "Whether two observers err on the same images, beyond what their accuracies explain.",
        },
    ),
}
