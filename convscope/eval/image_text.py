"""Image-text retrieval: images look for their captions, and captions for their image."""

from dataclasses import asdict, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from convscope.core.data.shard_set import open_shards
from convscope.core.distributed import pick_device
from convscope.core.errors import UserError
from convscope.core.memory import keep_freed_memory
from convscope.core.pairs.captions import CaptionSource
from convscope.core.pairs.embed import embed_images, embed_texts, read_captions
from convscope.core.pairs.metrics import Ranks, rank_pairs
from convscope.core.pairs.pair import load_pair
from convscope.core.results import EvalResult, Figure, bootstrap

if TYPE_CHECKING:
    from convscope.eval.retrieval import RetrievalCommand

TASK = "image-text-retrieval"
PROTOCOL = "image-text/1"
WITHOUT_MEANING = ("layers", "pool", "arch", "model_args", "allow_partial", "train_split", "label", "skip_self")


def evaluate(config: "RetrievalCommand") -> EvalResult:
    """Recall at each k and the mean rank of the first right answer, both ways, over the test split.

    An image with several captions has found them when it has found one; ties count as what a random order would give
    on average. Intervals are over images, both ways: captions of one image are not independent.

    Raises:
        UserError: what loading or reading refuses; a sample without a caption; a setting of the other mode.
    """
    _require_own_settings(config)
    shards = open_shards(config.data, config.test_split)
    captions = read_captions(shards, CaptionSource(field=config.caption_field, lines=config.caption_lines))
    pair, record = load_pair(config.model)
    device, bf16 = pick_device(config.device), config.precision == "bf16"
    if device.type == "cpu":
        keep_freed_memory()
    pair.to(device)
    images = embed_images(pair, shards, batch_size=config.batch_size, workers=config.workers, bf16=bf16)
    texts = embed_texts(pair, captions.texts, bf16=bf16)
    to_text, to_image = rank_pairs(images, texts, captions.text, captions.image)
    everything = torch.arange(len(images))
    figures = {
        f"{direction} {name}": figure
        for direction, ranks, owner in (
            ("image-to-text", to_text, everything),
            ("text-to-image", to_image, captions.image),
        )
        for name, figure in _figures(ranks, owner, config).items()
    }
    return EvalResult(
        task=TASK,
        protocol=PROTOCOL,
        model=record,
        data={
            "source": shards.source,
            "test": {"split": shards.split, "fingerprint": shards.fingerprint, "count": len(shards)},
            "captions": len(captions.text),
            "different captions": len(captions.texts),
        },
        preprocessing=asdict(pair.preprocessing),
        figures=figures,
        details={"recall_at": config.recall_at, "ties": "expected over random orders", "precision": config.precision},
        seed=config.seed,
    )


def _require_own_settings(config: "RetrievalCommand") -> None:
    for field in fields(config):
        if field.name in WITHOUT_MEANING and getattr(config, field.name) != field.default:
            raise UserError(f"--{field.name.replace('_', '-')} has no meaning for --mode image-text: leave it out")


def _figures(ranks: Ranks, owner: Tensor, config: "RetrievalCommand") -> dict[str, Figure]:
    measured = {f"recall@{k}": ranks.hits(k) for k in config.recall_at} | {"mean rank": ranks.expected()}
    return {name: over_images(values.double(), owner, config.seed) for name, values in measured.items()}


def over_images(values: Tensor, owner: Tensor, seed: int) -> Figure:
    """Mean over queries, with an interval from resampling images with all their queries.

    Args:
        values: of each query (Q,).
        owner: the image of each, from 0 on; every image has one (Q,).
        seed: of the resampling.
    """
    count = torch.bincount(owner)
    if int(count.max()) == 1:
        return bootstrap(values.numpy(), seed=seed)
    total = torch.zeros(len(count), dtype=values.dtype).index_add_(0, owner, values)
    rows = torch.stack([total, count.to(values.dtype)], 1).numpy()
    return bootstrap(rows, lambda drawn: float(drawn[:, 0].sum() / drawn[:, 1].sum()), seed=seed)
