"""Retrieval and zero-shot accuracy on held-out pairs while a contrastive objective trains."""

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray

from convscope.core.data.decode import DecodeError, decode
from convscope.core.data.shard_set import ShardSet, label_of
from convscope.core.errors import UserError
from convscope.core.log import info
from convscope.core.pairs.captions import CaptionSource
from convscope.core.pairs.embed import SIMPLE, Captions, embed_classes, embed_images, embed_texts, read_captions
from convscope.core.pairs.metrics import rank_pairs
from convscope.core.pairs.model import ImageText
from convscope.core.training.config import Hook, LoopState

RECALL_AT = (1, 5, 10)


class PairEvaluation(Hook):
    """Adds a line `eval/...` to metrics.jsonl at intervals, of the same pairs every time.

    Args:
        shards: held-out pairs.
        every: steps between two looks; there is one after the last step too.
        count: how many pairs, evenly over the split.
        source: where captions come from; with sentences about classes there is no retrieval, many images share them.

    Raises:
        UserError: none of them can be looked at.
    """

    def __init__(self, shards: ShardSet, every: int, count: int, source: CaptionSource) -> None:
        self.shards, self.every = shards, every
        chosen = np.unique(np.linspace(0, len(shards) - 1, min(count, len(shards))).astype(np.int64))
        self.indices = _kept(chosen, lambda index: decode(shards[index]))
        self.captions: Captions | None = None
        if not source.classes:
            captioned = _kept(self.indices, lambda index: source(shards.without_image(index)))
            if len(captioned):
                self.indices, self.captions = captioned, read_captions(shards, source, captioned)
        self.labels = _labels(shards, self.indices) if shards.classes else None
        if not len(self.indices) or (self.captions is None and self.labels is None):
            raise UserError(f"split {shards.split} of {shards.source} has neither captions nor named labels to look at")
        if left_out := len(chosen) - len(self.indices):
            info(f"note: {left_out} of {len(chosen)} held-out pairs are left out: no readable image, or no caption")
        if self.captions is None and not source.classes:
            info(f"note: no retrieval while training: split {shards.split} of {shards.source} has no captions")

    def after_step(self, state: LoopState) -> None:
        """Look when it is time."""
        if state.step % self.every and state.step != state.total_steps:
            return
        objective = state.objective
        assert isinstance(objective, ImageText)
        training = objective.training
        objective.eval()
        try:
            found = {f"eval/{name}": round(value, 6) for name, value in self.measure(objective).items()}
        finally:
            objective.train(training)
        state.run.append_metrics({"step": state.step, **found})
        state.logged |= found
        shown = ("image_to_text_recall@1", "text_to_image_recall@1", "zero_shot_top1")
        info("  ".join([f"step {state.step}", *(f"{n} {found[k]:.4f}" for n in shown if (k := f"eval/{n}") in found)]))

    def measure(self, pair: ImageText) -> dict[str, float]:
        """Recalls both ways, and zero-shot accuracy where classes are known."""
        images = embed_images(pair, self.shards, self.indices)
        found: dict[str, float] = {}
        if self.captions is not None:
            texts = embed_texts(pair, self.captions.texts)
            to_text, to_image = rank_pairs(images, texts, self.captions.text, self.captions.image)
            for direction, ranks in (("image_to_text", to_text), ("text_to_image", to_image)):
                found |= {f"{direction}_recall@{k}": float(ranks.hits(k).mean()) for k in RECALL_AT}
        if self.labels is not None and self.shards.classes:
            classes = embed_classes(pair, self.shards.classes, SIMPLE)
            found["zero_shot_top1"] = float(((images @ classes.T).argmax(1) == self.labels).double().mean())
        return found


def _kept(indices: NDArray[np.int64], read: Callable[[int], object]) -> NDArray[np.int64]:
    """Those of the indices that can be read; one that cannot must not end a run."""
    kept = []
    for index in indices.tolist():
        with suppress(DecodeError):
            read(index)
            kept.append(index)
    return np.array(kept, dtype=np.int64)


def _labels(shards: ShardSet, indices: np.ndarray) -> torch.Tensor | None:
    try:
        return torch.tensor([label_of(shards.without_image(index)) for index in indices.tolist()])
    except UserError:
        return None
