"""k-nearest-neighbour vote on frozen features, as DINO (arXiv:2104.14294), DINOv2, lightly and solo-learn do it."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from convscope.core.backbone import Backbone
from convscope.core.data.shard_set import ShardSet
from convscope.core.distributed import pick_device
from convscope.core.errors import UserError
from convscope.core.log import info
from convscope.core.neighbours import neighbours
from convscope.core.options import require_at_least
from convscope.core.results import EvalResult, Figure, Samples
from convscope.eval.best_layer import settings_of
from convscope.eval.classes import accuracies, hits_of, labelled, rank_of_truth
from convscope.eval.common import (
    FrozenFeatures,
    extract_both,
    figures_by_layer,
    frozen_result,
    open_both,
    percent,
    print_table,
    require_same_keys,
    same_samples,
    save_at,
)
from convscope.eval.features import Features
from convscope.eval.neighbours import NeighbourSettings

TASK = "knn"
PROTOCOL = "dino-vote/1"
SCORES = 2**27  # held at a time
EPSILON = 1e-5  # added to a distance, as solo-learn does
Distance = Literal["cosine", "euclidean"]
PRESETS: dict[str, dict[str, Any]] = {
    "dinov2": {"k": [10, 20, 100, 200], "temperature": [0.07], "distance": ["cosine"], "headline_k": 20},
    "lightly": {"k": [200], "temperature": [0.1], "distance": ["cosine"], "headline_k": 200},
    "solo-learn": {
        "k": [1, 2, 5, 10, 20, 50, 100, 200],
        "temperature": [0.07, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0],
        "distance": ["cosine", "euclidean"],
        "headline_k": 20,
    },
}


@dataclass(frozen=True, kw_only=True)
class KnnConfig(NeighbourSettings):
    """How neighbours vote."""

    k: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours; each is reported."""
    headline_k: int = 20
    """The k that is reported first, fixed beforehand: the best k of a table would be chosen on the test set."""
    temperature: tuple[float, ...] = (0.07,)
    """Of the softmax over cosines that weighs the votes; the first one is the headline's."""
    distance: tuple[Distance, ...] = ("cosine",)
    """cosine; euclidean: of features as they are, where a vote weighs 1 / (distance + 1e-5). The first is the
    headline's."""

    def __post_init__(self) -> None:
        NeighbourSettings.__post_init__(self)
        if not self.k or min(self.k) < 1:
            raise UserError(f"--k must name numbers of at least 1, got {self.k}")
        require_at_least(self, 1, "headline_k")
        if not self.temperature or not all(value > 0 for value in self.temperature):
            raise UserError(f"--temperature must name numbers above 0, got {self.temperature}")
        if not self.distance:
            raise UserError("--distance needs cosine, euclidean, or both")

    @property
    def votes(self) -> list[tuple[Distance, float | None]]:
        """Every way of weighing a vote, the headline's first; euclidean distances have no temperature."""
        distances = dict.fromkeys(self.distance)
        return [
            (distance, temperature)
            for distance in distances
            for temperature in (dict.fromkeys(self.temperature) if distance == "cosine" else [None])
        ]


@dataclass(frozen=True, kw_only=True)
class KnnCommand(FrozenFeatures, KnnConfig):
    """k-nearest-neighbour vote on frozen features; nothing is trained or chosen.

    --preset dinov2, lightly or solo-learn.
    """

    def __post_init__(self) -> None:
        FrozenFeatures.__post_init__(self)
        KnnConfig.__post_init__(self)


@dataclass(frozen=True)
class Knn:
    """Accuracies "top1" and "top5" by k, and the settings behind them."""

    by_k: Mapping[int, Mapping[str, Figure]]  # of the first way of voting
    others: Mapping[str, Mapping[int, Mapping[str, Figure]]]  # of the others, by name
    headline: int
    details: Mapping[str, Any]
    hits_by_k: Mapping[int, Samples] = dataclasses.field(compare=False, repr=False)  # what accuracies are means of

    @property
    def figures(self) -> dict[str, Figure]:
        """`top1` and `top5` of the headline, `top1 k=10` and so on, then `top1 k=10 T=0.2`, `top1 k=10 euclidean`."""
        ways = {"": {k: row for k, row in self.by_k.items() if k != self.headline}}
        ways |= {f" {name}": dict(by_k) for name, by_k in self.others.items()}
        named = {
            f"{name} k={k}{way}": figure
            for way, by_k in ways.items()
            for k, row in by_k.items()
            for name, figure in row.items()
        }
        return {**self.by_k[self.headline], **named}

    @property
    def samples(self) -> Samples:
        """Hits of the first way of voting, of the same names."""
        others = {k: row for k, row in self.hits_by_k.items() if k != self.headline}
        named = {f"{name} k={k}": hits for k, row in others.items() for name, hits in row.items()}
        return {**self.hits_by_k[self.headline], **named}


def preset(_: type, name: str, arguments: list[str]) -> Mapping[str, Any]:
    """Flags of a published protocol."""
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}; presets of knn: {', '.join(PRESETS)}")
    return PRESETS[name]


def run(config: KnnCommand) -> None:
    """Load, evaluate, print a table and write the result."""
    backbone, train, test = open_both(config)
    result = evaluate(backbone, train, test, config)
    rows = [
        [layer, way, f"{k} *" if not place and int(k) == details["headline_k"] else k, *_shown(row)]
        for layer, details in result.details["layers"].items()
        for place, (way, table) in enumerate([(details["way"], details["test"]), *details["other_ways"].items()])
        for k, row in table.items()
    ]
    header = ["layer", "vote", "k", "test top1", "test top5"][: len(rows[0])]
    print_table(f"{TASK} {config.model}", header, rows)
    save_at(result, config.output, config.model)


def _shown(row: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [percent(Figure(**figure)) for figure in row.values()]


def evaluate(backbone: Backbone, train: ShardSet, test: ShardSet, config: KnnCommand) -> EvalResult:
    """Vote with every layer; with several, each figure's name starts with its layer, and none is chosen.

    Raises:
        UserError: what reading, extracting or voting refuses.
    """
    if same_samples(train, test):
        config = dataclasses.replace(config, skip_self=True)
    if (most := max(*config.k, config.headline_k)) > (available := len(train) - config.skip_self):
        info(f"note: {most} neighbours are more than the {available} train images; all of these vote, as k={available}")
    both = extract_both(backbone, train, test, config, config.device)
    votes = {layer: knn(*parts, config) for layer, parts in both.items()}
    figures = figures_by_layer({layer: vote.figures for layer, vote in votes.items()})
    details = {
        "layers": {layer: vote.details for layer, vote in votes.items()},
        "settings": settings_of(config, KnnConfig),
    }
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
    headline = min(config.headline_k, available)
    ks = sorted({headline, *(min(k, available) for k in config.k)})
    device = pick_device(config.device)
    found: dict[str, dict[int, dict[str, Figure]]] = {}
    hits: dict[int, Samples] = {}
    near: dict[str, tuple[Tensor, Tensor]] = {}
    for distance, temperature in config.votes:
        if distance not in near:
            search = neighbours if distance == "cosine" else nearest
            near[distance] = search(part.train_x, part.test_x, ks[-1], device=device, skip_self=config.skip_self)
        closeness, index = near[distance]
        ranks = vote_ranks(closeness, part.train_y[index], part.test_y, part.classes, ks, temperature)
        way = distance if temperature is None else f"T={temperature:g}"
        found[way] = {k: accuracies(ranks[k], part.classes, config.seed) for k in ks}
        hits = hits or {k: hits_of(ranks[k], part.classes) for k in ks}
    first, *others = found
    details = {
        "test": _as_dict(found[first]),
        "way": first,
        "other_ways": {way: _as_dict(found[way]) for way in others},
        "headline_k": headline,
        "skip_self": config.skip_self,
        "dimensions": part.train_x.shape[1],
        "classes": part.classes,
    }
    return Knn(found[first], {way: found[way] for way in others}, headline, details, hits)


def _as_dict(by_k: Mapping[int, Mapping[str, Figure]]) -> dict[str, Any]:
    return {str(k): {name: dataclasses.asdict(figure) for name, figure in row.items()} for k, row in by_k.items()}


def nearest(
    train_x: Tensor, test_x: Tensor, k: int, *, device: torch.device, skip_self: bool = False
) -> tuple[Tensor, Tensor]:
    """The k nearest train rows of each test row by Euclidean distance: 1 / (distance + 1e-5) and index (Q, k).

    Args:
        train_x: (N, D).
        test_x: (Q, D).
        k: at most N, and at most N - 1 with `skip_self`.
        device: where to search.
        skip_self: test row i is train row i and does not count among its own neighbours.
    """
    gallery = train_x.float().to(device)
    rows = max(1, SCORES // (8 * len(gallery)))
    found: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(test_x), rows):
        part = test_x[start : start + rows].float().to(device)
        # Not by |a|^2 + |b|^2 - 2ab: of close rows that is rounding only, and a copy has to be at 0.
        distance = torch.cdist(part, gallery, compute_mode="donot_use_mm_for_euclid_dist")
        if skip_self:
            own = torch.arange(len(part), device=device)
            distance[own, start + own] = torch.inf
        best = distance.topk(k, dim=1, largest=False)
        found.append(((1 / (best.values + EPSILON)).cpu(), best.indices.cpu()))
    return torch.cat([one for one, _ in found]), torch.cat([one for _, one in found])


def vote_ranks(
    similarity: Tensor, labels: Tensor, y: Tensor, classes: int, ks: Sequence[int], temperature: float | None
) -> dict[int, Tensor]:
    """Rank (Q,) of the true class in the vote of the k nearest, for each k; `classes` where nobody voted for it.

    score_c(k) = sum over i <= k of w_i [label_i = c], w = softmax(similarity / temperature) over all given neighbours.

    Args:
        similarity: (Q, K), best first.
        labels: classes (Q, K) of the neighbours.
        y: true classes (Q,).
        classes: their number C.
        ks: numbers of neighbours, ascending, at most K.
        temperature: of the softmax; `None` takes similarities as weights.
    """
    ranks: dict[int, list[Tensor]] = {k: [] for k in ks}
    rows = max(1, SCORES // classes)
    parts = zip(*(torch.split(values, rows) for values in (similarity, labels, y)))
    for near, label, truth in parts:
        # In float32, where softmax subtracts the maximum; a far neighbour's vote is small but never nothing.
        weight = near.float() if temperature is None else torch.softmax(near.float() / temperature, dim=1)
        weight = weight.clamp_min(torch.finfo(torch.float32).tiny)
        scores = torch.zeros(len(near), classes)
        counted = 0
        for k in ks:
            scores.scatter_add_(1, label[:, counted:k], weight[:, counted:k])
            counted = k
            voted = scores.gather(1, truth[:, None])[:, 0] > 0
            ranks[k].append(torch.where(voted, rank_of_truth(scores, truth), classes))
    return {k: torch.cat(found) for k, found in ranks.items()}
