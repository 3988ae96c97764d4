"""Image-text retrieval: images look for their captions, and captions for their image."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from convscope.core.data.shard_set import open_shards
from convscope.core.distributed import pick_device
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


def evaluate(config: "RetrievalCommand") -> EvalResult:
    """Recall at each k and the mean rank of the first right answer, both ways, over the test split.

    An image with several captions has found them when it has found one; ties count as what a random order would give
    on average.

    Raises:
        UserError: what loading or reading refuses; a sample without a caption.
    """
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
    figures = {
        f"{direction} {name}": figure
        for direction, ranks in (("image-to-text", to_text), ("text-to-image", to_image))
        for name, figure in _figures(ranks, config).items()
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


def _figures(ranks: Ranks, config: "RetrievalCommand") -> dict[str, Figure]:
    found = {f"recall@{k}": bootstrap(ranks.hits(k).numpy(), seed=config.seed) for k in config.recall_at}
    return found | {"mean rank": bootstrap(ranks.expected().double().numpy(), seed=config.seed)}
