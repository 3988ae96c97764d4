"""A tiny contrastive objective and a batch for it."""

from typing import Any

import torch
from torch import Tensor

from convscope.core.backbone import create_backbone
from convscope.core.pairs.tokenizers import CaptionTokenizer, train_tokenizer
from convscope.ssl.objectives.clip import Clip, ClipConfig

COLOURS = ("red", "green", "blue", "a dark kind of yellow")


def tokenizer(context_length: int = 8) -> CaptionTokenizer:
    """Trained on four sentences."""
    return train_tokenizer([f"a picture in {colour}" for colour in COLOURS], 300, context_length)


def objective(arch: str = "convnext_tiny", **settings: Any) -> Clip:
    """Float64, with towers of a few thousand weights; a ConvNeXt, as BatchNorm would see other batches in parts."""
    widths: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (4, 8, 8, 16)}
    if arch == "resnet18":
        widths = {"layers": (1, 1, 1, 1), "channels": (4, 8, 8, 16)}
    backbone = create_backbone(arch, {**widths, "drop_path_rate": settings.pop("drop_path", 0.0)}, seed=0)
    torch.manual_seed(0)
    small = {"embed_dim": 6, "text_width": 8, "text_heads": 2, "text_layers": 2, "text_latents": 4}
    return ClipConfig(**{**small, **settings}).build(backbone, tokenizer()).double()


def batch(count: int = 8) -> dict[str, Tensor]:
    """Images of 32 px and captions of different lengths."""
    texts = [f"{'very ' * (i % 3)}{COLOURS[i % 4]}" for i in range(count)]
    images = torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return {"image": images, "text": tokenizer()(texts)}
