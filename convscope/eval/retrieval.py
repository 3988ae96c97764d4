"""Retrieval: test images query the train images of their own label, or images and their captions one another."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from convscope.core.backbone import Backbone
from convscope.core.data.shard_set import ShardSet
from convscope.core.distributed import pick_device
from convscope.core.errors import UserError
from convscope.core.results import EvalResult, Figure, Samples, bootstrap
from convscope.eval import image_text
from convscope.eval.classes import labelled
from convscope.eval.common import (
    FrozenFeatures,
    extract_both,
    figures_by_layer,
    frozen_result,
    open_both,
    percent,
    print_table,
    require_labels,
    require_same_keys,
    same_samples,
    save_at,
)
from convscope.eval.features import Features
from convscope.eval.neighbours import NeighbourSettings
from convscope.eval.ranking import SIMILARITIES, Ranking, Relevance, average_precision, exact_ranking, inverse_lengths
from convscope.eval.search_index import IndexSettings, build_index, recall_against_exact

TASK = "retrieval"
PROTOCOL = "image-image"
VERSION = 2  # 2: of equally similar images the relevant ones come last


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig(NeighbourSettings, IndexSettings):
    """What is asked of the ranking."""

    recall_at: tuple[int, ...] = (1, 5, 10)
    """A query is a hit at k if one of its k nearest has its label."""

    def __post_init__(self) -> None:
        NeighbourSettings.__post_init__(self)
        IndexSettings.__post_init__(self)
        if not self.recall_at or min(self.recall_at) < 1:
            raise UserError(f"--recall-at must name numbers of at least 1, got {self.recall_at}")


@dataclass(frozen=True, kw_only=True)
class RetrievalCommand(FrozenFeatures, RetrievalConfig):
    """Retrieval by cosine similarity. Between images, the train split is the gallery and the test split asks."""

    mode: Literal["image-image", "image-text"] = "image-image"
    """image-image: images of the same label. image-text: images and their captions, both ways, within the test split;
    MODEL is a run of pretrain clip, open_clip:NAME/PRETRAINED or open_clip:FOLDER."""
    caption_field: str | None = None
    """Member or json field of the captions; default: txt, text, caption, captions."""
    caption_lines: bool = False
    """Every line of a text is a caption of its own."""

    def __post_init__(self) -> None:
        FrozenFeatures.__post_init__(self)
        RetrievalConfig.__post_init__(self)
        require_labels(self)
        if self.mode == "image-text" and self.index != "flat":
            raise UserError(f"--mode image-text searches exactly; --index {self.index} is for images")


def run(config: RetrievalCommand) -> None:
    """Load, rank, print a table and write the result."""
    between_images = config.mode == "image-image"
    result = evaluate(*open_both(config), config) if between_images else image_text.evaluate(config)
    rows = [[name, _shown(name, figure)] for name, figure in result.figures.items()]
    print_table(f"{result.task} {config.model}", ["figure", "value"], rows)
    save_at(result, config.output, config.model)


def _shown(name: str, figure: Figure) -> str:
    return f"{figure.value:.1f} [{figure.low:.1f}, {figure.high:.1f}]" if name.endswith("rank") else percent(figure)


def evaluate(backbone: Backbone, gallery: ShardSet, queries: ShardSet, config: RetrievalCommand) -> EvalResult:
    """Rank the gallery for every query, by every layer; with several, a figure's name starts with its layer.

    Raises:
        UserError: what reading or extracting refuses.
    """
    if same_samples(gallery, queries):
        config = replace(config, skip_self=True)
    both = extract_both(backbone, gallery, queries, config, config.device)
    answers = {layer: per_query(*parts, config) for layer, parts in both.items()}
    return frozen_result(
        backbone,
        gallery,
        queries,
        config,
        task=TASK,
        protocol=f"{PROTOCOL if config.index == 'flat' else f'{PROTOCOL}-{config.index}'}/{VERSION}",
        figures=figures_by_layer({layer: means(found, config.seed) for layer, found in answers.items()}),
        details={
            "recall_at": config.recall_at,
            "skip_self": config.skip_self,
            "layers": list(answers),
            **_index_details(config),
        },
        seed=config.seed,
        samples=figures_by_layer(answers),
    )


def _index_details(config: RetrievalConfig) -> dict[str, Any]:
    """The settings of the index as they were given; `None` is the default that the gallery's size decides."""
    settings = {f.name: getattr(config, f.name) for f in fields(IndexSettings)}
    if config.index == "flat":
        return {"index": "flat", "ties": "relevant images last"}
    return {"index": settings, "ties": "as the index returns them"}


def retrieval(gallery: Features, queries: Features, config: RetrievalConfig) -> Mapping[str, Figure]:
    """The means of what `per_query` finds, with intervals over the queries."""
    return means(per_query(gallery, queries, config), config.seed)


def means(answers: Samples, seed: int) -> dict[str, Figure]:
    """The mean of each over the queries that have an answer, those that are not NaN."""
    return {name: bootstrap(values[~np.isnan(values)], seed=seed) for name, values in answers.items()}


def per_query(gallery: Features, queries: Features, config: RetrievalConfig) -> Samples:
    """Recall at each k and average precision over the whole ranking, of each query (Q,).

    With an approximate index the ranking ends after its candidates. `map@1000` counts what is relevant but not among
    them as never found, and `index recall@k` says how much of the exact search the index finds.

    Queries without a relevant image are NaN. With several labels an image, one in common is enough.

    Raises:
        UserError: labels are missing or do not fit, the gallery is empty, features are not finite.
    """
    gallery_y, query_y = _labels(gallery, queries)
    require_same_keys(gallery, queries, config.skip_self)

    def relevance(asked: slice) -> Tensor:
        return share_label(query_y[asked], gallery_y)

    device, skip_self = pick_device(config.device), config.skip_self
    found_by_index: Samples = {}
    precision = "map"
    if config.index == "flat":
        ranking = exact_ranking(gallery.x, queries.x, relevance, device=device, skip_self=skip_self)
    else:
        for part in (gallery.x, queries.x):
            inverse_lengths(part, device)  # refuses what is not finite
        index = build_index(gallery.x, config, device=device, seed=config.seed)
        depth = min(max(config.candidates, *config.recall_at), len(gallery.x) - skip_self)
        precision = f"map@{depth}"
        candidates = index.search(queries.x, depth + skip_self)
        ranking = candidate_ranking(candidates, len(gallery.x), relevance, skip_self=skip_self)
        shares = recall_against_exact(index, gallery.x, queries.x, config.recall_at, device)
        found_by_index = {f"index recall@{k}": share.double().numpy() for k, share in shares.items()}
    asked = ranking.relevant > 0  # with skip_self a label may occur once only: such a query has no answer
    if not bool(asked.any()):
        raise UserError("no query has another image of its label in the gallery")
    answers = {f"recall@{k}": ranking.hits(k) for k in config.recall_at} | {precision: ranking.average_precision}
    return {
        **{name: values.double().where(asked, torch.nan).numpy() for name, values in answers.items()},
        **found_by_index,
    }


def share_label(query_y: Tensor, gallery_y: Tensor) -> Tensor:
    """Which gallery images have a label in common with each query, bool (Q, N).

    Labels are classes, (Q,) and (N,), or 1 for each that is present, (Q, C) and (N, C).
    """
    if gallery_y.ndim == 1:
        return query_y[:, None] == gallery_y
    return (query_y == 1).float() @ (gallery_y == 1).float().T > 0


def candidate_ranking(found: Tensor, count: int, relevance: Relevance, *, skip_self: bool = False) -> Ranking:
    """The ranking that an index's candidates make; what is not among them is never found.

    Args:
        found: positions in the gallery (Q, K), best first, -1 for none.
        count: the gallery's size N.
        relevance: asked for consecutive queries.
        skip_self: query i is gallery image i, which does not count.
    """
    precision, first, relevant = [], [], []
    rows = max(1, SIMILARITIES // count)
    for number, row in enumerate(found):
        if number % rows == 0:
            block = relevance(slice(number, min(number + rows, len(found))))
        mask = block[number % rows]
        if skip_self:
            mask[number] = False
            row = row[row != number]
        ranks = mask[row[row >= 0]].nonzero()[:, 0]
        total = int(mask.sum())
        precision.append(average_precision(ranks, total) if total else 0.0)
        first.append(int(ranks[0]) if len(ranks) else count)
        relevant.append(total)
    return Ranking(torch.tensor(precision, dtype=torch.float64), torch.tensor(first), torch.tensor(relevant))


def _labels(gallery: Features, queries: Features) -> tuple[Tensor, Tensor]:
    """Labels of both parts: classes (N,) numbered from 0, or several labels an image (N, C) as they are."""
    if gallery.y is None or queries.y is None or gallery.y.ndim == queries.y.ndim == 1:
        part = labelled(gallery, queries)
        return part.train_y, part.test_y
    fit = gallery.y.shape[1:] == queries.y.shape[1:] and gallery.x.shape[1:] == queries.x.shape[1:]
    if not fit or not len(gallery.x) or not len(queries.x):
        raise UserError(f"gallery {tuple(gallery.x.shape)} and queries {tuple(queries.x.shape)} do not fit")
    return gallery.y, queries.y
