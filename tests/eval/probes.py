"""A small probe on augmented images."""

from pathlib import Path
from typing import Any

from convscope.eval.linear_probe import LinearProbeCommand

VIT = ("img_size=32", "patch_size=8", "embed_dim=24", "depth=5", "num_heads=2", "reg_tokens=2")


def command(data: str, output: Path, **changes: Any) -> LinearProbeCommand:
    values: dict[str, Any] = {
        "model": "timm:vit_tiny_patch16_224@random",
        "model_args": VIT,
        "data": data,
        "output_dir": output,
        "protocol": "dinov2",
        "iterations": 6,
        "sgd_batch_size": 16,
        "device": "cpu",
        "workers": 0,
        "decoding": "exact",
        **changes,
    }
    return LinearProbeCommand(**values)
