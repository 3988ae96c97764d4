"""Rotation prediction (Gidaris et al. 2018, "Unsupervised Representation Learning by Predicting Image Rotations").

The network sees every image in its four rotations and names each one's. The published evaluation reads a middle layer:
the last one is the best at the task, and for that the worse at others (ibid., sec. 3.1, table 1).
"""

from dataclasses import dataclass, field

import torch
import tyro
from torch import Tensor, nn

from convscope.core.backbone import Backbone
from convscope.core.data.photometric import PhotometricConfig
from convscope.core.data.stream import Transform
from convscope.core.data.transforms import crop_flip
from convscope.core.errors import UserError
from convscope.core.training.objective import Batch, Objective, StepOutput

ROTATIONS = 4


def no_colour_changes() -> PhotometricConfig:
    """Photometric settings that change nothing: the published recipe has none."""
    return PhotometricConfig(jitter=0.0, grey=0.0, blur=0.0, solarize=0.0)


@dataclass(frozen=True, kw_only=True)
class RotationConfig:
    """Settings of rotation prediction; crops are square, for corners would tell the rotation otherwise."""

    size: int | None = None
    """Side of the training crop in pixels; default: the backbone's own input size."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Range of the random crop's area."""
    interpolation: str = "bicubic"
    """Resampling of the random crop."""
    flip: bool = True
    """Mirror images at random."""
    photometric: tyro.conf.OmitArgPrefixes[PhotometricConfig] = field(default_factory=no_colour_changes)

    def __post_init__(self) -> None:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise UserError(f"--crop-scale must be 0 < low <= high <= 1, got {self.crop_scale}")

    def build(self, backbone: Backbone) -> "Rotation":
        """The objective around `backbone`.

        Raises:
            UserError: the images are not square.
        """
        height, width = self.crop_size(backbone)
        if height != width:
            raise UserError(f"rotation needs square images; {backbone.arch} takes {height} x {width}: pass --size")
        return Rotation(backbone)

    def transform(self, backbone: Backbone) -> Transform:
        """Random resized crop and flip."""
        size = self.crop_size(backbone)
        transform: Transform = crop_flip(size, scale=self.crop_scale, interpolation=self.interpolation, flip=self.flip)
        return transform

    def crop_size(self, backbone: Backbone) -> tuple[int, int]:
        """Height and width of the training crop in pixels."""
        return backbone.preprocessing.size if self.size is None else (self.size, self.size)


class Rotation(Objective):
    """Four-way cross-entropy over the rotations of every image; see RotationConfig."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.num_features, ROTATIONS)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch) -> StepOutput:
        """Loss on `image` (B, 3, S, S); the network sees 4 B images."""
        images = rotations(batch["image"])
        logits = self.head(self.backbone(images))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # out of autocast
        turned = torch.arange(ROTATIONS, device=logits.device).repeat_interleave(len(batch["image"]))
        loss = nn.functional.cross_entropy(logits, turned)
        return StepOutput(loss, {"accuracy": (logits.detach().argmax(1) == turned).float().mean()})


def rotations(images: Tensor) -> Tensor:
    """(B, C, S, S) -> (4 B, C, S, S): all as they are, then all turned by 90, 180, 270 degrees counter-clockwise."""
    turned = torch.cat([images.rot90(quarter, (2, 3)) for quarter in range(ROTATIONS)])
    return turned.contiguous(memory_format=torch.channels_last)
