"""What a split is made of: formats, sizes, labels, captions."""

import io
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convscope.core.data.decode import DecodeError, image_bytes
from convscope.core.data.shard_set import Sample, ShardSet, label_of
from convscope.core.errors import UserError
from convscope.core.log import progress

Captions = Callable[[Sample], list[str]]  # DecodeError where a sample has none

CHUNK = 1000  # samples that one thread looks at
LABEL_FIELDS = ("cls", "label")


@dataclass
class SplitStatistics:
    """Counts over the samples that were looked at; pictures are not decoded, only their headers read."""

    samples: int = 0
    members: Counter[str] = field(default_factory=Counter)  # samples that have a member of that suffix
    formats: Counter[str] = field(default_factory=Counter)  # "JPEG RGB"
    labels: Counter[str] = field(default_factory=Counter)
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # key, cause
    widths: list[int] = field(default_factory=list)  # pixels; these three of readable images, in their order
    heights: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    caption_words: list[int] = field(default_factory=list)  # these two of all captions
    caption_characters: list[int] = field(default_factory=list)

    def add(self, sample: Sample, captions: Captions) -> None:
        """Count one sample, with all of its captions."""
        self.samples += 1
        self.members.update(name for name in sample if name != "__key__")
        self._add_image(sample)
        if (label := _label(sample)) is not None:
            self.labels[label] += 1
        with suppress(DecodeError):
            for caption in captions(sample):
                self.caption_words.append(len(caption.split()))
                self.caption_characters.append(len(caption))

    def merge(self, other: "SplitStatistics") -> None:
        """Count what `other` counted."""
        self.samples += other.samples
        for name in ("members", "formats", "labels"):
            getattr(self, name).update(getattr(other, name))
        for name in ("unreadable", "widths", "heights", "bytes", "caption_words", "caption_characters"):
            getattr(self, name).extend(getattr(other, name))

    def _add_image(self, sample: Sample) -> None:
        try:
            data = image_bytes(sample)
            with Image.open(io.BytesIO(data)) as image:
                self.formats[f"{image.format} {image.mode}"] += 1
                width, height = image.size
        except DecodeError as error:
            self.unreadable.append((error.key, error.cause))
        except Exception as error:  # Pillow's readers raise anything on damaged input
            self.unreadable.append((str(sample["__key__"]), " ".join(str(error).split()) or type(error).__name__))
        else:
            self.widths.append(width)
            self.heights.append(height)
            self.bytes.append(len(data))


def statistics(shards: ShardSet, captions: Captions, indices: Iterable[int] | None = None) -> SplitStatistics:
    """Look at every sample, or at those at `indices`.

    Labels are those of member `cls`, else of the json's `cls` or `label`.

    Raises:
        UserError: a shard is damaged.
    """
    chosen: NDArray[np.int64] = np.fromiter(range(len(shards)) if indices is None else indices, dtype=np.int64)
    parts = [chosen[i : i + CHUNK] for i in range(0, len(chosen), CHUNK)]

    def look(part: NDArray[np.int64]) -> SplitStatistics:
        found = SplitStatistics()
        for index in part.tolist():
            found.add(shards[index], captions)
        return found

    whole = SplitStatistics()
    pool = ThreadPoolExecutor()
    try:
        with progress(f"reading {shards.split}", len(chosen)) as ticker:
            for part in pool.map(look, parts):
                whole.merge(part)
                ticker.advance(part.samples)
    finally:
        pool.shutdown(cancel_futures=True)
    return whole


def _label(sample: Sample) -> str | None:
    if "cls" in sample:  # as it stands, integer or not
        return _text(sample["cls"]).strip()
    for name in LABEL_FIELDS:
        with suppress(UserError):
            return str(label_of(sample, name))
    return None


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode(errors="replace")
