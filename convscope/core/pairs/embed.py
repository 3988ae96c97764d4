"""Unit vectors of a data set's images, captions and class names."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from convscope.core.data.shard_set import ShardSet
from convscope.core.data.stream import eval_batches
from convscope.core.data.transforms import Normalize, eval_transform
from convscope.core.errors import UserError
from convscope.core.log import progress
from convscope.core.pairs.captions import CaptionSource
from convscope.core.pairs.pair import Pair

TEXTS = 256  # encoded at a time
SIMPLE = ("a photo of a {}.",)  # the one template of quick looks


@dataclass(frozen=True)
class Captions:
    """Captions of some images; the same words are one text, so that equals are equal to the bit."""

    texts: list[str]  # different ones
    text: Tensor  # (M,) of each caption: which of `texts` it is
    image: Tensor  # (M,) and which image it belongs to, counted within the images asked for


def read_captions(shards: ShardSet, source: CaptionSource, indices: NDArray[np.int64] | None = None) -> Captions:
    """All captions of the samples at `indices`, or of every sample.

    Raises:
        UserError: a sample has none.
    """
    numbers: dict[str, int] = {}
    text, image = [], []
    places = range(len(shards)) if indices is None else indices.tolist()
    for place, index in enumerate(places):
        for caption in source(shards.without_image(index)):
            text.append(numbers.setdefault(caption, len(numbers)))
            image.append(place)
    return Captions(list(numbers), torch.tensor(text), torch.tensor(image))


@torch.inference_mode()
def embed_images(
    pair: Pair,
    shards: ShardSet,
    indices: NDArray[np.int64] | None = None,
    *,
    batch_size: int = 256,
    workers: int = 0,
    bf16: bool = False,
) -> Tensor:
    """Unit vectors (N, D) of the samples at `indices`, or of all, as the model's preprocessing shows them to it.

    Raises:
        UserError: an image cannot be decoded, or its vector is not finite.
    """
    device = pair.logit_scale.device
    preprocessing = pair.preprocessing
    normalize = Normalize(preprocessing.mean, preprocessing.std).to(device)
    transform = eval_transform(preprocessing)
    batches = eval_batches(shards, transform, batch_size=batch_size, workers=workers, label=None, indices=indices)
    found = []
    with (
        progress(f"images of {shards.split}", len(shards) if indices is None else len(indices)) as ticker,
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
    ):
        for batch in batches:
            found.append(pair.encode_image(normalize(batch["image"].to(device))).cpu())
            ticker.advance(len(found[-1]))
    return _finite(torch.cat(found), "images")


@torch.inference_mode()
def embed_texts(pair: Pair, texts: Sequence[str], *, bf16: bool = False) -> Tensor:
    """Unit vectors (M, D).

    Raises:
        UserError: one of them is not finite.
    """
    device = pair.logit_scale.device
    found = []
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for start in range(0, len(texts), TEXTS):
            tokens = pair.tokenizer(texts[start : start + TEXTS])
            found.append(pair.encode_text(tokens.to(device)).cpu())
    return _finite(torch.cat(found), "texts")


def embed_classes(pair: Pair, names: Sequence[str], templates: Sequence[str], *, bf16: bool = False) -> Tensor:
    """Unit vectors (C, D) of classes: of each, the mean over templates (Radford et al. 2021, sec. 3.1.4).

    Args:
        names: in words.
        templates: sentences with {} in place of the name.
    """
    texts = [template.replace("{}", name) for name in names for template in templates]
    vectors = embed_texts(pair, texts, bf16=bf16).view(len(names), len(templates), -1)
    return F.normalize(vectors.mean(1), dim=-1)


def _finite(vectors: Tensor, what: str) -> Tensor:
    if not vectors.isfinite().all():
        raise UserError(f"the vectors of some {what} are NaN or infinite; is the model trained well?")
    return vectors
