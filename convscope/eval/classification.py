"""What fine-tuning trains: a backbone with a linear head, on labels that may be mixed and smoothed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from PIL.Image import Image
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from convscope.core.backbone import Backbone, Preprocessing
from convscope.core.data.transforms import interpolation_mode
from convscope.core.errors import UserError
from convscope.core.options import require_at_least
from convscope.core.training.objective import Batch, Objective, StepOutput
from convscope.eval.conv_bn import fold, freeze_statistics

TRIVIAL = "trivial"
HEAD_STD = 0.01


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig:
    """The loss and how labels and images are changed against over-fitting."""

    loss: Literal["ce", "bce"] = "ce"
    """ce: softmax cross-entropy. bce: a binary cross-entropy for each class, averaged over classes (ResNet strikes
    back, arXiv:2110.00476)."""
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes."""
    mixup: float = 0.0
    """alpha of the Beta distribution that mixes pairs of images of a batch (arXiv:1710.09412); 0: never."""
    cutmix: float = 0.0
    """alpha of the Beta distribution for the area taken from another image (arXiv:1905.04899); with mixup, one of both
    for each batch."""
    erase: float = 0.0
    """Probability of a random rectangle of noise in an image (arXiv:1708.04896)."""
    auto_augment: str | None = None
    """trivial: torchvision's TrivialAugmentWide. Else timm's grammar, such as rand-m9-mstd0.5-inc1."""
    convbn: Literal["train", "eval", "tune"] = "train"
    """BatchNorm: statistics of the batch; frozen; frozen and folded into the convolutions, the same in less memory."""

    def __post_init__(self) -> None:
        for name in ("label_smoothing", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} must lie between 0 and 1, got {getattr(self, name)}")
        require_at_least(self, 0, "mixup", "cutmix")

    def augmentation(self, preprocessing: Preprocessing) -> Callable[[Tensor], Tensor] | None:
        """What happens to a crop uint8 (3, H, W), before it is normalised.

        Raises:
            UserError: an augmentation that timm does not know.
        """
        if self.auto_augment is None:
            return None
        if self.auto_augment == TRIVIAL:
            return _OnImages(v2.TrivialAugmentWide(interpolation=interpolation_mode(preprocessing.interpolation)))
        kinds = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
        make = next((kinds[kind] for kind in kinds if self.auto_augment.startswith(kind)), auto_augment_transform)
        fill = tuple(min(255, round(255 * mean)) for mean in preprocessing.mean)
        settings = {"translate_const": int(0.45 * min(preprocessing.size)), "img_mean": fill}  # as timm's own training
        try:
            return _OnImages(make(self.auto_augment, settings))
        except (AssertionError, ValueError, KeyError, AttributeError) as error:
            said = f"--auto-augment {self.auto_augment}: {TRIVIAL}, or timm's such as rand-m9-mstd0.5-inc1"
            raise UserError(said) from error


@dataclass(frozen=True)
class _OnImages:
    """A change of Pillow images, on uint8 (3, H, W)."""

    change: Callable[[Image], Image]

    def __call__(self, pixels: Tensor) -> Tensor:
        changed: Tensor = pil_to_tensor(self.change(to_pil_image(pixels)))
        return changed


class Classification(Objective):
    """Cross-entropy of a linear head on the backbone's pooled features.

    Raises:
        UserError: the backbone has no BatchNorm that could be folded.
    """

    def __init__(self, backbone: Backbone, classes: int, config: ClassificationConfig | None = None) -> None:
        super().__init__()
        self.config = config or ClassificationConfig()
        self.backbone = backbone
        self.head = nn.Linear(backbone.num_features, classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)
        if self.config.convbn == "tune":
            fold(backbone)
        mixes = [("mixup", v2.MixUp), ("cutmix", v2.CutMix)]
        chosen = [
            kind(alpha=alpha, num_classes=classes) for name, kind in mixes if (alpha := getattr(self.config, name))
        ]
        self.mix = v2.RandomChoice(chosen) if chosen else None
        self.erase = v2.RandomErasing(self.config.erase, value="random", inplace=True) if self.config.erase else None
        self.train()

    def train(self, mode: bool = True) -> "Classification":
        """Frozen statistics stay frozen."""
        super().train(mode)
        if self.config.convbn != "train":
            freeze_statistics(self.backbone.modules())
        return self

    def forward(self, batch: Batch) -> StepOutput:
        """Loss on normalised images `image` (B, 3, H, W) and `label` (B,)."""
        images, labels = batch["image"], batch["label"]
        target = F.one_hot(labels, self.head.out_features).float()
        if self.training:
            images, target = self._changed(images, labels, target)
        logits = self.logits(images).float()
        target = target * (1 - self.config.label_smoothing) + self.config.label_smoothing / target.shape[1]
        if self.config.loss == "bce":
            loss = F.binary_cross_entropy_with_logits(logits, target)
        else:
            loss = F.cross_entropy(logits, target)
        return StepOutput(loss, {"accuracy": (logits.argmax(1) == target.argmax(1)).float().mean()})

    def _changed(self, images: Tensor, labels: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if self.erase is not None:
            images = torch.stack([self.erase(image) for image in images.clone()])
        if self.mix is not None and len(images) > 1:
            images, target = self.mix(images, labels)
        return images.contiguous(memory_format=torch.channels_last), target

    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, classes)."""
        out: Tensor = self.head(self.backbone(images))
        return out
