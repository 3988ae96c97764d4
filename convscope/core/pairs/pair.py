"""What an image-text model can do, whoever made it."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convscope.core.backbone import Preprocessing


class Pair(nn.Module):
    """Images and texts as unit vectors of one space.

    Attributes:
        tokenizer: token numbers (N, L) of N texts.
        logit_scale: logarithm of what multiplies the vectors' products.
    """

    tokenizer: Callable[[Sequence[str]], Tensor]
    logit_scale: nn.Parameter

    @property
    def preprocessing(self) -> Preprocessing:
        """How pixels become what `encode_image` takes."""
        raise NotImplementedError

    def encode_image(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> unit vectors (B, D), float32."""
        raise NotImplementedError

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) int64 -> unit vectors (B, D), float32."""
        raise NotImplementedError

    def untrained(self, seed: int = 0) -> "Pair":
        """The same pair with an image tower at its initial values, the floor for any comparison."""
        raise NotImplementedError

    def weights_hash(self) -> str:
        """SHA-256 (first 16 hexadecimal digits) over keys, shapes and values."""
        digest = hashlib.sha256()
        for key, value in sorted(self.state_dict().items()):
            digest.update(f"{key}:{tuple(value.shape)}:{value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def load_pair(source: str) -> tuple[Pair, dict[str, Any]]:
    """The pair that `source` names, and what a result file says about it.

    Args:
        source: a run of pretrain clip or a file it left; open_clip:NAME/PRETRAINED; open_clip:FOLDER.

    Raises:
        UserError: no such source, or one without a text tower.
    """
    if source.startswith("open_clip:"):
        from convscope.core.pairs.open_clip_format import load_open_clip

        name = source.removeprefix("open_clip:")
        theirs = load_open_clip(name)
        return theirs, {"source": source, "arch": name.partition("/")[0], "weights_hash": theirs.weights_hash()}
    from convscope.core.pairs.model import load_image_text

    ours = load_image_text(source)
    return ours, {"source": source, "arch": ours.backbone.arch, "weights_hash": ours.weights_hash()}
