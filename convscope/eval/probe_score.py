"""Test accuracy of heads on a frozen backbone, and of the best of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convscope.core import distributed
from convscope.core.checkpoint import RunDirectory
from convscope.core.data.shard_set import ShardSet
from convscope.core.data.stream import eval_batches
from convscope.core.data.transforms import Normalize, eval_transform
from convscope.core.files import whole_lines
from convscope.core.results import Figure, bootstrap
from convscope.core.training.config import Hook, LoopState
from convscope.eval.classes import accuracies, rank_of_truth
from convscope.eval.probe_objective import FrozenProbe

EPOCH_KEY = "eval/top1"


@dataclass(frozen=True)
class Choice:
    """Which head was chosen, and on what."""

    best: int
    details: dict[str, Any]


def rank_test_images(objective: FrozenProbe, test: ShardSet, label: str, batch_size: int, workers: int) -> Tensor:
    """How many classes each head puts before the true one (N, H), in the data's order; processes share the images."""
    found = [
        (index, _ranks(objective, vectors, truth))
        for index, truth, vectors in _batches(objective, test, label, batch_size, workers)
    ]
    own = (torch.cat([index for index, _ in found]), torch.cat([ranks for _, ranks in found])) if found else None
    parts = [part for part in distributed.gather(own) if part is not None]
    index, ranks = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    return ranks[index.argsort()]


def each_accuracy(ranks: Tensor) -> list[float]:
    """Top-1 of each head of ranks (N, H)."""
    top1: list[float] = (ranks == 0).double().mean(0).tolist()
    return top1


def best_head_figures(ranks: Tensor, classes: int, seed: int) -> tuple[dict[str, Figure], Choice]:
    """Figures of the head that is best on all test images, as DINOv2 reports; the result says so.

    With several heads `top1_chosen_on_other_half` too: each half of the test images is scored by the head that is best
    on the other one, so that no image has a part in the choice of its own head.

    Args:
        ranks: (N, H).
        classes: their number.
        seed: of the intervals and the halves.
    """
    hits = (ranks == 0).double()
    best = int(hits.mean(0).argmax())
    figures = accuracies(ranks[:, best], classes, seed)
    if ranks.shape[1] == 1:
        return figures, Choice(best, {"chosen_on": "nothing: there is one head"})
    details = {"chosen_on": f"the reported test images, the best of {ranks.shape[1]} heads"}
    if len(ranks) > 1:
        figures["top1_chosen_on_other_half"] = bootstrap(_cross_chosen(hits, seed).numpy(), seed=seed)
    return figures, Choice(best, details)


class EpochAccuracy(Hook):
    """Test top-1 of the best head after every epoch, as `eval/top1` in metrics.jsonl.

    The backbone is frozen, so the test images pass through it once, before training.

    Args:
        objective: on its device.
        test: the split.
        label: its field.
        batch_size: images at a time.
        workers: processes that decode.
        steps_per_epoch: optimizer steps, not always a whole number.
    """

    def __init__(
        self,
        objective: FrozenProbe,
        test: ShardSet,
        label: str,
        batch_size: int,
        workers: int,
        steps_per_epoch: float,
    ) -> None:
        self.steps_per_epoch = steps_per_epoch
        batches = _batches(objective, test, label, batch_size, workers)
        own = [(truth, [x.cpu() for x in vectors]) for _, truth, vectors in batches]
        self.batches = [batch for part in distributed.gather(own) for batch in part]

    def after_step(self, state: LoopState) -> None:
        """Look after the last step of an epoch."""
        epochs = round(state.step / self.steps_per_epoch)
        if round(epochs * self.steps_per_epoch) != state.step and state.step != state.total_steps:
            return
        objective = state.objective
        assert isinstance(objective, FrozenProbe)
        ranks = [_ranks(objective, [x.to(state.device) for x in vectors], truth) for truth, vectors in self.batches]
        top1 = max(each_accuracy(torch.cat(ranks)))
        state.run.append_metrics({"step": state.step, EPOCH_KEY: top1})
        state.logged |= {EPOCH_KEY: top1}

    @staticmethod
    def read(run: RunDirectory) -> dict[str, float]:
        """Accuracy by step, from metrics.jsonl."""
        lines = whole_lines(run.path / "metrics.jsonl")
        return {str(line["step"]): float(line[EPOCH_KEY]) for line in lines if EPOCH_KEY in line}


def _batches(
    objective: FrozenProbe, test: ShardSet, label: str, batch_size: int, workers: int
) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
    """Index, true class and what the heads see, of this process's share of the test images."""
    device = objective.known.device
    preprocessing = objective.backbone.preprocessing
    normalize = Normalize(preprocessing.mean, preprocessing.std).to(device)
    batches = eval_batches(
        test,
        eval_transform(preprocessing),
        batch_size=batch_size,
        workers=workers,
        rank=distributed.rank(),
        world=distributed.world(),
        label=label,
    )
    for batch in batches:
        truth = torch.searchsorted(objective.known.cpu(), batch["label"])
        yield batch["index"], truth, objective.vectors(normalize(batch["image"].to(device)))


@torch.no_grad()
def _ranks(objective: FrozenProbe, vectors: list[Tensor], truth: Tensor) -> Tensor:
    """(B, H) of one batch, on the CPU."""
    training = objective.training
    objective.eval()
    logits = objective.heads(vectors)
    objective.train(training)
    y = truth.to(logits.device)
    return torch.stack([rank_of_truth(logits[:, head], y) for head in range(logits.shape[1])], 1).cpu()


def _cross_chosen(hits: Tensor, seed: int) -> Tensor:
    """Hits (N,) of the head that is best on the half of hits (N, H) without the image."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(hits)))
    first, second = order[: len(order) // 2], order[len(order) // 2 :]
    found = torch.empty(len(hits), dtype=hits.dtype)
    found[first] = hits[first][:, hits[second].mean(0).argmax()]
    found[second] = hits[second][:, hits[first].mean(0).argmax()]
    return found
