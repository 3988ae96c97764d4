"""The networks of the shelf: what they are called here and by their authors, and a small one of each family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
from torch import nn

from convscope.backbones import hornet, replknet, unireplknet, van


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A network that the authors' numbers are for."""

    arch: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def build(self, **further: Any) -> nn.Module:
        return timm.create_model(self.arch, **{**self.arguments, **further})


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """A large network without its last stages, which gives the whole one's numbers up to there in less time."""

    arguments: Mapping[str, Any]
    left_out: str  # pattern of the authors' keys that it lacks
    whole: tuple[str, ...]  # the modules, by the authors' name, whose outputs do not change


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture: a file of `convscope/backbones`."""

    module: Any
    variants: Mapping[str, Variant]  # by the name in data/FAMILY.json
    computed: str  # the variant whose outputs are compared
    truncation: Truncation | None = None
    module_name: Callable[[str], str]  # of the module that the authors call so; both end in a dot
    small: Variant  # for tests that need no numbers
    sizes: tuple[tuple[int, int], ...] = ((64, 96), (128, 64))  # height, width that it takes
    published: Mapping[str, float]  # millions of parameters by architecture, as the authors round them
    merges: bool = False  # whether it has a form for inference, which the published sizes are then of
    refused_by_spark: str = ""  # the layer's class, where there is one


FAMILIES = {
    "hornet": Family(
        module=hornet,
        variants={"hornet_tiny_7x7": Variant(arch="hornet_tiny_7x7")},
        computed="hornet_tiny_7x7",
        module_name=hornet.our_name,
        small=Variant(arch="hornet_tiny_7x7", arguments={"depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64)}),
        published={
            "hornet_tiny_7x7": 22.4,
            "hornet_small_7x7": 49.5,
            "hornet_base_7x7": 87.3,
            "hornet_large_7x7": 194.5,
        },
    ),
    "hornet_gf": Family(
        module=hornet,
        variants={"hornet_tiny_gf_f64fft": Variant(arch="hornet_tiny_gf")},
        computed="hornet_tiny_gf_f64fft",
        module_name=hornet.our_name,
        small=Variant(arch="hornet_tiny_gf", arguments={"depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64)}),
        published={"hornet_tiny_gf": 23, "hornet_small_gf": 50.4, "hornet_base_gf": 88.4, "hornet_large_gf": 196.3},
        refused_by_spark="GlobalLocalFilter",
    ),
    "replknet": Family(
        module=replknet,
        variants={"replknet31b": Variant(arch="replknet_31b")},
        computed="replknet31b",
        truncation=Truncation(
            arguments={"depths": (2, 2), "dims": (128, 256)},
            left_out=r"^(stages\.[23]|transitions\.[12]|norm|head)\.",
            whole=(
                "stem.0",
                "stem.3",
                "stages.0.blocks.0",
                "stages.0",
                "transitions.0",
                "stages.1.blocks.0",
                "stages.1",
            ),
        ),
        module_name=replknet.our_name,
        small=Variant(
            arch="replknet_31b", arguments={"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 20), "width_ratio": 1.5}
        ),
        merges=True,
        published={"replknet_31b": 79, "replknet_31l": 172, "replknet_xl": 335},
    ),
    "unireplknet": Family(
        module=unireplknet,
        variants={name: Variant(arch=name) for name in ("unireplknet_a", "unireplknet_p")},
        computed="unireplknet_a",
        module_name=unireplknet.our_name,
        small=Variant(arch="unireplknet_t", arguments={"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 40)}),
        merges=True,
        published={
            "unireplknet_a": 4.4,
            "unireplknet_f": 6.2,
            "unireplknet_p": 10.7,
            "unireplknet_n": 18.3,
            "unireplknet_t": 31,
            "unireplknet_s": 56,
            "unireplknet_b": 98,
            "unireplknet_l": 218,
            "unireplknet_xl": 386,
        },
    ),
    "van": Family(
        module=van,
        variants={"van_b0": Variant(arch="van_b0")},
        computed="van_b0",
        module_name=van.our_name,
        small=Variant(arch="van_b0", arguments={"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20)}),
        published={
            "van_b0": 4.1,
            "van_b1": 13.9,
            "van_b2": 26.6,
            "van_b3": 44.8,
            "van_b4": 60.3,
            "van_b5": 90.0,
            "van_b6": 200.3,
        },
    ),
}
