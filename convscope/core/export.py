"""`convscope export backbone | open-clip`: trained weights in the formats that other libraries load."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from convscope.core.models import LoadsModel, save_backbone
from convscope.core.options import AllowPartial, Arch, ModelArguments
from convscope.core.pairs.model import load_image_text
from convscope.core.pairs.open_clip_format import export_open_clip
from convscope.core.reparameterization import reparameterized


@dataclass(frozen=True, kw_only=True)
class ExportBackbone(LoadsModel):
    """Write a backbone under timm's keys; timm.create_model(ARCH, num_classes=0, checkpoint_path=FILE) loads it."""

    model: tyro.conf.Positional[str]
    """Checkpoint, run directory, or timm:NAME (docs/design.md, Models)."""
    output: Path
    """The .safetensors file to write."""
    arch: Arch = None
    model_args: ModelArguments = ()
    allow_partial: AllowPartial = 1.0
    reparameterize: bool = False
    """Merge parallel branches and BatchNorm into single convolutions that compute the same, for inference
    (UniRepLKNet, RepLKNet, timm's FastViT)."""


@dataclass(frozen=True, kw_only=True)
class ExportOpenClip:
    """Write both towers as a folder; open_clip.create_model_and_transforms("local-dir:FOLDER") loads it."""

    model: tyro.conf.Positional[str]
    """Run of pretrain clip, or its image_text.safetensors."""
    output: Path
    """The folder to write."""


def run_backbone(config: ExportBackbone) -> None:
    """Load, write and name the file."""
    backbone = config.load()
    save_backbone(config.output, reparameterized(backbone) if config.reparameterize else backbone)
    print(config.output)


def run_open_clip(config: ExportOpenClip) -> None:
    """Load, write, load with open_clip and compare, and name the folder."""
    export_open_clip(load_image_text(config.model), config.output)
    print(config.output)
