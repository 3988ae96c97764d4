"""Captions of a sample, and the one that a training step reads."""

import json
import random
import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from open_clip import SIMPLE_IMAGENET_TEMPLATES
from torch import Tensor

from convscope.core.data.decode import DecodeError
from convscope.core.data.shard_set import Sample, ShardSet, label_of
from convscope.core.errors import UserError
from convscope.core.pairs.tokenizers import Tokenizer

Sampling = Literal["first", "random", "sentence"]

FIELDS = ("txt", "text", "caption", "captions")  # where a caption is looked for, as members and in the json
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
TOKENIZER_SAMPLES = 100_000  # captions that a tokenizer is trained on, at most


@dataclass(frozen=True, kw_only=True)
class CaptionSource:
    """Where the captions of a sample come from.

    Args:
        field: member or json field; without, the usual ones are tried.
        lines: every line of a text is a caption of its own.
        classes: names of classes; captions are then sentences about the name of the sample's label.
    """

    field: str | None = None
    lines: bool = False
    classes: tuple[str, ...] = ()

    def __call__(self, sample: Sample) -> list[str]:
        """All captions of a sample, at least one; empty ones are left out.

        Raises:
            DecodeError: it has none.
            UserError: it has no label, or one beyond the names.
        """
        if self.classes:
            return self._about(label_of(sample))
        for place in (sample, _json(sample)):
            for name in self.names:
                if found := self._texts(place.get(name)):
                    return found
        raise DecodeError(str(sample["__key__"]), f"no caption ({', '.join(self.names)})")

    @property
    def names(self) -> tuple[str, ...]:
        """Members and fields that are tried."""
        return FIELDS if self.field is None else (self.field,)

    def _texts(self, value: Any) -> list[str]:
        if isinstance(value, bytes):
            value = value.decode(errors="replace")
        texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        parts = [part for text in texts for part in (text.splitlines() if self.lines else [text])]
        return [part.strip() for part in parts if part.strip()]

    def _about(self, label: int) -> list[str]:
        if not 0 <= label < len(self.classes):
            raise UserError(f"label {label} has no name among {len(self.classes)} classes")
        return [template(self.classes[label]) for template in SIMPLE_IMAGENET_TEMPLATES]


@dataclass(frozen=True)
class CaptionTokens:
    """Reads one caption of a sample as `text` (context_length,) int64; draws come from Python's generator.

    Args:
        tokenizer: makes tokens of it.
        source: where captions come from.
        sampling: the first caption, a random one, or a random sentence of a random one.
    """

    tokenizer: Tokenizer
    source: CaptionSource
    sampling: Sampling = "first"

    def __call__(self, sample: Sample) -> dict[str, Tensor]:
        """Tokens of one caption.

        Raises:
            DecodeError: the sample has none.
        """
        captions = self.source(sample)
        caption = captions[0] if self.sampling == "first" else random.choice(captions)
        if self.sampling == "sentence":
            caption = random.choice(sentences(caption))
        return {"text": self.tokenizer([caption])[0]}


def sentences(text: str) -> list[str]:
    """Its sentences, or the whole text where it has no end of one."""
    return [part.strip() for part in SENTENCE_END.split(text) if part.strip()] or [text]


def sample_captions(shards: ShardSet, source: CaptionSource, seed: int) -> list[str]:
    """Captions of up to 100 000 samples drawn at random, in the shards' order; of whole shards where they are remote.

    Raises:
        UserError: no sample has one.
    """
    found: list[str] = []
    for index in _drawn(shards, np.random.default_rng(seed)).tolist():
        try:
            found += source(shards.without_image(index))
        except DecodeError:
            continue  # training counts and names it
    if not found:
        raise UserError(f"{shards.source} has no captions: no member or json field {' or '.join(source.names)}")
    return found


def _drawn(shards: ShardSet, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices of up to TOKENIZER_SAMPLES samples, in ascending order."""
    count = min(len(shards), TOKENIZER_SAMPLES)
    if not shards.is_remote:
        return np.sort(rng.choice(len(shards), count, replace=False))
    sizes = np.array(shards.sizes)  # a shard is fetched whole, so a few of them give all the captions
    drawn = rng.permutation(len(sizes))
    needed = int(np.searchsorted(np.cumsum(sizes[drawn]), count)) + 1
    starts = np.cumsum(sizes) - sizes
    parts = [np.arange(starts[shard], starts[shard] + sizes[shard]) for shard in np.sort(drawn[:needed])]
    return np.concatenate(parts)[:count]


def _json(sample: Sample) -> dict[str, Any]:
    try:
        fields = json.loads(sample["json"]) if "json" in sample else {}
    except ValueError as error:
        raise DecodeError(str(sample["__key__"]), f"its .json is not valid JSON: {error}") from error
    return fields if isinstance(fields, dict) else {}
