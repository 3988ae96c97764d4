"""Retrieval: test images query the train images of their own label, or images and their captions one another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from convscope.core.backbone import Backbone
from convscope.core.data.shard_set import ShardSet
from convscope.core.distributed import pick_device
from convscope.core.errors import UserError
from convscope.core.results import EvalResult, Figure, bootstrap
from convscope.eval import image_text
from convscope.eval.common import (
    FrozenFeatures,
    extract_both,
    figures_by_layer,
    frozen_result,
    labelled,
    open_both,
    percent,
    print_table,
    require_same_keys,
    same_samples,
    save_frozen,
)
from convscope.eval.features import Features
from convscope.eval.neighbours import NeighbourSettings, neighbours

TASK = "retrieval"
PROTOCOL = "image-image/1"


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig(NeighbourSettings):
    """What is asked of the ranking."""

    recall_at: tuple[int, ...] = (1, 5, 10)
    """A query is a hit at k if one of its k nearest has its label."""

    def __post_init__(self) -> None:
        NeighbourSettings.__post_init__(self)
        if not self.recall_at or min(self.recall_at) < 1:
            raise UserError(f"--recall-at must name numbers of at least 1, got {self.recall_at}")


@dataclass(frozen=True, kw_only=True)
class RetrievalCommand(FrozenFeatures, RetrievalConfig):
    """Retrieval by cosine similarity, exact. Between images, the train split is the gallery and the test split asks."""

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


def run(config: RetrievalCommand) -> None:
    """Load, rank, print a table and write the result."""
    between_images = config.mode == "image-image"
    result = evaluate(*open_both(config), config) if between_images else image_text.evaluate(config)
    rows = [[name, _shown(name, figure)] for name, figure in result.figures.items()]
    print_table(f"{result.task} {config.model}", ["figure", "value"], rows)
    save_frozen(result, config)


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
    ranked = {layer: retrieval(*parts, config) for layer, parts in both.items()}
    return frozen_result(
        backbone,
        gallery,
        queries,
        config,
        task=TASK,
        protocol=PROTOCOL,
        figures=figures_by_layer(ranked),
        details={"recall_at": config.recall_at, "skip_self": config.skip_self, "layers": list(ranked)},
        seed=config.seed,
    )


def retrieval(gallery: Features, queries: Features, config: RetrievalConfig) -> Mapping[str, Figure]:
    """Recall at each k and mean average precision over the whole ranking; both with intervals over the queries.

    Raises:
        UserError: labels are missing or do not fit, or the gallery is empty.
    """
    part = labelled(gallery, queries)
    require_same_keys(gallery, queries, config.skip_self)
    available = len(part.train_x) - config.skip_self
    _, index = neighbours(
        part.train_x, part.test_x, available, device=pick_device(config.device), skip_self=config.skip_self
    )
    relevant = part.train_y[index] == part.test_y[:, None]  # (Q, N), best first
    asked = relevant.any(1)  # with skip_self a label may occur once only: such a query has no answer
    if not bool(asked.any()):
        raise UserError("no query has another image of its label in the gallery")
    figures = {
        f"recall@{k}": bootstrap(hits.numpy(), seed=config.seed)
        for k, hits in recalls(relevant[asked], config.recall_at).items()
    }
    figures["map"] = bootstrap(average_precision(relevant[asked]).numpy(), seed=config.seed)
    return figures


def recalls(relevant: Tensor, ks: Sequence[int]) -> dict[int, Tensor]:
    """Whether one of the first k is relevant, (Q,) for each k. relevant: (Q, N) bool, best first."""
    first = relevant.to(torch.uint8).argmax(1)
    return {k: relevant.any(1) & (first < k) for k in ks}


def average_precision(relevant: Tensor) -> Tensor:
    """Mean over the relevant places of the precision up to each, (Q,). relevant: (Q, N) bool, best first."""
    hits = relevant.double()
    precision = hits.cumsum(1) / torch.arange(1, relevant.shape[1] + 1, dtype=torch.float64)
    return (precision * hits).sum(1) / hits.sum(1)
