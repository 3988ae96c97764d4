"""Captions of a sample, and the one that a training step reads."""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from convscope.core.data.decode import DecodeError
from convscope.core.data.shard_set import Sample, ShardSet
from convscope.core.errors import UserError
from convscope.core.pairs.tokenizers import Tokenizer

Sampling = Literal["first", "random", "sentence"]

FIELDS = ("txt", "text", "caption", "captions")  # where a caption is looked for, as members and in the json
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
TOKENIZER_SAMPLES = 100_000  # captions that a tokenizer is trained on, at most


@dataclass(frozen=True)
class CaptionTokens:
    """Reads one caption of a sample as `text` (context_length,) int64; draws come from Python's generator.

    Args:
        tokenizer: makes tokens of it.
        sampling: the first caption, a random one, or a random sentence of a random one.
        field: member or json field of the captions; without, the usual ones are tried.
        lines: every line of a text is a caption of its own.
    """

    tokenizer: Tokenizer
    sampling: Sampling = "first"
    field: str | None = None
    lines: bool = False

    def __call__(self, sample: Sample) -> dict[str, Tensor]:
        """Tokens of one caption.

        Raises:
            DecodeError: the sample has none.
        """
        captions = captions_of(sample, self.field, lines=self.lines)
        caption = captions[0] if self.sampling == "first" else random.choice(captions)
        if self.sampling == "sentence":
            caption = random.choice(sentences(caption))
        return {"text": self.tokenizer([caption])[0]}


def captions_of(sample: Sample, field: str | None = None, *, lines: bool = False) -> list[str]:
    """All captions of a sample, at least one; empty ones are left out.

    Raises:
        DecodeError: it has none.
    """
    names = _names(field)
    for place in (sample, _json(sample)):
        value: Any = next((place[name] for name in names if name in place), None)
        if isinstance(value, bytes):
            value = value.decode(errors="replace")
        texts = value if isinstance(value, list) else [value]
        parts = [part for text in texts if isinstance(text, str) for part in (text.splitlines() if lines else [text])]
        if found := [part.strip() for part in parts if part.strip()]:
            return found
    raise DecodeError(str(sample["__key__"]), f"no caption ({', '.join(names)})")


def sentences(text: str) -> list[str]:
    """Its sentences, or the whole text where it has no end of one."""
    return [part.strip() for part in SENTENCE_END.split(text) if part.strip()] or [text]


def sample_captions(shards: ShardSet, seed: int, field: str | None = None, *, lines: bool = False) -> list[str]:
    """Captions of up to 100 000 samples drawn at random, in the shards' order.

    Raises:
        UserError: no sample has one.
    """
    count = min(len(shards), TOKENIZER_SAMPLES)
    indices = np.sort(np.random.default_rng(seed).choice(len(shards), count, replace=False))
    found: list[str] = []
    for index in indices.tolist():
        try:
            found += captions_of(shards.without_image(index), field, lines=lines)
        except DecodeError:
            continue  # training counts and names it
    if not found:
        raise UserError(f"{shards.source} has no captions: no member or json field {' or '.join(_names(field))}")
    return found


def _names(field: str | None) -> Sequence[str]:
    return FIELDS if field is None else (field,)


def _json(sample: Sample) -> dict[str, Any]:
    try:
        fields = json.loads(sample["json"]) if "json" in sample else {}
    except ValueError as error:
        raise DecodeError(str(sample["__key__"]), f"its .json is not valid JSON: {error}") from error
    return fields if isinstance(fields, dict) else {}
