"""Copy detection: which of many images was this one made from?"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from convscope.core.backbone import Backbone
from convscope.core.data.shard_set import Sample, ShardSet, open_shards
from convscope.core.distributed import pick_device
from convscope.core.errors import UserError
from convscope.core.models import model_record
from convscope.core.options import require_at_least
from convscope.core.results import EvalResult, Figure, bootstrap
from convscope.eval.descriptors import (
    DescriptorCommand,
    Pooling,
    describe,
    report,
    settings_record,
    whitening_of,
)
from convscope.eval.pictures import PictureFiles, Pictures, ShardPictures, files_hash, find_pictures
from convscope.eval.ranking import relevant_places
from convscope.eval.revisited import trapezoid_precision

TASK = "copy-detection"
PROTOCOL = "copydays/1"


@dataclass(frozen=True, kw_only=True)
class CopyDetectionCommand(DescriptorCommand):
    """Copy detection as DINO measures it on Copydays: altered copies look for their originals among distractors.

    Folders: a copy belongs to the original of the same file name, or of the same first letters (--link-letters).
    Shards: a copy belongs to the original with the same value of --link; an image without one is a distractor.
    """

    queries: Path | None = None
    """Folder of copies; figures are also given for each folder in it."""
    gallery: Path | None = None
    """Folder of originals."""
    distractors: Path | None = None
    """Folder of images that are nobody's original."""
    link_letters: int | None = None
    """First letters of a file's name that a copy shares with its original (Copydays: 4); default: the whole stem."""
    data: str | None = None
    """Folder of shards, in place of folders of images."""
    query_split: str = "copies"
    gallery_split: str = "originals"
    link: str = "original"
    """Member or json field, a word or number, that a copy and its original share."""
    depth: int | None = 20
    """Images of the ranking that count, as in DINO's evaluation; None: all."""
    image_size: int = 320
    """Side of the square that images are made, in pixels."""
    pooling: Pooling = "gem"
    """How the last map becomes a vector; DINO's figures use cls+gem."""
    gem_power: float = 4.0
    """Exponent of generalized-mean pooling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        folders = [self.queries, self.gallery]
        if (self.data is None) != all(folders) or (self.data is not None and any([*folders, self.distractors])):
            raise UserError("name either --queries and --gallery (folders of images) or --data (shards)")
        require_at_least(self, 1, "link_letters", "depth")


@dataclass(frozen=True)
class Linked:
    """Pictures, and which original each belongs to."""

    pictures: Pictures
    links: list[str | None]  # None: a distractor
    groups: list[str]  # folder of each picture, "" where there is none
    names: list[str]
    fingerprint: str


def run(config: CopyDetectionCommand) -> None:
    """Load, describe, rank, print a table and write the result."""
    copies, originals = open_linked(config)
    result = evaluate(config.load(), copies, originals, config)
    report(result, config, result.figures)


def open_linked(config: CopyDetectionCommand) -> tuple[Linked, Linked]:
    """Copies and the gallery.

    Raises:
        UserError: no images, a copy without a link.
    """
    if config.data is not None:
        copies = _from_shards(open_shards(config.data, config.query_split), config.link)
        return copies, _from_shards(open_shards(config.data, config.gallery_split), config.link)
    assert config.queries is not None
    assert config.gallery is not None
    return (
        _from_folders(config.queries, None, config.link_letters),
        _from_folders(config.gallery, config.distractors, config.link_letters),
    )


def evaluate(backbone: Backbone, copies: Linked, originals: Linked, config: CopyDetectionCommand) -> EvalResult:
    """Describe both sides and rank.

    Raises:
        UserError: a copy without an original, an image that cannot be read.
    """
    require_originals(copies, originals)
    wanted = set(copies.links)

    def described(pictures: Pictures, label: str = "images for whitening") -> Tensor:
        return describe(backbone, pictures, config, fit="square", label=label)

    whitening = whitening_of(config, described) or (lambda x: F.normalize(x, dim=1))
    queries, gallery = described(copies.pictures, "copies"), described(originals.pictures, "gallery")
    precision = copy_precision(
        whitening(queries),
        whitening(gallery),
        copies.links,
        originals.links,
        depth=config.depth,
        device=pick_device(config.device),
    )
    return EvalResult(
        task=TASK,
        protocol=PROTOCOL,
        model=model_record(backbone),
        data={
            "source": config.data or str(config.gallery),
            "train": {"split": "gallery", "fingerprint": originals.fingerprint, "count": len(originals.links)},
            "test": {"split": "copies", "fingerprint": copies.fingerprint, "count": len(copies.links)},
            "distractors": sum(link not in wanted for link in originals.links),
        },
        preprocessing=settings_record(backbone, config, fit="square"),
        figures=_figures(precision, copies.groups, config.seed),
        details={
            "depth": config.depth,
            "whitening": None if config.whiten_images is None else str(config.whiten_images),
            "ties": "originals last",
        },
        seed=config.seed,
    )


def copy_precision(
    queries: Tensor,
    gallery: Tensor,
    query_links: Sequence[str | None],
    gallery_links: Sequence[str | None],
    *,
    depth: int | None,
    device: torch.device,
) -> Tensor:
    """Average precision (Q,), by trapezoids, of each copy's originals in the first `depth` of the ranking.

    Of equally similar images originals come last.

    Args:
        queries: (Q, D).
        gallery: (N, D).
        query_links: what each copy was made from.
        gallery_links: the same for the gallery; `None` for distractors.
        depth: images of the ranking that count, `None` for all.
        device: where it is computed.

    Raises:
        UserError: features are NaN or infinite.
    """
    number = {link: i for i, link in enumerate(dict.fromkeys(link for link in gallery_links if link is not None))}
    of_gallery = torch.tensor([-1 if link is None else number[link] for link in gallery_links])
    of_query = torch.tensor([-2 if link is None else number.get(link, -2) for link in query_links])

    def relevance(asked: slice) -> Tensor:
        return of_query[asked, None] == of_gallery

    found = []
    for ranks in relevant_places(gallery, queries, relevance, device=device):
        seen = ranks if depth is None else ranks[ranks < depth]
        found.append(trapezoid_precision(seen, max(1, len(ranks))))
    return torch.tensor(found, dtype=torch.float64)


def require_originals(copies: Linked, originals: Linked) -> None:
    """Raise a UserError where a copy has no original."""
    known = set(originals.links) - {None}
    if missing := [name for name, link in zip(copies.names, copies.links) if link not in known]:
        raise UserError(
            f"{len(missing)} of {len(copies.links)} copies, such as {missing[0]}, have no original in the gallery; "
            "see --link-letters and --link"
        )


def link_of(sample: Sample, field: str) -> str | None:
    """The value of a member or of a json field, as text; `None` where there is neither.

    Raises:
        UserError: a json member that cannot be read.
    """
    if isinstance(member := sample.get(field), bytes):
        return member.decode("utf-8", "replace").strip()
    if not isinstance(described := sample.get("json"), bytes):
        return None
    try:
        value = json.loads(described).get(field)
    except (ValueError, AttributeError) as error:
        raise UserError(f"sample {sample['__key__']!s}: its .json is no JSON object") from error
    return None if value is None else str(value)


def _figures(precision: Tensor, groups: Sequence[str], seed: int) -> dict[str, Figure]:
    """`map` over all copies, and `FOLDER map` for each folder of several."""
    figures = {"map": bootstrap(precision.numpy(), seed=seed)}
    names = sorted(set(groups))
    for name in names if len(names) > 1 else []:
        chosen = torch.tensor([group == name for group in groups])
        figures[f"{name or '.'} map"] = bootstrap(precision[chosen].numpy(), seed=seed)
    return figures


def _from_shards(shards: ShardSet, field: str) -> Linked:
    samples = [shards.without_image(i) for i in range(len(shards))]
    names = [str(sample["__key__"]) for sample in samples]
    links = [link_of(sample, field) for sample in samples]
    return Linked(ShardPictures(shards), links, [""] * len(links), names, shards.fingerprint)


def _from_folders(folder: Path, distractors: Path | None, letters: int | None) -> Linked:
    files = find_pictures(folder)
    more = [] if distractors is None else find_pictures(distractors)
    parents = [file.parent.relative_to(folder).as_posix() for file in files]
    return Linked(
        PictureFiles([*files, *more]),
        [*(file.stem[:letters] for file in files), *(None for _ in more)],
        ["" if parent == "." else parent for parent in parents],
        [str(file) for file in files],
        files_hash([*files, *more]),
    )
