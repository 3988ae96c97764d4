"""k-nearest-neighbour vote on frozen features, as DINO (arXiv:2104.14294) and DINOv2 do it."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from convscope.core.backbone import Backbone
from convscope.core.data.shard_set import ShardSet
from convscope.core.distributed import pick_device
from convscope.core.errors import UserError
from convscope.core.results import EvalResult, Figure, Samples
from convscope.eval.common import (
    FrozenFeatures,
    accuracies,
    extract_both,
    figures_by_layer,
    frozen_result,
    hits_of,
    labelled,
    open_both,
    percent,
    print_table,
    rank_of_truth,
    require_same_keys,
    same_samples,
    save_frozen,
)
from convscope.eval.features import Features
from convscope.eval.neighbours import NeighbourSettings, neighbours

TASK = "knn"
PROTOCOL = "dino-vote/1"
HEADLINE = 20  # the k that is reported first, fixed beforehand: the best k of a table is chosen on the test set
SCORES = 2**27  # held at a time

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class KnnConfig(NeighbourSettings):
    """How neighbours vote."""

    k: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours; each is reported, and 20 always, because that is the headline."""
    temperature: float = 0.07
    """Of the softmax over similarities that weighs the votes."""

    def __post_init__(self) -> None:
        NeighbourSettings.__post_init__(self)
        if not self.k or min(self.k) < 1:
            raise UserError(f"--k must name numbers of at least 1, got {self.k}")
        if not self.temperature > 0:
            raise UserError(f"--temperature must be above 0, got {self.temperature}")


@dataclass(frozen=True, kw_only=True)
class KnnCommand(FrozenFeatures, KnnConfig):
    """k-nearest-neighbour vote on frozen features; nothing is trained or chosen."""

    def __post_init__(self) -> None:
        FrozenFeatures.__post_init__(self)
        KnnConfig.__post_init__(self)


@dataclass(frozen=True)
class Knn:
    """Accuracies "top1" and "top5" by k, and the settings behind them."""

    by_k: Mapping[int, Mapping[str, Figure]]
    headline: int
    details: Mapping[str, Any]
    hits_by_k: Mapping[int, Samples] = dataclasses.field(compare=False, repr=False)  # what accuracies are means of

    @property
    def figures(self) -> dict[str, Figure]:
        """`top1` and `top5` at the headline's k, then `top1 k=10` and so on at the others."""
        return self._named(self.by_k)

    @property
    def samples(self) -> Samples:
        """Hits of the same names."""
        return self._named(self.hits_by_k)

    def _named(self, by_k: Mapping[int, Mapping[str, T]]) -> dict[str, T]:
        others = [k for k in by_k if k != self.headline]
        return {**by_k[self.headline], **{f"{name} k={k}": each for k in others for name, each in by_k[k].items()}}


def run(config: KnnCommand) -> None:
    """Load, evaluate, print a table and write the result."""
    backbone, train, test = open_both(config)
    result = evaluate(backbone, train, test, config)
    rows = [
        [layer, f"{k} *" if int(k) == details["headline_k"] else k, *(percent(Figure(**f)) for f in row.values())]
        for layer, details in result.details["layers"].items()
        for k, row in details["test"].items()
    ]
    header = ["layer", "k", "test top1", "test top5"][: len(rows[0])]
    print_table(f"{TASK} {config.model}", header, rows)
    save_frozen(result, config)


def evaluate(backbone: Backbone, train: ShardSet, test: ShardSet, config: KnnCommand) -> EvalResult:
    """Vote with every layer; with several, each figure's name starts with its layer, and none is chosen.

    Raises:
        UserError: what reading, extracting or voting refuses.
    """
    if same_samples(train, test):
        config = dataclasses.replace(config, skip_self=True)
    both = extract_both(backbone, train, test, config, config.device)
    votes = {layer: knn(*parts, config) for layer, parts in both.items()}
    figures = figures_by_layer({layer: vote.figures for layer, vote in votes.items()})
    details = {"layers": {layer: vote.details for layer, vote in votes.items()}}
    return frozen_result(
        backbone,
        train,
        test,
        config,
        task=TASK,
        protocol=PROTOCOL,
        figures=figures,
        details=details,
        seed=config.seed,
        samples=figures_by_layer({layer: vote.samples for layer, vote in votes.items()}),
    )


def knn(train: Features, test: Features, config: KnnConfig) -> Knn:
    """Accuracy of the weighted vote for each k.

    Raises:
        UserError: labels are missing or do not fit; `skip_self` though the keys differ; fewer than two train images.
    """
    part = labelled(train, test)
    require_same_keys(train, test, config.skip_self)
    available = len(part.train_x) - config.skip_self
    ks = sorted({min(k, available) for k in (HEADLINE, *config.k)})
    headline = min(HEADLINE, available)
    similarity, index = neighbours(
        part.train_x, part.test_x, ks[-1], device=pick_device(config.device), skip_self=config.skip_self
    )
    ranks = vote_ranks(similarity, part.train_y[index], part.test_y, part.classes, ks, config.temperature)
    by_k = {k: accuracies(ranks[k], part.classes, config.seed) for k in ks}
    details = {
        "test": {str(k): {name: dataclasses.asdict(figure) for name, figure in by_k[k].items()} for k in ks},
        "headline_k": headline,
        "temperature": config.temperature,
        "skip_self": config.skip_self,
        "dimensions": part.train_x.shape[1],
        "classes": part.classes,
    }
    return Knn(by_k, headline, details, {k: hits_of(ranks[k], part.classes) for k in ks})


def vote_ranks(
    similarity: Tensor, labels: Tensor, y: Tensor, classes: int, ks: Sequence[int], temperature: float
) -> dict[int, Tensor]:
    """Rank (Q,) of the true class in the vote of the k nearest, for each k; `classes` where nobody voted for it.

    score_c(k) = sum over i <= k of w_i [label_i = c], w = softmax(similarity / temperature) over all given neighbours.

    Args:
        similarity: (Q, K), best first.
        labels: classes (Q, K) of the neighbours.
        y: true classes (Q,).
        classes: their number C.
        ks: numbers of neighbours, ascending, at most K.
        temperature: of the softmax.
    """
    ranks: dict[int, list[Tensor]] = {k: [] for k in ks}
    rows = max(1, SCORES // classes)
    parts = zip(*(torch.split(values, rows) for values in (similarity, labels, y)))
    for near, label, truth in parts:
        # In float32, where softmax subtracts the maximum; a far neighbour's vote is small but never nothing.
        weight = torch.softmax(near.float() / temperature, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        scores = torch.zeros(len(near), classes)
        counted = 0
        for k in ks:
            scores.scatter_add_(1, label[:, counted:k], weight[:, counted:k])
            counted = k
            voted = scores.gather(1, truth[:, None])[:, 0] > 0
            ranks[k].append(torch.where(voted, rank_of_truth(scores, truth), classes))
    return {k: torch.cat(found) for k, found in ranks.items()}
