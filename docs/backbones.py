"""Writes docs/backbones.md, the architectures that convscope adds to timm's.

python docs/backbones.py
"""

import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convscope.analysis.erf import ErfConfig, erf
from convscope.backbones import (
    convnext_small_image,
    dhvt,
    glnet,
    gmm_vit,
    hornet,
    replknet,
    resnet_small_image,
    simplenet,
    tvconv,
    unireplknet,
    van,
)
from convscope.core.backbone import Backbone, create_backbone
from convscope.core.errors import UserError
from convscope.ssl.sparse.rules import convert
from convscope.ssl.sparse.verify import verify

MEASURED_UP_TO = 12e6  # parameters
ERF_SIZE = 128  # pixels, or the network's own size where that is smaller or fixed
ERF_IMAGES = 4

INTRODUCTION = """# Backbones

Architectures that timm lacks, in timm's registry after `import convscope.backbones`:
`timm.create_model(NAME, features_only=True)`, and `--backbone NAME` or `--model timm:NAME@random` in commands. The
authors' checkpoints load with `--arch NAME`. All are written from the papers; of each family
that has a reference, a variant or more equals the authors' network in float64 on the same weights (`tests/backbones/`).

- Parameters with the default classifier; MACs of convolutions and matrix products at the default size (not of FFTs and
  of products of maps).
- ERF: the side in pixels of the square around the last map's central token that holds half of its input gradient,
  before any training (seed 0, mean of {images} noise images of {size} px, or of the network's own size where that is
  smaller or fixed; "all": the square does not fit the image). Not measured (-) above {limit:.0f} M parameters but for
  the first of its kind.
- SparK: whether `pretrain spark` trains it, exactly on visible positions; networks above that size take the answer of a
  smaller one with the same layers.

This page is written by `python docs/backbones.py`.
"""


@dataclass(frozen=True)
class Family:
    """A file of `convscope/backbones`."""

    title: str
    module: ModuleType
    source: str  # paper and reference
    licence: str  # of the reference


FAMILIES = (
    Family("UniRepLKNet", unireplknet, "arXiv:2311.15599, AILab-CVC/UniRepLKNet", "Apache-2.0"),
    Family("RepLKNet", replknet, "arXiv:2203.06717, DingXiaoH/RepLKNet-pytorch", "MIT"),
    Family("VAN", van, "arXiv:2202.09741, Visual-Attention-Network/VAN-Classification", "Apache-2.0"),
    Family("HorNet", hornet, "arXiv:2207.14284, raoyongming/HorNet", "MIT"),
    Family("GLNet", glnet, "arXiv:2411.14429, rayleizhu/GLMix", "MIT"),
    Family("DHVT", dhvt, "arXiv:2210.05958, ArieSeirack/DHVT", "Apache-2.0"),
    Family("SimpleNet", simplenet, "arXiv:1608.06037, Coderx7/SimpleNet_Pytorch", "MIT"),
    Family("MobileNetV2 with TVConv", tvconv, "arXiv:2203.10489, JierunChen/TVConv", "MIT"),
    Family("ViT with a Gaussian-mixture mask", gmm_vit, "arXiv:2309.05015 (the paper alone)", "the reference has none"),
    Family("ConvNeXt for small images", convnext_small_image, "timm's ConvNeXt", "Apache-2.0"),
    Family("ResNet for small images", resnet_small_image, "timm's ResNet", "Apache-2.0"),
)


def main() -> None:
    """Measure every network and write the page."""
    torch.backends.mha.set_fastpath_enabled(False)
    parts = [INTRODUCTION.format(images=ERF_IMAGES, size=ERF_SIZE, limit=MEASURED_UP_TO / 1e6)]
    for family in FAMILIES:
        parts.append(f"## {family.title}\n\nSource: {family.source}. Licence of the reference: {family.licence}.\n")
        lines = [
            "| name | parameters, M | MACs, G | size, px | stride | ERF 50 %, px | SparK |",
            "|---|---|---|---|---|---|---|",
        ]
        answers: dict[frozenset[str], str] = {}
        names = dict.fromkeys(name.split(".")[0] for name in family.module.default_cfgs)
        for name in sorted(names, key=parameters):
            lines.append(row(name, answers))
            print(lines[-1], flush=True)
        parts.append("\n".join(lines) + "\n")
    Path(__file__).with_suffix(".md").write_text("\n".join(parts))


def row(name: str, answers: dict[frozenset[str], str]) -> str:
    """A line of a family's table; `answers` has SparK's of the networks before, by their layers."""
    model = on_meta(name)
    height = model.pretrained_cfg["input_size"][-1]
    stride = model.feature_info[-1]["reduction"]
    layers = frozenset(type(module).__name__ for module in model.modules())
    area = "-"
    if parameters(name) <= MEASURED_UP_TO or layers not in answers:
        backbone = create_backbone(name, seed=0)
        area = receptive_field(backbone)
        if layers not in answers:
            answers[layers] = spark(backbone)
    count, macs = parameters(name) / 1e6, multiplications(model) / 1e9
    return f"| {name} | {count:.1f} | {macs:.2f} | {height} | {stride} | {area} | {answers.get(layers, '-')} |"


def on_meta(name: str) -> nn.Module:
    """The network without memory."""
    with torch.device("meta"):
        return timm.create_model(name).eval()


def parameters(name: str) -> int:
    """How many."""
    return sum(parameter.numel() for parameter in on_meta(name).parameters())


def multiplications(model: nn.Module) -> float:
    """Of one image."""
    size = model.pretrained_cfg["input_size"]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *size, device="meta"))
    return counter.get_total_flops() / 2


def receptive_field(backbone: Backbone) -> str:
    """The side of the square that holds half of the gradient."""
    fixed = backbone.model.pretrained_cfg.get("fixed_input_size")
    own = backbone.preprocessing.size[0]
    size = own if fixed else min(own, ERF_SIZE)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(ERF_IMAGES, 3, size, size, generator=generator)
    (last,) = erf(backbone.at_size(size), images.split(1), ErfConfig(thresholds=(0.5,))).values()
    area = last.areas["raw"][0]
    return "all" if area is None else f"{area.side:.0f} of {size}"


def spark(backbone: Backbone) -> str:
    """Whether SparK is exact on it, or why not."""
    try:
        verify(backbone, convert(backbone.model, backbone.arch), backbone.stride)
    except UserError as error:
        layer = re.search(r"layer \S+ \((\w+)\)", str(error))
        return f"no: {layer[1]} mixes positions" if layer else "no: attention between positions"
    return "yes"


if __name__ == "__main__":
    main()
