"""The networks of the shelf: what they are called here and by their authors, and a small one of each family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
from torch import nn

from convscope.backbones import van


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A network that the authors' numbers are for."""

    arch: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def build(self, **further: Any) -> nn.Module:
        return timm.create_model(self.arch, **{**self.arguments, **further})


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """A large network without its last blocks, which gives the whole one's numbers up to there in less time."""

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
    refused_by_spark: str = ""  # the layer's class, where there is one


FAMILIES = {
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
