"""The networks of the shelf: what they are called here and by their authors, and a small one of each family."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
from torch import nn

from convscope.backbones import dhvt, glnet, gmm_vit, hornet, replknet, simplenet, tvconv, unireplknet, van
from convscope.backbones.registration import renamed


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A network that the authors' numbers are for."""

    arch: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    classes: Mapping[str, int] = field(default_factory=dict)  # num_classes, where the authors' is not ours

    def build(self, **further: Any) -> nn.Module:
        return timm.create_model(self.arch, **{**self.arguments, **self.classes, **further})


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
    variants: Mapping[str, Variant]  # by the name in data/FAMILY.json; the first one's outputs are compared
    truncation: Truncation | None = None
    modules: Mapping[str, str] = field(default_factory=dict)  # by the authors' names, where `module.NAMES` does not do
    small_arguments: Mapping[str, Any]  # that make the first variant small
    sizes: tuple[tuple[int, int], ...] = ((64, 96), (128, 64))  # height, width that it takes
    drops: Mapping[str, float] = field(default_factory=lambda: {"drop_path_rate": 0.5})  # what makes features random
    published: Mapping[str, float]  # millions of parameters by architecture, as the authors round them
    merges: bool = False  # whether it has a form for inference, which the published sizes are then of
    refused_by_spark: str = ""  # the layer's class, where there is one

    @property
    def computed(self) -> str:
        """The variant whose outputs are compared."""
        return next(iter(self.variants))

    @property
    def small(self) -> Variant:
        """For tests that need no numbers."""
        return Variant(arch=self.variants[self.computed].arch, arguments=self.small_arguments)

    def module_name(self, name: str) -> str:
        """Of the module that the authors call `name`; both end in a dot."""
        return self.modules[name] if self.modules else renamed(name, getattr(self.module, "NAMES", ()))


def named_alike(*archs: str, **classes: int) -> dict[str, Variant]:
    """Variants with our names in data/FAMILY.json."""
    return {arch: Variant(arch=arch, classes=classes) for arch in archs}


FAMILIES = {
    "simplenet": Family(
        module=simplenet,
        variants={
            **named_alike("simplenet_cifar_310k", "simplenet_cifar_5m", num_classes=10),
            **named_alike("simplenetv1_5m_m1"),
        },
        modules={
            "features.2.": "stages.0.layer0.",
            "features.15.": "stages.1.pool.",
            "features.28.": "stages.2.pool.",
            "features.37.": "stages.3.pool.",
            "features.50.": "stages.4.pool.",
            "features.24.": "stages.3.pool.",  # these two are for ImageNet
            "features.42.": "stages.4.pool.",
            "features.": "stages.4.",
        },
        small_arguments={"stages": ((8, 8), (12,), (12,), ((16, 1),), (12,))},
        drops={"layer_drop_rate": 0.5},  # it has no branches to drop
        published={
            "simplenetv1_small_m1_05": 1.5,
            "simplenetv1_small_m2_05": 1.5,
            "simplenetv1_small_m1_075": 3.3,
            "simplenetv1_small_m2_075": 3.3,
            "simplenetv1_5m_m1": 5.7,
            "simplenetv1_5m_m2": 5.7,
            "simplenetv1_9m_m1": 9.5,
            "simplenetv1_9m_m2": 9.5,
        },
    ),
    "tvconv": Family(
        module=tvconv,
        variants={"tvconv_mobilenet_v2_x0_1": Variant(arch="mobilenetv2_tvconv_x0_1")},
        modules={
            "features.0.": "stages.0.0.",
            "features.1.conv.0.0.": "stages.0.1.mix.",
            "features.1.": "stages.0.1.",
            "features.3.": "stages.1.1.",
            "features.6.": "stages.2.2.",
            "features.10.": "stages.3.3.",
            "features.13.": "stages.3.6.",
            "features.16.": "stages.4.2.",
            "features.17.": "stages.4.3.",
            "features.18.": "stages.4.4.",
            "output_layer.": "embedding.",
        },
        small_arguments={"img_size": (32, 48)},
        sizes=((32, 48),),
        published={},
    ),
    "gmm_vit": Family(
        module=gmm_vit,
        variants={"gmm_vit_tiny_gmm": Variant(arch="vit_tiny_patch4_32_gmm", classes={"num_classes": 100})},
        modules={
            "to_patch_embedding.": "patch_embed.",
            "transformer.layers.0.0.": "blocks.0.attn.",
            "transformer.layers.0.1.": "blocks.0.mlp.",
            "transformer.": "blocks.",
        },
        small_arguments={"embed_dim": 24, "num_heads": 2, "depth": 3},
        sizes=((32, 32),),
        published={},
        refused_by_spark="it does not run on visible units",
    ),
    "glnet": Family(
        module=glnet,
        variants=named_alike("glnet_4g"),
        small_arguments={"depths": (1, 1, 2, 1), "dims": (32, 32, 64, 64)},
        published={"glnet_stl": 30, "glnet_4g": 27, "glnet_9g": 60, "glnet_16g": 106},
        refused_by_spark="SlotMixing",
    ),
    "dhvt": Family(
        module=dhvt,
        variants={
            **named_alike("dhvt_tiny_cifar_patch4", num_classes=100),
            **named_alike("dhvt_tiny_imagenet_patch16"),
        },
        small_arguments={"embed_dim": 24, "num_heads": 2, "depth": 3},
        sizes=((32, 32), (48, 48)),
        published={"dhvt_tiny_imagenet_patch16": 6.2, "dhvt_small_imagenet_patch16": 23.8},
        refused_by_spark="it does not run on visible units",
    ),
    "hornet": Family(
        module=hornet,
        variants=named_alike("hornet_tiny_7x7"),
        small_arguments={"depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64)},
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
        small_arguments={"depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64)},
        published={"hornet_tiny_gf": 23, "hornet_small_gf": 50.4, "hornet_base_gf": 88.4, "hornet_large_gf": 196.3},
        refused_by_spark="GlobalLocalFilter",
    ),
    "replknet": Family(
        module=replknet,
        variants={"replknet31b": Variant(arch="replknet_31b")},
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
        small_arguments={"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 20), "width_ratio": 1.5},
        merges=True,
        published={"replknet_31b": 79, "replknet_31l": 172, "replknet_xl": 335},
    ),
    "unireplknet": Family(
        module=unireplknet,
        variants=named_alike("unireplknet_a", "unireplknet_p"),
        small_arguments={"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 40), "third_stage": (13, 3)},
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
        variants=named_alike("van_b0"),
        small_arguments={"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20)},
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
